r"""Elementwise functions by tables and by powers of two.

A function of a 16-bit value has a table of up to 257 entries over the values that
calibration saw, with straight lines in between: with entries h apart the error is at
most :math:`h^2 \max|f''| / 8` and one unit of the result. With up to 256 possible
values every one has its entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fgrad.integer import arithmetic
from fgrad.integer.ranges import FINE, MIDDLE, Fixed, clip, fixed, limit_of, rescale

_ENTRIES = 256
_erf = np.vectorize(math.erf, otypes=[float])
_erfc = np.vectorize(math.erfc, otypes=[float])

# By the name of the primitive.
FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "tanh": np.tanh,
    "logistic": lambda x: 0.5 + 0.5 * np.tanh(0.5 * x),
    "erf": _erf,
    "erfc": _erfc,
    "log1p": lambda x: np.log1p(np.maximum(x, -1 + 2.0**-16)),
    "expm1": np.expm1,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "atan": np.arctan,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "asinh": np.arcsinh,
    "cbrt": np.cbrt,
    "floor": np.floor,
    "ceil": np.ceil,
    "round": np.rint,
}


def apply(
    x: Fixed,
    function: Callable[[np.ndarray], np.ndarray],
    low: float,
    high: float,
    scale: float,
) -> Fixed:
    """A function of a value, by a table.

    Args:
      x: the value, of up to 16 bits.
      function: from float64 arrays to float64 arrays.
      low: where the table begins; lower values count as this one.
      high: where it ends.
      scale: of the result.

    Returns:
      A `Fixed` of 16 bits.
    """
    first = min(max(x.low, math.floor(low / x.scale)), x.high)
    last = max(min(x.high, math.ceil(high / x.scale)), first)
    shift = max(0, math.ceil(math.log2(max(last - first, 1) / _ENTRIES)))
    count = max(1, -(-(last - first) // 2**shift))
    places = x.scale * (first + 2**shift * np.arange(count + 1.0))
    limit = limit_of(MIDDLE)
    with np.errstate(all="ignore"):
        values = np.nan_to_num(function(places)) / scale
    table = np.clip(np.rint(values), -limit, limit).astype(np.int32)
    q = arithmetic.interpolate(table, clip(x, first, last).wide, first, shift)
    return fixed(q, scale, int(table.min()), int(table.max()))


def exponential(x: Fixed, base: float, scale: float) -> Fixed:
    """``2**(base * value)`` on a grid whose scale is a power of two.

    Args:
      x: the value.
      base: binary logarithm of the base.
      scale: of the result.
    """
    unit = 2.0**-arithmetic.EXPONENT_BITS
    t = rescale(x.replace(scale=x.scale * base), unit, FINE)
    return _power_of_two(t.wide, scale)


def logarithm(x: Fixed) -> Fixed:
    """The natural logarithm; what rounds to zero counts as one unit."""
    offset = round(math.log2(x.scale) * 2**arithmetic.LOG_BITS)
    q = arithmetic.log2(jnp.maximum(x.wide, 1)) + offset
    low, high = offset, offset + (31 << arithmetic.LOG_BITS)
    return fixed(q, math.log(2) * 2.0**-arithmetic.LOG_BITS, low, high)


def power(x: Fixed, exponent: float, scale: float) -> Fixed:
    """The square root, or its reciprocal, by the logarithm.

    Args:
      x: the value; what rounds to zero or below counts as one unit under -0.5.
      exponent: 0.5 or -0.5.
      scale: of the result, a power of two.
    """
    offset = round(math.log2(x.scale) * 2**arithmetic.LOG_BITS)
    t = arithmetic.log2(jnp.maximum(x.wide, 1)) + offset
    t = (t if exponent > 0 else -t) + 1 >> 1
    root = _power_of_two(t, scale)
    if exponent < 0:
        return root
    return root.replace(q=jnp.where(x.wide > 0, root.q, 0))


def _power_of_two(t: jax.Array, scale: float) -> Fixed:
    """``2**(t / 2**16)``, for t of up to 24 bits."""
    top = arithmetic.SHORT_BITS + round(math.log2(scale))
    limit = arithmetic.MAX_SHORT_EXPONENT << arithmetic.EXPONENT_BITS
    below = jnp.clip((top << arithmetic.EXPONENT_BITS) - t, 0, limit)
    high = limit_of(MIDDLE)
    return fixed(jnp.minimum(arithmetic.exp2_short(below), high), scale, 0, high)
