"""Few-shot learning: episodes, ProtoNet's and SimpleShot's heads, intervals.

An episode, or task, has N classes (ways), each with K examples to learn from (shots,
the support) and Q to be tested on (the query). Features of a task are arrays [ways,
shots, features] and [ways, queries, features]: the row is the label.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Standard deviations to each side of the mean of a normal distribution, for 95%.
_INTERVAL = 1.96
TRANSFORMS = ("UN", "L2N", "CL2N")  # SimpleShot's
_TINY = 1e-12  # the least squared norm that features are divided by


class Episode(NamedTuple):
    """Where the examples of a task are.

    Attributes:
      classes: int32 [ways], their labels in the split.
      support: int32 [ways, shots], indices of examples of the split.
      query: int32 [ways, queries], others.
    """

    classes: jax.Array
    support: jax.Array
    query: jax.Array


def episodes(
    labels: np.ndarray | jax.Array,
    *,
    n_way: int = 5,
    k_shot: int = 5,
    num_queries: int = 15,
) -> Callable[[jax.Array], Episode]:
    """Makes the sampler of tasks of a split.

    Classes are drawn without replacement, then their examples.

    Args:
      labels: integers [examples], concrete; any numbers.
      n_way: N, classes of a task.
      k_shot: K, examples of each to learn from.
      num_queries: Q, examples of each to be tested on.

    Returns:
      ``sample(key) -> Episode``, a pure function, jitted, for vmap and other
      programs: the same key gives the same task.

    Raises:
      ValueError: if the split has too few classes, or a class too few examples.

    Example:
      >>> labels = np.repeat([3, 7, 9], 4)
      >>> sample = episodes(labels, n_way=2, k_shot=1, num_queries=2)
      >>> task = sample(jax.random.key(0))
      >>> task.support.shape, task.query.shape
      ((2, 1), (2, 2))
      >>> tasks = jax.vmap(sample)(jax.random.split(jax.random.key(1), 100))
      >>> bool(jnp.all(labels[tasks.query] == tasks.classes[..., None]))
      True

    Reference:
      Vinyals et al., "Matching networks for one shot learning", NeurIPS 2016.
    """
    for name, value in (
        ("n_way", n_way),
        ("k_shot", k_shot),
        ("num_queries", num_queries),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    classes, counts = np.unique(np.asarray(labels), return_counts=True)
    if len(classes) < n_way:
        raise ValueError(
            f"the split has {len(classes)} classes, fewer than n_way={n_way}: choose "
            "fewer ways or another split."
        )
    drawn = k_shot + num_queries
    if counts.min() < drawn:
        raise ValueError(
            f"class {classes[counts.argmin()]} has {counts.min()} examples, fewer than "
            f"k_shot + num_queries = {k_shot} + {num_queries}: choose fewer of them, "
            "or leave the class out."
        )
    # The examples of each class; a table needs rows of one length.
    order = np.argsort(labels, kind="stable").astype(np.int32)
    table = np.zeros((len(classes), counts.max()), np.int32)
    for row, part in zip(table, np.split(order, counts.cumsum()[:-1]), strict=True):
        row[: len(part)] = part

    @jax.jit
    def sample(key: jax.Array) -> Episode:
        class_key, *keys = jax.random.split(key, 1 + n_way)
        rows = _draw(class_key, jnp.ones(len(classes), bool), n_way)

        def choose(key: jax.Array, row: jax.Array) -> jax.Array:
            real = jnp.arange(table.shape[1]) < jnp.asarray(counts)[row]
            return jnp.asarray(table)[row, _draw(key, real, drawn)]

        chosen = jax.vmap(choose)(jnp.stack(keys), rows)
        return Episode(
            jnp.asarray(classes, jnp.int32)[rows],
            chosen[:, :k_shot],
            chosen[:, k_shot:],
        )

    return sample


def _draw(key: jax.Array, eligible: jax.Array, count: int) -> jax.Array:
    """Distinct places where ``eligible``, in random order."""
    numbers = jax.random.uniform(key, eligible.shape)
    return jax.lax.top_k(jnp.where(eligible, numbers, -1), count)[1]


def check_disjoint(labels: Mapping[str, np.ndarray | jax.Array]) -> None:
    """Makes sure that no class is in two splits.

    Args:
      labels: of each split, integers [examples] of one numbering of classes.

    Raises:
      ValueError: if a class is.

    Example:
      >>> check_disjoint({"train": np.array([0, 1]), "test": np.array([1, 2])})
      Traceback (most recent call last):
      ...
      ValueError: the splits train and test share the classes [1]: ...
    """
    sets = {name: set(np.unique(np.asarray(x)).tolist()) for name, x in labels.items()}
    names = list(sets)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if shared := sorted(sets[one] & sets[other]):
                raise ValueError(
                    f"the splits {one} and {other} share the classes {shared[:5]}: "
                    "few-shot tasks are of classes that were not seen before."
                )


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
    """Squared Euclidean distances.

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
    return cross_entropy(protonet_logits(support, query))


def cross_entropy(logits: jax.Array) -> jax.Array:
    """Mean cross-entropy of a task's queries.

    Args:
      logits: [ways, queries, ways]; the first index is the class.

    Returns:
      Scalar.
    """
    return -jnp.mean(jnp.einsum("nqn->nq", jax.nn.log_softmax(logits)))


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
      As the features; those of no length stay zero.

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
        raise ValueError(
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
    r"""Nearest centroid of transformed features.

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


class Interval(NamedTuple):
    """A mean and how far its 95% interval reaches.

    Attributes:
      mean: of the tasks.
      half: half of the interval's width.
    """

    mean: float
    half: float


def interval(accuracies: np.ndarray | jax.Array) -> Interval:
    r"""Mean accuracy and its 95% interval.

    .. math:: \bar{a} \pm 1.96 \, s / \sqrt{T}, \quad
      s^2 = \frac{1}{T - 1} \sum_t (a_t - \bar{a})^2

    Args:
      accuracies: [tasks], of independent tasks.

    Returns:
      The mean and half of the interval.

    Raises:
      ValueError: for fewer than two tasks.

    Example:
      >>> mean, half = interval(np.array([0.25, 0.75]))
      >>> mean, round(half, 6)
      (0.5, 0.49)
    """
    values = np.asarray(accuracies, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(
            "an interval needs the accuracies of two or more tasks, got an array of "
            f"shape {values.shape}."
        )
    half = _INTERVAL * values.std(ddof=1) / np.sqrt(len(values))
    return Interval(float(values.mean()), float(half))


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
