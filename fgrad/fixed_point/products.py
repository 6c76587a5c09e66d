"""Products of quantized tensors on int8 hardware: dot and convolution.

Activations are int8. A weight of up to 8 bits is one int8 product. A wider weight is
two: with ``q = 256 h + (l + 128)``, h and l are int8 for every 16-bit q, and

    x · q = 256 (x · h) + (x · l) + 128 Σ x.

Each of the three sums is exact in int32 for up to 2**17 terms; they are joined in
float32, where the scales are applied. Depthwise convolutions are shifted
multiply-adds, in int32 or of floats.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from fgrad.fixed_point import windows
from fgrad.fixed_point.qtensor import QTensor
from fgrad.tracing import execution_order

# |x| <= 127 and |h|, |l|, 128 <= 2**7, so 2**17 products stay below 2**31.
MAX_TERMS = 2**17
# Taps up to which a depthwise kernel is unrolled. Far below the 516 terms
# of 127 * 32767 that an int32 holds.
MAX_SHIFTS = 64


def dot_general(lhs: QTensor, rhs: QTensor, dimension_numbers: Any) -> jax.Array:
    """``lax.dot_general`` of quantized operands, exact in integers.

    Args:
      lhs: activations of up to 8 bits, one scale per tensor.
      rhs: weights of up to 16 bits (or activations), one scale per tensor or per
        entry of axes that are not contracted.
      dimension_numbers: as for ``jax.lax.dot_general``.

    Returns:
      float32 array of the dequantized product. The integer sums are exact; joining
      them in float32 errs by at most ``2**-24 Σ|x|(5|q| + 766)`` for x and q of the
      operands' integers, and not at all while the sums stay below 2**24.

    Raises:
      ValueError: for wider operands, a scale that varies along a contracted axis, or
        more than 2**17 terms.

    Example:
      >>> x = QTensor(jnp.array([[3, -2]], jnp.int8), jnp.float32(0.5))
      >>> w = QTensor(jnp.array([[1000], [32767]], jnp.int16), jnp.float32(1.0))
      >>> dot_general(x, w, (((1,), (0,)), ((), ())))
      Array([[-31267.]], dtype=float32)
    """
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    terms = math.prod(rhs.shape[axis] for axis in rhs_contract)
    _check_operands(lhs, rhs, rhs_contract, terms)

    scale = rhs.scale
    if scale.ndim:
        free = [a for a in range(rhs.ndim) if a not in (*rhs_contract, *rhs_batch)]
        shape = [scale.shape[a] for a in rhs_batch]
        shape += [1] * (lhs.ndim - len(lhs_contract) - len(lhs_batch))
        shape += [scale.shape[a] for a in free]
        scale = scale.transpose((*rhs_batch, *free, *rhs_contract)).reshape(shape)
    product: jax.Array = integer_dot_general_p.bind(
        lhs.qvalue,
        rhs.qvalue,
        bits=rhs.bits,
        dimension_numbers=_tuples(dimension_numbers),
    )
    dequantized: jax.Array = product * (lhs.scale.reshape(()) * scale)
    return dequantized


def conv_general_dilated(
    lhs: QTensor,
    rhs: QTensor,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
) -> jax.Array:
    """``lax.conv_general_dilated`` of quantized operands, exact in integers.

    Strided, dilated, grouped and depthwise convolutions.

    Args:
      lhs: activations of up to 8 bits, one scale per tensor.
      rhs: kernel of up to 16 bits, one scale per tensor or per output channel.
      window_strides: as for ``jax.lax.conv_general_dilated``, like all that follow.
      padding: "SAME", "VALID" or pairs.
      lhs_dilation: dilation of the input.
      rhs_dilation: dilation of the kernel.
      dimension_numbers: layout of input, kernel and output.
      feature_group_count: number of groups.

    Returns:
      float32 array of the dequantized convolution, with the error of `dot_general`.

    Raises:
      ValueError: as `dot_general`.
    """
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    in_feature, *spatial = numbers.rhs_spec[1:]
    contract = (in_feature, *spatial)
    terms = math.prod(rhs.shape[axis] for axis in contract)
    _check_operands(lhs, rhs, contract, terms)

    scale = rhs.scale
    if scale.ndim:
        shape = [1] * rhs.ndim
        shape[numbers.out_spec[1]] = scale.size
        scale = scale.reshape(shape)
    product: jax.Array = integer_conv_p.bind(
        lhs.qvalue,
        rhs.qvalue,
        bits=rhs.bits,
        **_geometry(
            lhs.shape,
            rhs.shape,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            numbers,
        ),
        dimension_numbers=numbers,
        feature_group_count=int(feature_group_count),
    )
    dequantized: jax.Array = product * (lhs.scale.reshape(()) * scale)
    return dequantized


def float_conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
) -> jax.Array:
    """``lax.conv_general_dilated`` of floats, depthwise as shifted multiply-adds.

    On a CPU XLA's own depthwise convolution is several times slower. The multiply-adds
    add up in float32 or wider.

    Args:
      lhs: activations.
      rhs: kernel of the same dtype.
      window_strides: as for ``jax.lax.conv_general_dilated``, like all that follow.
      padding: "SAME", "VALID" or pairs.
      lhs_dilation: dilation of the input.
      rhs_dilation: dilation of the kernel.
      dimension_numbers: layout of input, kernel and output.
      feature_group_count: number of groups.
      precision: of what is not depthwise; multiply-adds have that of their dtype.

    Returns:
      The convolution, in the dtype of the operands.

    Example:
      >>> x, w = jnp.arange(4.0).reshape(1, 2, 2), jnp.array([[[1.0, 10.0]]])
      >>> layout = ("NWC", "WIO", "NWC")
      >>> float_conv_general_dilated(x, w, (1,), "SAME", None, None, layout, 2)
      Array([[[ 0., 10.],
              [ 2., 30.]]], dtype=float32)
    """
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    arguments = window_strides, padding, lhs_dilation, rhs_dilation, numbers
    if not _is_depthwise(rhs.shape, lhs_dilation, numbers, feature_group_count):
        return lax.conv_general_dilated(
            lhs, rhs, *arguments, feature_group_count, precision=precision
        )
    geometry = _geometry(lhs.shape, rhs.shape, *arguments)
    del geometry["lhs_dilation"]
    y = windows.multiply_adds(lhs, rhs, **geometry, numbers=numbers)
    return y.astype(lhs.dtype)


def _geometry(
    lhs_shape: Sequence[int],
    rhs_shape: Sequence[int],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None,
    rhs_dilation: Sequence[int] | None,
    numbers: lax.ConvDimensionNumbers,
) -> dict[str, Any]:
    """Strides, dilations and pairs of padding as tuples of ints."""
    window = [rhs_shape[axis] for axis in numbers.rhs_spec[2:]]
    strides = tuple(map(int, window_strides))
    lhs_dilation = tuple(map(int, lhs_dilation or [1] * len(window)))
    rhs_dilation = tuple(map(int, rhs_dilation or [1] * len(window)))
    if isinstance(padding, str):
        if max(lhs_dilation) > 1:
            raise ValueError(
                "String padding is not implemented for a dilated input, got "
                f"padding={padding!r} and lhs_dilation={lhs_dilation}; give pairs."
            )
        size = [lhs_shape[axis] for axis in numbers.lhs_spec[2:]]
        reach = [(n - 1) * d + 1 for n, d in zip(window, rhs_dilation, strict=True)]
        padding = lax.padtype_to_pads(size, reach, strides, padding)
    return {
        "window_strides": strides,
        "padding": tuple((int(low), int(high)) for low, high in padding),
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
    }


def _is_depthwise(
    rhs_shape: Sequence[int],
    lhs_dilation: Sequence[int] | None,
    numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
) -> bool:
    """Whether a convolution is depthwise, and small enough to be unrolled."""
    _, in_feature, *spatial = numbers.rhs_spec
    taps = math.prod(rhs_shape[axis] for axis in spatial)
    depthwise = rhs_shape[in_feature] == 1 and feature_group_count > 1
    return depthwise and max(lhs_dilation or [1]) == 1 and taps <= MAX_SHIFTS


# ---------------------------------------------------------------------- primitives
#
# The integer products are JAX primitives, so that a program which reads jaxprs, such
# as the evaluator, sees one equation with the activation and the weight.


def _integer_dot(
    x: jax.Array, q: jax.Array, *, bits: int, dimension_numbers: Any
) -> jax.Array:
    """``dot_general`` of int8 and up to int16 integers, as float32."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers

    def product(w: jax.Array, numbers: Any) -> jax.Array:
        return lax.dot_general(x, w, numbers, preferred_element_type=jnp.int32)

    if bits <= 8:
        return product(q.astype(jnp.int8), dimension_numbers).astype(jnp.float32)
    high, low = (product(limb, dimension_numbers) for limb in _limbs(x, q))
    free = q.ndim - len(rhs_contract) - len(rhs_batch)
    # [*batch, *free axes of x], and an axis of length 1 for each free axis of q.
    kept = [a for a in range(x.ndim) if a not in (*lhs_contract, *lhs_batch)]
    sums = jnp.sum(x, axis=lhs_contract, dtype=jnp.int32, keepdims=True)
    sums = sums.transpose((*lhs_batch, *kept, *lhs_contract))
    sums = sums.reshape(*sums.shape[: len(lhs_batch) + len(kept)], *[1] * free)
    return _join(high, low, sums)


def _integer_conv(
    x: jax.Array,
    q: jax.Array,
    *,
    bits: int,
    window_strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    lhs_dilation: tuple[int, ...],
    rhs_dilation: tuple[int, ...],
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
) -> jax.Array:
    """``conv_general_dilated`` of int8 and up to int16 integers, as float32."""
    numbers, groups = dimension_numbers, feature_group_count
    if _is_depthwise(q.shape, lhs_dilation, numbers, groups):
        sums = windows.multiply_adds(
            x, q, window_strides, padding, rhs_dilation, numbers
        )
        return sums.astype(jnp.float32)
    geometry = (window_strides, padding, lhs_dilation, rhs_dilation)

    def product(w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x, w, *geometry, numbers, groups, preferred_element_type=jnp.int32
        )

    if bits <= 8:
        return product(q.astype(jnp.int8)).astype(jnp.float32)
    high, low = map(product, _limbs(x, q))
    # The sums are the same for all channels of a group.
    window = [q.shape[axis] for axis in numbers.rhs_spec[2:]]
    sums = _window_sums(x, window, *geometry, numbers.lhs_spec, groups)
    sums = jnp.repeat(sums, q.shape[numbers.rhs_spec[0]] // groups, 1)
    return _join(high, low, sums.transpose(np.argsort(numbers.out_spec)))


def _window_sums(
    x: jax.Array,
    window: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    lhs_spec: Sequence[int],
    groups: int,
) -> jax.Array:
    """``Σ x`` over the features of each group and each window: [N, groups, *out]."""
    sums = x.transpose(lhs_spec).astype(jnp.int32)
    sums = sums.reshape(sums.shape[0], groups, -1, *sums.shape[2:]).sum(2)
    of_windows: jax.Array = lax.reduce_window(
        sums,
        0,
        lax.add,
        (1, 1, *window),
        (1, 1, *window_strides),
        ((0, 0), (0, 0), *padding),
        (1, 1, *lhs_dilation),
        (1, 1, *rhs_dilation),
    )
    return of_windows


def _limbs(x: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The int8 h and l of ``q = 256 h + (l + 128)``, not before x.

    Two products, of h and of l, take less time than one of both side by side: to put
    the bytes of the weights side by side takes longer than to read x twice.
    """
    # Or the limbs of all weights would be made first, a second copy of the model.
    q = q.astype(jnp.int16)
    if x.size:
        q = execution_order.delayed(q, x)
    return (q >> 8).astype(jnp.int8), (q ^ 128).astype(jnp.int8)


def _join(high: jax.Array, low: jax.Array, sums: jax.Array) -> jax.Array:
    """``256 x · h + x · l + 128 Σ x`` as float32."""
    joined = high.astype(jnp.float32) * 256 + low.astype(jnp.float32)
    return joined + 128 * sums.astype(jnp.float32)


def product_primitive(
    name: str,
    function: Callable[..., jax.Array],
    batch_activations: Callable[..., tuple[jax.Array, int]] | None = None,
) -> Primitive:
    """A primitive ``name(x, q, **parameters)`` that computes ``function``.

    Args:
      name: of the primitive.
      function: ``function(x, q, **parameters)`` of arrays.
      batch_activations: ``batch_activations(x, q, **parameters)`` computes it for an x
        that has a leading axis of ``vmap``, and returns the axis of the output that
        belongs to it. By default ``vmap`` takes the function apart.
    """
    primitive = Primitive(name)

    def abstract_eval(x: Any, q: Any, **parameters: Any) -> jax.core.ShapedArray:
        out = jax.eval_shape(functools.partial(function, **parameters), x, q)
        return jax.core.ShapedArray(out.shape, out.dtype)

    def batch(args: Any, axes: Any, **parameters: Any) -> tuple[jax.Array, int]:
        if axes[1] is None and batch_activations is not None:
            x = jnp.moveaxis(args[0], axes[0], 0)
            return batch_activations(x, args[1], **parameters)
        return jax.vmap(functools.partial(function, **parameters), axes)(*args), 0

    primitive.def_impl(jax.jit(function, static_argnames=_parameters(function)))
    primitive.def_abstract_eval(abstract_eval)
    batching.primitive_batchers[primitive] = batch
    lowering = mlir.lower_fun(function, multiple_results=False)
    mlir.register_lowering(primitive, lowering)
    return primitive


def _batch_dot(
    x: jax.Array, q: jax.Array, *, bits: int, dimension_numbers: Any
) -> tuple[jax.Array, int]:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    later = tuple(axis + 1 for axis in lhs_contract), tuple(a + 1 for a in lhs_batch)
    numbers = ((later[0], rhs_contract), (later[1], rhs_batch))
    out = integer_dot_general_p.bind(x, q, bits=bits, dimension_numbers=numbers)
    return out, len(lhs_batch)  # the first of the free axes of x


def _batch_conv(x: jax.Array, q: jax.Array, **parameters: Any) -> tuple[jax.Array, int]:
    numbers = parameters["dimension_numbers"]
    n, batch = x.shape[0], numbers.lhs_spec[0]
    x = jnp.moveaxis(x, 0, batch)
    x = x.reshape(*x.shape[:batch], -1, *x.shape[batch + 2 :])
    out = integer_conv_p.bind(x, q, **parameters)
    batch = numbers.out_spec[0]
    return out.reshape(*out.shape[:batch], n, -1, *out.shape[batch + 1 :]), batch


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)[2:]


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list | tuple) else int(x)


integer_dot_general_p = product_primitive(
    "integer_dot_general", _integer_dot, _batch_dot
)
integer_conv_p = product_primitive("integer_conv", _integer_conv, _batch_conv)


def _check_operands(
    lhs: QTensor, rhs: QTensor, contract: Sequence[int], terms: int
) -> None:
    if lhs.bits > 8:
        raise ValueError(
            f"the left operand has {lhs.bits} bits; integer products take activations "
            "of at most 8."
        )
    if lhs.scale.size != 1:
        raise ValueError(
            "the left operand of an integer product takes one scale per tensor, got "
            f"shape {lhs.scale.shape}."
        )
    if rhs.scale.ndim and any(rhs.scale.shape[axis] != 1 for axis in contract):
        raise ValueError(
            f"the kernel's scale of shape {rhs.scale.shape} varies along contracted "
            f"axes {tuple(contract)}, so it cannot be taken out of the sum; quantize "
            "per tensor or per output channel (channel_axis=-1 for Flax kernels)."
        )
    if terms > MAX_TERMS:
        raise ValueError(
            f"a product of {terms} terms could overflow its int32 accumulator; the "
            f"bound is {MAX_TERMS}. Split the contraction."
        )
