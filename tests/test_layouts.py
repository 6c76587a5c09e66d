"""Runs of several seeds as one program, on one device and on four.

Run as a script, this file is the process that has four devices.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import main as launcher
from experiments.configs import quickstart
from experiments.data.arrays import Split
from experiments.drivers import layouts, programs
from experiments.drivers.trainer import Planned, Trainer
from experiments.models import linear
from experiments.usage import UsageError
from experiments.workdir import runs

SEEDS, STEPS = (0, 1, 2, 3), 24
LAYOUTS = {
    "separate": layouts.ALONE,
    "vmapped": layouts.Layout(vmapped=True),
    "four devices": {"mesh": "seeds=4"},
    "two devices": {"mesh": "seeds=2"},
    "shards": {"batch_shards": 2},
    "seeds and data": {"mesh": "seeds=2,data=2"},
}


def changed(**changes):
    config = quickstart.base("smoke")
    config.seeds = SEEDS
    for name, value in changes.items():
        config[name] = value
    return config


class KilledError(Exception):
    pass


def trained(how, folder, die_after=10**9, count=4):
    """Digests of the ends of runs, and their test scores."""
    layout = LAYOUTS[how]
    if not isinstance(layout, layouts.Layout):
        layout = layouts.resolved(changed(**layout))
    random = np.random.default_rng(0)
    split = Split(
        random.uniform(size=(24, 8)).astype(np.float32), random.integers(10, size=24)
    )
    method = quickstart.changed(
        quickstart.base("smoke").methods.forward_fp32, {"batch_size": 8}
    )
    model = linear.Linear(num_classes=10)
    params = model.init(np.zeros(2, np.uint32), split.images[:1])["params"]
    splits = dict.fromkeys(("train", "validation", "test"), split)
    trainer = Trainer(method, model.clone, params, splits, ["accuracy"], layout)
    taken = 0

    def progress(steps):
        nonlocal taken
        taken += steps
        if taken > die_after:
            raise KilledError

    planned = [
        Planned(seed, 0.1, runs.RunDirectory(folder / str(seed), 0.0))
        for seed in SEEDS[:count]
    ]
    groups = [planned] if layout.one_program else [[one] for one in planned]
    given = {"steps": STEPS, "num_evals": 2, "progress": progress}
    found = [run for group in groups for run in trainer.run(params, group, **given)]
    return {"digests": [r.digest for r in found], "curves": [r.curve for r in found]}


def killed_and_resumed():
    """A run of four devices that dies, and goes on with two and then with one."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for how, until in (("four devices", 44), ("two devices", 60)):
            with pytest.raises(KilledError):
                trained(how, folder, until)
        # One run got further than the others.
        return trained("separate", folder)


def main():
    """Prints what all layouts make, as JSON; what they share is compiled once."""
    found = {}
    kept = tempfile.TemporaryDirectory()
    jax.config.update("jax_compilation_cache_dir", kept.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    for how in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            found[how] = trained(how, pathlib.Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        found["three of four"] = trained("four devices", pathlib.Path(folder), count=3)
    found["resumed"] = killed_and_resumed()
    print(json.dumps(found))


@pytest.fixture(scope="module")
def results():
    """What the process with four devices found, by layout."""
    root = str(pathlib.Path(__file__).parent.parent)
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": root + os.pathsep + os.environ.get("PYTHONPATH", ""),
    }
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        env=environment,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["four devices", "two devices", "resumed"])
def test_runs_in_turn_on_any_devices_have_the_bits_of_separate_ones(results, how):
    assert len(set(results["separate"]["digests"])) == len(SEEDS)
    assert results[how] == results["separate"]


@pytest.mark.slow
def test_devices_that_share_steps_change_no_bit_for_as_many_shards(results):
    assert results["seeds and data"] == results["shards"]
    assert results["shards"]["digests"] != results["separate"]["digests"]


@pytest.mark.slow
def test_devices_without_a_run_of_their_own_change_nothing(results):
    expected = {name: x[:3] for name, x in results["separate"].items()}
    assert results["three of four"] == expected


@pytest.mark.slow
def test_vmapped_runs_are_separate_ones_but_for_rounding(results):
    vmapped, separate = (results[how]["curves"] for how in ("vmapped", "separate"))
    # Scores of 24 examples: one may be on the other side.
    np.testing.assert_allclose(vmapped, separate, atol=1.01 / 24)


def test_what_counts_steps_is_not_stacked():
    assert programs._axis((jax.tree_util.GetAttrKey("count"),)) is None
    assert programs._axis((jax.tree_util.DictKey("w"),)) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh": "seed=4"}, "has the part 'seed=4'; give numbers of devices along"),
        ({"mesh": "seeds=0"}, "has the part 'seeds=0'"),
        ({"mesh": "seeds=64"}, "has 64 devices and there are .*device_count=64"),
        ({"together": "often"}, 'must be "vmapped", "in_turn" or ""'),
        ({"batch_shards": 5}, "a batch of 64 of forward_fp32 cannot be cut into 5"),
    ],
)
def test_layouts_that_cannot_be_are_refused(changes, said):
    with pytest.raises(UsageError, match=said):
        layouts.check(changed(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh": "seeds=3"}, "4 seeds cannot .* seeds=3 devices; use 1 or 2 devices"),
        ({"mesh": "pairs=3"}, "2 pairs of forward_fp32 .* pairs=3 .* use 1 or 2 dev"),
        ({"mesh": "data=3"}, "a batch of 64 .* into 3 equal parts; 1 or 2 could be"),
        ({"mesh": "data=2", "batch_shards": 3}, "batch_shards=3 .* multiple of 2"),
        ({"mesh": "data=2", "run": ("backprop",)}, "none has pairs or a batch"),
    ],
)
def test_devices_that_do_not_divide_are_refused(monkeypatch, changes, said):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    with pytest.raises(UsageError, match=said):
        layouts.check(changed(**changes))


def test_the_mesh_of_the_command_reaches_all_parts():
    config = ConfigDict({"parts": {"a": changed(), "b": changed()}})
    launcher._set_mesh(config, "train", "seeds=2")
    assert [part.mesh for part in config.parts.values()] == ["seeds=2", "seeds=2"]
    with pytest.raises(UsageError, match="driver 'few_shot', are not shared"):
        launcher._set_mesh(changed(), "few_shot", "seeds=2")


if __name__ == "__main__":
    main()
