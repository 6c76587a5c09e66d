"""The objective of adaptation at test time: no labels, and a network's own statistics.

A network that was trained on a source is sure of its predictions there, and its
activations have a mean and a deviation in each channel. On other images it is less
sure, and the statistics are others. Both can be seen without a label.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments.data.arrays import Split
from experiments.learners.classification import Classification
from experiments.learners.learner import Outputs

_FLOOR = 1e-6  # under the root of a variance, whose derivative at 0 is infinite


class Statistics(NamedTuple):
    """Mean and deviation of each channel behind each stage of a network.

    Attributes:
      means: for each stage but the head, float [channels].
      deviations: likewise.
    """

    means: tuple[jax.Array, ...]
    deviations: tuple[jax.Array, ...]


class Unlabelled(NamedTuple):
    """A batch to adapt to.

    Attributes:
      images: float [batch, height, width, channels].
      source: the statistics that the network has on its source.
    """

    images: jax.Array
    source: Statistics


class EntropyAndAlignment:
    r"""Entropy of the predictions and distance of the activations from the source's.

    .. math:: \frac{1}{B} \sum_i H(p(x_i)) + λ \sum_l
      \left( ‖μ_l - μ_l^S‖ + ‖σ_l - σ_l^S‖ \right)

    where :math:`μ_l` and :math:`σ_l` are the mean and the deviation of each channel
    behind the stage l, over the batch. Of tokens, those of the first one, which is the
    class token. An `Objective` of `experiments.learners.learner.Learner`.

    Reference:
      Niu et al., "Test-time model adaptation with only forward passes", ICML 2024,
      equation (4). With λ = 0 it is the objective of Wang et al., "Tent: fully
      test-time adaptation by entropy minimization", ICLR 2021.
    """

    def __init__(self, method: ConfigDict):
        """Reads the settings.

        Args:
          method: ``entropy`` and ``alignment``, the weights of both terms; one that is
            0 is left out.
        """
        self._entropy = method.entropy
        self._alignment = method.alignment

    def batch(self, key: jax.Array, data: Unlabelled) -> Unlabelled:
        """All that there is: a stream brings one batch after the other."""
        del key
        return data

    def losses(self, outputs: Outputs, batch: Unlabelled) -> Any:
        """The entropies of the examples, and the distance of the statistics.

        Args:
          outputs: runs the network, or a slice of its stages.
          batch: images, and the statistics of the source.

        Returns:
          "entropy", float [batch], and "alignment", a scalar, both with their weights.
        """
        found, logits = statistics(outputs, batch.images, len(batch.source.means))
        losses: dict[str, jax.Array] = {}
        if self._entropy:
            losses["entropy"] = self._entropy * entropies(logits)
        if self._alignment:
            distances = jax.tree.map(_distance, found, batch.source)
            losses["alignment"] = self._alignment * sum(jax.tree.leaves(distances))
        return losses


class Labelled(Classification):
    """Cross-entropy of the labels of a stream's batch, all of it."""

    def batch(self, key: jax.Array, data: Split) -> Split:
        """All that there is."""
        del key
        return data


def entropies(logits: jax.Array) -> jax.Array:
    """Entropy of each prediction, in nats.

    Args:
      logits: float [batch, classes].

    Example:
      >>> entropies(jnp.zeros((1, 4)))  # ln 4
      Array([1.3862944], dtype=float32)
    """
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def statistics(
    outputs: Outputs, images: jax.Array, num_stages: int
) -> tuple[Statistics, jax.Array]:
    """Runs a network stage by stage and looks behind each of them.

    Args:
      outputs: runs a slice of the network's stages.
      images: float [batch, height, width, channels].
      num_stages: stages before the head.

    Returns:
      The statistics behind these stages, and the logits.
    """
    means, deviations, x = [], [], images
    for stage in range(num_stages):
        x, _ = outputs(x, start=stage, stop=stage + 1)
        mean, deviation = _moments(x)
        means.append(mean)
        deviations.append(deviation)
    logits, _ = outputs(x, start=num_stages)
    return Statistics(tuple(means), tuple(deviations)), logits


def source_statistics(
    outputs: Outputs, images: jax.Array, num_stages: int, batch_size: int = 100
) -> Statistics:
    """The statistics of a network on the images of its source.

    Args:
      outputs: runs a slice of the network's stages.
      images: float [examples, height, width, channels]; an incomplete last batch is
        left out.
      num_stages: stages before the head.
      batch_size: images at once. The variance over all images is the mean over batches
        of the squares, less the square of the mean.
    """
    count = len(images) // batch_size
    batches = images[: count * batch_size].reshape(count, batch_size, *images.shape[1:])
    found = jax.jit(
        lambda batches: jax.lax.map(
            lambda batch: statistics(outputs, batch, num_stages)[0], batches
        )
    )(batches)
    means = tuple(mean.mean(0) for mean in found.means)
    squares = [
        jnp.mean(d**2 + m**2, axis=0)
        for d, m in zip(found.deviations, found.means, strict=True)
    ]
    return Statistics(
        means,
        tuple(
            jnp.sqrt(square - mean**2)
            for square, mean in zip(squares, means, strict=True)
        ),
    )


class Moving(NamedTuple):
    """Moving means over the batches of a stream.

    Attributes:
      mean: float [channels], of the features.
      square: float [channels], the mean of their squares.
      weight: scalar, how much of both has been seen; 1 in the long run.
    """

    mean: jax.Array
    square: jax.Array
    weight: jax.Array


def moving(channels: int) -> Moving:
    """The moving means before the first batch."""
    return Moving(jnp.zeros(channels), jnp.zeros(channels), jnp.float32(0))


def moved(state: Moving, features: jax.Array, memory: float) -> Moving:
    """The moving means with one more batch.

    Args:
      state: those before it.
      features: float [batch, channels].
      memory: how much of them stays, from 0 to 1.
    """
    new = Moving(features.mean(0), jnp.mean(features**2, 0), jnp.float32(1))
    return jax.tree.map(lambda old, x: memory * old + (1 - memory) * x, state, new)


def realigned(state: Moving, features: jax.Array, source: Statistics) -> jax.Array:
    """Gives features the mean and the deviation that those of the source have.

    Args:
      state: what the stream has shown.
      features: float [batch, channels], those behind the last stage before the head.
      source: the statistics of the source.
    """
    mean, square = state.mean / state.weight, state.square / state.weight
    deviation = jnp.sqrt(jnp.maximum(square - mean**2, _FLOOR))
    unit = (features - mean) / deviation
    return unit * source.deviations[-1] + source.means[-1]


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and deviation of each channel of [batch, ..., channels]."""
    x = x[:, 0] if x.ndim == 3 else x  # tokens
    axes = tuple(range(x.ndim - 1))
    return x.mean(axes), jnp.sqrt(x.var(axes) + _FLOOR)


def _distance(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum((one - other) ** 2) + _FLOOR)
