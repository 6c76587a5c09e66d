"""What a workdir keeps of an experiment, so that a killed one goes on where it was.

One process owns a workdir at a time. Finished runs leave their numbers; a run that was
interrupted leaves its last two snapshots: parameters, optimizer state, key, and the
count that is the position in the data. It goes on from there to the same bits.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from ml_collections import ConfigDict

from experiments import events

_KEPT = 2  # snapshots: one may be damaged
# Fields on which no run depends: where data lies, what runs beside it, when it saves.
_FREE = frozenset({"data_dir", "parallel_runs", "run", "snapshot_seconds"})


@contextlib.contextmanager
def owned(directory: pathlib.Path, config: ConfigDict, resume: bool) -> Iterator[None]:
    """Makes this process the owner of a workdir, for one configuration.

    Args:
      directory: the workdir; made if it is not there.
      config: what runs in it. It is written to config.json.
      resume: whether to go on with what is there; otherwise its runs are removed.

    Raises:
      RuntimeError: if another process owns the workdir.
      ValueError: if it holds runs of another configuration. It may name other methods
        to run and another ``data_dir``, ``parallel_runs`` and ``snapshot_seconds``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(directory / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise RuntimeError(
            f"another process runs in {directory}; wait for it or choose another "
            "--workdir."
        ) from error
    with lock:
        written, text = directory / "config.json", _json(config)
        runs = directory / "runs"
        if not resume:
            shutil.rmtree(runs, ignore_errors=True)
        elif (
            runs.exists()
            and written.exists()
            and (names := _differences(*map(json.loads, (written.read_text(), text))))
        ):
            raise ValueError(
                f"{directory} holds runs of another configuration, with other values "
                f"of {', '.join(names[:5])}; choose another --workdir, or --noresume "
                "to begin anew in this one."
            )
        write_text(written, text)
        yield


class Snapshot(NamedTuple):
    """A run at some step.

    Attributes:
      state: its `TrainState`; on disk, beside it, the digest of its bits.
      curve: [test score, validation score] at the points so far.
      seconds: time of the steps so far.
      points: what the event file has so far.
    """

    state: Any
    curve: list[list[float]]
    seconds: float
    points: Sequence[events.Point] = ()


class RunDirectory:
    """What is kept of one run."""

    def __init__(
        self, path: pathlib.Path, every_seconds: float, event_files: bool = False
    ):
        """Makes the directory.

        Args:
          path: of the directory.
          every_seconds: least time between two snapshots.
          event_files: whether to write TensorBoard's.
        """
        self._path = path.absolute()
        self._every = every_seconds
        self._event_files = event_files
        self._last = time.monotonic()
        self._path.mkdir(parents=True, exist_ok=True)

    def result(self) -> dict[str, Any] | None:
        """What `finish` was given, or None for a run that is not finished."""
        file = self._path / "result.json"
        return json.loads(file.read_text()) if file.exists() else None

    def due(self) -> bool:
        """Whether it is time for a snapshot."""
        return time.monotonic() - self._last >= self._every

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Writes a snapshot; one that is cut off does not count."""
        path = self._path / str(step)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path / "state", snapshot.state, force=True)
        rest = snapshot._replace(state=_digest(snapshot.state))
        write_text(path / "rest.json", json.dumps(rest._asdict()))
        for old in self._steps()[:-_KEPT]:
            shutil.rmtree(self._path / str(old))
        self._last = time.monotonic()

    def latest(self, like: Any) -> tuple[int, Snapshot] | None:
        """The last snapshot that can be read, with its step.

        Args:
          like: a state of the same shapes.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        for step in reversed(self._steps()):
            path = self._path / str(step)
            try:
                rest = Snapshot(**json.loads((path / "rest.json").read_text()))
                rest = rest._replace(points=[events.Point(*p) for p in rest.points])
                with ocp.StandardCheckpointer() as checkpointer:
                    state = checkpointer.restore(path / "state", target)
                if _digest(state) != rest.state:
                    raise ValueError("the numbers are not those that were written")
                return step, rest._replace(state=state)
            except Exception as error:  # whatever a damaged file makes a library raise
                logging.warning(
                    "%s is damaged and left out; the run goes on from an earlier "
                    "step. (%s: %s)",
                    path,
                    type(error).__name__,
                    error,
                )
        return None

    @contextlib.contextmanager
    def log(
        self, points: Sequence[events.Point]
    ) -> Iterator[Callable[[events.Point], None] | None]:
        """As `events.writer`, or None in its place if no event files are asked for.

        Args:
          points: of the run so far.
        """
        if self._event_files:
            with events.writer(self._path, points) as add:
                yield add
        else:
            yield None

    def finish(self, result: dict[str, Any]) -> None:
        """Writes the numbers of a finished run and removes its snapshots."""
        write_text(self._path / "result.json", json.dumps(result))
        for step in self._steps():
            shutil.rmtree(self._path / str(step))

    def _steps(self) -> list[int]:
        """Steps of the snapshots, complete or not."""
        return sorted(int(p.name) for p in self._path.iterdir() if p.name.isdecimal())


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _json(config: ConfigDict) -> str:
    return config.to_json_best_effort(indent=2) + "\n"


def _differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Names of the fields, such as "methods.fp32.steps", that are not the same."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [name]
    return [
        found
        for key in sorted((one.keys() | other.keys()) - _FREE)
        for found in _differences(
            one.get(key), other.get(key), f"{name}.{key}" if name else key
        )
    ]


def _digest(state: Any) -> str:
    """SHA-256 of all bits of a state."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        digest.update(f"{array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
