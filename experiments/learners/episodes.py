"""Tasks of few-shot learning: how they are sampled, and means over many of them.

An episode, or task, has N classes (ways), each with K examples to learn from (shots,
the support) and Q to be tested on (the query).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.usage import UsageError

# Standard deviations to each side of the mean of a normal distribution, for 95%.
_INTERVAL = 1.96


class Episode(NamedTuple):
    """The indices of a task's examples in a split.

    Attributes:
      classes: int32 [ways], the labels that the classes have in the split.
      support: int32 [ways, shots], indices of the support.
      query: int32 [ways, queries], indices of the query, which are different ones.
    """

    classes: jax.Array
    support: jax.Array
    query: jax.Array


def sampler(
    labels: np.ndarray | jax.Array,
    *,
    n_way: int = 5,
    k_shot: int = 5,
    num_queries: int = 15,
) -> Callable[[jax.Array], Episode]:
    """Makes the function that samples tasks of a split.

    It draws classes without replacement, then examples of each without replacement.

    Args:
      labels: integers [examples], concrete; any numbers.
      n_way: N, classes of a task.
      k_shot: K, examples of each to learn from.
      num_queries: Q, examples of each to be tested on.

    Returns:
      ``sample(key) -> Episode``, a pure function, jitted, for vmap and other
      programs: the same key gives the same task.

    Raises:
      UsageError: if the split has too few classes, or a class too few examples.

    Example:
      >>> labels = np.repeat([3, 7, 9], 4)
      >>> sample = sampler(labels, n_way=2, k_shot=1, num_queries=2)
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
            raise UsageError(f"{name} must be at least 1, got {value}.")
    classes, counts = np.unique(np.asarray(labels), return_counts=True)
    if len(classes) < n_way:
        raise UsageError(
            f"the split has {len(classes)} classes, fewer than n_way={n_way}: choose "
            "fewer ways or another split."
        )
    drawn = k_shot + num_queries
    if counts.min() < drawn:
        raise UsageError(
            f"class {classes[counts.argmin()]} has {counts.min()} examples, fewer than "
            f"k_shot + num_queries = {k_shot} + {num_queries}: choose fewer of them, "
            "or leave the class out."
        )
    # Row by row the examples of each class, with zeros after those of small classes.
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
    """Draws distinct indices at which ``eligible`` is true, in random order."""
    numbers = jax.random.uniform(key, eligible.shape)
    return jax.lax.top_k(jnp.where(eligible, numbers, -1), count)[1]


def check_disjoint(labels: Mapping[str, np.ndarray | jax.Array]) -> None:
    """Makes sure that no class is in two splits.

    Args:
      labels: integers [examples] by the names of the splits, which number the classes
        in the same way.

    Raises:
      UsageError: if a class is.

    Example:
      >>> check_disjoint({"train": np.array([0, 1]), "test": np.array([1, 2])})
      Traceback (most recent call last):
      ...
      experiments.usage.UsageError: the splits train and test share the classes [1]: ...
    """
    sets = {name: set(np.unique(np.asarray(x)).tolist()) for name, x in labels.items()}
    names = list(sets)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if shared := sorted(sets[one] & sets[other]):
                raise UsageError(
                    f"the splits {one} and {other} share the classes {shared[:5]}: "
                    "few-shot tasks are of classes that were not seen before."
                )


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
