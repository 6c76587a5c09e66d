"""Pictures of the loss landscape around training runs, and of their gradients."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import rich
from matplotlib import figure
from ml_collections import ConfigDict

from experiments.data.arrays import Split
from experiments.drivers import settings
from experiments.drivers.progress import show_progress
from experiments.drivers.training import Task, prepare
from experiments.learners import adapt, gradient_quality, metrics
from experiments.learners.classification import Classification
from experiments.learners.learner import Learner, TrainState, make_learner
from experiments.workdir import report, runs
from fgrad import analysis

mpl.use("Agg")

_QUALITIES = {
    "cosine": "cosine with the gradient",
    "relative_variance": "variance over squared length",
    "effective_rank": "effective rank",
    "moved_fraction": "share of weights that moved",
}
_MARGIN = 0.3  # of the picture around the paths, as a share of their extent


class Path(NamedTuple):
    """What is kept of a training run to draw it.

    Attributes:
      learner: the method's functions.
      start: the training state before the first step.
      points: parameters at the start and after each part of the run, float or on
        their grid.
      rows: step, score on the test split, and quality of the gradient at each.
    """

    learner: Learner
    start: TrainState
    points: list[Any]
    rows: list[dict[str, float]]


def run(config: ConfigDict, workdir: str, resume: bool = True) -> dict[str, Any]:
    """Trains by every method and draws each forward run beside backpropagation's.

    A picture is the plane through the pre-trained network, the end of backpropagation
    (on the first axis) and the end of a forward run. Its losses are those of the
    forward method's network, in its arithmetic and with its weights on their grid.

    Args:
      config: see ``configs/landscape.py``; the first method to run is backpropagation.
      workdir: results.json, contours.png, surfaces.png and quality.png go here.
      resume: whether to go on from a pre-trained network that is there.

    Returns:
      What results.json holds: by forward method the losses and both runs' coordinates,
      and the rows of every run.

    Raises:
      UsageError: for a configuration that cannot be followed; before any work.
      InUseError, UsageError: as `experiments.workdir.runs.owned`.
    """
    settings.check_training(config)
    directory = pathlib.Path(workdir)
    with runs.owned(directory, config, resume), show_progress() as progress:
        first, *others = config.run
        steps = sum(config.methods[name].steps for name in config.run)
        points = config.resolution**2 * len(others)
        progress.expect(config.pretrain.steps + steps + points)
        task = prepare(config, directory, progress)
        paths = {
            name: _follow(config, config.methods[name], task, progress.advance)
            for name in config.run
        }
        pictures = {
            name: _picture(config, task, paths[first], paths[name], progress.advance)
            for name in others
        }
    results = {
        "landscapes": {
            name: {key: value.tolist() for key, value in found._asdict().items()}
            for name, (found, _) in pictures.items()
        },
        "paths": {
            name: {
                run: place.tolist()
                for run, place in zip((first, name), places, strict=True)
            }
            for name, (_, places) in pictures.items()
        },
        "rows": {name: path.rows for name, path in paths.items()},
    }
    report.write_json(results, directory)
    _draw_landscapes(pictures, first, directory)
    _draw_quality({name: path.rows for name, path in paths.items()}, directory)
    rich.print(
        f"Written to {directory}: results.json, contours.png, surfaces.png, quality.png"
    )
    return results


def _picture(
    config: ConfigDict,
    task: Task,
    backprop: Path,
    path: Path,
    progress: Callable[[int], None],
) -> tuple[analysis.Landscape, list[np.ndarray]]:
    """Computes the losses around two runs, and the coordinates of both runs."""
    ends = backprop.points[-1], path.points[-1]
    plane = analysis.plane_through(task.start, *ends)
    places = [
        analysis.coordinates(run.points, task.start, plane) for run in (backprop, path)
    ]
    first, second = _sides(np.concatenate(places), config.resolution)
    landscape = analysis.loss_landscape(
        path.learner.loss_fn,
        path.points[0],
        plane,
        first=first,
        second=second,
        chunk=config.chunk,
        progress=progress,
        frozen={},
        scales=path.start.scales,
        batch=_batch(config, task),
    )
    return landscape, places


def _follow(
    config: ConfigDict,
    method: ConfigDict,
    task: Task,
    progress: Callable[[int], None],
) -> Path:
    """Trains, and keeps the parameters at points on the way."""
    learner = make_learner(method, task.network, Classification(method))
    measure = _measure(config, learner, task)
    data = task.target["train"]
    images = data.images[: method.get("calibration_images")]
    start = learner.init(task.start, images, config.seeds[0])
    path = Path(learner, start, [], [])
    step = jax.jit(learner.step)
    state, done = start, 0
    rate, horizon = jnp.float32(method.learning_rate), jnp.float32(method.steps)
    for stop in np.linspace(0, method.steps, config.num_points).astype(int).tolist():
        for _ in range(done, stop):
            state = step(state, rate, horizon, data)
        progress(stop - done)
        done = stop
        path.points.append(adapt.merge(state.params, state.frozen))
        path.rows.append(measure(state, done))
    return path


def _measure(
    config: ConfigDict, learner: Learner, task: Task
) -> Callable[[TrainState, int], dict[str, float]]:
    """Makes a function of a state and a step that gives a row of numbers.

    The row holds the score on the test split, the share of weights that moved in the
    last step, and the quality of the gradient estimates, where there are any.
    """
    name, test = config.metrics[0], task.target["test"]
    batch = _batch(config, task)
    compare = gradient_quality.comparison(task.network, learner)
    logits_fn = jax.jit(learner.logits)

    def measure(state: TrainState, step: int) -> dict[str, float]:
        logits = logits_fn(state, test.images)
        row = {
            "step": float(step),
            "forward_passes": float(step * learner.passes_per_step),
            name: float(metrics.scores([name], logits, test.labels)[name]),
        }
        shares = optax.tree.get_all_with_path(state.opt_state, "moved_fraction")
        if step and shares:
            row["moved_fraction"] = float(shares[0][1])
        if compare is None:
            return row
        found = compare(state, batch, jax.random.key(step), config.num_estimates)
        return row | found._asdict()

    return measure


def _batch(config: ConfigDict, task: Task) -> Split:
    """The examples over which losses and gradients are averaged."""
    return jax.tree.map(lambda x: x[: config.batch], task.target["train"])


def _sides(places: np.ndarray, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the coordinates of a grid that has points [n, 2] inside."""
    low, high = places.min(axis=0), places.max(axis=0)
    room = _MARGIN * (high - low)
    first, second = np.linspace(low - room, high + room, resolution, axis=1)
    return first, second


def _draw_landscapes(
    pictures: Mapping[str, tuple[analysis.Landscape, list[np.ndarray]]],
    first: str,
    directory: pathlib.Path,
) -> None:
    size = (4.2 * len(pictures), 4)
    flat = figure.Figure(figsize=size, layout="constrained")
    solid = figure.Figure(figsize=size, layout="constrained")
    for index, (name, (landscape, places)) in enumerate(pictures.items(), start=1):
        place = (1, len(pictures), index)
        paths = dict(zip((first, name), places, strict=True))
        axes = flat.add_subplot(*place, xlabel=f"towards the end of {first}")
        analysis.plot_contour(axes, landscape, paths)
        axes = solid.add_subplot(*place, projection="3d")
        analysis.plot_surface(axes, landscape, paths)
    flat.savefig(directory / "contours.png", dpi=100)
    solid.savefig(directory / "surfaces.png", dpi=100)


def _draw_quality(
    rows: Mapping[str, list[dict[str, float]]], directory: pathlib.Path
) -> None:
    fig = figure.Figure(figsize=(3.4 * len(_QUALITIES), 3), layout="constrained")
    panels = fig.subplots(ncols=len(_QUALITIES), squeeze=False)[0]
    for axes, (key, title) in zip(panels, _QUALITIES.items(), strict=True):
        for name, points in rows.items():
            known = [point for point in points if key in point]
            if known:
                steps = [point["step"] for point in known]
                axes.plot(steps, [point[key] for point in known], label=name)
        axes.set(xlabel="step", title=title)
        axes.legend(fontsize=7)
    fig.savefig(directory / "quality.png", dpi=100)
