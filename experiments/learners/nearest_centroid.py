"""Nearest-centroid classifiers of few-shot learning: ProtoNet and SimpleShot.

Features of a task (`experiments.learners.episodes`) are arrays [ways, shots, features]
of the support and [ways, queries, features] of the query: the row is the label. Every
example is told by its distances to the centroids of the support's classes.

`NearestCentroid` trains a network to that end. It is the objective of few-shot
learning: augmented copies of a task's support shall be near the support of their class.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.learners.augmentation import augmented
from experiments.learners.learner import Learner, Outputs, TrainState, Weights
from experiments.usage import UsageError, check_names

HEADS = ("protonet", "simpleshot")
TRANSFORMS = ("UN", "L2N", "CL2N")  # of SimpleShot's features
_TINY = 1e-12  # the least squared norm that features are divided by


def prototypes(support: jax.Array) -> jax.Array:
    r"""The mean of each class.

    .. math:: c_n = \frac{1}{K} \sum_k x_{nk}

    Args:
      support: float features [ways, shots, features].

    Returns:
      [ways, features].
    """
    return jnp.mean(support, axis=-2)


def squared_distances(query: jax.Array, centroids: jax.Array) -> jax.Array:
    """Computes squared Euclidean distances.

    Args:
      query: float [..., features].
      centroids: float [ways, features].

    Returns:
      [..., ways].

    Example:
      >>> squared_distances(jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0], [0.0, 2.0]]))
      Array([4., 1.], dtype=float32)
    """
    return jnp.sum((query[..., None, :] - centroids) ** 2, axis=-1)


def protonet_logits(support: jax.Array, query: jax.Array) -> jax.Array:
    r"""Logits of ProtoNet.

    .. math:: logits_n(x) = -\|x - c_n\|^2, \quad c_n = \frac{1}{K} \sum_k x_{nk}

    Args:
      support: float features [ways, shots, features].
      query: float features [..., features].

    Returns:
      [..., ways].

    Raises:
      ValueError: if they have different numbers of features.

    Example:
      >>> support = jnp.array([[[0.0], [2.0]], [[10.0], [10.0]]])
      >>> protonet_logits(support, jnp.array([3.0]))
      Array([ -4., -49.], dtype=float32)

    Reference:
      Snell et al., "Prototypical networks for few-shot learning", NeurIPS 2017, (2).
    """
    _check(support, query)
    return -squared_distances(query, prototypes(support))


def protonet_loss(support: jax.Array, query: jax.Array) -> jax.Array:
    r"""ProtoNet's loss, over all queries of a task.

    .. math:: L = -\frac{1}{NQ} \sum_{n,q} \log softmax(logits(x_{nq}))_n

    Args:
      support: float features [ways, shots, features].
      query: float features [ways, queries, features], in the same order of classes.

    Returns:
      Scalar.

    Raises:
      ValueError: as `protonet_logits`, and for other numbers of ways.

    Example:
      >>> support = jnp.array([[[0.0]], [[2.0]]])
      >>> protonet_loss(support, jnp.array([[[1.0]], [[1.0]]]))  # log 2
      Array(0.6931472, dtype=float32)
    """
    _check_ways(support, query)
    return cross_entropies(protonet_logits(support, query)).mean()


def cross_entropies(logits: jax.Array) -> jax.Array:
    """Cross-entropy of each of a task's queries.

    Args:
      logits: [ways, queries, ways]; the first index is the class.

    Returns:
      [ways, queries].
    """
    return -jnp.einsum("nqn->nq", jax.nn.log_softmax(logits))


def simpleshot_transform(
    features: jax.Array, transform: str = "CL2N", base_mean: jax.Array | None = None
) -> jax.Array:
    r"""SimpleShot's transforms of features.

    .. math:: UN: x, \quad L2N: x / \|x\|, \quad CL2N: (x - μ) / \|x - μ\|

    Args:
      features: float [..., features].
      transform: "UN", "L2N" or "CL2N".
      base_mean: μ [features], the mean of the base classes' features, those of
        meta-train; for "CL2N" only.

    Returns:
      Features of the same shape; those of length zero stay zero.

    Raises:
      ValueError: for another transform; if the mean is missing, or is given to a
        transform that does not take it.

    Example:
      >>> simpleshot_transform(jnp.array([4.0, 5.0]), base_mean=jnp.array([1.0, 1.0]))
      Array([0.6, 0.8], dtype=float32)

    Reference:
      Wang et al., "SimpleShot: revisiting nearest-neighbor classification for few-shot
      learning", arXiv 1911.04623, section 3.
    """
    if transform not in TRANSFORMS:
        raise UsageError(
            f"transform must be one of {', '.join(TRANSFORMS)}, got {transform!r}."
        )
    if (base_mean is not None) != (transform == "CL2N"):
        raise ValueError(
            f"{transform} {'needs' if base_mean is None else 'takes no'} base_mean, "
            "the mean feature of the base classes, which CL2N takes away."
        )
    if transform == "UN":
        return features
    if base_mean is not None:
        features = features - base_mean
    squared = jnp.sum(features**2, axis=-1, keepdims=True)
    return features * jax.lax.rsqrt(jnp.maximum(squared, _TINY))


def simpleshot_logits(
    support: jax.Array,
    query: jax.Array,
    transform: str = "CL2N",
    base_mean: jax.Array | None = None,
) -> jax.Array:
    r"""Logits of SimpleShot: ProtoNet's, of transformed features.

    .. math:: logits_n(x) = -\|t(x) - \frac{1}{K} \sum_k t(x_{nk})\|^2

    Args:
      support: float features [ways, shots, features].
      query: float features [..., features].
      transform: t, see `simpleshot_transform`.
      base_mean: [features], of "CL2N".

    Returns:
      [..., ways]; the largest is the prediction.

    Raises:
      ValueError: as `protonet_logits` and `simpleshot_transform`.

    Reference:
      As `simpleshot_transform`.
    """
    _check(support, query)
    return protonet_logits(
        simpleshot_transform(support, transform, base_mean),
        simpleshot_transform(query, transform, base_mean),
    )


def accuracy(logits: jax.Array) -> jax.Array:
    """Share of a task's queries whose own class has the largest logit.

    Args:
      logits: [ways, queries, ways].

    Returns:
      Scalar in [0, 1].

    Example:
      >>> accuracy(jnp.array([[[1.0, 0.0]], [[1.0, 0.0]]]))
      Array(0.5, dtype=float32)
    """
    ways = jnp.arange(logits.shape[0])
    return jnp.mean(jnp.argmax(logits, axis=-1) == ways[:, None])


class Task(NamedTuple):
    """What a learner knows of a task.

    Attributes:
      support: [ways, shots, ...]: images, or what the frozen stages make of them.
      copies: [ways, shots * copies, ...], the augmented support.
      query: [ways, queries, ...].
      base_mean: [features], the mean output of the network over meta-train, before
        the first step.
    """

    support: jax.Array
    copies: jax.Array
    query: jax.Array
    base_mean: jax.Array


class NearestCentroid:
    """Distances to the centroids of a task's classes; an `Objective` of `Learner`."""

    def __init__(self, config: ConfigDict):
        """Reads the settings of the head.

        Args:
          config: ``head``, ``transform``, ``temperature``, ``copies`` and the
            augmentation of the copies; see ``configs/fewshot_vision.py``.

        Raises:
          UsageError: for another head or transform.
        """
        check_settings(config)
        self._config = config

    def begin(
        self,
        learner: Learner,
        weights: Weights,
        base_mean: jax.Array,
        images: tuple[jax.Array, jax.Array],
        key: jax.Array,
    ) -> tuple[TrainState, Task]:
        """Begins a task at the same weights as every other one.

        Args:
          learner: of this objective.
          weights: as the learner prepares them.
          base_mean: see `Task`.
          images: of the support and of the query, [ways, shots or queries, ...].
          key: PRNG key of the augmentation and of the perturbations.
        """
        support, query = images
        *keys, z_key = jax.random.split(key, 3)
        tiles = (1, self._config.copies, *[1] * (support.ndim - 2))
        copies = jnp.tile(support, tiles)
        flat = copies.reshape(-1, *copies.shape[2:])
        copies = augmented(self._config, keys, flat).reshape(copies.shape)
        # The frozen stages run once in a task, on all of its images.
        examples = (support, copies, query)
        sizes = np.cumsum([part.shape[1] for part in examples])[:-1]
        joined = jnp.concatenate(examples, axis=1)
        found = learner.behind_frozen(*weights, joined.reshape(-1, *joined.shape[2:]))
        found = found.reshape(*joined.shape[:2], *found.shape[1:])
        support, copies, query = jnp.split(found, sizes, axis=1)
        task = Task(support, copies, query, base_mean)
        return learner.begin(weights, z_key, z_key), task

    def batch(self, key: jax.Array, data: Task) -> Task:
        """The batch of a step is the whole task."""
        del key
        return data

    def losses(self, outputs: Outputs, batch: Task) -> jax.Array:
        """Cross-entropies of the augmented copies of the support."""
        return cross_entropies(self._logits(outputs, batch, batch.copies))

    def accuracy(self, learner: Learner, state: TrainState, task: Task) -> jax.Array:
        """The share of queries that are nearest to the centroid of their class.

        Args:
          learner: of this objective.
          state: of any step.
          task: that the state belongs to.
        """
        outputs = learner.outputs(state.params, state.frozen, state.scales)
        return accuracy(self._logits(outputs, task, task.query))

    def _logits(self, outputs: Outputs, task: Task, query: jax.Array) -> jax.Array:
        """Logits [ways, queries, ways] of examples beside the support."""
        both = jnp.concatenate([task.support, query], axis=1)
        found, _ = outputs(both.reshape(-1, *both.shape[2:]))
        found = found.reshape(*both.shape[:2], *found.shape[1:])
        found = self._transformed(found, task.base_mean)
        parts = jnp.split(found, [task.support.shape[1]], axis=1)
        return protonet_logits(*parts) / self._config.temperature

    def _transformed(self, x: jax.Array, base_mean: jax.Array) -> jax.Array:
        """Features as the head compares them."""
        if self._config.head == "protonet":
            return x
        mean = base_mean if self._config.transform == "CL2N" else None
        return simpleshot_transform(x, self._config.transform, mean)


def check_settings(config: ConfigDict) -> None:
    """Makes sure that there is the head of a configuration.

    Args:
      config: see ``configs/fewshot_vision.py``.

    Raises:
      UsageError: for another head or transform.
    """
    if config.head not in HEADS:
        raise UsageError(
            f'head must be "protonet" or "simpleshot", got {config.head!r}.'
        )
    check_names("transform", [config.transform], TRANSFORMS)


def _check(support: jax.Array, query: jax.Array) -> None:
    if support.ndim != 3 or query.shape[-1:] != support.shape[-1:]:
        raise ValueError(
            "support must be [ways, shots, features] and query [..., features], got "
            f"{support.shape} and {query.shape}."
        )


def _check_ways(support: jax.Array, query: jax.Array) -> None:
    if query.ndim != 3 or query.shape[0] != support.shape[0]:
        raise ValueError(
            "query must be [ways, queries, features] with the ways of the support, got "
            f"{query.shape} for a support of {support.shape}."
        )
