r"""Losses in integers, fine enough to tell two sides of a perturbation apart.

.. math:: L = \sum_b \log_2 \Big( \sum_c 2^{-t_{bc}} \Big) + t_{b y_b}, \quad
  t_{bc} = (\max_{c'} z_{bc'} - z_{bc}) \log_2 e
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fgrad.integer import arithmetic
from fgrad.integer.ranges import (
    FINE,
    INT32,
    MIDDLE,
    ConversionError,
    Fixed,
    fixed,
    limit_of,
    rescale,
)

# loss(outputs, labels) -> a scalar: what the program returns, and what is in the batch
Loss = Callable[..., Fixed]


# Fractional bits of a probability.
PROBABILITY_BITS = 15


def softmax_cross_entropy(logits: Fixed, labels: jax.Array) -> Fixed:
    """The sum of the cross-entropies of a batch.

    One unit is ``2**-16 ln 2`` (1.06e-5) for batches of up to 127 examples, whatever
    their logits; it doubles as often as larger batches need for the sum to fit. The
    error of an example is below 3.5 of these units, beside a factor of all logits that
    is within 2**-15 of 1.

    Args:
      logits: [batch, classes].
      labels: integers [batch].

    Returns:
      A `Fixed` int32 scalar.

    Raises:
      ConversionError: if logits have another number of axes.
    """
    _check(logits)
    batch, classes = logits.q.shape
    t, powers = _powers(logits)
    own = jnp.sum(jnp.where(_is_own(classes, labels), t.wide, 0), axis=1)
    # 2**22 each: 256 of them stay below 2**31.
    drop = max(0, math.ceil(math.log2(classes / 256)))
    total = jnp.sum(powers >> drop, axis=1)
    offset = (arithmetic.POWER_BITS - drop) << arithmetic.LOG_BITS
    losses = own + arithmetic.log2(total) - offset

    high = min(t.high, limit_of(FINE)) + (math.ceil(math.log2(classes)) + 1 << 16)
    coarser = max(0, math.ceil(math.log2(batch * high / INT32)))
    if coarser:
        losses = arithmetic.multiply_shift(losses, 1, coarser)
    bound = batch * ((high >> coarser) + 1)
    scale = math.log(2) * 2.0 ** (coarser - arithmetic.LOG_BITS)
    return Fixed(jnp.sum(losses), scale, -batch, bound)


def softmax_error(logits: Fixed, labels: jax.Array) -> Fixed:
    r"""The gradient of `softmax_cross_entropy` at the logits, softmax minus one-hot.

    .. math:: e_{bc} = 2^{-t_{bc}} / \sum_{c'} 2^{-t_{bc'}} - [c = y_b]

    One unit is 2**-15. The error of a value is below 2 units, and a factor of the
    probability that is within ``classes * 2**-16`` of 1.

    Args:
      logits: [batch, up to 2**15 classes].
      labels: integers [batch].

    Returns:
      A `Fixed` of 16 bits [batch, classes].

    Raises:
      ConversionError: if logits have another number of axes, or too many classes.
    """
    _check(logits)
    classes = logits.q.shape[1]
    if classes > 1 << PROBABILITY_BITS:
        raise ConversionError(
            f"softmax_error divides by a sum over up to 2**15 classes, got {classes}; "
            "train such a head by perturbations."
        )
    _, powers = _powers(logits)
    drop = arithmetic.POWER_BITS - PROBABILITY_BITS
    powers = (powers + (1 << (drop - 1))) >> drop
    total = jnp.sum(powers, axis=1, keepdims=True)
    # 2**30 and half of a sum of up to 2**15 * 2**15.
    share = lax.div((powers << PROBABILITY_BITS) + (total >> 1), total)
    own = _is_own(classes, labels).astype(jnp.int32) << PROBABILITY_BITS
    limit = limit_of(MIDDLE)
    error = jnp.clip(share - own, -limit, limit)
    return fixed(error, 2.0**-PROBABILITY_BITS, -limit, limit)


def _check(logits: Fixed) -> None:
    if logits.q.ndim != 2:
        raise ConversionError(
            f"a softmax is taken of logits [batch, classes], got the shape "
            f"{logits.q.shape}; give train_step another loss=."
        )


def _powers(logits: Fixed) -> tuple[Fixed, jax.Array]:
    """Distances t from the largest logit in units of 2**-16, and 2**(22 - t)."""
    z = logits.wide
    distance = Fixed(
        jnp.max(z, axis=1, keepdims=True) - z,
        logits.scale * math.log2(math.e),
        0,
        logits.high - logits.low,
    )
    t = rescale(distance, 2.0**-arithmetic.EXPONENT_BITS, FINE)
    largest = arithmetic.MAX_EXPONENT << arithmetic.EXPONENT_BITS
    return t, arithmetic.exp2_negative(jnp.minimum(t.wide, largest))


def _is_own(classes: int, labels: jax.Array) -> jax.Array:
    own: jax.Array = jnp.arange(classes, dtype=labels.dtype) == labels[:, None]
    return own


def sum_of_outputs(outputs: Fixed, labels: jax.Array | None = None) -> Fixed:
    """The sum of what the program returns, for a function that computes its loss.

    The differences of such a loss are no finer than its 16 bits.
    """
    del labels
    bound = outputs.q.size * outputs.magnitude
    return Fixed(jnp.sum(outputs.wide), outputs.scale, -bound, bound)
