"""Features of a frozen network, computed once: all that a linear probe needs."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.arrays import Split

# The least deviation that features are divided by, as a share of the mean deviation.
# Without it, features that are almost always zero would be blown up.
FLOOR = 0.1


def extract(
    backbone: Callable[[], Callable[[jax.Array], jax.Array]],
    splits: Mapping[str, Split],
    cache: pathlib.Path,
    batch_size: int = 32,
) -> dict[str, Split]:
    """Replaces images by their features.

    Args:
      backbone: makes a function from images [batch, height, width, channels], floats in
        [0, 1], to features [batch, size]. It is called only if the cache is not there.
      splits: of images.
      cache: an npz file of features that is read if it is there, and written if not.
      batch_size: images that are computed at once.

    Returns:
      Splits whose ``images`` are float32 features [examples, size].
    """
    if not cache.exists():
        apply = jax.jit(backbone())
        features: dict[str, Any] = {
            name: batched(apply, split.images, batch_size)
            for name, split in splits.items()
        }
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".partial.npz")
        np.savez(partial, **features)
        partial.replace(cache)
    with np.load(cache) as stored:
        return {
            name: Split(jnp.asarray(stored[name]), split.labels)
            for name, split in splits.items()
        }


def batched(
    apply: Callable[[jax.Array], jax.Array], images: jax.Array, batch_size: int = 32
) -> np.ndarray:
    """Computes ``apply(images)`` a batch at a time.

    Args:
      apply: a jitted function of a batch.
      images: [examples, ...].
      batch_size: of every batch. The last one is padded, so that one program serves
        all of them.

    Returns:
      [examples, ...], in the order of the images.

    Example:
      >>> batched(lambda x: 2 * x, jnp.arange(3), batch_size=2)
      array([0, 2, 4], dtype=int32)
    """
    count = len(images)
    padding = [(0, -count % batch_size)] + [(0, 0)] * (images.ndim - 1)
    padded = np.pad(np.asarray(images), padding)
    batches = padded.reshape(-1, batch_size, *images.shape[1:])
    return np.concatenate([np.asarray(apply(batch)) for batch in batches])[:count]


def standardize(
    splits: Mapping[str, Split],
    floor: float = FLOOR,
    reference: jax.Array | None = None,
) -> dict[str, Split]:
    """Shifts and scales features to mean 0 and deviation 1 over the train split.

    It needs no labels, so a new domain can have statistics of its own.

    Args:
      splits: of features, with one called "train".
      floor: the least deviation, as a share of the mean deviation.
      reference: features [examples, size] of another domain, whose statistics are taken
        in the place of the train split's: a private domain's would tell of it.

    Returns:
      The same splits, standardized.
    """
    chosen = splits["train"].images if reference is None else reference
    mean, scale = moments(chosen, floor)
    return {
        name: split._replace(images=(split.images - mean) / scale)
        for name, split in splits.items()
    }


def aligned(features: jax.Array, domain: jax.Array, reference: jax.Array) -> jax.Array:
    """Gives features the mean and deviation of another domain, without labels.

    Args:
      features: float [examples, size], of a domain.
      domain: [examples, size], features of the same domain, whose statistics are
        removed.
      reference: [others, size], features of another domain, whose statistics replace
        them.

    Returns:
      [examples, size].

    Example:
      >>> column = lambda *x: jnp.array(x)[:, None]
      >>> aligned(column(2.0), column(1.0, 3.0), column(10.0, 30.0))
      Array([[20.]], dtype=float32)
    """
    (mean, scale), (new_mean, new_scale) = moments(domain), moments(reference)
    return (features - mean) / scale * new_scale + new_mean


def moments(features: jax.Array, floor: float = FLOOR) -> tuple[jax.Array, jax.Array]:
    """Computes the mean and the deviation of each feature.

    Args:
      features: [examples, size].
      floor: the least deviation, as a share of the mean deviation.

    Returns:
      The means [size] and the deviations [size].
    """
    deviation = jnp.std(features, axis=0)
    least = floor * jnp.mean(deviation)
    return jnp.mean(features, axis=0), jnp.maximum(deviation, least)
