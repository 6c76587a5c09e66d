"""Exact integer arithmetic on fixed-point grids: the paper's integer equations.

A grid of b bits holds the integers of magnitude up to ``2**(b - 1) - 1``. This module
perturbs (equation (6)), updates (equation (8)) and requantizes (Appendix A) such
integers. No function here needs a 64-bit type.

Every rounding is to the nearest integer with ties to even. It is symmetric in the
sign, so ``w + εz`` and ``w - εz`` are treated alike, and it is what ``jnp.round`` and
AQT do, so that integers and floats on the same grid agree bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fgrad.fixed_point import words

MIN_BITS, MAX_BITS = 2, 16


def max_qvalue(bits: int) -> int:
    """Largest integer of the symmetric b-bit grid, ``2**(bits - 1) - 1``."""
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer):
        raise TypeError(f"bits must be an integer, got {bits!r}.")
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must lie in [{MIN_BITS}, {MAX_BITS}], got {bits}.")
    largest: int = 2 ** (int(bits) - 1) - 1
    return largest


def storage_dtype(bits: int) -> Any:
    """Smallest of int8 and int16 that holds the b-bit grid."""
    return jnp.int8 if max_qvalue(bits) <= 127 else jnp.int16


def requantize(
    acc: jax.Array,
    multiplier: jax.Array | int,
    shift: jax.Array | int,
    bits: int = 32,
) -> jax.Array:
    r"""Multiplies by an integer and shifts right, rounding, without 64-bit types.

    .. math:: clip(\lfloor acc \cdot multiplier / 2^{shift} \rceil), \pm(2^{bits-1}-1))

    Ties go to the even integer. The 63-bit product is held in two 32-bit words.

    Args:
      acc: int32 accumulator, any value of the type.
      multiplier: int32 in [0, 2**31); broadcasts against ``acc``.
      shift: in [0, 63]; broadcasts against ``acc``.
      bits: the result saturates to this width, 2 to 32.

    Returns:
      int32 array.

    Example:
      >>> requantize(jnp.array([5, 6, -7]), 1, 1)  # ties to even
      Array([ 2,  3, -4], dtype=int32)

    Reference:
      Appendix A of Feng et al. 2024; Jacob et al. 2018 (arXiv 1712.05877).
    """
    if not MIN_BITS <= bits <= 32:
        raise ValueError(f"bits must lie in [{MIN_BITS}, 32], got {bits}.")
    _check_range("multiplier", multiplier, 0, 2**31 - 1)
    _check_range("shift", shift, 0, 63)
    acc = jnp.asarray(acc, jnp.int32)
    limit = 2 ** (bits - 1) - 1
    if isinstance(multiplier, int) and multiplier == 1 and isinstance(shift, int):
        return jnp.clip(_rounding_shift(acc, shift), -limit, limit)
    high, low = words.multiply(_magnitude(acc), jnp.asarray(multiplier, jnp.uint32))
    shift = jnp.asarray(shift, jnp.uint32)
    high_q, low_q = words.shift_right(high, low, shift)
    # The bit below the result decides, and whether anything is set below that bit.
    below = jnp.maximum(shift, 1) - 1
    half = jnp.where(shift > 0, words.shift_right(high, low, below)[1] & 1, 0)
    mask_high, mask_low = words.low_mask(below)
    sticky = ((high & mask_high) | (low & mask_low)) != 0
    round_up = (half == 1) & (sticky | ((low_q & 1) == 1))
    limit = jnp.uint32(limit)
    # low_q + 1 cannot wrap where it is used: it is used only below the limit.
    saturated = (high_q != 0) | (low_q >= limit)
    magnitude = jnp.where(saturated, limit, low_q + round_up).astype(jnp.int32)
    return jnp.where(acc < 0, -magnitude, magnitude)


def fixed_point_ratio(ratio: float) -> tuple[int, int]:
    """Integers ``(multiplier, shift)`` with ``multiplier / 2**shift ≈ ratio``.

    The multiplier has up to 31 bits, so the relative error is at most 2**-31; a
    dyadic ratio, such as the default perturbation step 2**-5, is exact and small.

    Args:
      ratio: positive and finite, in (2**-32, 2**30].

    Returns:
      Python integers for `requantize`.

    Example:
      >>> fixed_point_ratio(2**-5), fixed_point_ratio(0.75)
      ((1, 5), (3, 2))
    """
    if not 2.0**-32 < ratio <= 2.0**30:
        raise ValueError(f"ratio must lie in (2**-32, 2**30], got {ratio}.")
    mantissa, exponent = math.frexp(ratio)
    multiplier, shift = round(mantissa * 2**31), 31 - exponent
    while multiplier % 2 == 0 and shift > 0:
        multiplier, shift = multiplier // 2, shift - 1
    return multiplier, shift


def perturb_qvalue(
    qvalue: jax.Array,
    z: jax.Array,
    epsilon_q: jax.Array,
    z_step: float,
    bits: int,
) -> jax.Array:
    r"""Adds ``ε z`` to a weight in integers, with a 32-bit accumulator.

    .. math:: w_q' = clip(\lfloor Δ_z (1_q w_q + ε_q z_q) \rceil),
      \quad 1_q = \lfloor 1/Δ_z \rceil

    Args:
      qvalue: weights w_q on the b-bit grid; int8, int16, or floats holding integers.
      z: int8 perturbation z_q, with the sign of the evaluation applied or not.
      epsilon_q: int32 ``⌊ε/Δ_w⌉``, negative for ``w - εz``; broadcasts.
      z_step: Δ_z in [1/64, 1]. A power of two makes ``1_q Δ_z = 1`` exact and the
        division a shift.
      bits: width b of the weight grid.

    Returns:
      The perturbed integers in the dtype of ``qvalue``.

    Raises:
      ValueError: if ``z_step`` is out of range.

    Reference:
      Equation (6) of Feng et al. 2024.
    """
    if not 1 / 64 <= z_step <= 1:
        raise ValueError(f"z_step must lie in [1/64, 1], got {z_step}.")
    one_q = round(1 / z_step)
    # Beyond this a single unit of z crosses the whole grid: the result is clipped
    # anyway, and the accumulator stays inside int32.
    largest = 2**22
    acc = qvalue.astype(jnp.int32) * one_q
    acc += jnp.clip(epsilon_q, -largest, largest) * z.astype(jnp.int32)
    multiplier, shift = fixed_point_ratio(z_step)
    return requantize(acc, multiplier, shift, bits).astype(qvalue.dtype)


def update_qvalue(qvalue: jax.Array, update_q: jax.Array, bits: int) -> jax.Array:
    r"""Integer change of a weight that stays on its grid.

    .. math:: clip(w_q + \bar w_q) - w_q

    Args:
      qvalue: weights w_q on the b-bit grid; int8, int16, or floats holding integers.
      update_q: int32 change in grid steps, any value of the type.
      bits: width b of the weight grid.

    Returns:
      int32 array: the change after clipping, so ``qvalue + result`` is on the grid.

    Reference:
      Equation (8) of Feng et al. 2024.
    """
    limit = max_qvalue(bits)
    qvalue = qvalue.astype(jnp.int32)
    # Clipping the change first keeps the sum inside int32.
    update_q = jnp.clip(update_q, -2 * limit, 2 * limit)
    return jnp.clip(qvalue + update_q, -limit, limit) - qvalue


def _check_range(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, int) and not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value}.")


def _rounding_shift(x: jax.Array, shift: int) -> jax.Array:
    """``⌊x / 2**shift⌉`` of int32, ties to even, in a handful of instructions."""
    if shift == 0:
        return x
    if shift > 31:
        return jnp.zeros_like(x)  # |x| / 2**shift is at most one half, and 0 is even
    floor = x >> shift
    remainder = (x & (2**shift - 1)).astype(jnp.uint32)
    half = jnp.uint32(2 ** (shift - 1))
    up = (remainder > half) | ((remainder == half) & ((floor & 1) == 1))
    rounded: jax.Array = floor + up
    return rounded


def _magnitude(x: jax.Array) -> jax.Array:
    """``|x|`` of int32 as uint32, right for -2**31 too."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(x < 0, ~bits + 1, bits)
