r"""Integers that stand for real numbers, and the proof that none of them overflows.

A value of the float program becomes ``value = scale * q``. The scale is a Python
number, found by calibration when the program is built, and so are two bounds of q: what
the operations before it can produce whatever the data are. An operation whose result
might leave int32 is an error of the conversion, not of a run.

A weight may have a scale for each of its output channels, and so has the product that
reads it, until its sums are rescaled.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fgrad.integer import arithmetic

INT32 = 2**31 - 1
# Width of what lies between products, and of what sums over many values leave.
MIDDLE, FINE = 16, 24
# Bits of the multiplier of a rescaling; its relative error is at most 2**-15.
_MULTIPLIER_BITS = 15
# From this shift on a product may need more than 32 bits.
_WIDE_SHIFT = 16


class ConversionError(ValueError):
    """A function that cannot become an integer program, and what to do about it."""


@dataclasses.dataclass(frozen=True)
class Fixed:
    """An array of integers that stands for one of real numbers.

    Attributes:
      q: int8, int16 or int32 array; ``value = scale * q``.
      scale: units of the value per unit of q.
      low: least integer that q can hold, whatever the data.
      high: largest integer that q can hold.
      bits: width up to which results computed from it are kept, 16 or 24.
      weight: whether it is a parameter, perhaps in another shape: products read it in
        its own width.
      channels: what the scale of each channel is of ``scale``, a float64 array that
        broadcasts to q; None where one scale serves all.
    """

    q: Any
    scale: float
    low: int
    high: int
    bits: int = MIDDLE
    weight: bool = False
    channels: np.ndarray | None = None

    @property
    def magnitude(self) -> int:
        """Largest ``|q|``."""
        return max(abs(self.low), abs(self.high))

    @property
    def wide(self) -> jax.Array:
        """Q as int32."""
        wide: jax.Array = self.q.astype(jnp.int32)
        return wide

    def replace(self, **changes: Any) -> Fixed:
        """A copy with other attributes."""
        return dataclasses.replace(self, **changes)


def fixed(q: jax.Array, scale: float, low: int, high: int, bits: int = MIDDLE) -> Fixed:
    """A `Fixed` of an int32 result, in the smallest type that its bounds allow.

    Raises:
      ConversionError: if the bounds are beyond int32.
    """
    prove(low, high, "a result")
    return Fixed(q.astype(smallest(low, high)), scale, low, high, bits)


def smallest(low: int, high: int) -> Any:
    """The smallest of int8, int16 and int32 that holds these integers."""
    for dtype in (jnp.int8, jnp.int16):
        if jnp.iinfo(dtype).min <= low and high <= jnp.iinfo(dtype).max:
            return dtype
    return jnp.int32


def prove(low: int, high: int, what: str) -> None:
    """Checks that integers from ``low`` to ``high`` are int32.

    Raises:
      ConversionError: if they are not.
    """
    if low < -INT32 or high > INT32:
        raise ConversionError(
            f"{what} can lie anywhere in [{low}, {high}], which an int32 does not "
            "hold: sum over fewer values at a time, or give activations fewer bits."
        )


def limit_of(bits: int) -> int:
    """Largest integer of the symmetric grid of a width, ``2**(bits - 1) - 1``."""
    return (1 << (bits - 1)) - 1


def clip(x: Fixed, low: int, high: int) -> Fixed:
    """Saturates, if the bounds do not exclude that there is anything to saturate."""
    if x.low >= low and x.high <= high:
        return x
    q = jnp.clip(x.wide, low, high)
    low, high = min(max(low, x.low), high), max(min(high, x.high), low)
    return fixed(q, x.scale, low, high, x.bits)


def ratio_of(ratio: float) -> tuple[int, int]:
    """Integers ``(multiplier, shift)`` with ``multiplier / 2**shift`` near a ratio.

    Args:
      ratio: positive and finite.

    Returns:
      A multiplier, below 2**15 unless the shift is 0, and a shift.

    Example:
      >>> ratio_of(0.75), ratio_of(2**-7), ratio_of(100_000.0)
      ((3, 2), (1, 7), (100000, 0))
    """
    mantissa, exponent = math.frexp(ratio)
    multiplier = round(mantissa * 2**_MULTIPLIER_BITS)
    shift = _MULTIPLIER_BITS - exponent
    if shift < 0:
        return round(ratio), 0
    while multiplier % 2 == 0 and shift > 0:
        multiplier, shift = multiplier // 2, shift - 1
    return multiplier, shift


def ratios_of(ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`ratio_of` for each channel: multipliers below 2**15, and shifts from 0.

    Args:
      ratios: float64 array, positive and finite; what exceeds 2**15 - 1 counts as that.

    Returns:
      Two int64 arrays of the same shape.

    Example:
      >>> ratios_of(np.array([0.75, 2**-7]))
      (array([3, 1]), array([2, 7]))
    """
    flat = np.minimum(np.asarray(ratios, np.float64), 2**_MULTIPLIER_BITS - 1)
    pairs = [ratio_of(float(ratio)) for ratio in flat.reshape(-1)]
    multipliers, shifts = np.array(pairs, np.int64).T.reshape(2, *flat.shape)
    return multipliers, shifts


def rescale(x: Fixed, scale: float, bits: int = MIDDLE) -> Fixed:
    """The same value on another grid, saturated to a width.

    Args:
      x: a value; if it has a scale for each channel, each gets a multiplier and shift.
      scale: of the grid.
      bits: the width, 2 to 24.

    Returns:
      A `Fixed` of that one scale with ``|q| <= 2**(bits - 1) - 1``.
    """
    limit = limit_of(bits)
    if x.channels is not None:
        return _rescaled_channels(x, scale, limit)
    multiplier, shift = ratio_of(x.scale / scale)
    # What would be saturated afterwards need not be multiplied.
    edge = min(-(-(limit + 1 << shift) // multiplier), INT32)
    if x.magnitude > edge:
        x = clip(x, -edge, edge)
    multiplier, shift = _fitted(multiplier, shift, x.magnitude)
    q = multiply(x.wide, multiplier, shift, x.magnitude)
    low, high = (_rounded(v * multiplier, shift) for v in (x.low, x.high))
    x = clip(Fixed(q, scale, low, high, x.bits), -limit, limit)
    return fixed(x.wide, scale, x.low, x.high, x.bits)


def _rescaled_channels(x: Fixed, scale: float, limit: int) -> Fixed:
    """`rescale` of a value that has a scale for each channel."""
    multipliers, shifts = ratios_of(x.scale / scale * np.asarray(x.channels))
    magnitudes = np.full_like(shifts, x.magnitude)
    q = x.wide
    if np.any(shifts < _WIDE_SHIFT):  # what would be saturated must not overflow
        edges = -(-(limit + 1 << shifts) // multipliers)
        magnitudes = np.minimum(edges, magnitudes)
        if np.any(edges < x.magnitude):
            edges = magnitudes.astype(np.int32)
            q = jnp.clip(q, -edges, edges)
    q = multiply_channels(q, multipliers, shifts, magnitudes)
    ends = [
        [
            _rounded(max(min(end, int(most)), -int(most)) * int(m), int(s))
            for m, s, most in zip(
                multipliers.flat, shifts.flat, magnitudes.flat, strict=True
            )
        ]
        for end in (x.low, x.high)
    ]
    # A halved multiplier may round an end up.
    low, high = min(ends[0]) - 1, max(ends[1]) + 1
    x = clip(Fixed(q, scale, low, high, x.bits), -limit, limit)
    return fixed(x.wide, scale, x.low, x.high, x.bits)


def multiply(
    q: jax.Array, multiplier: Any, shift: int, magnitude: int, most: int | None = None
) -> jax.Array:
    """``⌊q multiplier / 2**shift + 1/2⌋``, however wide the product.

    Args:
      q: int32 array.
      multiplier: from `ratio_of`, or an int32 scalar.
      shift: from `ratio_of`.
      magnitude: largest ``|q|``; the result is below 2**31.
      most: the largest multiplier, if it is traced.
    """
    most = multiplier if most is None else most
    if shift == 0:
        return q if most == 1 else q * multiplier
    if magnitude * most < 2 ** (shift - 1):
        return jnp.zeros_like(q)
    if shift < 32 and magnitude * most + 2 ** (shift - 1) <= INT32:
        narrow: jax.Array = arithmetic.multiply_shift(q, multiplier, shift)
        return narrow
    if shift >= _WIDE_SHIFT:
        _prove_wide(most, shift, magnitude)
        wide: jax.Array = arithmetic.multiply_shift_wide(q, multiplier, shift)
        return wide
    high, low = q >> 15, q & 0x7FFF
    low = arithmetic.multiply_shift(low, multiplier, shift)
    sums: jax.Array = (high * multiplier << (15 - shift)) + low
    return sums


def multiply_channels(
    q: jax.Array,
    multipliers: np.ndarray,
    shifts: np.ndarray,
    magnitudes: np.ndarray | int,
    share: jax.Array | None = None,
) -> jax.Array:
    """`multiply` with a multiplier and a shift for each channel.

    Args:
      q: int32 array.
      multipliers: from `ratios_of`; broadcasts to q.
      shifts: from `ratios_of`.
      magnitudes: largest ``|q|`` of each channel.
      share: a share of the multipliers to take, in units of 2**-15; all by default.

    Returns:
      int32 array.

    Raises:
      ConversionError: if a product might not fit.
    """
    magnitudes = np.broadcast_to(np.int64(magnitudes), shifts.shape)
    if share is not None:  # with all their digits, for they will be fewer
        digits = np.maximum(_MULTIPLIER_BITS - np.frexp(multipliers)[1], 0)
        multipliers, shifts = multipliers << digits, shifts + digits
    is_zero = magnitudes * multipliers * 2.0 < 2.0**shifts
    multipliers = np.where(is_zero, 0, multipliers)
    shifts = np.where(is_zero, _WIDE_SHIFT, shifts)
    whole = shifts < 1
    multipliers = np.where(whole, multipliers << 1, multipliers)
    shifts = np.where(whole, shifts + 1, shifts)
    halves = 1 << np.maximum(shifts - 1, 0)
    wide = (shifts < 1) | (shifts > 31) | (magnitudes * multipliers + halves > INT32)
    if np.any(wide) and np.any(~wide & (multipliers > 0)):
        # A shift of one kind may be too much for the channels of the other.
        narrow, rest = (
            multiply_channels(
                q,
                np.where(chosen, multipliers, 0),
                np.where(chosen, shifts, _WIDE_SHIFT),
                np.where(chosen, magnitudes, 0),
                share,
            )
            for chosen in (~wide, wide)
        )
        mixed: jax.Array = jnp.where(wide, rest, narrow)
        return mixed
    function = arithmetic.multiply_shift
    if np.any(wide):
        function = arithmetic.multiply_shift_wide
        # Digits that the multiplier has room for, before those of q.
        room = np.maximum(_MULTIPLIER_BITS - np.frexp(multipliers)[1], 0)
        room = np.minimum(room, np.maximum(_WIDE_SHIFT - shifts, 0))
        multipliers, shifts = multipliers << room, shifts + room
        up = np.maximum(_WIDE_SHIFT - shifts, 0)
        magnitudes, shifts = magnitudes << up, shifts + up
        prove(-int(magnitudes.max()), int(magnitudes.max()), "a change of grid")
        if np.any(up):
            q = jnp.left_shift(q, up.astype(np.int32))
        if share is None:
            fitted = map(_fitted, multipliers.flat, shifts.flat, magnitudes.flat)
            multipliers, shifts = np.array(list(fitted)).T.reshape(2, *shifts.shape)
        for each in zip(multipliers.flat, shifts.flat, magnitudes.flat, strict=True):
            _prove_wide(*map(int, each))
    factors: Any = multipliers.astype(
        np.int16 if np.all(multipliers < 2**15) else np.int32
    )
    if share is not None:
        factors = multipliers.astype(np.int32) * share >> _MULTIPLIER_BITS
    product: jax.Array = function(q, factors, shifts.astype(np.int8))
    return product


def _fitted(multiplier: int, shift: int, magnitude: int) -> tuple[int, int]:
    """A ratio with as many digits as `arithmetic.multiply_shift_wide` has room for."""
    multiplier, shift, magnitude = int(multiplier), int(shift), int(magnitude)
    while shift > _WIDE_SHIFT and _largest_wide(multiplier, shift, magnitude) > INT32:
        multiplier, shift = multiplier + 1 >> 1, shift - 1
    return multiplier, shift


def _prove_wide(multiplier: int, shift: int, magnitude: int) -> None:
    """Checks that `arithmetic.multiply_shift_wide` stays inside int32."""
    largest = _largest_wide(multiplier, shift, magnitude)
    prove(-largest, largest, "a change of grid")


def _largest_wide(multiplier: int, shift: int, magnitude: int) -> int:
    """A bound of the sums inside `arithmetic.multiply_shift_wide`."""
    half = 1 << max(shift - _WIDE_SHIFT, 0)
    return ((magnitude >> 15) + 1) * multiplier + half


def _rounded(product: int, shift: int) -> int:
    return product if shift == 0 else (product + 2 ** (shift - 1)) >> shift
