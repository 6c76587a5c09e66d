import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_events import read

import fgrad
from experiments import runs, train
from experiments.configs import quickstart


class State(NamedTuple):
    params: object
    key: jax.Array
    nothing: tuple
    count: jax.Array


def state(seed):
    w = jax.random.normal(jax.random.key(seed), (6, 5))
    params = {"q": fgrad.quantize(w, bits=16), "f": w, "h": w.astype(jnp.bfloat16)}
    return State(params, jax.random.key(seed), (), jnp.int32(seed))


def bits(tree):
    return [
        np.asarray(
            jax.random.key_data(x)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
        ).tobytes()
        for x in jax.tree.leaves(tree)
    ]


def directory_with(tmp_path, *steps):
    directory = runs.RunDirectory(tmp_path / "run", every_seconds=0)
    for step in steps:
        directory.save(
            step, runs.Snapshot(state(step), [[0.1 * step, 0.5]], float(step))
        )
    return directory


def test_a_snapshot_comes_back_bit_by_bit(tmp_path):
    directory_with(tmp_path, 3, 7, 11)
    # Another process has nothing but a state of the same shapes.
    again = runs.RunDirectory(tmp_path / "run", every_seconds=0)
    step, snapshot = again.latest(like=state(0))
    assert (step, snapshot.curve, snapshot.seconds) == (11, [[1.1, 0.5]], 11.0)
    assert bits(snapshot.state) == bits(state(11))
    assert jax.tree.structure(snapshot.state) == jax.tree.structure(state(11))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["11", "7"]


def test_an_empty_directory_has_nothing(tmp_path):
    directory = runs.RunDirectory(tmp_path / "run", every_seconds=0)
    assert directory.latest(like=state(0)) is None
    assert directory.result() is None


def largest_file(path):
    return max(
        (p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )


def cut(path):
    file = largest_file(path / "state")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(path):
    file = largest_file(path / "state")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def unfinish(path):
    (path / "rest.json").unlink()


def lie(path):
    """A state that can be read and is another one."""
    rest = json.loads((path / "rest.json").read_text())
    (path / "rest.json").write_text(json.dumps({**rest, "state": "0" * 64}))


@pytest.mark.parametrize("damage", [cut, flip, unfinish, lie])
def test_a_damaged_snapshot_is_refused_and_the_one_before_is_used(
    damage, tmp_path, caplog
):
    directory = directory_with(tmp_path, 3, 7)
    damage(tmp_path / "run" / "7")
    step, snapshot = directory.latest(like=state(0))
    assert step == 3
    assert bits(snapshot.state) == bits(state(3))
    assert "is damaged and left out" in caplog.text
    damage(tmp_path / "run" / "3")
    assert directory.latest(like=state(0)) is None
    # It goes on: a new snapshot takes the place of the damaged ones.
    directory.save(7, runs.Snapshot(state(8), [], 0.0))
    assert bits(directory.latest(like=state(0))[1].state) == bits(state(8))


def test_a_finished_run_leaves_its_numbers_only(tmp_path):
    directory = directory_with(tmp_path, 3)
    directory.finish({"validation": 0.5})
    assert directory.result() == {"validation": 0.5}
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["result.json"]


def test_a_workdir_has_one_owner_and_one_configuration(tmp_path):
    config = ConfigDict({"a": 1, "b": {"c": 0.5, "d": 2}})
    with (
        runs.owned(tmp_path, config, resume=True),
        pytest.raises(RuntimeError, match="another process runs in"),
        runs.owned(tmp_path, config, resume=True),
    ):
        pass
    (tmp_path / "runs" / "base").mkdir(parents=True)
    with runs.owned(tmp_path, config, resume=True):
        assert (tmp_path / "runs" / "base").exists()
    # A method more, or data in another place, leaves the runs there as they are.
    more = ConfigDict({**config, "run": ("base", "more"), "data_dir": "elsewhere"})
    with runs.owned(tmp_path, more, resume=True):
        assert (tmp_path / "runs" / "base").exists()
    other = ConfigDict({"a": 1, "b": {"c": 0.25, "d": 2}, "e": None, "f": 1})
    with (
        pytest.raises(ValueError, match=r"with other values of b.c, f; choose"),
        runs.owned(tmp_path, other, resume=True),
    ):
        pass
    with runs.owned(tmp_path, other, resume=False):
        assert not (tmp_path / "runs").exists()


KILLS = int(os.environ.get("FGRAD_TEST_KILLS", "2"))
SETTINGS = {
    "run": ("forward_16w8a",),
    "snapshot_seconds": 0.0,
    "event_files": True,
    # Two seeds and a snapshot every ten steps: eight for each kill, which waits for
    # four at most and may miss some on a machine with other work.
    "methods.forward_16w8a.steps": 40 * KILLS,
}


def without_times(results):
    for result in results.values():
        result.pop("seconds", None)
    return results


@pytest.mark.optimized
def test_a_killed_experiment_ends_in_the_same_bits(tmp_path):
    config = quickstart.get_config("smoke")
    config.update_from_flattened_dict(SETTINGS)
    config.data_dir = str(tmp_path / "data")
    expected = without_times(train.run(config, str(tmp_path / "whole")))

    workdir = tmp_path / "killed"
    command = [
        *(sys.executable, "-m", "experiments.main", f"--workdir={workdir}"),
        "--config=experiments/configs/quickstart.py:smoke",
        f"--config.data_dir={config.data_dir}",
        *(f"--config.{name}={value}" for name, value in SETTINGS.items()),
    ]

    def kept():
        while True:
            try:
                return set((workdir / "runs").rglob("*.json"))
            except FileNotFoundError:  # a folder was renamed or removed meanwhile
                continue

    def launch():
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    rng = np.random.default_rng(0)
    for _ in range(KILLS):
        process, before = launch(), kept()
        # Somewhere after the next few snapshots, in the midst of a step or a write.
        more = int(rng.integers(1, 5))
        while len(kept() - before) < more and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        ended = process.wait()
        assert ended == -signal.SIGKILL, "it ended before it was killed"
    assert launch().wait() == 0
    written = json.loads(pathlib.Path(workdir / "results.json").read_text())
    assert without_times(written) == expected
    for name in ("pretrain", "forward_16w8a/seed_0", "forward_16w8a/seed_1"):
        found, whole = (read(tmp_path / w / "runs" / name) for w in ("killed", "whole"))
        assert found == whole
        assert found
