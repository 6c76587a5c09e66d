import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from concurrent import futures
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_events import read

import fgrad
from experiments.configs import quickstart
from experiments.drivers import training
from experiments.usage import UsageError
from experiments.workdir import events, runs


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


def test_runs_in_threads_may_save_at_the_same_time(tmp_path):
    def work(number):
        directory = runs.RunDirectory(tmp_path / str(number), every_seconds=0)
        for step in range(1, 6):
            directory.save(step, runs.Snapshot(state(number), [], 0.0))
        return directory.latest(like=state(0))

    with futures.ThreadPoolExecutor(3) as pool:
        for number, (step, snapshot) in enumerate(pool.map(work, range(3))):
            assert (step, bits(snapshot.state)) == (5, bits(state(number)))


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
    assert "cannot be read and is left out" in caplog.text
    damage(tmp_path / "run" / "3")
    assert directory.latest(like=state(0)) is None
    # It goes on: a new snapshot takes the place of the damaged ones.
    directory.save(7, runs.Snapshot(state(8), [], 0.0))
    assert bits(directory.latest(like=state(0))[1].state) == bits(state(8))


def again(tmp_path):
    """The directory of a run, as the next process sees it."""
    return runs.RunDirectory(tmp_path / "run", every_seconds=0)


def saved_steps(tmp_path):
    return sorted(int(p.name) for p in (tmp_path / "run").iterdir())


@pytest.mark.parametrize("damage", [cut, flip, unfinish, lie])
@pytest.mark.parametrize("good", [None, 3])
def test_later_snapshots_that_cannot_be_read_do_not_evict_new_ones(
    damage, good, tmp_path
):
    directory_with(tmp_path, 70 if good is None else good, 80)
    for step in {70, 80} & set(saved_steps(tmp_path)):
        damage(tmp_path / "run" / str(step))
    directory = again(tmp_path)
    found = directory.latest(like=state(0))
    assert (found[0] if found else None) == good
    for step in (5, 6, 8):
        directory.save(step, runs.Snapshot(state(step), [], 0.0))
        # The run makes durable progress from the first snapshot on.
        assert again(tmp_path).latest(like=state(0))[0] == step
    assert saved_steps(tmp_path) == [6, 8]


def test_a_damaged_snapshot_does_not_take_the_place_of_a_good_one(tmp_path):
    directory_with(tmp_path, 3, 7)
    flip(tmp_path / "run" / "7")
    directory = again(tmp_path)
    assert directory.latest(like=state(0))[0] == 3
    directory.save(9, runs.Snapshot(state(9), [], 0.0))
    assert saved_steps(tmp_path) == [3, 9]
    flip(tmp_path / "run" / "9")
    assert again(tmp_path).latest(like=state(0))[0] == 3


class Renamed(NamedTuple):
    weights: object
    key: jax.Array
    nothing: tuple
    count: jax.Array


def with_another_leaf(state):
    return state._replace(params={**state.params, "more": jnp.ones(2)})


def without_a_leaf(state):
    return state._replace(params={"f": state.params["f"]})


def renamed(state):
    return Renamed(*state)


def of_another_shape(state):
    return state._replace(params={**state.params, "f": jnp.ones((7, 5))})


@pytest.mark.parametrize(
    "other", [with_another_leaf, without_a_leaf, renamed, of_another_shape]
)
def test_a_state_of_another_structure_does_not_evict_new_ones(other, tmp_path, caplog):
    directory = again(tmp_path)
    for step in (70, 80):
        directory.save(step, runs.Snapshot(other(state(step)), [], 0.0))
    directory = again(tmp_path)
    assert directory.latest(like=state(0)) is None
    assert "of another version" in caplog.text
    for step in (5, 6, 8):
        directory.save(step, runs.Snapshot(state(step), [], 0.0))
        found, snapshot = again(tmp_path).latest(like=state(0))
        assert (found, bits(snapshot.state)) == (step, bits(state(step)))


def test_no_flipped_bit_of_a_snapshot_is_accepted(tmp_path):
    points = [events.Point(0, 1e9, {"train/loss": 2.5})]
    directory = again(tmp_path)
    directory.save(3, runs.Snapshot(state(3), [[0.5, 0.25]], 1.5, points))
    path = tmp_path / "run" / "3" / "rest.json"
    written = path.read_bytes()
    for place in range(8 * len(written)):
        flipped = bytearray(written)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError, match=r"."):  # JSON's and UTF-8's are such
            runs.unsealed(flipped.decode())
    for place in (20, 8 * len(written) // 2, 8 * len(written) - 20):
        flipped = bytearray(written)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert again(tmp_path).latest(like=state(0)) is None
    path.write_bytes(written)
    assert again(tmp_path).latest(like=state(0))[1].points == points


RESULT = {"validation": 0.5, "scores": {"accuracy": 0.75}, "curve": [[0.5, 0.25]]}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("0.75", "0.25"),
        lambda text: text.replace("sha256", "sha257"),
        lambda text: text.replace("content", "kontent"),
        lambda text: "{}",
        lambda text: "null",
    ],
)
def test_a_damaged_result_makes_the_run_be_repeated(damage, tmp_path, caplog):
    directory = again(tmp_path)
    directory.finish(RESULT)
    path = tmp_path / "run" / "result.json"
    path.write_text(damage(path.read_text()))
    assert again(tmp_path).result() is None
    assert "the run is repeated" in caplog.text
    directory.finish(RESULT)
    assert again(tmp_path).result() == RESULT


def test_files_of_earlier_versions_are_read(tmp_path):
    directory_with(tmp_path, 3)
    path = tmp_path / "run" / "3" / "rest.json"
    path.write_text(json.dumps(json.loads(path.read_text())["content"]))
    assert again(tmp_path).latest(like=state(0))[0] == 3
    (tmp_path / "run" / "result.json").write_text(json.dumps(RESULT))
    assert again(tmp_path).result() == RESULT


def test_a_directory_that_was_removed_is_not_made_anew(tmp_path):
    directory = directory_with(tmp_path, 3)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="was removed while a run wrote"):
        directory.save(7, runs.Snapshot(state(7), [], 0.0))
    assert not (tmp_path / "run").exists()


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


ONE, OTHER = ConfigDict({"a": 1}), ConfigDict({"a": 2})


def emptied(path):
    path.write_text("")


def removed(path):
    path.unlink()


def bit_flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = [emptied, removed, bit_flipped]


def workdir_with_runs(path):
    with runs.owned(path, ONE, resume=True):
        (path / "runs" / "base").mkdir(parents=True)


@pytest.mark.parametrize("file", ["config.json", "runs.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_runs_are_not_given_to_another_configuration(file, damage, tmp_path):
    workdir_with_runs(tmp_path)
    damage(tmp_path / file)
    with (
        pytest.raises(UsageError, match="with other values of a; choose"),
        runs.owned(tmp_path, OTHER, resume=True),
    ):
        pass
    with runs.owned(tmp_path, ONE, resume=True):  # and are healed by their own
        assert (tmp_path / "runs" / "base").exists()
        assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("damage", [emptied, removed])
def test_runs_of_an_unknown_configuration_are_refused(damage, tmp_path):
    workdir_with_runs(tmp_path)
    damage(tmp_path / "config.json")
    damage(tmp_path / "runs.json")
    for config in (ONE, OTHER):
        with (
            pytest.raises(UsageError, match="missing or damaged"),
            runs.owned(tmp_path, config, resume=True),
        ):
            pass
    assert (tmp_path / "runs" / "base").exists()
    with runs.owned(tmp_path, OTHER, resume=False):
        assert not (tmp_path / "runs").exists()


def test_a_workdir_of_an_earlier_version_goes_on(tmp_path):
    workdir_with_runs(tmp_path)
    (tmp_path / "runs.json").unlink()
    with runs.owned(tmp_path, ONE, resume=True):
        assert (tmp_path / "runs" / "base").exists()


def lock_removed(path):
    path.unlink()


def lock_replaced(path):
    path.unlink()
    path.touch()


def lock_renamed(path):
    path.rename(path.with_name("elsewhere"))


@pytest.mark.skipif(sys.platform == "win32", reason="a file in use stays there")
@pytest.mark.parametrize("change", [lock_removed, lock_replaced, lock_renamed])
def test_the_owner_stays_the_owner_without_its_lock_file(change, tmp_path):
    with runs.owned(tmp_path, ONE, resume=True):
        change(tmp_path / "lock")
        for _ in range(2):
            with (
                pytest.raises(runs.InUseError, match="another process runs in"),
                runs.owned(tmp_path, ONE, resume=True),
            ):
                pass
    with runs.owned(tmp_path, ONE, resume=True):
        pass


KILLS = int(os.environ.get("FGRAD_TEST_KILLS", "1"))
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


@pytest.mark.slow
def test_a_killed_experiment_ends_in_the_same_bits(tmp_path):
    config = quickstart.get_config("smoke")
    config.update_from_flattened_dict(SETTINGS)
    config.data_dir = str(tmp_path / "data")
    expected = without_times(training.run(config, str(tmp_path / "whole")))

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
