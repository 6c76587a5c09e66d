"""Event files for TensorBoard, one for each run, written without TensorFlow.

    tensorboard --logdir workdir/quickstart/runs

The snapshots of a run hold its points as well. A run that goes on after a kill writes a
new file from them, so every point is there once.
"""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import optax
import tensorboardX

# What the state of a method may tell of its last step.
_IN_STATE = ("loss", "moved_fraction")


class Point(NamedTuple):
    """What is known at a step of a run.

    Attributes:
      step: steps taken.
      time: seconds since the epoch.
      values: by name.
    """

    step: int
    time: float
    values: dict[str, float]


def point(
    step: int, forward_passes: float, opt_state: Any, values: Mapping[str, float]
) -> Point:
    """Collects what a training loop knows after a step.

    Args:
      step: steps taken.
      forward_passes: of all these steps.
      opt_state: state of an optax chain; its ``loss`` and ``moved_fraction`` are read
        if it has them.
      values: what else is known, by name.

    Returns:
      The point, with the time of now.

    Example:
      >>> point(3, 6, optax.EmptyState(), {"test/accuracy": 0.5}).values
      {'forward_passes': 6.0, 'test/accuracy': 0.5}
    """
    values = {"forward_passes": float(forward_passes), **values}
    for name in _IN_STATE:
        # Nested chains may each have one.
        for _, value in optax.tree.get_all_with_path(opt_state, name)[:1]:
            values[f"train/{name}"] = float(value)
    return Point(step, time.time(), values)


@contextlib.contextmanager
def writer(
    directory: pathlib.Path, points: Sequence[Point]
) -> Iterator[Callable[[Point], None]]:
    """Begins the event file of a run anew.

    Args:
      directory: of the run; event files of before are removed.
      points: what the file begins with.

    Yields:
      A function that adds a point. The file is complete when the context ends; until
      then it is written with a delay of seconds.
    """
    for old in directory.glob("events.out.tfevents.*"):
        old.unlink()
    with tensorboardX.SummaryWriter(str(directory), flush_secs=10) as summary:

        def add(point: Point) -> None:
            for name, value in point.values.items():
                summary.add_scalar(name, value, point.step, walltime=point.time)

        for known in points:
            add(known)
        yield add
