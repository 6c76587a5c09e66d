"""Images of a package as TFDS datasets whose domains are rotations."""

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from scipy import ndimage
from sklearn import model_selection

_SPLIT_SEED = 0


@dataclasses.dataclass
class RotatedConfig(tfds.core.BuilderConfig):
    """A domain.

    Attributes:
      degrees: counter-clockwise rotation of every image.
    """

    degrees: float = 0.0


class RotatedImages(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]  # mypy does not see tfds
):
    """Builder of grey images, upright and rotated; works without TensorFlow.

    The splits hold the same images in every domain and are stratified by class.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012  (the name and type are TFDS's)
        RotatedConfig(name="upright", description="As recorded."),
        *(
            RotatedConfig(
                name=f"rotated_{degrees}",
                description=f"Rotated by {degrees} degrees, bilinear.",
                degrees=float(degrees),
            )
            for degrees in (15, 30, 45)
        ),
    ]

    # Set by each dataset.
    DESCRIPTION: ClassVar[str]
    CITATION: ClassVar[str]
    HOMEPAGE: ClassVar[str]
    IMAGE_SHAPE: ClassVar[tuple[int, int]]
    WHITE: ClassVar[int]  # the largest grey level
    SPLIT_SIZES: ClassVar[Mapping[str, int]]  # of all images together

    @abc.abstractmethod
    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Images [examples, height * width] from 0 to WHITE, and labels [examples]."""

    def _info(self) -> tfds.core.DatasetInfo:
        # Tensor, not Image: decoding PNG would need TensorFlow.
        shape = (*self.IMAGE_SHAPE, 1)
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=shape, dtype=np.uint8),
                "label": tfds.features.Tensor(shape=(), dtype=np.int32),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=features,
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # the package carries the images
        images, labels = self.load()
        rest, start = np.arange(len(labels)), {}
        for split, size in self.SPLIT_SIZES.items():
            if len(rest) > size:
                start[split], rest = model_selection.train_test_split(
                    rest,
                    train_size=size,
                    stratify=labels[rest],
                    random_state=_SPLIT_SEED,
                )
            else:
                start[split] = rest
        images = images.reshape(-1, *self.IMAGE_SHAPE)
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
            # 8 bits keep what the interpolation made.
            image = np.clip(np.rint(image * (255 / self.WHITE)), 0, 255)
            image = image.astype(np.uint8)
            yield int(index), {"image": image[..., None], "label": int(labels[index])}
