"""The integer rule of each primitive.

A rule takes the operands of an equation and returns its results. An operand is a
`Fixed`, an array of plain integers or bools (labels, indices, masks), or a NumPy array
of floats that is known when the program is built. What lies between products has 16
bits on a grid whose scale is a power of two, so that most changes of grid are shifts.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from fgrad.integer import arithmetic, products, tables
from fgrad.integer.calibration import PRODUCTS, Observed
from fgrad.integer.ranges import (
    FINE,
    MIDDLE,
    ConversionError,
    Fixed,
    clip,
    fixed,
    limit_of,
    prove,
    rescale,
)
from fgrad.tracing import primitives
from fgrad.tracing.graph import Node

_LIBRARY = os.path.dirname(os.path.dirname(__file__)) + os.sep
# The scale of what is zero on all of the calibration data.
_ZERO_SCALE = 2.0**-12


@dataclasses.dataclass(frozen=True)
class Grids:
    """Which grid a value lies on.

    Attributes:
      observed: the extremes of the values.
      bits: width of the activations that enter products, up to 8.
      headroom: activations may grow to this multiple of what calibration saw.
    """

    observed: Observed
    bits: int
    headroom: float

    def magnitude(self, value: int) -> float:
        """The largest magnitude to be represented."""
        return self.headroom * max(map(abs, self.observed.values[value]))

    def scale(self, value: int, bits: int = MIDDLE) -> float:
        """The grid of a value: a power of two above 8 bits."""
        return scale_for(self.magnitude(value), bits)

    def narrow(self, x: Fixed, value: int | None) -> Fixed:
        """An activation as it enters a product, in 8 bits."""
        bound = x.scale * x.magnitude
        if value is not None and value in self.observed.values:
            bound = min(bound, self.magnitude(value))
            if value in self.observed.bounds:
                bound = min(bound, self.headroom * self.observed.bounds[value])
        return rescale(x, scale_for(bound, self.bits), self.bits)

    def inside(self, node: Node) -> Grids:
        """The grids of the body of a scan."""
        return dataclasses.replace(self, observed=self.observed.bodies[node.outputs[0]])


def scale_for(magnitude: float, bits: int) -> float:
    """The scale by which ``|value| <= magnitude`` has a width."""
    if magnitude == 0:
        return _ZERO_SCALE
    scale = magnitude / limit_of(bits)
    return scale if bits <= 8 else 2.0 ** math.ceil(math.log2(scale))


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
# These know what to do with a scale for each channel.
OF_CHANNELS = frozenset(
    {
        *PRODUCTS,
        *("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim"),
        *("slice", "rev", "copy", "copy_p", "stop_gradient", "optimization_barrier"),
        *("convert_element_type", "reduce_precision", "gather"),
    }
)


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def is_constant(x: Any) -> bool:
    """Whether an operand is floats that are known when the program is built."""
    return isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.floating)


def as_fixed(x: Any, bits: int = MIDDLE) -> Fixed:
    """A constant on a grid of its own; a `Fixed` as it is."""
    if isinstance(x, Fixed):
        return x
    if not is_constant(x):  # integers that stand for themselves
        x = jnp.asarray(x)
        low, high = jnp.iinfo(jnp.int16).min, jnp.iinfo(jnp.int16).max
        if x.dtype == bool:
            low, high = 0, 1
        return fixed(jnp.clip(x.astype(jnp.int32), low, high), 1.0, low, high)
    return on_grid(x, scale_for(float(np.max(np.abs(x), initial=0)), bits))


def on_grid(x: np.ndarray, scale: float) -> Fixed:
    """A constant rounded to a grid; infinities become the ends of 24 bits.

    Raises:
      ConversionError: if it holds NaN.
    """
    if np.any(np.isnan(x)):
        raise ConversionError("a constant is NaN, which no integer stands for.")
    limit = limit_of(FINE)
    q = np.clip(np.rint(np.asarray(x, np.float64) / scale), -limit, limit)
    low, high = int(q.min(initial=0)), int(q.max(initial=0))
    return fixed(jnp.asarray(q.astype(np.int32)), scale, low, high)


def with_one_scale(x: Any) -> Any:
    """A value without scales of its own for channels: 16 bits hold all of them."""
    if not isinstance(x, Fixed) or x.channels is None:
        return x
    scale = scale_for(x.scale * x.magnitude, MIDDLE)
    found = rescale(x, scale, MIDDLE)
    return found.replace(q=found.q.astype(jnp.int16), weight=x.weight)


def aligned(x: Any, scale: float, bits: int = MIDDLE) -> Fixed:
    """An operand on a given grid."""
    return on_grid(x, scale) if is_constant(x) else rescale(as_fixed(x), scale, bits)


def _precision(operands: Sequence[Any]) -> int:
    """The width of a result: that of the least precise operand."""
    return min((x.bits for x in operands if isinstance(x, Fixed)), default=MIDDLE)


def _settled(grids: Grids, node: Node, x: Fixed, bits: int) -> Fixed:
    """A result on the grid of its value, unless it needs no more than its own."""
    scale = grids.scale(node.outputs[0], bits)
    same = x.channels is None and x.scale == scale
    if same and x.magnitude <= limit_of(bits):
        return x.replace(bits=bits)
    return rescale(x, scale, bits).replace(bits=bits)


# ------------------------------------------------------------- shapes and order


@_rule(
    "reshape",
    "transpose",
    "squeeze",
    "expand_dims",
    "broadcast_in_dim",
    "slice",
    "rev",
    "copy",
    "copy_p",
    "reduce_min",
    "reduce_precision",
    "reduce_window_max",
    "reduce_window_min",
    "optimization_barrier",
    "stop_gradient",
    "tile",
    "cummax",
    "cummin",
)
def _unchanged(grids: Grids, node: Node, x: Fixed) -> Fixed:
    del grids
    channels = None
    if x.channels is not None:
        with jax.ensure_compile_time_eval():
            every = node.evaluate([np.broadcast_to(x.channels, x.q.shape)])[0]
            channels = _compact(every)
    return x.replace(q=_integers(node, x.q), channels=channels)


@_rule("reduce_max")
def _largest(grids: Grids, node: Node, x: Fixed) -> Fixed:
    if tuple(node.equation.params["axes"]) == (x.q.ndim - 1,):
        return x.replace(q=arithmetic.max_of_rows(x.q))
    found: Fixed = _unchanged(grids, node, x)
    return found


def _compact(x: Any) -> np.ndarray:
    """An array that broadcasts to another, without the axes along which it is equal."""
    array = np.asarray(x, np.float64)
    for axis in range(array.ndim):
        first = array.take([0], axis)
        if np.all(array == first):
            array = first
    return array


@_rule("split")
def _split(grids: Grids, node: Node, x: Fixed) -> list[Fixed]:
    del grids
    return [x.replace(q=part) for part in node.evaluate([x.q])]


@_rule("gather", "dynamic_slice")
def _read(grids: Grids, node: Node, x: Fixed, *indices: Any) -> Fixed:
    del grids
    if not isinstance(x, Fixed) or any(isinstance(i, Fixed) for i in indices):
        raise ConversionError(
            f"{node.name} reads at places that are not integers; compute them from "
            "integer arguments."
        )
    channels = None
    if x.channels is not None and node.name == "gather":
        channels = _channels_read(node, x.channels)
    if channels is None:
        x = with_one_scale(x)
    q = _integers(node, x.q, *indices)
    return x.replace(q=q, weight=False, channels=channels)


def _channels_read(node: Node, channels: np.ndarray) -> np.ndarray | None:
    """Scales of what a gather reads, if each read has those of all channels."""
    numbers = node.equation.params["dimension_numbers"]
    hidden = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [a for a in range(channels.ndim) if a not in hidden]
    varying = [a for a, n in enumerate(channels.shape) if n > 1]
    if not set(varying) <= set(kept) - set(numbers.start_index_map):
        return None
    shape = [1] * len(_shape_of(node))
    for axis in varying:
        shape[numbers.offset_dims[kept.index(axis)]] = channels.shape[axis]
    return channels.reshape(shape)


@_rule("argmax", "argmin")
def _position(grids: Grids, node: Node, x: Fixed) -> jax.Array:
    del grids
    position: jax.Array = node.evaluate([x.wide])[0]
    return position


@_rule("concatenate", "stack")
def _concatenate(grids: Grids, node: Node, *parts: Any) -> Fixed:
    bits = _precision(parts)
    scale = grids.scale(node.outputs[0], bits)
    return _joined(node, [aligned(x, scale, bits) for x in parts], bits)


@_rule("select_n")
def _select(grids: Grids, node: Node, which: Any, *cases: Any) -> Fixed:
    bits = _precision(cases)
    if isinstance(which, np.ndarray) and which.size and np.all(which == which.flat[0]):
        chosen = as_fixed(cases[int(which.flat[0])], bits)  # the other may be NaN
        return chosen.replace(q=jnp.broadcast_to(chosen.q, _shape_of(node)))
    scale = grids.scale(node.outputs[0], bits)
    parts = [aligned(x, scale, bits) for x in cases]
    return _joined(node, parts, bits, before=[which])


@_rule("pad")
def _pad(grids: Grids, node: Node, x: Any, padding: Any) -> Fixed:
    x = as_fixed(x)
    return _joined(node, [x, aligned(padding, x.scale, x.bits)], x.bits)


@_rule("dynamic_update_slice")
def _write(grids: Grids, node: Node, x: Any, update: Any, *indices: Any) -> Fixed:
    bits = _precision([x, update])
    scale = grids.scale(node.outputs[0], bits)
    parts = [aligned(x, scale, bits), aligned(update, scale, bits)]
    return _joined(node, parts, bits, after=indices)


def _joined(
    node: Node,
    parts: Sequence[Fixed],
    bits: int,
    before: Sequence[Any] = (),
    after: Sequence[Any] = (),
) -> Fixed:
    """An equation that moves values of one grid side by side."""
    low, high = min(x.low for x in parts), max(x.high for x in parts)
    widest = max((x.q.dtype for x in parts), key=lambda dtype: dtype.itemsize)
    arrays = [x.q.astype(widest) for x in parts]
    q = _integers(node, *before, *arrays, *after)
    return Fixed(q, parts[0].scale, low, high, bits)


def _integers(node: Node, *arrays: jax.Array) -> jax.Array:
    """The equation on integers, without the types that it had for floats."""
    primitive, params = node.equation.primitive, dict(node.equation.params)
    if node.name == "reduce_precision":
        return arrays[0]
    if "fill_value" in params:
        params["fill_value"] = None if params["fill_value"] is None else 0
    with primitives.settings(node.equation):
        results = primitive.bind(*arrays, **primitive.get_bind_params(params))
    result: jax.Array = results[0] if primitive.multiple_results else results
    return result


# ------------------------------------------------------------------- arithmetic


@_rule("add", "add_any", "sub")
def _add(grids: Grids, node: Node, a: Any, b: Any) -> Fixed:
    sign = -1 if node.name == "sub" else 1
    bits = _precision([a, b])
    scale = grids.scale(node.outputs[0], bits)
    x, y = aligned(a, scale, bits), aligned(b, scale, bits)
    edges = sorted((sign * y.low, sign * y.high))
    low, high = x.low + edges[0], x.high + edges[1]
    total = Fixed(x.wide + sign * y.wide, scale, low, high)
    limit = limit_of(bits)
    total = clip(total, -limit, limit)
    return fixed(total.wide, scale, total.low, total.high, bits)


@_rule("mul")
def _multiply(grids: Grids, node: Node, a: Any, b: Any) -> Fixed:
    if is_constant(a):
        a, b = b, a
    if is_constant(b) and (factor := _uniform(b)) is not None:
        return _times(as_fixed(a), factor, node)
    return _product(grids, node, as_fixed(a), as_fixed(b))


def _product(grids: Grids, node: Node, a: Fixed, b: Fixed) -> Fixed:
    bits, is_square = _precision([a, b]), a.q is b.q
    a, b = (_at_most(x, MIDDLE) for x in (a, b))
    corners = [p * q for p in (a.low, a.high) for q in (b.low, b.high)]
    low, high = min(corners), max(corners)
    if is_square:  # a variance must be fine where it is small
        low, bits, b = 0, FINE, a
    prove(low, high, "a product")
    product = Fixed(a.wide * b.wide, a.scale * b.scale, low, high)
    return _settled(grids, node, product, bits)


def _times(x: Fixed, factor: float, node: Node) -> Fixed:
    """A product with a number: another scale for the same integers."""
    q = x.q
    shape = _shape_of(node)
    if factor == 0:
        return fixed(jnp.zeros(shape, jnp.int32), _ZERO_SCALE, 0, 0, x.bits)
    if q.shape != shape:
        q = jnp.broadcast_to(q, shape)
    if factor > 0:
        return x.replace(q=q, scale=x.scale * factor)
    negative = fixed(-q.astype(jnp.int32), x.scale, -x.high, -x.low, x.bits)
    return negative.replace(scale=x.scale * -factor, weight=x.weight)


def _shape_of(node: Node) -> tuple[int, ...]:
    """The shape of what an equation makes."""
    aval: Any = node.equation.outvars[0].aval
    return tuple(aval.shape)


def _uniform(x: np.ndarray) -> float | None:
    """The number that fills an array, if there is one."""
    if x.size == 0:
        return None
    first = float(x.reshape(-1)[0])
    return first if np.all(x == first) and math.isfinite(first) else None


def _at_most(x: Fixed, bits: int) -> Fixed:
    """A value in no more than a width, at no cost if it has no more."""
    if x.magnitude <= limit_of(bits):
        return x
    scale = x.scale * 2.0 ** math.ceil(math.log2(x.magnitude / limit_of(bits)))
    return rescale(x, scale, bits)


@_rule("div")
def _divide(grids: Grids, node: Node, a: Any, b: Any) -> Fixed:
    if is_constant(b):
        if (divisor := _uniform(b)) is not None and divisor != 0:
            return _times(as_fixed(a), 1 / divisor, node)
        return _product(grids, node, as_fixed(a), as_fixed(1 / b))
    x, y = _at_most(as_fixed(a), MIDDLE), _at_most(as_fixed(b), MIDDLE)
    bound = (x.magnitude << (MIDDLE - 1)) + y.magnitude // 2 + 1
    prove(-bound, bound, "a dividend")
    # A divisor that rounds to zero is taken as the least that there is.
    divisor = jnp.maximum(jnp.abs(y.wide), 1)
    dividend = x.wide if y.low >= 0 else x.wide * jnp.where(y.wide < 0, -1, 1)
    if divisor.size < dividend.size:
        q = _by_reciprocal(dividend, divisor)
    else:  # rounded to nearest: |2**15 x| + |y| / 2 is below 2**31
        half = divisor >> 1
        dividend = dividend << (MIDDLE - 1)
        q = lax.div(dividend + jnp.where(dividend < 0, -half, half), divisor)
    low = 0 if x.low >= 0 and y.low >= 0 else -bound
    quotient = Fixed(q, x.scale / y.scale / 2 ** (MIDDLE - 1), low, bound)
    return _settled(grids, node, quotient, _precision([a, b]))


def _by_reciprocal(dividend: jax.Array, divisor: jax.Array) -> jax.Array:
    """``2**15 dividend / divisor`` with one division for each divisor.

    The reciprocal has 15 bits, so that the result has a relative error of 2**-15.

    Args:
      dividend: int32 array of up to 16 bits.
      divisor: int32 array, 1 to 32767, of fewer elements.
    """
    digits = 32 - lax.clz(divisor)
    normal = jnp.left_shift(divisor, 15 - digits)  # 2**14 to 2**15
    reciprocal = lax.div((1 << 29) + (normal >> 1), normal)
    half = jnp.left_shift(1, digits - 1) >> 1
    return (dividend * reciprocal + half) >> (digits - 1)


@_rule("neg")
def _negative(grids: Grids, node: Node, x: Fixed) -> Fixed:
    return _times(x, -1.0, node)


@_rule("abs")
def _absolute(grids: Grids, node: Node, x: Fixed) -> Fixed:
    low = max(0, x.low, -x.high)
    return fixed(jnp.abs(x.wide), x.scale, low, x.magnitude, x.bits)


@_rule("sign")
def _sign(grids: Grids, node: Node, x: Fixed) -> Fixed:
    return fixed(jnp.sign(x.wide), 1.0, -1, 1)


@_rule("square")
def _square(grids: Grids, node: Node, x: Fixed) -> Fixed:
    return _product(grids, node, x, x)


@_rule("integer_pow")
def _integer_power(grids: Grids, node: Node, x: Fixed) -> Fixed:
    power = node.equation.params["y"]
    if power == 2:
        return _product(grids, node, x, x)
    return _tabulated(grids, node, x, lambda v: _finite(v**power))


@_rule("max", "min")
def _extreme(grids: Grids, node: Node, a: Any, b: Any) -> Fixed:
    choose, among = (jnp.maximum, max) if node.name == "max" else (jnp.minimum, min)
    if is_constant(a):
        a, b = b, a
    bits = _precision([a, b])
    x = as_fixed(a)
    if not is_constant(b):
        scale = grids.scale(node.outputs[0], bits)
        x, y = aligned(x, scale, bits), aligned(b, scale, bits)
    else:
        y = on_grid(b, x.scale)
    low, high = among(x.low, y.low), among(x.high, y.high)
    return fixed(choose(x.wide, y.wide), x.scale, low, high, bits)


@_rule("clamp")
def _clamp(grids: Grids, node: Node, low: Any, x: Any, high: Any) -> Fixed:
    x = as_fixed(x)
    least, most = (aligned(v, x.scale, FINE) for v in (low, high))
    q = jnp.minimum(jnp.maximum(x.wide, least.wide), most.wide)
    bounds = [min(max(v, least.low), most.high) for v in (x.low, x.high)]
    return fixed(q, x.scale, min(*bounds, most.low), max(*bounds, least.high), x.bits)


@_rule("eq", "ne", "lt", "le", "gt", "ge")
def _compare(grids: Grids, node: Node, a: Any, b: Any) -> jax.Array:
    x: Any = a if is_constant(a) else as_fixed(a)
    y: Any = b if is_constant(b) else as_fixed(b)
    if is_constant(y):
        y = on_grid(y, x.scale)
    elif is_constant(x):
        x = on_grid(x, y.scale)
    else:
        finer = min(x.scale, y.scale)
        # 24 bits of the larger one, so that neither saturates.
        scale = max(finer, max(v.scale * v.magnitude for v in (x, y)) / 2**22)
        x, y = rescale(x, scale, FINE), rescale(y, scale, FINE)
    equation = node.equation
    truth: jax.Array = equation.primitive.bind(x.wide, y.wide, **equation.params)
    return truth


@_rule("is_finite")
def _always(grids: Grids, node: Node, x: Fixed) -> jax.Array:
    return jnp.ones(x.q.shape, bool)


@_rule("convert_element_type")
def _convert(grids: Grids, node: Node, x: Any) -> Any:
    dtype = node.equation.params["new_dtype"]
    if isinstance(x, Fixed):
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ConversionError(
                f"a real number becomes {dtype} here, which has no integer rule: "
                "compute integers from integer arguments."
            )
        return x
    scale = grids.scale(node.outputs[0])
    return rescale(as_fixed(x), min(scale, 1.0))


# --------------------------------------------------------------- sums and windows


@_rule("reduce_sum", "reduce_window_sum", "cumsum")
def _sum(grids: Grids, node: Node, x: Fixed) -> Fixed:
    params = node.equation.params
    if node.name == "reduce_sum":
        count = math.prod(x.q.shape[axis] for axis in params["axes"])
    elif node.name == "cumsum":
        count = x.q.shape[params["axis"]]
    else:
        count = math.prod(params["window_dimensions"])
    x = _at_most(x, min(FINE, 31 - math.ceil(math.log2(max(count, 1)))))
    low, high = min(0, count * x.low), max(0, count * x.high)
    if node.name == "reduce_sum" and count:
        low, high = count * x.low, count * x.high
    prove(low, high, f"a sum of {count} values")
    total = Fixed(_integers(node, x.wide), x.scale, low, high)
    return _settled(grids, node, total, FINE)


# ------------------------------------------------------------ elementwise functions


def _tabulated(
    grids: Grids, node: Node, x: Any, function: Callable[[np.ndarray], np.ndarray]
) -> Fixed:
    """A function by a table over the values that calibration saw."""
    value = node.inputs[0]
    low, high = grids.observed.values[value] if isinstance(value, int) else (0.0, 0.0)
    span = (grids.headroom - 1) * max(abs(low), abs(high))
    out = grids.scale(node.outputs[0])
    x = _at_most(as_fixed(x), MIDDLE)
    return tables.apply(x, function, low - span, high + span, out)


def _finite(x: np.ndarray) -> np.ndarray:
    finite: np.ndarray = np.nan_to_num(x)
    return finite


def _register_tables() -> None:
    for name, function in tables.FUNCTIONS.items():

        def rule(grids: Grids, node: Node, x: Any, function: Any = function) -> Fixed:
            return _tabulated(grids, node, x, function)

        RULES[name] = rule


_register_tables()


@_rule("exp", "exp2")
def _exponential(grids: Grids, node: Node, x: Fixed) -> Fixed:
    base = math.log2(math.e) if node.name == "exp" else 1.0
    return tables.exponential(x, base, grids.scale(node.outputs[0]))


@_rule("log")
def _logarithm(grids: Grids, node: Node, x: Fixed) -> Fixed:
    return _settled(grids, node, tables.logarithm(x), _precision([x]))


@_rule("rsqrt", "sqrt")
def _root(grids: Grids, node: Node, x: Fixed) -> Fixed:
    exponent = -0.5 if node.name == "rsqrt" else 0.5
    return tables.power(x, exponent, grids.scale(node.outputs[0]))


@_rule("pow")
def _power(grids: Grids, node: Node, x: Any, y: Any) -> Fixed:
    if not is_constant(y) or (exponent := _uniform(y)) is None:
        raise ConversionError(
            "a power whose exponent is computed has no integer rule; use a constant."
        )
    with np.errstate(all="ignore"):
        return _tabulated(grids, node, x, lambda v: _finite(np.power(v, exponent)))


# ------------------------------------------------------------------------- products


@_rule(*PRODUCTS)
def _linear(grids: Grids, node: Node, lhs: Any, rhs: Any) -> Fixed:
    return linear(grids, node, *factors(grids, node, lhs, rhs))


def factors(grids: Grids, node: Node, lhs: Any, rhs: Any) -> tuple[Fixed, Fixed]:
    """The operands of a dot or convolution as it multiplies them."""
    operands = [as_fixed(x) for x in (lhs, rhs)]
    if operands[0].weight and operands[1].weight:
        operands[0] = operands[0].replace(weight=False)
    for place, x in enumerate(operands):
        if not x.weight or products.sums_over_channels(node, place, x):
            operands[place] = with_one_scale(x)
    first, second = (
        x if x.weight else grids.narrow(x, n if isinstance(n, int) else None)
        for x, n in zip(operands, node.inputs, strict=True)
    )
    return first, second


def linear(grids: Grids, node: Node, lhs: Fixed, rhs: Fixed) -> Fixed:
    """A dot or convolution of such operands."""
    return _settled(grids, node, products.product(node, lhs, rhs), MIDDLE)


def unsupported(node: Node) -> ConversionError:
    """The error for a primitive that has no rule."""
    remedy = REMEDIES.get(
        node.name,
        "an operation that is not known here; write it by other ones, or compute it "
        "before the program",
    )
    return ConversionError(
        f"the primitive {node.name!r} has no integer rule "
        f"({source_of(node.equation)}): it is "
        f"{remedy}."
    )


# What an operation without a rule is, and what to do about it.
REMEDIES = {
    "while": "a loop whose end depends on data; use lax.scan, or lax.fori_loop with "
    "Python integers as bounds",
    "cond": "a branch; compute both sides and choose by jnp.where",
    "sort": "an order; leave it out of the program and sort what it returns",
    "top_k": "an order; leave it out of the program and sort what it returns",
    "random_bits": "random numbers; pass them as an argument, or turn dropout off",
    "fft": "a Fourier transform; write it as a product with its matrix",
}


def source_of(equation: core.JaxprEqn) -> str:
    """Where the user's code computes an equation: file, line and function."""
    traceback: Any = equation.source_info.traceback
    frames: Any = traceback.frames if traceback is not None else ()
    for frame in frames:
        name: str = frame.file_name
        if not name.startswith((_LIBRARY, "<")) and "site-packages" not in name:
            return f"{name}:{frame.line_num}, in {frame.function_name}"
    layer = str(equation.source_info.name_stack)
    return f"in {layer}" if layer else "inside a function of a library"
