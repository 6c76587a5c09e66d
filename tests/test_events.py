import pathlib
import struct

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from experiments.configs import quickstart
from experiments.data import arrays
from experiments.drivers.trainer import Planned, Trainer
from experiments.models import linear
from experiments.workdir import events, runs


def read(directory):
    """All scalars of a directory's event files as (name, step, value), by time."""
    scalars = []
    for file in sorted(pathlib.Path(directory).glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                number = (value.tag, event.step, value.simple_value)
                scalars.append((event.wall_time, *number))
    return [number for _, *number in scalars]


def test_a_file_has_the_points_before_and_after(tmp_path):
    points = [
        events.Point(step, 1e9 + step, {"a": step / 2, "b": -step}) for step in (0, 7)
    ]
    for known in (0, 1, 2):  # the file of before is replaced each time
        with events.writer(tmp_path, points[:known]) as add:
            for point in points[known:]:
                add(point)
        assert read(tmp_path) == [["a", 0, 0], ["b", 0, 0], ["a", 7, 3.5], ["b", 7, -7]]
        assert len(list(tmp_path.iterdir())) == 1


class KilledError(Exception):
    pass


class Setting:
    """A run of a method on random features, ten steps between two looks."""

    steps, num_evals = 35, 3

    def __init__(self, method):
        config = quickstart.base("smoke")
        random = np.random.default_rng(0)
        split = arrays.Split(
            random.uniform(size=(24, 8)).astype(np.float32),
            random.integers(10, size=24),
        )
        self.config = config.methods[method]
        self.splits = dict.fromkeys(("train", "validation", "test"), split)
        model = linear.Linear(num_classes=10)
        key = np.zeros(2, np.uint32)
        self.params = model.init(key, split.images[:1])["params"]
        self.trainer = Trainer(
            self.config, model.clone, self.params, self.splits, ["accuracy"]
        )

    def run(self, path, die_after=10**9, event_files=True):
        taken = 0

        def progress(steps):
            nonlocal taken
            taken += steps
            if taken > die_after:
                raise KilledError

        directory = runs.RunDirectory(path, 0.0, event_files)
        (run,) = self.trainer.run(
            self.params,
            [Planned(0, 0.1, directory)],
            steps=self.steps,
            num_evals=self.num_evals,
            progress=progress,
        )
        return run


@pytest.fixture(scope="module", params=["backprop", "forward_fp32"])
def setting(request):
    return Setting(request.param)


def test_a_run_writes_what_it_knows(setting, tmp_path):
    run = setting.run(tmp_path)
    found = {}
    for name, step, value in read(tmp_path):
        found.setdefault(name, {})[step] = value
    evals = [0, 11, 23, 35]  # three equal parts of 35 steps
    looks = [0, 10, 11, 21, 23, 33, 35]
    assert list(found["test/accuracy"]) == evals
    np.testing.assert_allclose(
        list(found["test/accuracy"].values()), [x for x, _ in run.curve]
    )
    per_step = setting.trainer.learner.passes_per_step
    assert found["forward_passes"] == {step: per_step * step for step in looks}
    if setting.config.gradient == "backward":  # its optimizer tells nothing
        assert set(found) == {"test/accuracy", "forward_passes"}
    else:
        for name in ("train/loss", "train/moved_fraction"):
            assert list(found[name]) == looks[1:]
            assert np.all(np.isfinite(list(found[name].values())))
        assert 0 < found["train/moved_fraction"][10] <= 1
        assert (
            1 < found["train/loss"][10] < 5
        )  # log(10) for a network that knows nothing


@pytest.mark.parametrize("die_after", [11, 33])
def test_a_run_that_goes_on_has_every_point_once(setting, tmp_path, die_after):
    expected = setting.run(tmp_path / "whole")
    for more in (die_after, die_after - 10):
        with pytest.raises(KilledError):
            setting.run(tmp_path / "killed", more)
        assert read(tmp_path / "killed")
    found = setting.run(tmp_path / "killed")
    assert found._replace(seconds=0) == expected._replace(seconds=0)
    assert read(tmp_path / "killed") == read(tmp_path / "whole")


def test_no_file_is_written_unless_asked_for(setting, tmp_path):
    setting.run(tmp_path, event_files=False)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert not quickstart.base().event_files
