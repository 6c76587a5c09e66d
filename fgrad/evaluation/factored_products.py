r"""Products with a weight that is perturbed in a subspace of low rank.

.. math:: x (W + a \sum_r u_r v_r^T) = x W + a \sum_r (x u_r) v_r^T

The base product is that of the unperturbed weight. Under ``jax.vmap`` over
perturbations it is one product for all of them; only u and v differ.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from fgrad.fixed_point import products, windows
from fgrad.fixed_point.windows import Window
from fgrad.tracing import primitives

# Taps of a kernel up to which x · u is taken at every place and then shifted.
_MAX_SHIFTS = 49
# The letter of the axis of r in an einsum.
_RANK = string.ascii_letters[0]


class Factored(NamedTuple):
    """A weight ``base + amplitude * Σᵣ uᵣ vᵣ``.

    Attributes:
      base: the unperturbed weight.
      u: [rank, ...] with the weight's axes, of length 1 where v varies.
      v: [rank, ...] with the weight's axes, of length 1 where u varies.
      amplitude: scalar, or with the weight's axes, like the scale of a grid. No
        product contracts an axis along which it varies.
      between: what is done to the products with u before those with v, or None; then
        nothing but a product with an activation has a meaning.
    """

    base: jax.Array
    u: jax.Array
    v: jax.Array
    amplitude: jax.Array
    between: Callable[[jax.Array], jax.Array] | None = None


# ------------------------------------------------------------------------- views
#
# What may happen to a weight on its way into a product and leaves it factored. A view
# takes the operands of an equation and returns a `Factored`, or None if it cannot.


def _convert(weight: Factored, *, equation: core.JaxprEqn) -> Factored | None:
    dtype = equation.params["new_dtype"]
    if jnp.issubdtype(dtype, jnp.signedinteger):
        if not jnp.issubdtype(weight.base.dtype, jnp.signedinteger):
            return None
        # Integers of a grid that fit: the base, u and v do so as their sum does.
        return weight._replace(base=weight.base.astype(dtype))
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return Factored(
        weight.base.astype(dtype),
        weight.u,
        weight.v,
        weight.amplitude.astype(dtype),
    )


def _multiply(x: Any, y: Any, *, equation: core.JaxprEqn) -> Factored | None:
    del equation
    weight, factor = (x, y) if isinstance(x, Factored) else (y, x)
    if isinstance(factor, Factored) or jnp.size(factor) != 1:
        return None
    factor = jnp.reshape(factor, ())
    return weight._replace(
        base=weight.base * factor, amplitude=weight.amplitude * factor
    )


def _transpose(weight: Factored, *, equation: core.JaxprEqn) -> Factored:
    axes = equation.params["permutation"]
    factor_axes = (0, *(axis + 1 for axis in axes))
    amplitude = weight.amplitude
    return Factored(
        weight.base.transpose(axes),
        weight.u.transpose(factor_axes),
        weight.v.transpose(factor_axes),
        amplitude.transpose(axes) if amplitude.ndim else amplitude,
    )


def _copy(weight: Factored, *, equation: core.JaxprEqn) -> Factored:
    del equation
    return weight


VIEWS: dict[str, Callable[..., Factored | None]] = {
    "convert_element_type": _convert,
    "copy": _copy,
    "copy_p": _copy,
    "mul": _multiply,
    "transpose": _transpose,
}


# ---------------------------------------------------------------------- products
#
# A product takes the operands of an equation, one of them a `Factored`, and returns its
# output, or None where the dense product is the better way.


def _dot_general(x: Any, y: Any, *, equation: core.JaxprEqn) -> jax.Array | None:
    of_x, of_y = equation.params["dimension_numbers"][0]
    weight, contracted = (x, of_x) if isinstance(x, Factored) else (y, of_y)
    if any(_varies_along(weight.amplitude, axis) for axis in contracted):
        return None
    base: jax.Array = primitives.bind(equation, [_base(x), _base(y)])[0]
    if isinstance(x, Factored):
        return base + _dot_correction(y, x, equation, weight_first=True)
    return base + _dot_correction(x, y, equation, weight_first=False)


def _dot_correction(
    x: jax.Array, weight: Factored, equation: core.JaxprEqn, weight_first: bool
) -> jax.Array:
    """``a Σᵣ (x · uᵣ) vᵣ``, which the perturbation of a weight adds to its product."""
    axes = _axis_letters(
        x.ndim, weight.base.ndim, equation.params["dimension_numbers"], weight_first
    )
    # v varies along some axes of the weight, u along the others.
    of_v = [a for a, n in enumerate(weight.v.shape[1:]) if n > 1]
    of_u = [a for a in range(weight.base.ndim) if a not in of_v]
    u = weight.u.reshape(-1, *(weight.base.shape[a] for a in of_u))
    v = weight.v.reshape(-1, *(weight.base.shape[a] for a in of_v))
    u_axes = "".join(axes.weight[a] for a in of_u)
    v_axes = "".join(axes.weight[a] for a in of_v)

    # First x · u: its axes are those that the output or the sum over v still needs.
    left_of_x = "".join(c for c in axes.x if c in axes.out or c in v_axes)
    left_of_u = "".join(c for c in u_axes if c in axes.out and c not in axes.x)
    xu_axes = f"{left_of_x}{_RANK}{left_of_u}"
    x = _like(u, x)
    xu = jnp.einsum(
        f"{axes.x},{_RANK}{u_axes}->{xu_axes}",
        x,
        u.astype(x.dtype),
        preferred_element_type=_accumulator(x),
        precision=equation.params.get("precision"),
    )
    if weight.between is not None:
        xu = weight.between(xu)
    # Then the sum over the rank.
    out: Any = equation.outvars[0].aval
    total = jnp.einsum(
        f"{xu_axes},{_RANK}{v_axes}->{axes.out}",
        xu.astype(out.dtype),
        v.astype(out.dtype),
        precision="highest",
    )
    amplitude = weight.amplitude.astype(out.dtype)
    if amplitude.ndim:
        amplitude = _aligned(amplitude, axes)
    return total * amplitude


class _Axes(NamedTuple):
    """The axes of a ``dot_general``, one letter for each, as ``einsum`` takes them.

    Attributes:
      x: of the activation; an axis that is matched with one of the weight, whether
        contracted or a batch axis, has the weight's letter.
      weight: of the weight.
      out: of the product.
    """

    x: str
    weight: str
    out: str


def _axis_letters(
    x_ndim: int, weight_ndim: int, dimension_numbers: Any, weight_first: bool
) -> _Axes:
    """Letters for the axes of a ``dot_general`` of an activation and a weight."""
    (x_contract, w_contract), (x_batch, w_batch) = [
        pair[::-1] if weight_first else pair for pair in dimension_numbers
    ]
    weight, end = string.ascii_letters[1 : weight_ndim + 1], weight_ndim + 1
    x = list(string.ascii_letters[end : end + x_ndim])
    for x_axis, w_axis in zip(
        (*x_contract, *x_batch), (*w_contract, *w_batch), strict=True
    ):
        x[x_axis] = weight[w_axis]
    batch = [x[a] for a in x_batch]
    x_free = [c for a, c in enumerate(x) if a not in (*x_contract, *x_batch)]
    w_free = [c for a, c in enumerate(weight) if a not in (*w_contract, *w_batch)]
    free = [*w_free, *x_free] if weight_first else [*x_free, *w_free]
    return _Axes("".join(x), weight, "".join([*batch, *free]))


def _aligned(amplitude: jax.Array, axes: _Axes) -> jax.Array:
    """An amplitude with the weight's axes, as an array that broadcasts to the output.

    The axes along which it varies are not contracted.
    """
    sizes = [
        amplitude.shape[axes.weight.index(c)] if c in axes.weight else 1
        for c in axes.out
    ]
    order = sorted(
        (a for a, c in enumerate(axes.weight) if c in axes.out),
        key=lambda a: axes.out.index(axes.weight[a]),
    )
    rest = [a for a in range(amplitude.ndim) if a not in order]
    return amplitude.transpose((*order, *rest)).reshape(sizes)


def _conv(x: Any, weight: Any, *, equation: core.JaxprEqn) -> jax.Array | None:
    if not isinstance(weight, Factored) or not _can_be_apart(weight, equation.params):
        return None
    params = equation.params
    numbers = params["dimension_numbers"]
    base: jax.Array = primitives.bind(equation, [x, weight.base])[0]
    image = windows.features_last(_like(weight.u, x), numbers.lhs_spec)
    in_feature, *spatial = numbers.rhs_spec[1:]
    # [*window, in_feature, rank]
    u = weight.u[..., 0].transpose([*(a + 1 for a in (*spatial, in_feature)), 0])
    u = u.astype(image.dtype)
    size = u.shape[:-2]
    touching = size == tuple(params["window_strides"])
    dilated = any(d != 1 for d in params["rhs_dilation"])
    if touching and not dilated and not any(map(any, params["padding"])):
        xu = _patches_dot(image, u, _accumulator(image))
    elif math.prod(size) <= _MAX_SHIFTS:
        xu = _shifted_dots(image, u, params, _accumulator(image))
    else:
        return None
    if weight.between is not None:
        xu = weight.between(xu)
    dtype = base.dtype
    v = weight.v.reshape(weight.u.shape[0], -1).astype(dtype)
    correction = jnp.einsum("...r,ro->...o", xu.astype(dtype), v, precision="highest")
    amplitude = weight.amplitude.astype(dtype)
    correction *= amplitude.reshape(-1) if amplitude.ndim else amplitude
    return base + windows.from_features_last(correction, numbers.out_spec)


def _can_be_apart(weight: Factored, params: Mapping[str, Any]) -> bool:
    """Whether `_conv` can take a convolution with this kernel apart."""
    last = weight.base.ndim - 1
    return (
        params["dimension_numbers"].rhs_spec[0] == last
        and not any(_varies_along(weight.amplitude, axis) for axis in range(last))
        and params["feature_group_count"] == 1
        and params.get("batch_group_count", 1) == 1
        and all(d == 1 for d in params["lhs_dilation"])
    )


def _like(u: jax.Array, x: jax.Array) -> jax.Array:
    """The activation for a product with u: integers as floats, if u is of floats."""
    both = jnp.issubdtype(x.dtype, jnp.integer), jnp.issubdtype(u.dtype, jnp.integer)
    return x.astype(u.dtype) if both == (True, False) else x


def _varies_along(amplitude: jax.Array, axis: int) -> bool:
    return amplitude.ndim > 0 and amplitude.shape[axis] > 1


def _accumulator(x: jax.Array) -> Any:
    """The dtype in which x · u adds up: exact for integers, x being int8."""
    return jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else x.dtype


def _patches_dot(image: jax.Array, u: jax.Array, accumulator: Any) -> jax.Array:
    """A convolution with r outputs whose windows do not overlap: [N, *out, rank]."""
    *window, features, _ = u.shape
    counts = [n // w for n, w in zip(image.shape[1:-1], window, strict=True)]
    image = image[
        (slice(None), *(slice(0, c * w) for c, w in zip(counts, window, strict=True)))
    ]
    split = [n for pair in zip(counts, window, strict=True) for n in pair]
    image = image.reshape(image.shape[0], *split, features)
    axes = [2 + 2 * i for i in range(len(window))]
    return lax.dot_general(
        image,
        u,
        (((*axes, image.ndim - 1), (*range(len(window)), u.ndim - 2)), ((), ())),
        preferred_element_type=accumulator,
    )


def _shifted_dots(
    image: jax.Array, u: jax.Array, params: Mapping[str, Any], accumulator: Any
) -> jax.Array:
    """A convolution with r outputs as one product and shifts: [N, *out, rank].

    Under ``vmap`` a convolution with many small kernels would become a grouped one.
    """
    *size, features, rank = u.shape
    taps = jnp.moveaxis(u, -2, 0).reshape(features, -1)
    y = lax.dot_general(
        image,
        taps,
        (((image.ndim - 1,), (0,)), ((), ())),
        preferred_element_type=accumulator,
    )
    window = Window(
        size, params["window_strides"], params["padding"], params["rhs_dilation"]
    )
    y = window.padded(y)
    y = y.reshape(*y.shape[:-1], -1, rank)
    total = jnp.zeros((), y.dtype)
    for number, tap in enumerate(window.taps()):
        of_tap = lax.index_in_dim(y, number, y.ndim - 2, keepdims=False)
        total = total + window.seen_by(tap, of_tap)
    return total


def _base(x: Any) -> jax.Array:
    return x.base if isinstance(x, Factored) else x


# Products that are always taken apart.
DOTS = frozenset({"dot_general", products.integer_dot_general_p.name})

PRODUCTS: dict[str, Callable[..., jax.Array | None]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    products.integer_dot_general_p.name: _dot_general,
    products.integer_conv_p.name: _conv,
}
