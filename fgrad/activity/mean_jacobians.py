r"""Running means of Jacobians that joint pairs teach, and what they predict.

The gradient of example i's loss by an activation is :math:`δ_i J_i`, where δ is its
gradient by the logits. The mean of J over examples, and if wanted over positions, is
learned from perturbations:

.. math::
  \bar J \leftarrow \bar J + \frac{η \sum_i δ_i^T r_i}{g \sum_i |δ_i|^2}, \quad
  \frac{1}{η} = 1 + \frac{\min(t, memory)}{every} + \frac{3 \, size(\bar J_0)}{KB}

with r of `fgrad.activity.joint_step`, the share g of units whose nonlinearity is not
flat, and the number of values :math:`size(\bar J_0)` of one output's Jacobian.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# The least Σ|δ|² and the least g to divide by: when all examples are learned, or all
# units silent, there is nothing to learn from.
_LEAST_SIGNAL = 1e-3
_LEAST_SHARE = 0.05
# The weight of the noise of u in the rate. A pair moves all activations, and the
# differences of its losses hold the noise of all of them.
_NOISE = 3.0


class Teaching(NamedTuple):
    """How fast a mean Jacobian moves.

    Attributes:
      steps: float scalar, steps taken.
      every: steps from one perturbation to the next.
      memory: steps that the mean goes back.
      num_perturbations: K, the number of directions.
    """

    steps: jax.Array
    every: int
    memory: float
    num_perturbations: int

    def rate(self, size: int, examples: int) -> jax.Array:
        """η for a Jacobian of ``size`` values."""
        remembered = jnp.minimum(self.steps, self.memory) / self.every
        noise = _NOISE * size / (self.num_perturbations * examples)
        rate: jax.Array = 1 / (1 + jnp.floor(remembered) + noise)
        return rate


def predicted(
    jacobian: jax.Array, signal: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """The gradient of each example's loss by an activation.

    Args:
      jacobian: [outputs, channels] or [outputs, ..., channels] with all positions.
      signal: δ [examples, outputs].
      shape: of the activation, [examples, ..., channels].
    """
    gradient = jnp.tensordot(signal, jacobian, 1)
    missing = [1] * (len(shape) - gradient.ndim)
    gradient = gradient.reshape(shape[0], *missing, *gradient.shape[1:])
    return jnp.broadcast_to(gradient, shape)


def evidence(jacobian: jax.Array, signal: jax.Array, residual: jax.Array) -> jax.Array:
    """Σ δᵀ r over some examples, in the shape of the mean Jacobian.

    Args:
      jacobian: for its shape.
      signal: δ [examples, outputs].
      residual: r, the shape of the activation.
    """
    size = math.prod(jacobian.shape[1:])
    positions = math.prod(residual.shape[1:]) // max(size, 1)
    residual = residual.reshape(len(signal), positions, *jacobian.shape[1:]).mean(1)
    return jnp.tensordot(signal.T, residual, 1).astype(jacobian.dtype)


def learned(
    jacobian: jax.Array,
    signal: jax.Array,
    evidence: jax.Array,
    share: jax.Array,
    teaching: Teaching,
) -> jax.Array:
    """The running mean after a step; without evidence it stays.

    Args:
      jacobian: before it.
      signal: δ [examples, outputs].
      evidence: of all examples.
      share: of units whose nonlinearity is not flat.
      teaching: how fast the mean moves.
    """
    seen = jnp.maximum(jnp.sum(jnp.square(signal)), _LEAST_SIGNAL)
    change = evidence / (seen * jnp.maximum(share, _LEAST_SHARE))
    rate = teaching.rate(math.prod(jacobian.shape[1:]), len(signal))
    return jacobian + (rate * change).astype(jacobian.dtype)
