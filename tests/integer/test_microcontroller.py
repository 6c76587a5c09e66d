"""The tables of integer programs, in their smallest settings."""

import functools

import jax
import numpy as np
import pytest

from experiments.benchmarks import emulation
from fgrad.fixed_point import is_qtensor

microcontroller = pytest.importorskip(
    "experiments.benchmarks.microcontroller", reason="needs the extra [experiments]"
)
head = pytest.importorskip("experiments.benchmarks.microcontroller_head")
accuracy = pytest.importorskip("experiments.benchmarks.integer_accuracy")
adaptation = pytest.importorskip("experiments.benchmarks.integer_adaptation")
problems = pytest.importorskip("experiments.benchmarks.integer_problems")
arrays = pytest.importorskip("experiments.data.arrays")
crnn = pytest.importorskip("experiments.models.crnn")

host = pytest.mark.skipif(not emulation.has_host_compiler(), reason="needs gcc or cc")


def check(printed):
    (row,) = [line for line in printed.splitlines() if line.startswith("| 0 |")]
    assert row.endswith("| yes |")
    if emulation.has_emulator():
        assert "Bits of JAX after 1 steps: True" in printed
    else:
        assert "pip install 'fgrad[integer]'" in printed


@pytest.mark.slow
@host
def test_the_tables_are_printed(tmp_path, capsys):
    microcontroller.EXAMPLE.run(str(tmp_path), True, microcontroller.SMOKE)
    check(capsys.readouterr().out)


@pytest.mark.slow
@host
def test_a_head_on_a_frozen_backbone(tmp_path, capsys, monkeypatch):
    network = functools.partial(crnn.CRNN, num_classes=4, width=4, depth=1, pool=(2, 2))
    sounds = jax.random.normal(jax.random.key(0), (40, 8, 4, 1))
    split = arrays.Split(sounds, np.arange(40) % 2 + 7)
    params = jax.jit(network().init)(jax.random.key(1), sounds)["params"]
    monkeypatch.setattr(
        problems,
        "features_network",
        lambda *_: (network, params, {"train": split, "test": split}),
    )
    program, train, test = head.prepared(tmp_path, smoke=True)
    assert sorted(np.unique(train.labels)) == [0, 1]
    assert len(train.labels) == 20
    assert len(test.labels) == 10
    backbone = jax.tree.leaves(program.params["recurrent"], is_leaf=is_qtensor)
    widths = {leaf.bits for leaf in backbone}
    assert widths == {8}
    head.EXAMPLE.run(str(tmp_path), True, head.SMOKE)
    check(capsys.readouterr().out)


@pytest.mark.slow
def test_integer_programs_beside_float_networks(tmp_path):
    problem = problems.digits_cnn(tmp_path, smoke=True)
    cells = accuracy.row(problem).strip("| ").split(" | ")
    assert cells[:2] == ["CNN, digits", "accuracy"]
    shares = [float(cell.split("%")[0]) for cell in cells[2:]]
    assert abs(shares[1] - shares[0]) <= 1
    assert shares[2] > 98  # the same predictions


@pytest.mark.slow
def test_the_integer_step_beside_the_library_s(tmp_path, monkeypatch):
    task = adaptation.digits(tmp_path, smoke=True)
    task.method.learning_rates = task.method.learning_rates[:1]
    lines = list(adaptation.rows(task, tmp_path))
    assert [line.split(" | ")[1] for line in lines] == [
        "16w8a of the library",
        "integer step",
    ]
    assert all("| 80 |" in line for line in lines)  # 20 steps of two pairs
    # What was run is read back.
    monkeypatch.setattr(adaptation, "adapted", None)
    assert list(adaptation.rows(task, tmp_path)) == lines


def test_voices_are_split_by_class():
    images = np.arange(12.0).reshape(12, 1)
    labels = np.array([5, 9] * 6)
    found = problems.new_voices(arrays.Split(images, labels))
    assert {name: len(part.labels) for name, part in found.items()} == {
        "train": 6,
        "validation": 4,
        "test": 2,
    }
    for part in found.values():
        np.testing.assert_array_equal(part.labels, part.images[:, 0] % 2)
    every = np.concatenate([part.images[:, 0] for part in found.values()])
    assert sorted(every) == list(range(12))
