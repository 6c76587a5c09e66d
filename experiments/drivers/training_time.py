"""Steps until a loss is reached: predicted before the training, and counted in it."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import rich
from matplotlib import figure
from ml_collections import ConfigDict

import fgrad
from experiments.data.arrays import Split
from experiments.drivers import settings
from experiments.drivers.progress import Progress, show_progress
from experiments.drivers.training import Task, prepare
from experiments.workdir import report, runs
from fgrad import analysis, estimators

mpl.use("Agg")

_ACTUAL = "actual"


def run(config: ConfigDict, workdir: str, resume: bool = True) -> dict[str, Any]:
    """Predicts trainings, then trains.

    Args:
      config: see ``configs/training_time.py``.
      workdir: results.json, table.md and figure.png go here.
      resume: whether to go on from pre-trained networks that are there.

    Returns:
      What results.json holds: by task, by method and by number of directions (and
      "actual") the mean loss before each step, a list for each seed.

    Raises:
      UsageError: for a configuration that cannot be followed.
      InUseError, UsageError: as `experiments.workdir.runs.owned`.
    """
    settings.check_training_time(config)
    directory = pathlib.Path(workdir)
    curves: dict[str, Any] = {}
    with runs.owned(directory, config, resume), show_progress() as progress:
        pretraining = sum(task.pretrain.steps for task in config.tasks.values())
        adapting = len(config.learning_rates) * len(config.seeds) * config.steps
        progress.expect(pretraining + len(config.tasks) * adapting)
        for name, settings_of_task in config.tasks.items():
            where = directory / settings_of_task.dataset  # one pre-training for each
            where.mkdir(exist_ok=True)
            task = prepare(settings_of_task, where, progress)
            curves[name] = _curves(config, task, progress)
            report.write_json(curves, directory)
            progress.say(f"{name} is finished")
    _write(config, curves, directory)
    _draw(config, curves, directory)
    rich.print(f"Written to {directory}: results.json, table.md, figure.png")
    return curves


def _curves(
    config: ConfigDict, task: Task, progress: Progress
) -> dict[str, dict[str, list[list[float]]]]:
    """The losses of one task, predicted and actual, by method."""
    model = task.network(bits=None)
    data = jax.tree.map(lambda x: x[: config.examples], task.target["train"])

    def apply_fn(params: Any, images: jax.Array) -> jax.Array:
        logits: jax.Array = model.apply({"params": params}, images)
        return logits

    def sketch(key: jax.Array) -> analysis.LinearModel:
        return analysis.linear_model(
            apply_fn,
            task.start,
            key,
            num_directions=config.directions[-1],
            epsilon=config.epsilon,
            images=data.images,
        )

    found: dict[str, dict[str, list[list[float]]]] = {}
    sketches = [jax.jit(sketch)(jax.random.key(seed)) for seed in config.seeds]
    for method in config.learning_rates:

        def predict(
            part: analysis.LinearModel, key: jax.Array, method: str = method
        ) -> jax.Array:
            z_key, batch_key = jax.random.split(key)
            return analysis.predicted_losses(
                part,
                _loss,
                data.labels,
                _transformation(config, method, z_key),
                batch_key,
                steps=config.steps,
                batch_size=config.batch_size,
            )

        def train(key: jax.Array, method: str = method) -> jax.Array:
            z_key, batch_key = jax.random.split(key)
            tx = _transformation(config, method, z_key)
            return _trained(config, apply_fn, task.start, tx, data, batch_key)

        predict, train = jax.jit(predict), jax.jit(train)
        for seed, linear in zip(config.seeds, sketches, strict=True):
            for count in config.directions:
                # The first directions are those of a model with as many.
                share = (config.directions[-1] / count) ** 0.5
                part = linear._replace(slopes=share * linear.slopes[:count])
                losses = predict(part, jax.random.key(1000 + seed))
                _append(found, method, str(count), losses)
            _append(found, method, _ACTUAL, train(jax.random.key(2000 + seed)))
            progress.advance(config.steps)
    return found


def _append(found: dict[str, Any], method: str, kind: str, losses: jax.Array) -> None:
    rows = found.setdefault(method, {}).setdefault(kind, [])
    rows.append([float(x) for x in losses])


def _loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


def _transformation(
    config: ConfigDict, method: str, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    sgd = optax.sgd(config.learning_rates[method])
    if method == "backprop":
        return optax.with_extra_args_support(sgd)
    return optax.chain(
        fgrad.fixed_point_forward_grad(
            key,
            epsilon=config.epsilon,
            num_perturbations=config.num_perturbations,
            estimator=estimators.spsa,
        ),
        sgd,
    )


def _trained(
    config: ConfigDict,
    apply_fn: Any,
    start: Any,
    tx: optax.GradientTransformationExtraArgs,
    data: Split,
    key: jax.Array,
) -> jax.Array:
    """The mean loss of all examples before each step of a training and at its end."""

    def loss_fn(params: Any, index: jax.Array) -> jax.Array:
        return _loss(apply_fn(params, data.images[index]), data.labels[index])

    everything = jnp.arange(len(data.labels))

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        index = jax.random.randint(key, (config.batch_size,), 0, len(data.labels))
        gradient = jax.grad(loss_fn)(params, index)
        updates, state = tx.update(
            gradient, state, params, value_fn=loss_fn, index=index
        )
        params = optax.apply_updates(params, updates)
        return (params, state), loss_fn(params, everything)

    keys = jax.random.split(key, config.steps)
    _, losses = jax.lax.scan(step, (start, tx.init(start)), keys)
    return jnp.concatenate([loss_fn(start, everything)[None], losses])


def _steps(losses: Sequence[float], share: float) -> float:
    """The steps until a share of the first loss is reached; NaN if it is not."""
    found = analysis.steps_to_reach(jnp.asarray(losses), share * losses[0])
    return float("nan") if found is None else float(found)


def _write(
    config: ConfigDict, curves: Mapping[str, Any], directory: pathlib.Path
) -> None:
    kinds = [_ACTUAL, *map(str, config.directions)]
    cells: list[list[str]] = []
    errors: dict[tuple[str, str], list[float]] = {}
    for task, methods in curves.items():
        for method, found in methods.items():
            for share in config.targets:
                steps = {k: [_steps(x, share) for x in found[k]] for k in kinds}
                cells.append([task, method, f"{share:g}"])
                cells[-1] += [_spread(steps[kind]) for kind in kinds]
                for kind in kinds[1:]:
                    ratio = float(np.mean(steps[kind]) / np.mean(steps[_ACTUAL]))
                    errors.setdefault((method, kind), []).append(abs(ratio - 1))
    for method in config.learning_rates:
        row = [_percent(errors[method, kind]) for kind in kinds[1:]]
        cells.append(["mean error", method, "", "", *row])
    note = (
        "Steps until the mean loss of the training images is down to a share of the "
        f"first; {report.spread(len(config.seeds))}; predicted by a linear model of "
        f"{', '.join(map(str, config.directions))} directions, twice as many forward "
        f"passes over {config.examples} images; at most {config.steps} steps, those "
        "that take longer are left empty; mean error: of the mean prediction."
    )
    columns = ("task", "method", "share", _ACTUAL, *(f"k = {k}" for k in kinds[1:]))
    report.write_table(columns, cells, note, directory, wide=len(columns))


def _percent(errors: Sequence[float]) -> str:
    """The mean of the errors that there are."""
    known = [error for error in errors if np.isfinite(error)]
    return f"{100 * np.mean(known):.0f}%" if known else ""


def _spread(values: Sequence[float]) -> str:
    if not np.all(np.isfinite(values)):
        return ""
    mean = f"{np.mean(values):.0f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.0f}"


def _draw(
    config: ConfigDict, curves: Mapping[str, Any], directory: pathlib.Path
) -> None:
    """Draws predicted and actual losses of the first seed."""
    size = (3.2 * len(curves), 2.8 * len(config.learning_rates))
    fig = figure.Figure(figsize=size, layout="constrained")
    panels = fig.subplots(len(config.learning_rates), len(curves), squeeze=False)
    for column, (task, methods) in enumerate(curves.items()):
        for axes, (method, found) in zip(
            panels[:, column], methods.items(), strict=True
        ):
            for kind, rows in found.items():
                style = {"color": "black"} if kind == _ACTUAL else {"linestyle": "--"}
                label = kind if kind == _ACTUAL else f"k = {kind}"
                axes.plot(rows[0], label=label, **style)
            axes.set(title=f"{task}, {method}", xlabel="step", yscale="log")
    panels[0, 0].legend(fontsize=7)
    fig.savefig(directory / "figure.png", dpi=100)
