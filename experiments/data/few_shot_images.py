"""CIFAR-FS, CUB and Omniglot: images of TFDS's catalogue in class-disjoint splits.

A domain is "cifar_fs", "cub_84" or "omniglot_28", where the numbers are the pixels of a
side and may be others. Where each split is from:

  cifar_fs: 64, 16 and 20 classes of CIFAR-100, of Bertinetto et al., "Meta-learning
    with differentiable closed-form solvers", ICLR 2019; as in torchmeta's
    ``cifar-fs/*.json``.
  cub: 100, 50 and 50 classes of Caltech-UCSD Birds 2011, by number: every second one is
    in train, the others in turn in validation and test; of Chen et al., "A closer look
    at few-shot classification", ICLR 2019 (``write_CUB_filelist.py``). Whole pictures,
    resized to a square.
  omniglot: the 30 background and 20 evaluation alphabets of Lake et al., "Human-level
    concept learning through probabilistic program induction", Science 2015. The
    evaluation set is test. They have no validation split; ours are the last five
    background alphabets, by name. White on black.
"""

import io
import re
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageOps

from experiments.data import arrays, catalogue

CIFAR_FS = {
    "validation": (
        "beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree "
        "motorcycle otter sea shark television tractor"
    ),
    "test": (
        "baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket "
        "rose snail sweet_pepper table telephone wardrobe whale woman worm"
    ),
}
_OMNIGLOT_VALIDATION = 5  # alphabets


def load(domain: str, data_dir: str) -> dict[str, arrays.Split]:
    """Reads a domain into memory.

    Args:
      domain: see the module.
      data_dir: where TFDS keeps the dataset, see `experiments.data.catalogue`.

    Returns:
      Splits "train", "validation" and "test", whose labels are numbers over all splits:
      colour images, of Omniglot grey ones.

    Raises:
      ModuleNotFoundError: as `experiments.data.catalogue.builder`.
      ValueError: if there is no such domain.

    Example:
      >>> load("mnist", "data")
      Traceback (most recent call last):
      ...
      ValueError: domain must be "cifar_fs", or "cub_" or "omniglot_" and the ...
    """
    if domain == "cifar_fs":
        return _cifar_fs(data_dir)
    match = re.fullmatch(r"(cub|omniglot)_([1-9]\d*)", domain)
    if not match:
        raise ValueError(
            'domain must be "cifar_fs", or "cub_" or "omniglot_" and the pixels of a '
            f'side, such as "cub_84", got {domain!r}.'
        )
    return {"cub": _cub, "omniglot": _omniglot}[match[1]](data_dir, int(match[2]))


def _cifar_fs(data_dir: str) -> dict[str, arrays.Split]:
    builder = catalogue.builder("cifar100:3.0.2", data_dir)
    everything = arrays.read(builder, {"all": "train+test"})["all"]
    number = builder.info.features["label"].str2int
    classes = {
        split: set(map(number, names.split())) for split, names in CIFAR_FS.items()
    }
    rest = set(range(100)).difference(*classes.values())
    return _divided(everything, {"train": rest, **classes})


def _cub(data_dir: str, size: int) -> dict[str, arrays.Split]:
    builder = catalogue.builder("caltech_birds2011:0.2.0", data_dir)

    def example(e: Any) -> tuple[np.ndarray, int]:
        with Image.open(io.BytesIO(e["image"])) as image:
            square = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
        return np.asarray(square), int(e["label"])

    everything = arrays.read(
        builder, {"all": "train+test"}, example=example, decoders=_ENCODED
    )["all"]
    # In the order of the folders, from 0.
    classes = {
        "train": set(range(0, 200, 2)),
        "validation": set(range(1, 200, 4)),
        "test": set(range(3, 200, 4)),
    }
    return _divided(everything, classes)


def _omniglot(data_dir: str, size: int) -> dict[str, arrays.Split]:
    builder = catalogue.builder("omniglot:3.0.0", data_dir)
    alphabets = {}

    def example(e: Any) -> tuple[np.ndarray, int]:
        with Image.open(io.BytesIO(e["image"])) as image:
            grey = ImageOps.invert(image.convert("L"))
        alphabets[int(e["label"])] = int(e["alphabet"])
        small = grey.resize((size, size), Image.Resampling.BOX)
        return np.asarray(small)[..., None], int(e["label"])

    splits = arrays.read(
        builder,
        {"background": "train", "evaluation": "test"},
        example=example,
        decoders=_ENCODED,
    )
    # TFDS numbers alphabets by name.
    own = {alphabets[label] for label in set(splits["background"].labels.tolist())}
    last = set(sorted(own)[-_OMNIGLOT_VALIDATION:])
    held_out = {label for label, alphabet in alphabets.items() if alphabet in last}
    found = _divided(
        splits["background"],
        {"train": set(alphabets) - held_out, "validation": held_out},
    )
    return {**found, "test": splits["evaluation"]}


# The encoded image, which TFDS decodes into three channels.
_ENCODED = {"image": tfds.decode.SkipDecoding()}


def _divided(
    examples: arrays.Split, classes: dict[str, set[int]]
) -> dict[str, arrays.Split]:
    labels = np.asarray(examples.labels)
    return {
        split: arrays.Split(examples.images[chosen], examples.labels[chosen])
        for split, of_split in classes.items()
        for chosen in [np.flatnonzero(np.isin(labels, list(of_split)))]
    }
