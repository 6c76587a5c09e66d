"""Electroluminescence images of solar cells, functional or defective.

The 2,624 images are those of the package ``elpv-dataset``, which is read when the data
is prepared. They are under CC BY-NC-SA 4.0: not for commercial use, to be credited, and
what is made of them is to be shared alike. That holds for prepared files as well; our
own licence does not cover them.
"""

import dataclasses
import functools
import importlib.resources
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from sklearn import model_selection

from experiments.data import archives, pictures

_SPLIT_SEED = 0
_INSTALL = "pip install 'elpv-dataset>=1.0.0.post1'"
_LICENSE = "CC BY-NC-SA 4.0 (https://creativecommons.org/licenses/by-nc-sa/4.0/)"
_TABLE = "labels.csv"
_TYPES = {"mono": ("mono",), "poly": ("poly",), "all": ("mono", "poly")}


@dataclasses.dataclass
class SolarConfig(tfds.core.BuilderConfig):
    """A domain at a size.

    Attributes:
      cells: "mono" or "poly" for mono- or polycrystalline cells; "all" for both.
      size: height and width in pixels; the package's images have 300.
    """

    cells: str = "all"
    size: int = 96


class SolarCells(tfds.core.GeneratorBasedBuilder):
    """Builder of the images by type of the cell; works without TensorFlow.

    Configurations are "<cells>_<size>", such as "mono_96" and "poly_96"; for another
    size pass a `SolarConfig`. Images are resized with Pillow's Lanczos filter, which
    averages over as many pixels as it must to avoid aliasing.

    The label is 1, defective, where the package's probability of a defect is above one
    half (2/3 and 1), and 0, functional, elsewhere (0 and 1/3). The package prescribes
    no threshold; its four probabilities are verdicts, certain and uncertain, of an
    expert, and this one takes the verdict.

    The splits are stratified by label within each type. They are the same cells at
    every size, and "all" holds those of "mono" and "poly" split by split. The package
    has no splits, and does not tell which cells come from one module: a module may have
    cells in several of ours.

    Preparing takes about 5 ms for each cell, 10 s for "all_96".

    The images are under CC BY-NC-SA 4.0, see the module.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012  (the name and type are TFDS's)
        SolarConfig(
            name=f"{cells}_{size}",
            description=f"Cells: {cells}; {size}x{size} pixels.",
            cells=cells,
            size=size,
        )
        for cells in _TYPES
        for size in (32, 64, 96, 128, 300)
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        if config.cells not in _TYPES:
            raise ValueError(
                f"cells must be one of {', '.join(_TYPES)}, got {config.cells!r}."
            )
        if config.size < 1:
            raise ValueError(f"size must be positive, got {config.size}.")
        # Tensor, not Image: decoding PNG would need TensorFlow.
        shape = (config.size, config.size, 1)
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=shape, dtype=np.uint8),
                "label": tfds.features.Tensor(shape=(), dtype=np.int32),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=features,
            homepage="https://github.com/zae-bayern/elpv-dataset",
            citation=_CITATION,
            license=_LICENSE,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # the package carries the images
        files = _package_files()
        logging.warning(
            "The solar cells of elpv-dataset are under %s: no commercial use.", _LICENSE
        )
        table = _read_table(files)
        labels = (table["probability"] > 0.5).astype(np.int32)
        splits: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
        for cells in _TYPES[self.builder_config.cells]:
            of_type = np.flatnonzero(table["type"] == cells)
            for name, indices in _split(of_type, labels).items():
                splits[name].extend(indices.tolist())
        paths = table["path"]
        return {
            name: self._generate_examples(files, paths, labels, indices)
            for name, indices in splits.items()
        }

    def _generate_examples(
        self, files: Any, paths: np.ndarray, labels: np.ndarray, indices: list[int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        size = self.builder_config.size
        # One at a time: the package's own loader holds all of them, twice.
        for index in indices:
            path = archives.inside(files, paths[index], files / _TABLE)
            image = pictures.square(archives.content(path), path, "L", size)
            yield index, {"image": image[..., None], "label": labels[index]}


def _package_files() -> Any:
    """The folder of the package's images and labels."""
    try:
        return importlib.resources.files("elpv_dataset") / "data"
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The solar cells are in the package elpv-dataset, which is not installed: "
            f"{_INSTALL}"
        ) from error


def _read_table(files: Any) -> np.ndarray:
    """Path, probability of a defect, and type of each cell."""
    content = archives.content(files / _TABLE)
    with archives.naming(files / _TABLE):
        rows = []
        for line in filter(str.strip, content.decode().splitlines()):
            path, probability, cells = line.split()
            if not 0 <= float(probability) <= 1 or (cells,) not in _TYPES.values():
                raise ValueError(f"the row {line[:80]!r} is of no cell.")
            rows.append((path, float(probability), cells))
        if len({path for path, _, _ in rows}) < len(rows):
            raise ValueError("it names a file twice.")
    return np.array(
        rows, dtype=[("path", object), ("probability", float), ("type", "U4")]
    )


def _split(indices: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """60% train, 15% validation, 25% test, stratified by label."""
    divide = functools.partial(
        model_selection.train_test_split, random_state=_SPLIT_SEED
    )
    rest, test = divide(indices, test_size=0.25, stratify=labels[indices])
    train, validation = divide(rest, test_size=0.2, stratify=labels[rest])
    return {"train": train, "validation": validation, "test": test}


_DESCRIPTION = f"""
2,624 electroluminescence images of solar cells from 44 modules, in 256 grey levels,
labelled 0 (functional) or 1 (defective). Each configuration is a domain, "mono" or
"poly" crystalline cells or "all", at a size. Of label 0 and 1 there are, in train,
validation and test:

mono: 422 + 222, 106 + 55, 177 + 92
poly: 658 + 271, 165 + 68, 275 + 113
all: 1,080 + 493, 271 + 123, 452 + 205

Licence: {_LICENSE}, for non-commercial use; prepared files are under it, too. From the
package elpv-dataset ({_INSTALL}).
"""
_CITATION = """
@article{deitsch2019automatic,
  title = {Automatic classification of defective photovoltaic module cells in
           electroluminescence images},
  author = {Deitsch, Sergiu and Christlein, Vincent and Berger, Stephan and
            Buerhop-Lutz, Claudia and Maier, Andreas and Gallwitz, Florian and
            Riess, Christian},
  journal = {Solar Energy},
  volume = {185},
  pages = {455--468},
  year = {2019},
}
@inproceedings{buerhop2018benchmark,
  title = {A Benchmark for Visual Identification of Defective Solar Cells in
           Electroluminescence Imagery},
  author = {Buerhop-Lutz, Claudia and Deitsch, Sergiu and Maier, Andreas and
            Gallwitz, Florian and Berger, Stephan and Doll, Bernd and
            Hauch, Jens and Camus, Christian and Brabec, Christoph J.},
  booktitle = {European PV Solar Energy Conference and Exhibition},
  year = {2018},
}
"""
