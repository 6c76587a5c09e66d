"""ESC-50 and FSDKaggle2018: sounds of 50 and of 41 kinds, of the official archives.

Their class splits are those of MetaAudio, which are read from the file that its authors
published; none is written down here.
"""

import io
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from experiments import audio
from experiments.data import archives, sounds

_FOLDER = "In TFDS's folder for manual downloads (downloads/manual in the data_dir): "
_METAAUDIO = (
    "https://github.com/CHeggan/MetaAudio-A-Few-Shot-Audio-Classification-Benchmark, "
    "Examples/MAML_ESC/dataset_/splits"
)
ESC_SPLIT, FSD_SPLIT = "ESC_paper_splits.npy", "Kaggle18_norm_split.npy"


def _config(name: str, description: str, seconds: float) -> sounds.SoundsConfig:
    return sounds.SoundsConfig(name=name, description=description, seconds=seconds)


def class_split(
    folder: pathlib.Path, name: str, classes: list[str], instructions: str
) -> dict[str, list[str]]:
    """The names of the classes of each split, of a file of MetaAudio's.

    Args:
      folder: where the file is.
      name: of the file: an npy of three lists of names, train, validation and test.
      classes: all names that there are.
      instructions: how to get the file.

    Returns:
      By the names of the splits.

    Raises:
      FileNotFoundError: if the file is not there.
      ValueError: if it names a class that is none, or one twice.
    """
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {name}. {instructions}")
    with path.open("rb") as file:
        parts = archives.load_objects(file)
    if parts.ndim not in (1, 2) or len(parts) != 3:
        raise ValueError(f"{path} is not of three lists of names: it is {parts.shape}.")
    found = {
        split: _names(part, path)
        for split, part in zip(("train", "validation", "test"), parts, strict=True)
    }
    named = [label for part in found.values() for label in part]
    if unknown := sorted(set(named) - set(classes)):
        raise ValueError(
            f"{path} names the classes {unknown[:5]}, which the dataset does not have: "
            "get the file that is for it."
        )
    if len(set(named)) < len(named):
        raise ValueError(f"{path} has a class in two splits; download it again.")
    return found


def _names(part: Any, path: pathlib.Path) -> list[str]:
    """A list of names, of a list or an array."""
    listed = part.tolist() if isinstance(part, np.ndarray) else part
    if not isinstance(listed, (list, tuple)) or not all(
        isinstance(name, str) for name in listed
    ):
        raise ValueError(f"{path} has a part that is no list of names.")
    return [str(name) for name in listed]


def _divided(
    folder: pathlib.Path, name: str, rows: list[tuple[Any, str]], instructions: str
) -> dict[str, Iterator[sounds.Recording]]:
    """Recordings of each split, of files and the names of their classes."""
    if len({file.name for file, _ in rows}) < len(rows):
        raise ValueError(f"{folder} has tables that name a file twice.")
    classes = sorted({label for _, label in rows})
    split = class_split(folder, name, classes, instructions)

    def of_split(own: list[str]) -> Iterator[sounds.Recording]:
        for file, label in rows:
            if label in own:
                yield sounds.Recording(file.name, _read(file), classes.index(label))

    return {name: of_split(own) for name, own in split.items()}


def _read(file: Any) -> np.ndarray:
    content = io.BytesIO(archives.content(file))
    return audio.read(content, sounds.SAMPLE_RATE, name=str(file))


class Esc50(sounds.Sounds):
    """Builder of ESC-50; works without TensorFlow.

    It reads ``ESC-50-master.zip`` as GitHub makes it, or what it unpacks to, and
    MetaAudio's ``ESC_paper_splits.npy``. 2,000 recordings of 5 seconds; the label is
    the number of the category, by name.
    """

    BUILDER_CONFIGS = [_config("5s", "Whole recordings.", 5.0)]  # noqa: RUF012
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"{_FOLDER}https://github.com/karolpiczak/ESC-50/archive/master.zip as "
        f"ESC-50-master.zip, and {ESC_SPLIT} of {_METAAUDIO}"
    )
    DESCRIPTION = """
    2,000 recordings of 50 kinds of sound of the environment, 5 seconds each; the class
    split is MetaAudio's, which is read.
    """
    CITATION = """
    @inproceedings{piczak2015esc,
      title = {{ESC}: {Dataset} for {Environmental Sound Classification}},
      author = {Piczak, Karol J.},
      booktitle = {Proceedings of the 23rd ACM International Conference on Multimedia},
      pages = {1015--1018},
      year = {2015},
    }
    """
    HOMEPAGE = "https://github.com/karolpiczak/ESC-50"
    LICENSE = "CC BY-NC 3.0"

    def recordings(
        self, folder: pathlib.Path
    ) -> Mapping[str, Iterator[sounds.Recording]]:
        """Those of each split."""
        instructions = self.MANUAL_DOWNLOAD_INSTRUCTIONS
        root = archives.root(folder, "ESC-50-master", instructions)
        path = root / "meta" / "esc50.csv"
        rows = [
            (archives.inside(root / "audio", name, path), label)
            for name, label in archives.table(path, "filename", "category")
        ]
        return _divided(folder, ESC_SPLIT, rows, instructions)


class FsdKaggle2018(sounds.Sounds):
    """Builder of FSDKaggle2018; works without TensorFlow.

    It reads ``FSDKaggle2018.audio_train``, ``.audio_test`` and ``.meta``, zips or what
    they unpack to, and MetaAudio's ``Kaggle18_norm_split.npy``. 11,073 recordings of
    0.3 to 30 seconds; the label is the number of the class, by name.
    """

    BUILDER_CONFIGS = [  # noqa: RUF012
        _config("5s", "The middle of each recording: 5 s.", 5.0)
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"{_FOLDER}FSDKaggle2018.audio_train.zip, FSDKaggle2018.audio_test.zip and "
        "FSDKaggle2018.meta.zip of https://zenodo.org/record/2552860, and "
        f"{FSD_SPLIT} of {_METAAUDIO}"
    )
    DESCRIPTION = """
    11,073 recordings of 41 kinds of sound; the class split is MetaAudio's, which is
    read.
    """
    CITATION = """
    @inproceedings{fonseca2018general,
      title = {General-purpose Tagging of {Freesound} Audio with {AudioSet} Labels: Task
               Description, Dataset, and Baseline},
      author = {Fonseca, Eduardo and Plakal, Manoj and Font, Frederic and
                Ellis, Daniel P. W. and Favory, Xavier and Pons, Jordi and
                Serra, Xavier},
      booktitle = {Proceedings of the DCASE 2018 Workshop},
      year = {2018},
    }
    """
    HOMEPAGE = "https://zenodo.org/record/2552860"
    LICENSE = "CC BY 4.0; of each recording CC0 or CC BY"

    def recordings(
        self, folder: pathlib.Path
    ) -> Mapping[str, Iterator[sounds.Recording]]:
        """Those of each split."""
        instructions = self.MANUAL_DOWNLOAD_INSTRUCTIONS
        meta = archives.root(folder, "FSDKaggle2018.meta", instructions)
        rows = []
        for part, table in (
            ("train", "train_post_competition.csv"),
            ("test", "test_post_competition_scoring_clips.csv"),
        ):
            files = archives.root(folder, f"FSDKaggle2018.audio_{part}", instructions)
            rows += [
                (archives.inside(files, name, meta / table), label)
                for name, label in archives.table(meta / table, "fname", "label")
            ]
        return _divided(folder, FSD_SPLIT, rows, instructions)
