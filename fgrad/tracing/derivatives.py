"""Derivatives of traced equations in closed form, without differentiating a program.

`slope` gives the derivative of a function that acts on each value by itself, such as
GELU. `transposed` takes the gradient at a value near the loss back to one before it,
through products, sums and elementwise functions; rounding to a grid counts as the
identity. Both read one table, `PARTIALS`, of derivatives of elementwise primitives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fgrad.tracing import graph, roundings
from fgrad.tracing.graph import Graph, Node

# partials(operands, output, parameters) -> the derivative by each operand; None where
# it is zero everywhere.
_Partials = Callable[[Sequence[Any], Any, Mapping[str, Any]], Sequence[Any]]


def _of_one(function: Callable[[Any, Any], Any]) -> _Partials:
    """The rule of a function of one operand: ``function(x, y)`` is dy/dx."""
    return lambda operands, output, parameters: [function(operands[0], output)]


def _pow(operands: Sequence[Any], output: Any, parameters: Any) -> Sequence[Any]:
    x, exponent = operands
    by_exponent = jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), 0) * output
    return [exponent * x ** (exponent - 1), by_exponent]


def _integer_pow(
    operands: Sequence[Any], output: Any, parameters: Mapping[str, Any]
) -> Sequence[Any]:
    power = parameters["y"]
    return [power * lax.integer_pow(operands[0], power - 1) if power else None]


def _larger(operands: Sequence[Any], output: Any, parameters: Any) -> Sequence[Any]:
    x, y = operands
    return [_as_float(x > y, output), _as_float(y > x, output)]


def _smaller(operands: Sequence[Any], output: Any, parameters: Any) -> Sequence[Any]:
    x, y = operands
    return [_as_float(x < y, output), _as_float(y < x, output)]


def _select(operands: Sequence[Any], output: Any, parameters: Any) -> Sequence[Any]:
    which, *cases = operands
    return [None, *(_as_float(which == i, output) for i in range(len(cases)))]


def _clamp(operands: Sequence[Any], output: Any, parameters: Any) -> Sequence[Any]:
    low, x, high = operands
    return [None, _as_float((x > low) & (x < high), output), None]


def _as_float(condition: Any, like: Any) -> Any:
    return condition.astype(jnp.result_type(like))


# Where a function has a kink, the derivative is the smaller one in size: that of
# max(x, 0) at 0 is 0, as that of `jax.nn.relu`.
PARTIALS: dict[str, _Partials] = {
    "add": lambda operands, output, parameters: [1, 1],
    "add_any": lambda operands, output, parameters: [1, 1],
    "sub": lambda operands, output, parameters: [1, -1],
    "mul": lambda operands, output, parameters: [operands[1], operands[0]],
    "div": lambda operands, output, parameters: [
        1 / operands[1],
        -output / operands[1],
    ],
    "neg": _of_one(lambda x, y: -1),
    "copy": _of_one(lambda x, y: 1),
    "copy_p": _of_one(lambda x, y: 1),
    "convert_element_type": _of_one(lambda x, y: 1),
    "max": _larger,
    "min": _smaller,
    "clamp": _clamp,
    "select_n": _select,
    "pow": _pow,
    "integer_pow": _integer_pow,
    "square": _of_one(lambda x, y: 2 * x),
    "sqrt": _of_one(lambda x, y: 0.5 / y),
    "rsqrt": _of_one(lambda x, y: -0.5 * y / x),
    "cbrt": _of_one(lambda x, y: y / (3 * x)),
    "abs": _of_one(lambda x, y: jnp.sign(x)),
    "exp": _of_one(lambda x, y: y),
    "exp2": _of_one(lambda x, y: math.log(2) * y),
    "expm1": _of_one(lambda x, y: y + 1),
    "log": _of_one(lambda x, y: 1 / x),
    "log1p": _of_one(lambda x, y: 1 / (1 + x)),
    "logistic": _of_one(lambda x, y: y * (1 - y)),
    "tanh": _of_one(lambda x, y: 1 - y * y),
    "sin": _of_one(lambda x, y: jnp.cos(x)),
    "cos": _of_one(lambda x, y: -jnp.sin(x)),
    "erf": _of_one(lambda x, y: 2 / math.sqrt(math.pi) * jnp.exp(-x * x)),
    "erfc": _of_one(lambda x, y: -2 / math.sqrt(math.pi) * jnp.exp(-x * x)),
}
# Primitives whose derivative is zero wherever there is one.
_FLAT = frozenset(
    {
        *("eq", "ge", "gt", "le", "lt", "ne", "is_finite", "and", "or", "not"),
        *("ceil", "floor", "round", "sign", "argmax", "argmin", "stop_gradient"),
    }
)
# Elementwise functions that are no straight line.
_CURVED = frozenset(PARTIALS) - {
    *("add", "add_any", "sub", "mul", "div", "neg", "copy", "copy_p"),
    "convert_element_type",
}


def is_curved(node: Node, inputs: Collection[int]) -> bool:
    """Whether an elementwise equation is no straight line in these of its operands."""
    several = sum(isinstance(x, int) and x in inputs for x in node.inputs) > 1
    return node.name in _CURVED or (node.name in ("mul", "div") and several)


def has_slope(node: Node) -> bool:
    """Whether `slope` goes through an equation."""
    return node.name in PARTIALS or node.name in _FLAT


def is_flat(node: Node) -> bool:
    """Whether the derivative of an equation is zero wherever there is one."""
    return node.name in _FLAT


def slope(
    nodes: Iterable[Node], start: int, end: int, values: Mapping[int, Any]
) -> jax.Array:
    """The derivative of one value by another, of which it is a function elementwise.

    Args:
      nodes: the equations from one to the other, all with `has_slope`.
      start: number of the value to differentiate by.
      end: number of the function's value, in the same shape.
      values: of an evaluation, by number.

    Returns:
      The derivative, in the shape of the two.

    Example:
      >>> program = graph.trace(jax.nn.silu, jnp.ones(2))
      >>> values = graph.evaluate(program.nodes, {program.inputs[0]: jnp.zeros(2)})
      >>> slope(program.nodes, program.inputs[0], program.outputs[0], values)
      Array([0.5, 0.5], dtype=float32)
    """
    found: dict[int, Any] = {start: 1}
    for node in nodes:
        if node.name in _FLAT:
            continue
        tangent = _elementwise(node, _operands(node, values), values, found)
        if tangent is not None:
            found[node.outputs[0]] = tangent
    value = values[end]
    return jnp.broadcast_to(
        jnp.asarray(found.get(end, 0), jnp.result_type(value)), jnp.shape(value)
    )


def transposed(
    program: Graph,
    starts: Sequence[int],
    end: int,
    values: Mapping[int, Any],
    dy: jax.Array,
) -> list[jax.Array]:
    """The gradients at some values from the gradient at a later one.

    What lies between the two is made linear, equation by equation, and transposed. The
    rounding of activations to integers counts as the identity, and a product of
    integers as one of their values.

    Args:
      program: a traced function.
      starts: numbers of the earlier values, float arrays.
      end: number of the later one.
      values: of an evaluation, by number.
      dy: the gradient at the later value, in its shape.

    Returns:
      The gradient by each earlier value of what it does to the later one.

    Raises:
      ValueError: for an equation between the two that has no closed form here.

    Example:
      >>> program = graph.trace(lambda x, w: jnp.tanh(x) @ w, jnp.ones(2), jnp.eye(2))
      >>> x, w = program.inputs
      >>> given = {x: jnp.zeros(2), w: jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> values = graph.evaluate(program.nodes, given)
      >>> transposed(program, [x], program.outputs[0], values, jnp.array([1.0, 0.0]))
      [Array([1., 3.], dtype=float32)]
    """
    nodes = between(program, starts, end)
    limits = roundings.limits(program.nodes)

    def linear(*tangents: jax.Array) -> jax.Array:
        own = dict(zip(starts, tangents, strict=True))
        found: dict[int, Any] = dict(own)
        for node in nodes:
            moved = _moved(node, values, found, limits)
            if moved is not None:
                number = node.outputs[0]
                # A start moves by itself, and with the starts before it.
                found[number] = moved + own[number] if number in own else moved
        if end not in found:
            return jnp.zeros(jnp.shape(values[end]), dy.dtype)
        result: jax.Array = found[end]
        return result.astype(dy.dtype)

    likes = [
        jax.ShapeDtypeStruct(jnp.shape(values[x]), jnp.result_type(values[x]))
        for x in starts
    ]
    return list(jax.linear_transpose(linear, *likes)(dy))


def between(program: Graph, starts: Sequence[int], end: int) -> list[Node]:
    """The equations through which one value depends on some earlier ones."""
    after: set[int] = set()
    for start in starts:
        after |= program.depending([start]) - {start}
    return [n for n in program.needed([end]) if not after.isdisjoint(n.outputs)]


def _operands(node: Node, values: Mapping[int, Any]) -> list[Any]:
    """The operands of a node, with scalars as arrays."""
    return [jnp.asarray(x) for x in graph.operands(node, values)]


def _tangents(node: Node, found: Mapping[int, Any]) -> list[Any]:
    """For each operand how it moves, or None if it does not."""
    return [found.get(x) if isinstance(x, int) else None for x in node.inputs]


def _elementwise(
    node: Node,
    operands: Sequence[Any],
    values: Mapping[int, Any],
    found: Mapping[int, Any],
) -> Any:
    """How the output of an elementwise equation moves with its operands."""
    output = values[node.outputs[0]]
    partials = PARTIALS[node.name](operands, output, node.equation.params)
    parts = [
        partial * tangent
        for partial, tangent in zip(partials, _tangents(node, found), strict=True)
        if partial is not None and tangent is not None
    ]
    return sum(parts[1:], parts[0]) if parts else None


def _moved(
    node: Node,
    values: Mapping[int, Any],
    found: Mapping[int, Any],
    limits: Collection[int],
) -> Any:
    """How the output of any equation that is known here moves with its operands.

    Args:
      node: the equation.
      values: of an evaluation, by number.
      found: how values move, by number.
      limits: the values that come out of the limits of a rounding.
    """
    tangents = _tangents(node, found)
    if all(t is None for t in tangents) or node.name in _FLAT - {"round"}:
        return None
    if node.name == "round":
        return tangents[0]
    if node.name == "convert_element_type":
        return _converted(node, tangents[0])
    operands = _operands(node, values)
    if node.outputs[0] in limits:
        return _limited(node, operands, tangents)
    if node.name in PARTIALS:
        return _elementwise(node, operands, values, found)
    if node.name in ("integer_dot_general", "integer_conv"):
        return _integer_product(node, operands, tangents)
    if node.name in ("reduce_max", "reduce_min"):
        return _of_extremes(node, operands[0], values[node.outputs[0]], tangents[0])
    if node.facts.linear and len(node.outputs) == 1:
        zeros = [jnp.zeros_like(x) for x in operands]
        pairs = zip(tangents, zeros, strict=True)
        return node.evaluate([z if t is None else t for t, z in pairs])[0]
    moving = [i for i, t in enumerate(tangents) if t is not None]
    if not node.facts.linear_in or not set(moving) <= set(node.facts.linear_in):
        raise ValueError(
            f"{node.name!r} lies between them, and its derivative is not in the table "
            "of fgrad.tracing.derivatives"
        )
    parts = [
        node.evaluate([tangents[i] if j == i else x for j, x in enumerate(operands)])[0]
        for i in moving
    ]
    return sum(parts[1:], parts[0])


def _limited(node: Node, operands: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """How a value moves that is limited to a grid: freely up to half a step beyond.

    So much beyond the last step rounds to it.
    """
    (place,) = (i for i, tangent in enumerate(tangents) if tangent is not None)
    x, tangent = operands[place], tangents[place]
    low, high = operands[0], operands[-1]
    if node.name != "clamp":
        bound = operands[1 - place]
        low, high = (bound, x) if node.name == "max" else (x, bound)
    inside = (x >= low - 0.5) & (x <= high + 0.5)
    return tangent * _as_float(inside, tangent)


def _of_extremes(node: Node, x: Any, output: Any, tangent: Any) -> Any:
    """How a maximum or minimum moves: as the mean of the values that have it."""
    axes = node.equation.params["axes"]
    extreme = (x == jnp.expand_dims(output, axes)).astype(tangent.dtype)
    return jnp.sum(extreme * tangent, axes) / jnp.sum(extreme, axes)


def _converted(node: Node, tangent: Any) -> Any:
    """A tangent in another dtype; in that of integers it stays the float that it is."""
    dtype = node.equation.params["new_dtype"]
    return tangent.astype(dtype) if jnp.issubdtype(dtype, jnp.floating) else tangent


def _integer_product(node: Node, operands: Sequence[Any], tangents: Any) -> Any:
    """How a product of integers moves with its operands, in floats."""
    parameters = {k: v for k, v in node.equation.params.items() if k != "bits"}
    is_dot = node.name == "integer_dot_general"
    product: Any = lax.dot_general if is_dot else lax.conv_general_dilated
    parts = []
    for place, tangent in enumerate(tangents):
        if tangent is None:
            continue
        both = [x.astype(tangent.dtype) for x in operands]
        both[place] = tangent
        parts.append(product(*both, **parameters))
    return sum(parts[1:], parts[0])
