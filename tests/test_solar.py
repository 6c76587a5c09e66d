import importlib.resources
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from experiments.data import arrays, solar

COUNTS = {"mono": (24, 6, 2, 8), "poly": (28, 8, 4, 20)}  # of the probabilities in turn
PROBABILITIES = (0.0, 1 / 3, 2 / 3, 1.0)


@pytest.fixture
def package(tmp_path_factory, monkeypatch):
    """A small package with the files of elpv-dataset; returns its rows.

    The grey level of a cell's corner tells its row.
    """
    root = tmp_path_factory.mktemp("package")
    images = root / "elpv_dataset" / "data" / "images"
    images.mkdir(parents=True)
    (root / "elpv_dataset" / "__init__.py").touch()
    rows = [
        (probability, cells)
        for cells, counts in COUNTS.items()
        for probability, count in zip(PROBABILITIES, counts, strict=True)
        for _ in range(count)
    ]
    table = ""
    for i, (probability, cells) in enumerate(rows):
        # Grey, and a checkerboard of single pixels to the right.
        image = np.full((64, 64), i, np.uint8)
        image[:, 32:] = 255 * (np.indices((64, 32)).sum(axis=0) % 2)
        Image.fromarray(image).save(images / f"cell{i + 1:04d}.png")
        table += f"images/cell{i + 1:04d}.png  {probability:<18}  {cells}\n"
    (images.parent / "labels.csv").write_text(table)
    monkeypatch.syspath_prepend(root)
    monkeypatch.delitem(sys.modules, "elpv_dataset", raising=False)
    yield rows
    sys.modules.pop("elpv_dataset", None)


def load(config, data_dir, **kwargs):
    builder = solar.SolarCells(
        config=config, data_dir=str(data_dir), file_format="array_record", **kwargs
    )
    return arrays.load(builder)


def numbers(split):
    """The rows of a split's cells."""
    return np.rint(np.asarray(split.images[:, 0, 0, 0]) * 255).astype(int)


def test_every_cell_is_in_one_split_with_its_label(package, tmp_path):
    for cells in ("mono", "poly"):
        splits = load(f"{cells}_32", tmp_path)
        found = [
            (int(number), int(label))
            for split in splits.values()
            for number, label in zip(
                numbers(split), np.asarray(split.labels), strict=True
            )
        ]
        assert sorted(found) == [
            (i, int(probability in (2 / 3, 1.0)))
            for i, (probability, type_) in enumerate(package)
            if type_ == cells
        ]


def test_splits_are_stratified_and_seeded(package, tmp_path):
    mono = load("mono_32", tmp_path / "one")
    again = load("mono_32", tmp_path / "other")
    sizes = {name: np.bincount(split.labels).tolist() for name, split in mono.items()}
    assert sizes == {"train": [18, 6], "validation": [4, 2], "test": [8, 2]}
    for name, split in mono.items():
        np.testing.assert_array_equal(numbers(split), numbers(again[name]))


def test_all_is_mono_and_poly_split_by_split(package, tmp_path):
    mono, poly, both = (load(f"{c}_32", tmp_path) for c in ("mono", "poly", "all"))
    for name, split in both.items():
        parts = [*numbers(mono[name]), *numbers(poly[name])]
        assert sorted(numbers(split)) == sorted(parts)


def test_sizes_hold_the_same_cells_without_aliasing(package, tmp_path):
    small, large = load("mono_32", tmp_path), load("mono_64", tmp_path)
    config = solar.SolarConfig(name="mono_48", cells="mono", size=48)
    other = load(config, tmp_path)
    for name in small:
        assert small[name].images.shape[1:] == (32, 32, 1)
        assert other[name].images.shape[1:] == (48, 48, 1)
        assert sorted(numbers(small[name])) == sorted(numbers(large[name]))
        assert sorted(numbers(small[name])) == sorted(numbers(other[name]))
    # The checkerboard is too fine for half the pixels: grey, away from its edges.
    board = np.asarray(small["test"].images[:, 2:-2, 20:-2])
    np.testing.assert_allclose(board, 0.5, atol=0.02)
    # At the package's size nothing changes.
    assert set(np.unique(large["test"].images[:, :, 32:])) == {0, 1}


def test_the_licence_is_told(package, tmp_path, caplog):
    builder = solar.SolarCells(config="mono_32", data_dir=str(tmp_path))
    assert "CC BY-NC-SA 4.0" in builder.info.description
    assert "CC BY-NC-SA 4.0" in solar.__doc__
    with caplog.at_level("WARNING", logger="absl"):
        load("mono_32", tmp_path)
    assert "CC BY-NC-SA 4.0" in caplog.text


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'elpv-dataset"):
        load("mono_32", tmp_path)


def test_bad_configurations_are_refused(tmp_path):
    for wrong, match in (
        ({"cells": "thin"}, "cells must be one of mono, poly, all, got 'thin'"),
        ({"size": 0}, "size must be positive, got 0"),
    ):
        config = solar.SolarConfig(name="wrong", **wrong)
        with pytest.raises(ValueError, match=match):
            load(config, tmp_path)


@pytest.mark.slow
def test_nothing_imports_tensorflow(package, tmp_path):
    code = (
        "import sys; from experiments.data import arrays, solar;"
        "builder = solar.SolarCells(config='mono_32', data_dir=sys.argv[1],"
        " file_format='array_record'); arrays.load(builder);"
        "assert 'tensorflow' not in sys.modules"
    )
    path = [str(path) for path in sys.path]
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {path}; {code}", tmp_path],
        check=True,
    )


def test_the_real_cells_are_elpvs(tmp_path):
    utils = pytest.importorskip("elpv_dataset.utils")
    splits = load("mono_32", tmp_path / "data")
    counts = {
        name: np.bincount(split.labels).tolist() for name, split in splits.items()
    }
    assert counts == {"train": [422, 222], "validation": [106, 55], "test": [177, 92]}
    # All of the second domain by its table only: its images take longer.
    table = solar._read_table(solar._package_files())
    (poly,) = np.nonzero(table["type"] == "poly")
    labels = (table["probability"] > 0.5).astype(int)
    counts = {
        name: np.bincount(labels[indices]).tolist()
        for name, indices in solar._split(poly, labels).items()
    }
    assert counts == {"train": [658, 271], "validation": [165, 68], "test": [275, 113]}
    # The package's own loader, on the first eight rows of its table.
    source = importlib.resources.files("elpv_dataset") / "data"
    rows = (source / "labels.csv").read_text().splitlines(keepends=True)[:8]
    (tmp_path / "labels.csv").write_text("".join(rows))
    (tmp_path / "images").symlink_to(str(source / "images"))
    images, probabilities, types = utils.load_dataset(str(tmp_path / "labels.csv"))
    np.testing.assert_array_equal(table["probability"][:8], probabilities)
    np.testing.assert_array_equal(table["type"][:8], types)
    found = {
        np.rint(image[..., 0] * 255).astype(np.uint8).tobytes(): int(label)
        for split in splits.values()
        for image, label in zip(*map(np.asarray, split), strict=True)
    }
    for image, probability in zip(images, probabilities, strict=True):
        small = Image.fromarray(image).resize((32, 32), Image.Resampling.LANCZOS)
        assert found[np.asarray(small).tobytes()] == round(probability)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("../../secret.png 0.0 mono", "leads out of its folder"),
        ("/etc/passwd 0.0 mono", "leads out of its folder"),
        ("images/cell0001.png nan mono", "is of no cell"),
        ("images/cell0001.png 2.0 mono", "is of no cell"),
        ("images/cell0001.png many mono", "could not convert"),
        ("images/cell0001.png 0.0 thin", "is of no cell"),
        ("images/cell0001.png 0.0", "not enough values"),
        ("images/cell0002.png 0.0 mono", "names a file twice"),
        ("images/none.png 0.0 mono", "no such file"),
    ],
)
def test_rows_that_are_none_are_refused(row, match, package, tmp_path):
    table = solar._package_files() / "labels.csv"
    rows = table.read_text().splitlines()
    table.write_text("\n".join([row, *rows[1:]]))
    with pytest.raises(ValueError, match=rf"(labels\.csv|none\.png): .*{match}"):
        load("mono_32", tmp_path)
