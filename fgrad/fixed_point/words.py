"""64-bit unsigned integers as two 32-bit words, for machines without a 64-bit type.

A number ``x = high * 2**32 + low`` is the pair ``(high, low)`` of uint32 arrays. XLA
gives 0 for a shift by 32 or more, which every shift here allows for.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def multiply(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The 64-bit product of two uint32, as (high, low) words."""
    a_high, a_low = a >> 16, a & 0xFFFF
    b_high, b_low = b >> 16, b & 0xFFFF
    middle = a_high * b_low + (a_low * b_low >> 16)  # < 2**32
    middle_low = (middle & 0xFFFF) + a_low * b_high  # < 2**32
    high = a_high * b_high + (middle >> 16) + (middle_low >> 16)
    return high, a * b


def shift_right(
    high: jax.Array, low: jax.Array, shift: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``(high, low) >> shift`` for shift in [0, 63]."""
    carried = jnp.where(shift < 32, _left(high, 32 - shift), high >> _over(shift))
    return _right(high, shift), _right(low, shift) | carried


def shift_left(
    high: jax.Array, low: jax.Array, shift: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``(high, low) << shift`` for shift in [0, 63]."""
    far = jnp.where(shift >= 32, low << jnp.where(shift >= 32, shift - 32, 0), 0)
    carried = jnp.where(shift > 0, low >> jnp.where(shift > 0, 32 - shift, 0), 0)
    near = (high << jnp.minimum(shift, 31)) | carried
    wide = shift >= 32
    return jnp.where(wide, far, near), jnp.where(wide, 0, low << jnp.minimum(shift, 31))


def low_mask(count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(high, low) words whose lowest ``count`` bits are set, count in [0, 62]."""
    ones = jnp.uint32(0xFFFFFFFF)
    mask_low = jnp.where(count < 32, _left(jnp.uint32(1), count) - 1, ones)
    mask_high = jnp.where(count > 32, _left(jnp.uint32(1), _over(count)) - 1, 0)
    return mask_high.astype(jnp.uint32), mask_low


def sum_of_squares(q: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Exact ``Σ q²`` as the (high, low) words of a 64-bit integer.

    Args:
      q: integers of magnitude up to 2**15, of any dtype that holds them.
      axes: the axes to sum over.

    Returns:
      Two uint32 arrays without those axes.

    Example:
      >>> sum_of_squares(jnp.full(8, 2**15), (0,))  # 2**33
      (Array(2, dtype=uint32), Array(0, dtype=uint32))
    """
    squares = jnp.square(q.astype(jnp.int32)).astype(jnp.uint32)

    def add(x: Any, y: Any) -> Any:
        low = x[1] + y[1]
        return x[0] + y[0] + (low < x[1]).astype(jnp.uint32), low

    zero = jnp.uint32(0)
    high, low = lax.reduce((jnp.zeros_like(squares), squares), (zero, zero), add, axes)
    return high, low


def square_root(high: jax.Array, low: jax.Array) -> jax.Array:
    """Square root of 64-bit integers, by an integer root of 32 bits.

    The integer is shifted up to fill its two words first, so that the root is right to
    2**-31 of itself for small sums as well.

    Args:
      high: uint32, the upper words.
      low: uint32, the lower words.

    Returns:
      float32 array, the root rounded once from 32 bits.

    Example:
      >>> square_root(jnp.uint32(2), jnp.uint32(0)) == 2**16.5
      Array(True, dtype=bool)
    """
    zeros = jnp.where(high > 0, lax.clz(high), 32 + lax.clz(low)).astype(jnp.uint32)
    shift = jnp.minimum(zeros & ~jnp.uint32(1), 62)
    root = integer_root(*shift_left(high, low, shift))
    half = (shift >> 1).astype(jnp.int32)
    return jnp.ldexp(root.astype(jnp.float32), -half)


def integer_root(high: jax.Array, low: jax.Array) -> jax.Array:
    """``⌊√x⌋`` of the 64-bit integers ``x = high · 2**32 + low``, as uint32.

    Example:
      >>> integer_root(jnp.uint32(0), jnp.uint32(99))
      Array(9, dtype=uint32)
    """

    def try_bit(i: Any, root: jax.Array) -> jax.Array:
        trial = root | (jnp.uint32(2**31) >> jnp.asarray(i).astype(jnp.uint32))
        square_high, square_low = multiply(trial, trial)
        fits = (square_high < high) | ((square_high == high) & (square_low <= low))
        return jnp.where(fits, trial, root)

    root: jax.Array = lax.fori_loop(0, 32, try_bit, jnp.zeros_like(low))
    return root


def _over(shift: jax.Array) -> jax.Array:
    return jnp.where(shift >= 32, shift - 32, 0)


def _right(x: jax.Array, shift: jax.Array) -> jax.Array:
    return jnp.where(shift < 32, x >> jnp.minimum(shift, 31), 0)


def _left(x: jax.Array, shift: jax.Array) -> jax.Array:
    return jnp.where(shift < 32, x << jnp.minimum(shift, 31), 0)
