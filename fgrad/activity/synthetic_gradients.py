r"""Synthetic gradients: gradients predicted from the perturbations of past steps.

The gradient by an activation deep inside a network is :math:`δ_i J_i`. Here
:math:`δ_i` is the loss's gradient by the logits, which is exact and cheap, and
:math:`J_i` is the Jacobian of what lies between the two, which differs from example to
example around a mean. A running mean of it over the perturbations of many steps
predicts a good part of every gradient, without any noise of this step's u.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fgrad import _checks
from fgrad.activity import mean_jacobians


@dataclasses.dataclass(frozen=True)
class SyntheticGradient:
    r"""Predicts the gradient at a site from the loss's gradient at an exact site.

    With :math:`δ_i` [outputs], the gradient of example i's loss by the output of the
    exact site (for cross-entropy p - y of the logits), and the running mean
    :math:`\bar J` [outputs, channels] of the Jacobian of these by the site:

    .. math::
      g_i = δ_i \bar J, \quad
      r_i = \frac{1}{K} \sum_k (d_{ik} - g_i · u_{ik}) \, u_{ik}, \quad
      \frac{dL}{dy_i} ≈ \frac{1}{B} (g_i + c \, r_i)

    where d are the losses' differences. :math:`g_i` is the same at all positions. What
    the differences say beyond it is :math:`r_i`. Averaged over positions, it moves the
    mean at step t:

    .. math::
      \bar J \leftarrow \bar J + \frac{η \sum_i δ_i^T r_i}{\sum_i |δ_i|^2}, \quad
      \frac{1}{η} = 1 + \min(t, memory) + \frac{channels}{KB}

    Attributes:
      site: a name of the exact site, such as "head", whose output is [examples,
        outputs].
      memory: number of steps that the running mean goes back. With many classes each
        of them is seen in a part of the batch only, and the mean needs as many times
        more steps.
      correction: c. With c = 1 the prediction is a control variate: the mean over u is
        the gradient, as it is without a prediction. With a smaller c, the noise of u
        shrinks by c, and the share 1 - c of the prediction's error stays.

    Raises:
      ValueError: for no name, a negative memory, or a correction outside [0, 1].

    Example:
      >>> SyntheticGradient("head").correction
      0.1

    Reference:
      Jaderberg et al., "Decoupled neural interfaces using synthetic gradients", ICML
      2017; Fournier et al., "Can forward gradient match backpropagation?", ICML 2023,
      for predictions that a forward gradient corrects.
    """

    site: str
    memory: float = 60.0
    correction: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.site, str) or not self.site:
            raise ValueError(
                "a synthetic gradient needs the name of an exact site, got "
                f'{self.site!r}; use for example SyntheticGradient("head").'
            )
        _checks.at_least("memory, in steps,", self.memory, 0)
        unbiased = "; 1 leaves the gradient unbiased"
        _checks.fraction("correction", self.correction, hint=unbiased)


class Evidence(NamedTuple):
    """What a site's gradient is predicted from.

    Attributes:
      jacobian: [outputs, channels], the running mean of the Jacobian.
      signal: [examples, outputs], the gradient of each example's own loss by the
        output of the exact site.
      count: int32 scalar, steps taken.
    """

    jacobian: jax.Array
    signal: jax.Array
    count: jax.Array  # type: ignore[assignment]  # tuple has a count, too


def predicted(evidence: Evidence, activation: jax.Array) -> jax.Array:
    """The gradient of each example's loss by an activation [examples, …, channels]."""
    return mean_jacobians.predicted(
        evidence.jacobian, evidence.signal, activation.shape
    )


def learned(
    evidence: Evidence,
    excess: jax.Array,
    *,
    memory: float,
    num_perturbations: int,
) -> jax.Array:
    """The running mean after a step.

    Args:
      evidence: what the step's prediction was made from.
      excess: r, what the step found beyond its prediction, [examples, …, channels].
      memory: see `SyntheticGradient`.
      num_perturbations: K, the number of directions.
    """
    jacobian, signal, count = evidence
    examples, channels = excess.shape[0], excess.shape[-1]
    excess = excess.reshape(examples, -1, channels).mean(1)
    noise = channels / (num_perturbations * examples)
    rate = 1 / (1 + jnp.minimum(count, memory) + noise)
    size = jnp.sum(jnp.square(signal))
    change = signal.T @ excess / jnp.where(size > 0, size, 1)
    return jacobian + (rate * change).astype(jacobian.dtype)
