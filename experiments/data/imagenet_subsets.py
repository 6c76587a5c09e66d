"""miniImageNet and tieredImageNet, of the files that their authors published.

Their images are ImageNet's, for non-commercial research; nobody may pass them on. The
class splits are read from the files beside the images; none is written down here.
"""

import abc
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from experiments.data import archives, pictures

_SPLITS = {"train": "train", "validation": "val", "test": "test"}
_MOST_CLASSES = 21_841  # ImageNet's
_LICENSE = "ImageNet's terms of access: non-commercial research and education."


class _Picture(NamedTuple):
    key: str
    encoded: bytes
    label: int  # over all splits


@dataclasses.dataclass
class SubsetConfig(tfds.core.BuilderConfig):
    """A size.

    Attributes:
      size: height and width in pixels.
    """

    size: int = 84


class _Subset(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]  # mypy does not see tfds
):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012  (the name and type are TFDS's)
        SubsetConfig(name=str(size), description=f"{size}x{size} pixels.", size=size)
        for size in (32, 84)
    ]

    # Set by each dataset.
    DESCRIPTION: ClassVar[str]
    CITATION: ClassVar[str]
    HOMEPAGE: ClassVar[str]

    @abc.abstractmethod
    def pictures(self, folder: pathlib.Path) -> Mapping[str, Iterator[_Picture]]:
        """Those of each split, of the files in TFDS's folder for manual downloads."""

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.size
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    # Tensor, not Image: decoding PNG would need TensorFlow.
                    "image": tfds.features.Tensor(
                        shape=(size, size, 3), dtype=np.uint8
                    ),
                    "label": tfds.features.Tensor(shape=(), dtype=np.int32),
                }
            ),
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            license=_LICENSE,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        splits = self.pictures(pathlib.Path(dl_manager.manual_dir))
        return {name: self._generate_examples(split) for name, split in splits.items()}

    def _generate_examples(
        self, found: Iterator[_Picture]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        size = self.builder_config.size
        for key, encoded, label in found:
            square = pictures.square(encoded, key, "RGB", size)
            yield key, {"image": square, "label": label}


class MiniImageNet(_Subset):
    """Builder of miniImageNet; works without TensorFlow.

    It reads ``miniImageNet/{train,val,test}.csv``, rows of "filename,label" as Ravi and
    Larochelle published them, and ``miniImageNet/images/``, from the folder for manual
    downloads or from ``miniImageNet.zip`` there. Labels are numbers of the WordNet
    names in order, over all splits: 64, 16 and 20 classes of 600 images.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "In TFDS's folder for manual downloads (downloads/manual in the data_dir): "
        "miniImageNet/ with train.csv, val.csv and test.csv of "
        "https://github.com/twitter-research/meta-learning-lstm "
        "(data/miniImagenet), and images/ with the files that they name, cut out of "
        "ImageNet's as that repository says; or a zip of that folder."
    )
    DESCRIPTION = """
    60,000 pictures of 100 classes of ImageNet, for few-shot tasks. The class split is
    that of Ravi and Larochelle's csv files, which are read.
    """
    CITATION = """
    @inproceedings{ravi2017optimization,
      title = {Optimization as a Model for Few-Shot Learning},
      author = {Ravi, Sachin and Larochelle, Hugo},
      booktitle = {International Conference on Learning Representations},
      year = {2017},
    }
    @inproceedings{vinyals2016matching,
      title = {Matching Networks for One Shot Learning},
      author = {Vinyals, Oriol and Blundell, Charles and Lillicrap, Timothy and
                Kavukcuoglu, Koray and Wierstra, Daan},
      booktitle = {Advances in Neural Information Processing Systems},
      year = {2016},
    }
    """
    HOMEPAGE = "https://github.com/twitter-research/meta-learning-lstm"

    def pictures(self, folder: pathlib.Path) -> Mapping[str, Iterator[_Picture]]:
        """Those of each split."""
        root = archives.root(folder, "miniImageNet", self.MANUAL_DOWNLOAD_INSTRUCTIONS)
        rows = {}
        for split, name in _SPLITS.items():
            path = root / f"{name}.csv"
            rows[split] = [
                (archives.inside(root / "images", file, path), label)
                for file, label in archives.table(path, "filename", "label")
            ]
        names = sorted({label for split in rows.values() for _, label in split})

        def of_split(split: list[tuple[Any, str]]) -> Iterator[_Picture]:
            for file, label in split:
                encoded = archives.content(file)
                yield _Picture(file.name, encoded, names.index(label))

        return {split: of_split(found) for split, found in rows.items()}


class TieredImageNet(_Subset):
    """Builder of tieredImageNet; works without TensorFlow.

    It reads ``tiered-imagenet/{train,val,test}_{images_png,labels}.pkl`` as Ren et al.
    published them, from the folder for manual downloads; their pickles are read without
    running code. Labels are those of the files, counted on over the splits: 351, 97 and
    160 classes.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "In TFDS's folder for manual downloads (downloads/manual in the data_dir): "
        "tiered-imagenet/ of tiered-imagenet.tar, see "
        "https://github.com/renmengye/few-shot-ssl-public"
    )
    DESCRIPTION = """
    779,165 pictures of 608 classes of ImageNet, for few-shot tasks; the splits differ
    in whole categories. The class split is that of Ren et al.'s files, which are read.
    """
    CITATION = """
    @inproceedings{ren2018metalearning,
      title = {Meta-Learning for Semi-Supervised Few-Shot Classification},
      author = {Ren, Mengye and Triantafillou, Eleni and Ravi, Sachin and Snell, Jake
                and Swersky, Kevin and Tenenbaum, Joshua B. and Larochelle, Hugo and
                Zemel, Richard S.},
      booktitle = {International Conference on Learning Representations},
      year = {2018},
    }
    """
    HOMEPAGE = "https://github.com/renmengye/few-shot-ssl-public"

    def pictures(self, folder: pathlib.Path) -> Mapping[str, Iterator[_Picture]]:
        """Those of each split."""
        root = archives.root(
            folder, "tiered-imagenet", self.MANUAL_DOWNLOAD_INSTRUCTIONS
        )
        labels, start = {}, 0
        for split, name in _SPLITS.items():
            with archives.opened(root / f"{name}_labels.pkl") as file:
                own = _labels(archives.load_pickle(file))
            labels[split] = start + own
            start += int(own.max()) + 1

        def of_split(split: str) -> Iterator[_Picture]:
            path = root / f"{_SPLITS[split]}_images_png.pkl"
            with archives.opened(path) as file:
                encoded = archives.load_pickle(file)
                own = labels[split]
                if not isinstance(encoded, list) or len(encoded) != len(own):
                    raise ValueError(f"it is no list of {len(own)} pictures.")
            for i, (png, label) in enumerate(zip(encoded, own, strict=True)):
                # A column of bytes, as OpenCV makes it, or the bytes.
                if isinstance(png, np.ndarray) and png.dtype == np.uint8:
                    png = png.tobytes()
                if not isinstance(png, bytes):
                    raise ValueError(
                        f"cannot read {path}: its number {i} is no picture."
                    )
                yield _Picture(f"{split}_{i} of {path.name}", png, int(label))

        return {split: of_split(split) for split in _SPLITS}


def _labels(content: Any) -> np.ndarray:
    """The label of each picture, from 0 on."""
    found = content.get("label_specific") if isinstance(content, dict) else None
    if isinstance(found, list) and all(type(label) is int for label in found):
        found = np.array(found, np.int64)
    if not (
        isinstance(found, np.ndarray)
        and found.ndim == 1
        and found.size
        and found.dtype.kind in "iu"
        and found.min() >= 0
        and found.max() < _MOST_CLASSES
    ):
        raise ValueError('its "label_specific" is no list of labels.')
    return found.astype(np.int64)
