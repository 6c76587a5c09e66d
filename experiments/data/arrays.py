"""Splits of TFDS builders as arrays in memory."""

from typing import NamedTuple

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

    The examples come in the order of their shards, which a data source keeps.

    Args:
      builder: a builder with features "image" and "label"; array_record files, since
        those are read without TensorFlow.

    Returns:
      A `Split` for each split of the builder.
    """
    builder.download_and_prepare()
    splits = {}
    for name in builder.info.splits:
        source = builder.as_data_source(split=name)
        examples = source.__getitems__(range(len(source)))
        splits[name] = Split(
            jnp.asarray(np.stack([e["image"] for e in examples]), jnp.float32) / 255,
            jnp.asarray(np.stack([e["label"] for e in examples]), jnp.int32),
        )
    return splits
