"""Splits of TFDS builders as arrays in memory."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds


class Split(NamedTuple):
    """Examples of one split.

    Attributes:
      images: float32 [examples, height, width, channels] in [0, 1].
      labels: int32 [examples].
    """

    images: jax.Array
    labels: jax.Array


def load(builder: tfds.core.DatasetBuilder) -> dict[str, Split]:
    """Prepares a dataset of uint8 images and reads all its splits into memory.

    Args:
      builder: a builder with features "image" and "label"; array_record files, since
        those are read without TensorFlow.

    Returns:
      A `Split` for each split of the builder.
    """
    builder.download_and_prepare()
    return read(builder, {name: name for name in builder.info.splits})


def read(
    builder: tfds.core.DatasetBuilder,
    splits: Mapping[str, str],
    *,
    example: Callable[[Any], tuple[np.ndarray, int]] = lambda e: (
        e["image"],
        e["label"],
    ),
    part: slice = slice(None),
    decoders: Any = None,
) -> dict[str, Split]:
    """Reads a dataset that is prepared into memory.

    The examples come in the order of their shards, which a data source keeps.

    Args:
      builder: of array_record files.
      splits: our name of each split to TFDS's, such as "train[:90%]".
      example: from what TFDS reads of an example to its uint8 image [height, width,
        channels], all of one shape, and its label.
      part: which examples of each split.
      decoders: of features that TFDS shall not decode in its own way.

    Returns:
      A `Split` by each of our names.
    """
    found = {}
    for name, split in splits.items():
        source = builder.as_data_source(split=split, decoders=decoders)
        pairs = [example(source[index]) for index in range(len(source))[part]]
        images, labels = zip(*pairs, strict=True)
        found[name] = Split(
            jnp.asarray(np.stack(images), jnp.float32) / 255,
            jnp.asarray(np.stack(labels), jnp.int32),
        )
    return found
