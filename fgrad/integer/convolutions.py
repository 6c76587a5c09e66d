"""Convolutions of int8 images in int32, as products of the patches under a window.

XLA has fast products of int8 on a CPU, and slow convolutions. What the taps of a window
see, side by side, is a matrix of patches, and the convolution is its product with the
kernel. A kernel of one input channel is a sum of shifted multiplications in int32,
which has room for 16-bit weights. Integers do not care about the order of a sum, so
that the results are those of a convolution, bit for bit.

Each function is one equation of a traced program. The writer of C knows them by name
and puts a loop in their place, so that a microcontroller needs no memory for patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fgrad.fixed_point import windows
from fgrad.fixed_point.products import MAX_SHIFTS, product_primitive
from fgrad.fixed_point.windows import Window
from fgrad.integer.arithmetic import limbs

# Pairs of a name and a value: these parameters of ``lax.conv_general_dilated``.
Options = tuple[tuple[str, Any], ...]
OPTIONS = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "batch_group_count",
)


def _plain(x: jax.Array, w: jax.Array, *, options: Options) -> jax.Array:
    """The convolution of int8 with int8."""
    params = dict(options)
    if _has_one_input_channel(w, params):
        return _shifted(x, w, params)
    return _products(x, [w], params)[0]


def _exact(x: jax.Array, w: jax.Array, *, options: Options) -> jax.Array:
    """The convolution of int8 with int16, where it is below 2**31."""
    params = dict(options)
    if _has_one_input_channel(w, params):
        return _shifted(x, w, params)
    high, low = _products(x, limbs(w), params)
    return (high << 8) + low + 128 * _sums_of_windows(x, w, params)


def _coarse(x: jax.Array, w: jax.Array, *, options: Options) -> jax.Array:
    """``⌊exact / 256 + 1/2⌋``, for sums of up to 2**17 terms that do not fit."""
    params = dict(options)
    if _has_one_input_channel(w, params):
        high, low = (_shifted(x, part, params) for part in (w >> 8, w & 255))
    else:
        high, low = _products(x, limbs(w), params)
        low = low + 128 * _sums_of_windows(x, w, params)
    return high + ((low + 128) >> 8)


plain_conv_p = product_primitive("plain_conv", _plain)
exact_conv_p = product_primitive("exact_conv", _exact)
coarse_conv_p = product_primitive("coarse_conv", _coarse)


def _taps(w: jax.Array, params: dict[str, Any]) -> int:
    return math.prod(w.shape[axis] for axis in params["dimension_numbers"].rhs_spec[2:])


def _has_one_input_channel(w: jax.Array, params: dict[str, Any]) -> bool:
    """Whether each output channel reads one channel, by a few taps."""
    one = w.shape[params["dimension_numbers"].rhs_spec[1]] == 1
    simple = max(params["lhs_dilation"]) == 1 == params["batch_group_count"]
    return one and simple and _taps(w, params) <= MAX_SHIFTS


def _shifted(x: jax.Array, w: jax.Array, params: dict[str, Any]) -> jax.Array:
    names = ("window_strides", "padding", "rhs_dilation", "dimension_numbers")
    return windows.multiply_adds(x, w, *(params[name] for name in names))


def _products(
    x: jax.Array, kernels: Sequence[jax.Array], params: dict[str, Any]
) -> list[jax.Array]:
    """The convolutions with int8 kernels of one shape."""
    numbers, w = params["dimension_numbers"], kernels[0]
    groups = params["feature_group_count"] * params["batch_group_count"]
    if groups > 1 or _taps(w, params) > MAX_SHIFTS:
        return [
            lax.conv_general_dilated(x, w, **params, preferred_element_type=jnp.int32)
            for w in kernels
        ]
    out, into, *taps = numbers.rhs_spec
    seen = _patches(windows.features_last(x, numbers.lhs_spec), w, params)
    last = ((seen.ndim - 1,), (0,)), ((), ())
    sums = []
    for w in kernels:
        matrix = w.transpose((*taps, into, out)).reshape(seen.shape[-1], w.shape[out])
        y = lax.dot_general(seen, matrix, last, preferred_element_type=jnp.int32)
        sums.append(windows.from_features_last(y, numbers.out_spec))
    return sums


def _patches(x: jax.Array, w: jax.Array, params: dict[str, Any]) -> jax.Array:
    """What all taps see, [N, *outputs, taps * features]."""
    window = _window(w, params)
    image = window.padded(x)
    return jnp.concatenate([window.seen_by(t, image) for t in window.taps()], axis=-1)


def _window(w: jax.Array, params: dict[str, Any]) -> Window:
    size = [w.shape[axis] for axis in params["dimension_numbers"].rhs_spec[2:]]
    names = ("window_strides", "padding", "rhs_dilation", "lhs_dilation")
    return Window(size, *(params[name] for name in names))


def _sums_of_windows(x: jax.Array, w: jax.Array, params: dict[str, Any]) -> jax.Array:
    """``Σ x`` over the window and the features, for all output channels."""
    numbers = params["dimension_numbers"]
    groups = params["feature_group_count"] * params["batch_group_count"]
    if groups > 1 or _taps(w, params) > MAX_SHIFTS:
        ones = jnp.ones(w.shape, jnp.int8)
        if groups == 1:  # one channel of sums serves all
            ones = lax.slice_in_dim(ones, 0, 1, axis=numbers.rhs_spec[0])
        return _products(x, [ones], params)[0]
    image = windows.features_last(x, numbers.lhs_spec)
    window = _window(w, params)
    padded = window.padded(jnp.sum(image, axis=-1, dtype=jnp.int32))
    total = jnp.zeros((), jnp.int32)
    for tap in window.taps():
        total += window.seen_by(tap, padded)
    return windows.from_features_last(total[..., None], numbers.out_spec)
