"""Handwritten digits: scikit-learn's 1,797 real 8x8 images."""

import numpy as np
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
