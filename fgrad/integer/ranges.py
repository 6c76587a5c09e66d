r"""Integers that stand for real numbers, and the proof that none of them overflows.

A value of the float program becomes ``value = scale * q``. The scale is a Python
number, found by calibration when the program is built, and so are two bounds of q: what
the operations before it can produce whatever the data are. An operation whose result
might leave int32 is an error of the conversion, not of a run.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fgrad.integer import arithmetic

INT32 = 2**31 - 1
# Width of what lies between products, and of what sums over many values leave.
MIDDLE, FINE = 16, 24
# Bits of the multiplier of a rescaling; its relative error is at most 2**-15.
_MULTIPLIER_BITS = 15


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
    """

    q: Any
    scale: float
    low: int
    high: int
    bits: int = MIDDLE
    weight: bool = False

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


def rescale(x: Fixed, scale: float, bits: int = MIDDLE) -> Fixed:
    """The same value on another grid, saturated to a width.

    Args:
      x: a value.
      scale: of the grid.
      bits: the width, 2 to 24.

    Returns:
      A `Fixed` of that scale with ``|q| <= 2**(bits - 1) - 1``.
    """
    limit = limit_of(bits)
    multiplier, shift = ratio_of(x.scale / scale)
    # What would be saturated afterwards need not be multiplied.
    edge = min(-(-(limit + 1 << shift) // multiplier), INT32)
    if x.magnitude > edge:
        x = clip(x, -edge, edge)
    q = multiply(x.wide, multiplier, shift, x.magnitude)
    low, high = (_rounded(v * multiplier, shift) for v in (x.low, x.high))
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
    if shift >= 16:
        wide: jax.Array = arithmetic.multiply_shift_wide(q, multiplier, shift)
        return wide
    high, low = q >> 15, q & 0x7FFF
    low = arithmetic.multiply_shift(low, multiplier, shift)
    sums: jax.Array = (high * multiplier << (15 - shift)) + low
    return sums


def _rounded(product: int, shift: int) -> int:
    return product if shift == 0 else (product + 2 ** (shift - 1)) >> shift
