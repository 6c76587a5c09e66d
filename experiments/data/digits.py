"""Handwritten digits: scikit-learn's 1,797 real 8x8 images."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from sklearn import datasets

from experiments.data import rotated


class Digits(rotated.RotatedImages):
    """Builder of the digits."""

    DESCRIPTION = """
    The 1,797 real 8x8 images of handwritten digits that scikit-learn carries (the test
    part of the UCI ML set "Optical Recognition of Handwritten Digits"), in 17 grey
    levels. Each configuration is a domain: "upright" as recorded, "rotated_D" turned by
    D degrees. The splits hold the same images in every domain: 1,078 train, 300
    validation and 419 test, stratified by class.
    """
    CITATION = """
    @misc{alpaydin1998optical,
      author = {Alpaydin, E. and Kaynak, C.},
      title = {Optical Recognition of Handwritten Digits},
      year = {1998},
      howpublished = {UCI Machine Learning Repository},
      doi = {10.24432/C50P49},
    }
    """
    HOMEPAGE = "https://doi.org/10.24432/C50P49"
    IMAGE_SHAPE = (8, 8)
    WHITE = 16
    SPLIT_SIZES = {"train": 1078, "validation": 300, "test": 419}  # noqa: RUF012

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """The images and labels in the package."""
        return datasets.load_digits(return_X_y=True)


class DigitClasses(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]  # mypy does not see tfds
):
    """Builder of the digits with class-disjoint splits, for tasks of three classes.

    "train" has 0 to 3, "validation" 4 to 6 and "test" 7 to 9. The splits are ours.
    """

    VERSION = tfds.core.Version("1.0.0")
    CLASSES = {"train": range(4), "validation": range(4, 7), "test": range(7, 10)}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{Digits.DESCRIPTION}Here: {DigitClasses.__doc__}",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.Tensor(shape=(), dtype=np.int32),
                }
            ),
            homepage=Digits.HOMEPAGE,
            citation=Digits.CITATION,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # the package carries the images
        return {
            split: self._generate_examples(classes)
            for split, classes in self.CLASSES.items()
        }

    def _generate_examples(
        self, classes: range
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        images, labels = datasets.load_digits(return_X_y=True)
        for index in np.flatnonzero(np.isin(labels, classes)):
            image = np.rint(images[index] * (255 / Digits.WHITE)).astype(np.uint8)
            yield int(index), {"image": image.reshape(8, 8, 1), "label": labels[index]}
