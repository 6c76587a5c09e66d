"""Visual Wake Words: is there a person in the picture? Photographs of COCO 2014.

A domain is the side of the pictures in pixels, such as "96", and how many of a split
are read, if not all: "96_2000". Whole pictures are resized to a square.

The label is 1 if the box of a person covers 0.5% of the picture or more. The splits are
90% and 10% of COCO's train2014, and val2014 to test. The reference tests on 8,059 of
val2014 and trains on all else, so its numbers are not quite comparable.

Reference:
  Chowdhery et al., "Visual Wake Words dataset", arXiv 1906.05721.
"""

import functools
import io
import re
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from experiments.data import arrays, catalogue

_SMALLEST = 0.005  # of the picture


def load(domain: str, data_dir: str) -> dict[str, arrays.Split]:
    """Reads a domain into memory; "96" takes 13.6 GB there, "96_2000" 0.7.

    Args:
      domain: see the module.
      data_dir: where TFDS keeps COCO, see `experiments.data.catalogue`; the
        preparation downloads 38 GB.

    Returns:
      Splits "train", "validation" and "test" of colour images and two classes.

    Raises:
      ModuleNotFoundError: as `experiments.data.catalogue.builder`.
      ValueError: if there is no such domain.

    Example:
      >>> load("small", "data")
      Traceback (most recent call last):
      ...
      ValueError: domain must be the pixels of a side, such as "96" or "96_2000", ...
    """
    match = re.fullmatch(r"([1-9]\d*)(?:_([1-9]\d*))?", domain)
    if not match:
        raise ValueError(
            'domain must be the pixels of a side, such as "96" or "96_2000", got '
            f"{domain!r}."
        )
    size, count = int(match[1]), int(match[2]) if match[2] else None
    builder = catalogue.builder("coco/2014:1.1.0", data_dir)
    person = builder.info.features["objects"]["label"].str2int("person")
    return arrays.read(
        builder,
        {"train": "train[:90%]", "validation": "train[90%:]", "test": "validation"},
        example=functools.partial(_example, size, person),
        # TFDS leaves pictures without colours in one channel.
        decoders={"image": tfds.decode.SkipDecoding()},
        part=slice(count),  # TFDS has shuffled them
    )


def _example(size: int, person: int, example: Any) -> tuple[np.ndarray, int]:
    """The picture [size, size, 3] and the label."""
    with Image.open(io.BytesIO(example["image"])) as image:
        square = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    objects = example["objects"]
    # Top, left, bottom and right as shares of the height and the width.
    top, left, bottom, right = np.reshape(objects["bbox"], (-1, 4)).T
    large = (bottom - top) * (right - left) >= _SMALLEST
    return np.asarray(square), int(np.any(large & np.equal(objects["label"], person)))
