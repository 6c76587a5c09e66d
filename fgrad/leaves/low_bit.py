r"""Weights of few bits that learn: the perturbation and the update are grid steps.

Below some 10 bits, equation (6) rounds ε to zero and equation (8) the update. Here one
sparse integer vector is both the probe and the update, and its density is the learning
rate, so there is nothing left to round:

.. math::
  r = \frac{η}{m Δ_w}, \quad M = \max(1, ⌈r⌉), \quad
  z_i ∈ \{-M, 0, M\},\; P(z_i ≠ 0) = (r / M)^2

  c_i = sign[L(clip(w_q + κ z_i)) - L(clip(w_q - κ z_i))], \quad
  w_q ← clip(w_q - \sum_i c_i z_i)

z has zero mean and variance r², so that an update is as long, on average, as one of
sign-m-SPSA with learning rate η. κ widens the probe only. docs/low_bit.md says why
density acts as a learning rate.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fgrad import _checks, perturbations
from fgrad.leaves.epsilon import Schedule, at, check, peak_of

# (first, largest) widening κ by the bits of the weights, found in runs on digits.
PROBES = {8: (4, 16), 6: (4, 8), 4: (2, 2)}

# z is an int8, and so is M.
MAX_STEPS = 127

# A random word for each value: one bit is the sign, 31 decide whether it is zero.
WORDS = perturbations.Perturbation(
    "random words", 1.0, 1, lambda words: words, perturbations.counter_hash
)


@dataclasses.dataclass(frozen=True)
class OnGrid:
    """How weights of few bits are trained; see `on_grid`.

    Attributes:
      learning_rate: η, or an optax schedule of it.
      probe: (first, largest) widening κ, or None for those of `PROBES`.
      below: leaves of fewer bits are trained this way.
      peak: the largest learning rate, relative to which κ widens.
    """

    learning_rate: Schedule
    probe: tuple[int, int] | None
    below: int
    peak: float | jax.Array

    def at(self, count: jax.Array, num_perturbations: int) -> Sparsity:
        """The density of z in step ``count``, with so many perturbations."""
        now = at("learning_rate", self.learning_rate, count)
        # The peak was computed by another program and may differ in its last bit.
        peak = jnp.maximum(now, self.peak * (1 + 2.0**-20))
        widening = jnp.where(now > 0, peak / jnp.where(now > 0, now, 1), jnp.inf)
        rms = now / num_perturbations
        return Sparsity(rms, widening, self.probe, self.below)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("rms", "widening"),
    meta_fields=("widths", "below"),
)
@dataclasses.dataclass(frozen=True)
class Sparsity:
    """The density of z in one step.

    Attributes:
      rms: float32 scalar, η / m: the root mean square of z in units of the weights.
      widening: float32 scalar, how much smaller η is than at its peak.
      widths: (first, largest) widening κ, or None for those of `PROBES`.
      below: leaves of fewer bits are trained this way.
    """

    rms: jax.Array
    widening: jax.Array
    widths: tuple[int, int] | None
    below: int

    def sample(self, words: jax.Array, scale: jax.Array) -> jax.Array:
        """int8 z of random uint32 words, for weights whose step is ``scale``."""
        largest, probability = _size(self.rms, scale)
        threshold = (probability * 2.0**31).astype(jnp.uint32)
        sign = 1 - 2 * (words & 1).astype(jnp.int8)
        return jnp.where(words >> 1 < threshold, sign * largest, 0).astype(jnp.int8)

    def probe(self, bits: int) -> jax.Array:
        """int32 κ for weights of ``bits`` bits."""
        first, largest = self.widths or default_probe(bits)
        widened = jnp.floor(first * jnp.minimum(self.widening, 2.0**20))
        return jnp.clip(widened, 1, largest).astype(jnp.int32)


def _size(rms: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """M as int8, and the probability that z is not zero."""
    r = jnp.minimum(rms / scale, MAX_STEPS)
    largest = jnp.maximum(jnp.ceil(r), 1)
    return largest.astype(jnp.int8), jnp.square(r / largest)


def default_probe(bits: int) -> tuple[int, int]:
    """The entry of `PROBES` for as many bits, or for the next fewer."""
    known = [b for b in PROBES if b <= bits] or [min(PROBES)]
    return PROBES[max(known)]


def probe_qvalue(
    qvalue: jax.Array, z: jax.Array, widening: jax.Array, limit: int
) -> jax.Array:
    """``clip(w_q + κ z)``, exact in int32.

    Args:
      qvalue: int8 or int16 w_q.
      z: int8, of the same shape.
      widening: int32 κ with the sign of the perturbation, of magnitude up to 2**20.
      limit: the largest integer of the grid.

    Returns:
      An array like ``qvalue``.

    Example:
      >>> probe_qvalue(jnp.array([5, 126], jnp.int8), jnp.array([-1, 1]), 4, 127)
      Array([  1, 127], dtype=int8)
    """
    moved = qvalue.astype(jnp.int32) + widening * z.astype(jnp.int32)
    return jnp.clip(moved, -limit, limit).astype(qvalue.dtype)


def on_grid(
    learning_rate: Schedule,
    *,
    probe: tuple[int, int] | None = None,
    below: int = 16,
) -> OnGrid:
    r"""Trains `QTensor` leaves of few bits by sparse integer steps.

    It is the ``low_bit`` option of ``fixed_point_forward_grad``, and what
    ``fgrad.qzo_ff`` does by default. There is no state beside the weights, no epsilon
    and no rounding; leaves of more bits and floats are trained as ever, by the same
    evaluations of the loss.

    Args:
      learning_rate: η in units of the weights, or an optax schedule: that of the
        ``optax.sgd`` that follows. The gradient of these leaves is
        ``Δ_w / η Σᵢ cᵢ zᵢ``, so that SGD and ``quantized_update`` take the whole
        number of steps ``Σᵢ cᵢ zᵢ`` exactly.
      probe: (first, largest) factor κ by which the probe exceeds the update: the first
        at the peak of the learning rate, and more in proportion as the rate is lower,
        up to the largest. By default (4, 16) from 8 bits, (4, 8) from 6,
        (2, 2) below.
      below: leaves of fewer bits are trained this way.

    Returns:
      An `OnGrid`.

    Raises:
      TypeError, ValueError: for a learning rate that is not positive, or an
        impossible probe.

    Example:
      >>> on_grid(1e-3).probe is None
      True
    """
    if probe is not None:
        probe = _checked(probe)
    below = _checks.integer("below, in bits,", below, 3, 17)
    if callable(learning_rate):
        peak = peak_of("learning_rate", learning_rate)
    else:
        check("learning_rate", learning_rate)
        peak = learning_rate
    return OnGrid(learning_rate, probe, below, peak)


def _checked(probe: Any) -> tuple[int, int]:
    try:
        first, largest = probe
        first = _checks.integer("first", first, 1, 2**15)
        return first, _checks.integer("largest", largest, first, 2**15)
    except (TypeError, ValueError):
        raise ValueError(
            "probe must be two integers (first, largest) with 1 <= first <= "
            f"largest <= 32768, got {probe!r}; the default is {PROBES[8]}."
        ) from None
