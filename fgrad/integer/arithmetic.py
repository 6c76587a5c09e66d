r"""Exact integer functions on int32 arrays: no float, no 64-bit type.

Multiplication by a ratio is a multiplication by an integer and a shift to the right,

.. math:: \lfloor q \cdot m / 2^s + 1/2 \rfloor,

and exponentials and logarithms have base two, so that the whole part of an exponent is
a shift. A table of 256 intervals gives the rest, or a polynomial where 16 bits are
enough: XLA makes a loop of its own for every look-up.

The functions that are compiled by themselves (`multiply_shift`, `exact_dot`, ...) stay
one equation in a traced program. The writer of C knows them by name and puts a function
or a loop in their place.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Fractional bits of an exponent, of a power of two, and of a logarithm.
EXPONENT_BITS, POWER_BITS, LOG_BITS = 16, 22, 16
# Exponents at and beyond which a power of two is zero.
MAX_EXPONENT = 31
# Of `exp2_short`: fractional bits of its result, and the largest exponent.
SHORT_BITS, MAX_SHORT_EXPONENT = 15, 29

# A maximum over no more is not taken apart.
_FEW = 32

_INTERVALS = np.arange(257) / 256
POWERS = np.rint(2.0 ** (POWER_BITS - _INTERVALS)).astype(np.int32)
LOGS = np.rint(np.log2(1 + _INTERVALS) * 2 ** (LOG_BITS + 4)).astype(np.int32)


@jax.jit
def multiply_shift(q: jax.Array, multiplier: Any, shift: Any) -> jax.Array:
    """``⌊q m / 2**s + 1/2⌋`` where ``|q| m + 2**(s - 1)`` is below 2**31.

    Args:
      q: int32 array.
      multiplier: m, from 1.
      shift: s, 1 to 31.

    Example:
      >>> multiply_shift(jnp.array([5, -5, 6]), 3, 2)  # 3.75, -3.75, 4.5
      Array([ 4, -4,  5], dtype=int32)
    """
    half = jnp.left_shift(jnp.int32(1), jnp.int32(shift) - 1)
    rounded: jax.Array = (q * jnp.int32(multiplier) + half) >> jnp.int32(shift)
    return rounded


@jax.jit
def multiply_shift_wide(q: jax.Array, multiplier: Any, shift: Any) -> jax.Array:
    """`multiply_shift` of any q whose product may need 46 bits.

    Args:
      q: int32 array, ``|q| m + 2**(s - 1) < 2**46 - 2**30``.
      multiplier: m, 1 to 2**15 - 1.
      shift: s, 16 to 46.

    Example:
      >>> multiply_shift_wide(jnp.array([2_000_000_000]), 30_000, 31)
      Array([27940], dtype=int32)
    """
    multiplier, shift = jnp.int32(multiplier), jnp.int32(shift)
    # q m = 2**15 (high m) + low m, and half of 2**s is a multiple of 2**15.
    high, low = q >> 15, q & 0x7FFF
    half = jnp.left_shift(jnp.int32(1), shift - 16)
    sums = high * multiplier + (low * multiplier >> 15) + half
    rounded: jax.Array = sums >> (shift - 15)
    return rounded


@jax.jit
def exp2_negative(t: jax.Array) -> jax.Array:
    r"""Powers of two, ``2**(-t / 2**16)`` in units of 2**-22.

    Args:
      t: int32 array, 0 to 31 * 2**16.

    Returns:
      int32 array, 0 to 2**22; the error is below 5 units.

    Example:
      >>> exp2_negative(jnp.array([0, 2**15, 2**16])) / 2**22
      Array([1.       , 0.7071068, 0.5      ], dtype=float32)
    """
    whole, fraction = t >> EXPONENT_BITS, t & 0xFFFF
    index, rest = fraction >> 8, fraction & 0xFF
    table = jnp.asarray(POWERS)
    here, there = _read(table, index), _read(table, index + 1)
    power = here + (((there - here) * rest + 128) >> 8)
    # Rounded, for what is below one half of a unit is zero.
    half = jnp.where(whole > 0, jnp.left_shift(1, jnp.maximum(whole - 1, 0)), 0)
    return (power + half) >> whole


@jax.jit
def exp2_short(t: jax.Array) -> jax.Array:
    r"""Powers of two, ``2**(-t / 2**16)`` in units of 2**-15, without a table.

    With f the fraction of t less one half it is a polynomial,

    .. math:: 2^{-f-1/2} ≈ c_0 + f (c_1 + f (c_2 + f (c_3 + f c_4))),

    whose coefficients have 17, 16, 18, 20 and 22 fractional bits, so that no product
    leaves int32.

    Args:
      t: int32 array, 0 to 29 * 2**16.

    Returns:
      int32 array, 0 to 2**15; the error is below 0.9 units.

    Example:
      >>> exp2_short(jnp.array([0, 2**15, 2**16]))
      Array([32768, 23171, 16384], dtype=int32)
    """
    whole, f = t >> EXPONENT_BITS, (t & 0xFFFF) - 0x8000
    power = -41430 + (28682 * f >> 18)
    power = 44528 + (power * f >> 18)
    power = -32120 + (power * f + 0x20000 >> 18)
    power = 92682 + (power * f + 0x4000 >> 15)
    half = jnp.left_shift(jnp.int32(2), whole)
    return (power + half) >> (whole + 2)


@jax.jit
def log2(x: jax.Array) -> jax.Array:
    r"""Logarithms, ``log2(x)`` in units of 2**-16.

    Args:
      x: int32 array, from 1.

    Returns:
      int32 array, 0 to 31 * 2**16; the error is below 0.8 units.

    Example:
      >>> log2(jnp.array([1, 2, 10])) / 2**16
      Array([0.     , 1.     , 3.32193], dtype=float32)
    """
    zeros = lax.clz(x)
    mantissa = jnp.left_shift(x, zeros - 1)  # 2**30 to 2**31
    index, rest = (mantissa >> 22) & 0xFF, (mantissa >> 8) & 0x3FFF
    table = jnp.asarray(LOGS)
    here, there = _read(table, index), _read(table, index + 1)
    fraction = here + (((there - here) * rest + 0x2000) >> 14)
    return ((31 - zeros) << LOG_BITS) + ((fraction + 8) >> 4)


@jax.jit
def max_of_rows(x: jax.Array) -> jax.Array:
    """The largest value along the last axis.

    Halves are compared first, all at once: XLA has no fast loop for the maximum of
    integers in a row.

    Args:
      x: integer array, with one element or more along that axis.

    Example:
      >>> max_of_rows(jnp.arange(80).reshape(2, 40))
      Array([39, 79], dtype=int32)
    """
    while (count := x.shape[-1]) > _FEW:
        half = -(-count // 2)  # an odd one is in both
        x = jnp.maximum(x[..., :half], x[..., count - half :])
    return jnp.max(x, axis=-1)


def interpolate(table: np.ndarray, q: jax.Array, low: int, shift: int) -> jax.Array:
    """A table of values at ``low, low + 2**shift, ...``, linear in between.

    Args:
      table: int32 [n + 1].
      q: int32 array, ``low`` to ``low + n 2**shift``.
      low: where the table begins.
      shift: binary logarithm of the distance of its entries; 0 for an entry each.

    Returns:
      int32 array, rounded to nearest.
    """
    entries = jnp.asarray(table, jnp.int32)
    offset = q - low
    if shift == 0:
        return _read(entries, offset)
    index = jnp.minimum(offset >> shift, len(table) - 2)
    rest = offset - (index << shift)
    values = np.asarray(table, np.int64)
    rises = np.diff(values)
    if np.all(np.abs(values) < 2**15) and np.all(np.abs(rises) < 2**15):
        # Both in one word: XLA makes a loop of its own for every look-up.
        pairs = jnp.asarray((values[:-1] << 16 | rises & 0xFFFF).astype(np.int32))
        pair = _read(pairs, index)
        here, rise = pair >> 16, jnp.left_shift(pair, 16) >> 16
    else:
        here = _read(entries, index)
        rise = _read(entries, index + 1) - here
    return here + ((rise * rest + (1 << (shift - 1))) >> shift)


def _read(table: jax.Array, index: jax.Array) -> jax.Array:
    return table.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


# ------------------------------------------------------------------------- products


@functools.partial(jax.jit, static_argnames="dimension_numbers")
def exact_dot(lhs: jax.Array, rhs: jax.Array, *, dimension_numbers: Any) -> jax.Array:
    """``lax.dot_general`` of int8 and int16 in int32, where the sums fit.

    With ``w = 256 h + (l + 128)``, h and l are int8 for every int16, and the product
    is ``256 (x · h) + (x · l) + 128 Σ x``: two products that int8 hardware has.

    Args:
      lhs: int8 array x.
      rhs: int16 array w.
      dimension_numbers: as for ``jax.lax.dot_general``, nested tuples.

    Returns:
      int32 array, exact as long as the result is below 2**31.

    Example:
      >>> x, w = jnp.array([[3, -2]], jnp.int8), jnp.array([[1000], [32767]], jnp.int16)
      >>> exact_dot(x, w, dimension_numbers=(((1,), (0,)), ((), ())))
      Array([[-62534]], dtype=int32)
    """
    high, low = _dot_limbs(lhs, rhs, dimension_numbers)
    return (high << 8) + low


@functools.partial(jax.jit, static_argnames="dimension_numbers")
def coarse_dot(lhs: jax.Array, rhs: jax.Array, *, dimension_numbers: Any) -> jax.Array:
    """``⌊exact_dot / 256 + 1/2⌋``, for sums of up to 2**17 terms that do not fit.

    Example:
      >>> x, w = jnp.full((1, 2), 127, jnp.int8), jnp.full((2, 1), 32767, jnp.int16)
      >>> coarse_dot(x, w, dimension_numbers=(((1,), (0,)), ((), ())))
      Array([[32511]], dtype=int32)
    """
    high, low = _dot_limbs(lhs, rhs, dimension_numbers)
    return high + ((low + 128) >> 8)


def _dot_limbs(
    lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any
) -> tuple[jax.Array, jax.Array]:
    """``x · (w >> 8)`` and ``x · (w & 255)``."""
    product = functools.partial(
        lax.dot_general,
        dimension_numbers=dimension_numbers,
        preferred_element_type=jnp.int32,
    )
    high, low = limbs(rhs)
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    # A third product, since XLA would compute x again inside the loop of a sum.
    ones = jnp.ones([lhs.shape[a] for a in lhs_contract], jnp.int8)
    axes = (tuple(lhs_contract), tuple(range(ones.ndim))), ((), ())
    sums = lax.dot_general(lhs, ones, axes, preferred_element_type=jnp.int32)
    # The free axes of the left come after those of the batch, then those of the right.
    rest = [a for a in range(lhs.ndim) if a not in lhs_contract]
    order = [*lhs_batch, *(a for a in rest if a not in lhs_batch)]
    sums = jnp.transpose(sums, [rest.index(a) for a in order])
    sums = sums.reshape(
        *sums.shape, *[1] * (rhs.ndim - len(rhs_contract) - len(rhs_batch))
    )
    return product(lhs, high), product(lhs, low) + 128 * sums


def limbs(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The int8 h and l of int16 weights ``256 h + l + 128``."""
    w = w.astype(jnp.int32)
    return (w >> 8).astype(jnp.int8), ((w & 255) - 128).astype(jnp.int8)
