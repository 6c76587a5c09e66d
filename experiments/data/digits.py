"""Handwritten digits, upright and rotated: scikit-learn's 1,797 real 8x8 images."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from scipy import ndimage
from sklearn import datasets, model_selection

_DESCRIPTION = """
The 1,797 real 8x8 images of handwritten digits that scikit-learn carries (the test part
of the UCI ML set "Optical Recognition of Handwritten Digits"), in 17 grey levels. Each
configuration is a domain: "upright" as recorded, "rotated_D" turned by D degrees. The
splits hold the same images in every domain: 1,078 train, 300 validation and 419 test,
stratified by class.
"""

_CITATION = """
@misc{alpaydin1998optical,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  howpublished = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49},
}
"""

_SPLIT_SIZES = {"train": 1078, "validation": 300, "test": 419}
_SPLIT_SEED = 0


@dataclasses.dataclass
class DigitsConfig(tfds.core.BuilderConfig):
    """A domain of the digits.

    Attributes:
      degrees: counter-clockwise rotation of every image.
    """

    degrees: float = 0.0


class Digits(tfds.core.GeneratorBasedBuilder):
    """Builder of the digits; reads and writes without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012  (the name and type are TFDS's)
        DigitsConfig(name="upright", description="As recorded."),
        *(
            DigitsConfig(
                name=f"rotated_{degrees}",
                description=f"Rotated by {degrees} degrees, bilinear.",
                degrees=float(degrees),
            )
            for degrees in (15, 30, 45)
        ),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        # Tensor, not Image: decoding PNG would need TensorFlow.
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                "label": tfds.features.Tensor(shape=(), dtype=np.int32),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=features,
            homepage="https://doi.org/10.24432/C50P49",
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # the package carries the images
        images, labels = datasets.load_digits(return_X_y=True)
        rest, start = np.arange(len(labels)), {}
        for split, size in _SPLIT_SIZES.items():
            if len(rest) > size:
                start[split], rest = model_selection.train_test_split(
                    rest,
                    train_size=size,
                    stratify=labels[rest],
                    random_state=_SPLIT_SEED,
                )
            else:
                start[split] = rest
        images = images.reshape(-1, 8, 8)
        return {
            split: self._generate_examples(images, labels, indices)
            for split, indices in start.items()
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        degrees = self.builder_config.degrees
        for index in indices:
            image = images[index]
            if degrees:
                image = ndimage.rotate(image, degrees, reshape=False, order=1)
            # 0..16 to 0..255, so that 8 bits keep what the interpolation made.
            image = np.clip(np.rint(image * (255 / 16)), 0, 255).astype(np.uint8)
            yield int(index), {"image": image[..., None], "label": int(labels[index])}
