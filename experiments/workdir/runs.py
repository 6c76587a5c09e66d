"""What a workdir keeps of an experiment, so that a killed one goes on where it was.

One process owns a workdir at a time. Finished runs leave their numbers; a run that was
interrupted leaves its last two snapshots: parameters, optimizer state, key, and the
count that is the position in the data. It goes on from there to the same bits.

Whatever a later process reads back is checked: the numbers of a state against a digest
of their bits, the JSON files against a digest of their text. What is damaged does not
count, and the run that it belongs to goes on from what was written before.
"""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
import threading
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

from experiments.usage import UsageError
from experiments.workdir import events

_KEPT = 2  # snapshots: one may be damaged
_RUNS_OF = "runs.json"  # the configuration that the runs of a workdir belong to
# Fields on which no run depends: where data lies, what runs beside it and on which
# devices, when it saves.
_FREE = frozenset({"data_dir", "mesh", "parallel_runs", "run", "snapshot_seconds"})


# Methods train side by side in threads. Orbax counts its operations in one place, and two
# that overlap make each other's directories: a save then fails with FileExistsError.
_one_checkpointer = threading.Lock()


class InUseError(RuntimeError):
    """Another process owns the workdir."""


@contextlib.contextmanager
def owned(directory: pathlib.Path, config: ConfigDict, resume: bool) -> Iterator[None]:
    """Makes this process the owner of a workdir, for one configuration.

    Args:
      directory: the workdir; made if it is not there.
      config: what runs in it. It is written to config.json for readers, and with a
        digest to runs.json, which says to which configuration the runs belong.
      resume: whether to go on with what is there; otherwise its runs are removed.

    Raises:
      InUseError: if another process owns the workdir.
      UsageError: if it holds runs of another configuration, or does not tell of which.
        It may name other methods to run and another ``data_dir``, ``mesh``,
        ``parallel_runs`` and ``snapshot_seconds``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        runs = directory / "runs"
        if not resume:
            shutil.rmtree(runs, ignore_errors=True)
        text = _json(config)
        if runs.exists() and any(runs.iterdir()):
            _check_same(directory, json.loads(text))
        write_text(directory / "config.json", text)
        write_text(directory / _RUNS_OF, sealed(json.loads(text)))
        yield


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[None]:
    """Locks a directory for this process, or raises an `InUseError`."""
    taken = InUseError(
        f"another process runs in {directory}; wait for it or choose another --workdir."
    )
    with contextlib.ExitStack() as stack:
        try:
            lock = filelock.FileLock(directory / "lock")
            stack.enter_context(lock.acquire(timeout=0))
        except filelock.Timeout as error:
            raise taken from error
        if sys.platform != "win32":  # where a file in use cannot be deleted
            import fcntl

            # The lock file can be deleted, and another one locked in its place.
            descriptor = os.open(directory, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise taken from error
            except OSError:  # some network file systems lock no directories
                logging.warning("%s is guarded by its lock file only.", directory)
        yield


def _check_same(directory: pathlib.Path, config: Any) -> None:
    """Makes sure that the runs of a workdir are of a configuration."""
    known = _known_config(directory)
    if known is None:
        raise UsageError(
            f"{directory} holds runs, and neither {_RUNS_OF} nor config.json tells of "
            "which configuration: they are missing or damaged. Put one back, choose "
            "another --workdir, or --noresume to begin anew in this one."
        )
    if names := _differences(known, config):
        raise UsageError(
            f"{directory} holds runs of another configuration, with other values of "
            f"{', '.join(names[:5])}; choose another --workdir, or --noresume to begin "
            "anew in this one."
        )


def _known_config(directory: pathlib.Path) -> Any:
    """The configuration of the runs in a workdir, or None if nothing tells it."""
    with contextlib.suppress(OSError, ValueError):
        return unsealed((directory / _RUNS_OF).read_text())
    # Workdirs of earlier versions have no other.
    with contextlib.suppress(OSError, ValueError):
        return json.loads((directory / "config.json").read_text())
    return None


class Snapshot(NamedTuple):
    """A run at some step.

    Attributes:
      state: its `TrainState`; in rest.json the digest of the state's bits.
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
        self,
        path: pathlib.Path,
        every_seconds: float,
        event_files: bool = False,
        loss_files: bool = False,
    ):
        """Makes the directory.

        Args:
          path: of the directory.
          every_seconds: least time between two snapshots.
          event_files: whether to write TensorBoard's.
          loss_files: whether to keep the losses of all steps, see `losses_file`.
        """
        self._path = path.absolute()
        self._every = every_seconds
        self._event_files = event_files
        self.keeps_losses = loss_files
        self._last = time.monotonic()
        self._unreadable: set[int] = set()  # steps of snapshots that are left out
        self._path.mkdir(parents=True, exist_ok=True)

    def result(self) -> dict[str, Any] | None:
        """What `finish` was given, or None for a run that is not finished.

        A damaged file counts as none: the run is repeated, to the same numbers.
        """
        file = self._path / "result.json"
        if not file.exists():
            return None
        try:
            return unsealed(file.read_text())
        except ValueError as error:
            logging.warning("%s is damaged; the run is repeated. (%s)", file, error)
            return None

    @property
    def losses_file(self) -> pathlib.Path:
        """The `fgrad.RunLog` of the run, which can be made again from it."""
        return self._path / "losses"

    def due(self) -> bool:
        """Whether it is time for a snapshot."""
        return time.monotonic() - self._last >= self._every

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Writes a snapshot; one that is cut off does not count.

        Of the earlier ones the last is kept. Snapshots of later steps, which the run
        did not go on from because they cannot be read, are removed.

        Args:
          step: steps taken.
          snapshot: of the run at this step.

        Raises:
          FileNotFoundError: if the directory was removed during the run.
        """
        if not self._path.is_dir():
            raise FileNotFoundError(
                f"{self._path} was removed while a run wrote into it; the same command "
                "begins the run anew."
            )
        path = self._path / str(step)
        with _one_checkpointer, ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path / "state", snapshot.state, force=True)
        rest = snapshot._replace(state=digest(snapshot.state))
        write_text(path / "rest.json", sealed(rest._asdict()))
        self._unreadable.discard(step)
        readable = [
            known
            for known in self._steps()
            if known <= step and known not in self._unreadable
        ]
        for known in set(self._steps()) - set(readable[-_KEPT:]):
            shutil.rmtree(self._path / str(known))
        self._unreadable.clear()
        self._last = time.monotonic()

    def latest(
        self, like: Any, until: int | None = None
    ) -> tuple[int, Snapshot] | None:
        """The last snapshot that can be read, with its step.

        Args:
          like: a state of the same structure and shapes.
          until: the last step that is asked for; None for any.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        for step in reversed(self._steps()):
            if until is not None and step > until:
                continue
            path = self._path / str(step)
            try:
                return step, _read(path, target)
            except Exception as error:  # whatever a damaged file makes a library raise
                self._unreadable.add(step)
                logging.warning(
                    "%s cannot be read and is left out, since it is damaged or of "
                    "another version; the run goes on from an earlier step. (%s: %s)",
                    path,
                    type(error).__name__,
                    error,
                )
        return None

    @contextlib.contextmanager
    def log(
        self, points: Sequence[events.Point]
    ) -> Iterator[Callable[[events.Point], None] | None]:
        """Opens `events.writer`; yields None if no event files are asked for.

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
        write_text(self._path / "result.json", sealed(result))
        for step in self._steps():
            shutil.rmtree(self._path / str(step))

    def _steps(self) -> list[int]:
        """Steps of the snapshots, complete or not."""
        return sorted(int(p.name) for p in self._path.iterdir() if p.name.isdecimal())


def once(path: pathlib.Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a part of an experiment found, computed unless it is kept already.

    Args:
      path: directory of the part.
      compute: gives what JSON can hold.
    """
    kept = RunDirectory(path, math.inf)
    if (found := kept.result()) is None:
        found = compute()
        kept.finish(found)
    return found


def _read(path: pathlib.Path, target: Any) -> Snapshot:
    """Reads a snapshot, or raises something if it is not what was written.

    Args:
      path: its directory.
      target: shapes and dtypes of the state.
    """
    rest = Snapshot(**unsealed((path / "rest.json").read_text()))
    with _one_checkpointer, ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(path / "state", target)
    if digest(state) != rest.state:
        raise ValueError("the numbers are not those that were written")
    points = [events.Point(*point) for point in rest.points]
    return rest._replace(state=state, points=points)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file as a whole or not at all, even if the machine goes down."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sealed(content: Any) -> str:
    """JSON that tells whether a bit of it was changed; `unsealed` reads it.

    Args:
      content: what JSON can hold.

    Example:
      >>> text = sealed({"steps": 3})
      >>> unsealed(text)
      {'steps': 3}
      >>> unsealed(text.replace("3", "7"))
      Traceback (most recent call last):
      ...
      ValueError: the text is not the one that was written
    """
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({"sha256": digest, "content": content})


def unsealed(text: str) -> Any:
    """What `sealed` was given.

    Args:
      text: as `sealed` made it, or a dictionary as earlier versions wrote it, without a
        digest.

    Raises:
      ValueError: if the text is another one.
    """
    found = json.loads(text)
    if isinstance(found, dict) and found and not found.keys() & {"sha256", "content"}:
        return found
    content = found.get("content") if isinstance(found, dict) else None
    if text != sealed(content):
        raise ValueError("the text is not the one that was written")
    return content


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


def digest(state: Any) -> str:
    """SHA-256 of all bits of a state."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        found.update(f"{array.dtype} {array.shape} ".encode())
        found.update(array.tobytes())
    return found.hexdigest()
