r"""Losses in integers, fine enough to tell two sides of a perturbation apart.

.. math:: L = \sum_b \log_2 \Big( \sum_c 2^{-t_{bc}} \Big) + t_{b y_b}, \quad
  t_{bc} = (\max_{c'} z_{bc'} - z_{bc}) \log_2 e
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fgrad.integer import arithmetic
from fgrad.integer.ranges import FINE, INT32, ConversionError, Fixed, limit_of, rescale

# loss(outputs, labels) -> a scalar: what the program returns, and what is in the batch
Loss = Callable[..., Fixed]


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
    if logits.q.ndim != 2:
        raise ConversionError(
            f"softmax_cross_entropy takes logits [batch, classes], got the shape "
            f"{logits.q.shape}; give train_step another loss=."
        )
    batch, classes = logits.q.shape
    z = logits.wide
    span = logits.high - logits.low
    distance = Fixed(
        jnp.max(z, axis=1, keepdims=True) - z,
        logits.scale * math.log2(math.e),
        0,
        span,
    )
    unit = 2.0**-arithmetic.EXPONENT_BITS
    t = rescale(distance, unit, FINE)
    chosen = jnp.arange(classes, dtype=labels.dtype) == labels[:, None]
    own = jnp.sum(jnp.where(chosen, t.wide, 0), axis=1)

    largest = arithmetic.MAX_EXPONENT << arithmetic.EXPONENT_BITS
    powers = arithmetic.exp2_negative(jnp.minimum(t.wide, largest))
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


def sum_of_outputs(outputs: Fixed, labels: jax.Array | None = None) -> Fixed:
    """The sum of what the program returns, for a function that computes its loss.

    The differences of such a loss are no finer than its 16 bits.
    """
    del labels
    bound = outputs.q.size * outputs.magnitude
    return Fixed(jnp.sum(outputs.wide), outputs.scale, -bound, bound)
