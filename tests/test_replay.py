"""Runs of experiments that are made again from their losses."""

import numpy as np
import pytest

from experiments.configs import quickstart
from experiments.data.arrays import Split
from experiments.drivers import replay, training
from experiments.drivers.trainer import Planned, Trainer
from experiments.models import linear
from experiments.usage import UsageError
from experiments.workdir import runs

NAME, STEPS = "forward_fp32/seed_3", 12


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A finished run, killed once on its way; its config, its workdir and its task."""
    config, workdir = quickstart.base("smoke"), tmp_path_factory.mktemp("workdir")
    method = config.methods.forward_fp32
    method.batch_size = 8
    random = np.random.default_rng(0)
    split = Split(
        random.uniform(size=(24, 8)).astype(np.float32), random.integers(10, size=24)
    )
    splits = dict.fromkeys(("train", "validation", "test"), split)
    model = linear.Linear(num_classes=10)
    params = model.init(np.zeros(2, np.uint32), split.images[:1])["params"]
    trainer = Trainer(method, model.clone, params, splits, ["accuracy"])

    def run(progress):
        directory = runs.RunDirectory(workdir / "runs" / NAME, 0.0, loss_files=True)
        given = {"steps": STEPS, "num_evals": 2, "progress": progress}
        return trainer.run(params, [Planned(3, 0.1, directory)], **given)

    def die(steps):
        calls.append(steps)
        if len(calls) == 3:  # at the start, after the first steps, and after the next
            raise KilledError

    calls = []
    with pytest.raises(KilledError):
        run(die)
    run(lambda steps: None)
    return config, workdir, training.Task(model.clone, splits, splits, params)


@pytest.fixture(autouse=True)
def prepared(setting, monkeypatch):
    monkeypatch.setattr(training, "prepare", lambda *args: setting[2])


def test_a_run_is_made_again_to_the_bit(setting):
    config, workdir, _ = setting
    told = replay.run(config, str(workdir), NAME)
    size = (workdir / "runs" / NAME / "losses").stat().st_size
    assert told.startswith(f"{NAME}: {STEPS} steps again from {size:,} bytes; SHA-256")
    assert 8 * config.methods.forward_fp32.num_perturbations * STEPS < size < 2000


def test_another_method_ends_elsewhere(setting):
    config, workdir, _ = setting
    other = config.copy_and_resolve_references()
    other.methods.forward_fp32.optimizer = "momentum"
    with pytest.raises(UsageError, match=r"SHA-256 .*, and the run had"):
        replay.run(other, str(workdir), NAME)


@pytest.mark.parametrize("name", ["forward_fp32/seed_4", "forward_fp32", "seed_3"])
def test_what_is_no_finished_run_is_refused(setting, name):
    config, workdir, _ = setting
    with pytest.raises(UsageError, match="is no finished run of a seed; give one"):
        replay.run(config, str(workdir), name)


def test_a_run_without_losses_is_refused(setting, tmp_path):
    config, _, _ = setting
    runs.RunDirectory(tmp_path / "runs" / NAME, 0.0).finish({"digest": ""})
    with pytest.raises(UsageError, match="kept no losses: make the run with --config"):
        replay.run(config, str(tmp_path), NAME)
