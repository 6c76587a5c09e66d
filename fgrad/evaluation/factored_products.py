r"""Products with a weight that is perturbed in a subspace of low rank.

.. math:: x (W + a \sum_r u_r v_r^T) = x W + a \sum_r (x u_r) v_r^T

The base product is that of the unperturbed weight. Under ``jax.vmap`` over
perturbations it is one product for all of them; only u and v differ.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from fgrad.fixed_point import products
from fgrad.tracing import primitives

# Taps of a kernel up to which x · u is taken at every place and then shifted.
_MAX_SHIFTS = 49


class Factored(NamedTuple):
    """A weight ``base + amplitude * Σᵣ uᵣ vᵣ``.

    Attributes:
      base: the unperturbed weight.
      u: [rank, ...] with the weight's axes, of length 1 where v varies.
      v: [rank, ...] with the weight's axes, of length 1 where u varies.
      amplitude: scalar, or with the weight's axes, of length 1 where u varies.
    """

    base: jax.Array
    u: jax.Array
    v: jax.Array
    amplitude: jax.Array


def factored(
    base: jax.Array, u: jax.Array, v: jax.Array, amplitude: jax.Array
) -> Factored | None:
    """A `Factored`, or None if the amplitude varies along an axis of u."""
    if amplitude.ndim and any(n > 1 for n in amplitude.shape[:-1]):
        return None
    return Factored(base, u, v, amplitude)


# ------------------------------------------------------------------------- views
#
# What may happen to a weight on its way into a product and leaves it factored. A view
# takes the operands of an equation and returns a `Factored`, or None if it cannot.


def _convert(weight: Factored, *, equation: core.JaxprEqn) -> Factored | None:
    dtype = equation.params["new_dtype"]
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


VIEWS: dict[str, Callable[..., Factored | None]] = {
    "convert_element_type": _convert,
    "mul": _multiply,
    "transpose": _transpose,
}


# ---------------------------------------------------------------------- products
#
# A product takes the operands of an equation, one of them a `Factored`, and returns its
# output, or None where the dense product is the better way.


def _dot_general(x: Any, y: Any, *, equation: core.JaxprEqn) -> jax.Array | None:
    base = primitives.bind(equation, [_base(x), _base(y)])[0]
    if isinstance(x, Factored):
        return base + _dot_correction(y, x, equation, weight_first=True)
    return base + _dot_correction(x, y, equation, weight_first=False)


def _dot_correction(
    x: jax.Array, weight: Factored, equation: core.JaxprEqn, weight_first: bool
) -> jax.Array:
    numbers = equation.params["dimension_numbers"]
    (x_contract, w_contract), (x_batch, w_batch) = [
        pair[::-1] if weight_first else pair for pair in numbers
    ]
    letters = iter(string.ascii_letters)
    rank = next(letters)
    w_axes = [next(letters) for _ in range(weight.base.ndim)]
    x_axes = [next(letters) for _ in range(x.ndim)]
    for x_axis, w_axis in zip(
        (*x_contract, *x_batch), (*w_contract, *w_batch), strict=True
    ):
        x_axes[x_axis] = w_axes[w_axis]
    batch = [x_axes[a] for a in x_batch]
    x_free = [c for a, c in enumerate(x_axes) if a not in (*x_contract, *x_batch)]
    w_free = [c for a, c in enumerate(w_axes) if a not in (*w_contract, *w_batch)]
    out = [*batch, *(w_free + x_free if weight_first else x_free + w_free)]

    # Along which of its axes does v vary? u varies along the others.
    of_v = [a for a, n in enumerate(weight.v.shape[1:]) if n > 1]
    of_u = [a for a in range(weight.base.ndim) if a not in of_v]
    u = weight.u.reshape(-1, *(weight.base.shape[a] for a in of_u))
    v = weight.v.reshape(-1, *(weight.base.shape[a] for a in of_v))
    u_axes, v_axes = [w_axes[a] for a in of_u], [w_axes[a] for a in of_v]
    x_axes_left = [c for c in x_axes if c in out or c in v_axes]
    u_axes_left = [c for c in u_axes if c in out and c not in x_axes]
    # First x · u, then the sum over the rank: exact integers if x is int8.
    accumulator = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else x.dtype
    xu = jnp.einsum(
        f"{''.join(x_axes)},{''.join([rank, *u_axes])}->"
        f"{''.join([*x_axes_left, rank, *u_axes_left])}",
        x,
        u.astype(x.dtype),
        preferred_element_type=accumulator,
        precision=equation.params.get("precision"),
    )
    out_aval: Any = equation.outvars[0].aval
    dtype = out_aval.dtype
    amplitude = weight.amplitude.astype(dtype)
    total = jnp.einsum(
        f"{''.join([*x_axes_left, rank, *u_axes_left])},{''.join([rank, *v_axes])}->"
        f"{''.join(out)}",
        xu.astype(dtype),
        v.astype(dtype),
        precision="highest",
    )
    if amplitude.ndim:
        # Varies along axes of v, which are not contracted: align it with the output.
        sizes = [amplitude.shape[w_axes.index(c)] if c in w_axes else 1 for c in out]
        order = sorted(
            (a for a, c in enumerate(w_axes) if c in out),
            key=lambda a: out.index(w_axes[a]),
        )
        rest = [a for a in range(amplitude.ndim) if a not in order]
        amplitude = amplitude.transpose((*order, *rest)).reshape(sizes)
    return total * amplitude


def _conv(x: Any, weight: Any, *, equation: core.JaxprEqn) -> jax.Array | None:
    if not isinstance(weight, Factored):
        return None
    params = equation.params
    numbers = params["dimension_numbers"]
    last = weight.base.ndim - 1
    if (
        numbers.rhs_spec[0] != last
        or params["feature_group_count"] != 1
        or params.get("batch_group_count", 1) != 1
        or any(d != 1 for d in params["lhs_dilation"])
    ):
        return None
    base = primitives.bind(equation, [x, weight.base])[0]
    rank = weight.u.shape[0]
    in_feature, *spatial = numbers.rhs_spec[1:]
    image = x.transpose(
        (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    )
    # [*window, in_feature, rank]
    u = weight.u[..., 0].transpose([*(a + 1 for a in (*spatial, in_feature)), 0])
    accumulator = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else x.dtype
    window = u.shape[:-2]
    apart = window == tuple(params["window_strides"])
    dilated = any(d != 1 for d in params["rhs_dilation"])
    if apart and not dilated and not any(map(any, params["padding"])):
        xu = _patches_dot(image, u.astype(x.dtype), accumulator)
    elif math.prod(window) <= _MAX_SHIFTS:
        xu = _shifted_dots(image, u.astype(x.dtype), params, accumulator)
    else:
        return None
    dtype = base.dtype
    v = weight.v.reshape(rank, -1).astype(dtype)
    correction = jnp.einsum("...r,ro->...o", xu.astype(dtype), v, precision="highest")
    amplitude = weight.amplitude.astype(dtype)
    correction *= amplitude.reshape(-1) if amplitude.ndim else amplitude
    order = [numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]]
    return base + correction.transpose(np.argsort(order))


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
    image: jax.Array, u: jax.Array, params: dict[str, Any], accumulator: Any
) -> jax.Array:
    """A convolution with r outputs as one product and shifts: [N, *out, rank].

    Under ``vmap`` a convolution with many small kernels would become a grouped one.
    """
    *window, _, rank = u.shape
    features = image.ndim - 1
    taps = jnp.moveaxis(u, -2, 0).reshape(image.shape[-1], -1)
    y = lax.dot_general(
        image, taps, (((features,), (0,)), ((), ())), preferred_element_type=accumulator
    )
    zero = jnp.zeros((), y.dtype)
    y = lax.pad(y, zero, [(0, 0, 0), *((*p, 0) for p in params["padding"]), (0, 0, 0)])
    y = y.reshape(*y.shape[:-1], math.prod(window), rank)
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    out = [
        max(0, (n - (w - 1) * d - 1) // s + 1)
        for n, w, d, s in zip(y.shape[1:-2], window, dilation, strides, strict=True)
    ]
    total = zero
    for tap, offsets in enumerate(np.ndindex(*window)):
        places = tuple(
            slice(o * d, o * d + (n - 1) * s + 1 if n else o * d, s)
            for o, d, s, n in zip(offsets, dilation, strides, out, strict=True)
        )
        total = total + y[(slice(None), *places, tap)]
    return total


def _base(x: Any) -> jax.Array:
    return x.base if isinstance(x, Factored) else x


PRODUCTS: dict[str, Callable[..., jax.Array | None]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    products.integer_dot_general_p.name: _dot_general,
    products.integer_conv_p.name: _conv,
}
