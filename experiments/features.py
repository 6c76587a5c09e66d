"""Features of a frozen network, computed once: all that a linear probe needs."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.arrays import Split

# The least deviation, as a share of the mean one: rare features would be blown up.
_FLOOR = 0.1


def extract(
    backbone: Callable[[], Callable[[jax.Array], jax.Array]],
    splits: Mapping[str, Split],
    cache: pathlib.Path,
    batch_size: int = 32,
) -> dict[str, Split]:
    """Replaces images by their features.

    Args:
      backbone: makes a function from images [batch, height, width, channels], floats in
        [0, 1], to features [batch, size]. It is called only if they are to be computed.
      splits: of images.
      cache: an npz file that is read if it is there, and written if not.
      batch_size: images at once.

    Returns:
      Splits whose ``images`` are float32 features [examples, size].
    """
    if not cache.exists():
        apply = jax.jit(backbone())
        features: dict[str, Any] = {}
        for name, split in splits.items():
            count = len(split.labels)
            # Batches of one size, so that one program serves all.
            padding = [(0, -count % batch_size)] + [(0, 0)] * (split.images.ndim - 1)
            images = np.pad(np.asarray(split.images), padding)
            batches = images.reshape(-1, batch_size, *images.shape[1:])
            parts = [np.asarray(apply(batch)) for batch in batches]
            features[name] = np.concatenate(parts)[:count]
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".partial.npz")
        np.savez(partial, **features)
        partial.replace(cache)
    with np.load(cache) as stored:
        return {
            name: Split(jnp.asarray(stored[name]), split.labels)
            for name, split in splits.items()
        }


def standardize(splits: Mapping[str, Split]) -> dict[str, Split]:
    """Gives features the mean 0 and deviation 1 that they have in the train split.

    It needs no labels, so a new domain can have its own statistics.

    Args:
      splits: of features, with one called "train".

    Returns:
      The same splits, standardized; deviations have a floor of a tenth of their mean.
    """
    train = splits["train"].images
    deviation = jnp.std(train, axis=0)
    scale = jnp.maximum(deviation, _FLOOR * jnp.mean(deviation))
    return {
        name: split._replace(images=(split.images - jnp.mean(train, axis=0)) / scale)
        for name, split in splits.items()
    }
