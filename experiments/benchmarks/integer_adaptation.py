"""The integer step beside the library's 16w8a step, at equal forward passes.

    python -m experiments.benchmarks.integer_adaptation --out=workdir/integer_adaptation

Two tasks: the quickstart's CNN learns rotated digits, and a new head of a CRNN learns
ten voices in languages that the network has never heard. Its backbone is frozen, an
integer program of 8-bit weights that runs once on every recording. Each method chooses
among three learning rates on the validation split, by runs of 0.3 of the length with
another seed, and then runs with five seeds. Prints a table as Markdown;
``--only=digits`` takes one task, ``--smoke`` tiny settings, which show no result. The
workdir keeps every run that was finished.

"integer, exact head" is the head's gradient in integers, without perturbations: a step
costs one forward pass.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import fgrad
from experiments import features
from experiments.benchmarks import integer_problems, integer_tables
from experiments.benchmarks.integer_problems import applied
from experiments.configs import quickstart
from experiments.data.arrays import Split
from experiments.drivers import training
from experiments.drivers.progress import show_progress
from experiments.drivers.trainer import Planned, Trainer
from experiments.models import linear
from experiments.registry import Splits
from experiments.workdir.runs import RunDirectory
from fgrad import integer

_TUNING_SEED, _TUNING_FRACTION = 100, 0.3
# Weights of a head that starts at zero may grow to 1.5 times as much.
_ZERO_BOUND = 4.0
_COLUMNS = ("task", "method", "accuracy", "forward passes", "learning rate")
# run(name, seed, learning_rate, steps) gives the accuracy on validation and test.
Run = Callable[[str, int, float, int], tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is adapted, and how.

    Attributes:
      name: of the task.
      network: ``network(bits=...)`` gives the Flax module.
      start: float parameters.
      data: the splits to adapt on.
      method: settings of the library's 16w8a method; its steps and rates are those of
        the integer step as well.
      exact: steps and learning rates of the exact head.
      seeds: of batches and perturbations.
    """

    name: str
    network: Callable[..., Any]
    start: Any
    data: Splits
    method: ConfigDict
    exact: tuple[int, tuple[float, ...]] | None
    seeds: tuple[int, ...]


def digits(directory: pathlib.Path, smoke: bool) -> Task:
    """The quickstart: all weights, 700 steps of 16 pairs with batches of 64."""
    config = quickstart.base("smoke" if smoke else "full")
    with show_progress() as progress:
        progress.expect(config.pretrain.steps)
        task = training.prepare(config, directory, progress)
    method = config.methods.forward_16w8a
    return Task(
        "digits, upright to rotated by 30 degrees, whole CNN",
        task.network,
        task.start,
        task.target,
        method,
        None,
        _seeds(smoke),
    )


def voices(directory: pathlib.Path, smoke: bool) -> Task:
    """Ten new voices: a new head on the CRNN of the few-shot experiments."""
    config = integer_problems.voices_config(smoke)
    with show_progress() as progress:
        network, params, data = integer_problems.features_network(
            config, directory, progress
        )
    heard = np.asarray(data["train"].images[:256])
    backbone = integer.convert(applied(network(bits=None)), params, heard, bits=(8, 8))
    found = {
        name: split._replace(images=jnp.asarray(features_of(backbone, split.images)))
        for name, split in integer_problems.new_voices(data["test"]).items()
    }
    classes = int(jnp.max(found["train"].labels)) + 1
    size = found["train"].images.shape[1]
    head = {"kernel": jnp.zeros((size, classes)), "bias": jnp.zeros(classes)}
    method = quickstart.changed(
        quickstart.base("smoke" if smoke else "full").methods.forward_16w8a,
        {
            "steps": 20 if smoke else 1000,
            "num_perturbations": 8,
            "batch_size": 32,
            "epsilon": 1e-2,
            "learning_rates": (0.08, 0.16, 0.32),
            "zero_bound": _ZERO_BOUND,
        },
    )
    return Task(
        "voices, a head for ten new ones",
        functools.partial(linear.Linear, num_classes=classes),
        {"Dense_0": head},
        found,
        method,
        (20 if smoke else 1000, (1.0, 2.0, 4.0)),
        _seeds(smoke),
    )


def features_of(backbone: integer.Program, inputs: Any) -> np.ndarray:
    """What an integer program makes of all inputs, as floats."""
    return features.batched(
        functools.partial(backbone.decode, backbone.params), backbone.encode(inputs)
    )


TASKS = {"digits": digits, "voices": voices}


def rows(task: Task, directory: pathlib.Path) -> Iterator[str]:
    """Lines of the table, one for each method."""
    steps, rates = task.method.steps, tuple(task.method.learning_rates)
    passes = 2 * task.method.num_perturbations
    methods: dict[str, tuple[Run, int, tuple[float, ...], int]] = {
        "16w8a of the library": (_library(task, directory), steps, rates, passes),
        "integer step": (_integers(task, directory, exact=False), steps, rates, passes),
    }
    if task.exact is not None:
        exact = _integers(task, directory, exact=True)
        methods["integer, exact head"] = (exact, *task.exact, 1)
    for name, (run, steps, rates, passes) in methods.items():
        tuned = {
            rate: run(f"tune_{rate:g}", _TUNING_SEED, rate, _tuning_steps(steps))[0]
            for rate in rates
        }
        best = max(tuned, key=lambda rate: tuned[rate])
        scores = [
            run(f"rate_{best:g}_{seed}", seed, best, steps)[1] for seed in task.seeds
        ]
        mean, deviation = 100 * np.mean(scores), 100 * np.std(scores, ddof=1)
        cells = (
            task.name,
            name,
            f"{mean:.1f} ± {deviation:.1f}",
            f"{steps * passes:,}",
            f"{best:g}",
        )
        yield f"| {' | '.join(cells)} |"


def _tuning_steps(steps: int) -> int:
    return max(1, int(steps * _TUNING_FRACTION))


def _seeds(smoke: bool) -> tuple[int, ...]:
    return (0, 1) if smoke else (0, 1, 2, 3, 4)


def _library(task: Task, directory: pathlib.Path) -> Run:
    """Runs of the library's step, as the experiments take them."""
    trainer = Trainer(task.method, task.network, task.start, task.data, ("accuracy",))

    def run(name: str, seed: int, rate: float, steps: int) -> tuple[float, float]:
        where = _run_directory(directory, "library", name)
        (found,) = trainer.run(
            task.start,
            [Planned(seed, rate, where)],
            steps=steps,
            num_evals=1,
            progress=lambda steps: None,
        )
        return found.validation, found.scores["accuracy"]

    return run


def _integers(task: Task, directory: pathlib.Path, exact: bool) -> Run:
    """Runs of the integer step; ``exact``: by the gradient of a linear network."""
    method = task.method
    program = integer.convert(
        applied(task.network(bits=None)),
        fgrad.quantize(
            task.start, 16, headroom=method.headroom, zero_bound=method.zero_bound
        ),
        task.data["train"].images[: method.calibration_images],
    )
    coded = {
        name: Split(program.encode(split.images), split.labels)
        for name, split in task.data.items()
    }
    predict = jax.jit(lambda weights, x: jnp.argmax(program(weights, x), axis=-1))

    def accuracy(weights: Any, split: str) -> float:
        found = predict(weights, coded[split].images)
        return float(jnp.mean(found == coded[split].labels))

    def run(name: str, seed: int, rate: float, steps: int) -> tuple[float, float]:
        where = _run_directory(directory, "exact" if exact else "integer", name)
        if (found := where.result()) is None:
            step = made(program, task, seed, rate, steps, exact)
            weights = adapted(step, coded["train"], method.batch_size, seed, steps)
            found = {x: accuracy(weights, x) for x in ("validation", "test")}
            where.finish(found)
        return found["validation"], found["test"]

    return run


def made(
    program: integer.Program,
    task: Task,
    seed: int,
    rate: float,
    steps: int,
    exact: bool,
) -> integer.TrainStep:
    """The integer step of a seed, whose rate decays to zero over a run."""
    key = jax.random.key(seed)
    options: dict[str, Any] = {"learning_rate": rate, "decay_steps": steps}
    if exact:
        return integer.train_step(program, key, exact_head="Dense_0", **options)[1]
    return integer.train_step(
        program,
        key,
        epsilon=task.method.epsilon,
        num_perturbations=task.method.num_perturbations,
        estimator="normalized",
        **options,
    )[1]


def adapted(
    step: integer.TrainStep, data: Split, batch_size: int, seed: int, steps: int
) -> Any:
    """The weights after a run on batches that are drawn with replacement."""
    shape = steps, batch_size
    chosen = np.random.default_rng(seed).integers(0, len(data.labels), shape)

    @jax.jit
    def advance(weights: Any, state: Any, index: jax.Array) -> Any:
        batch = data.images[index], jnp.asarray(data.labels[index], jnp.int32)
        return step(weights, state, batch)

    weights, state = step.init()
    for index in chosen:
        weights, state = advance(weights, state, index)
    return weights


def _run_directory(directory: pathlib.Path, method: str, name: str) -> RunDirectory:
    return RunDirectory(directory / "adapted" / method / name, np.inf)


def lines(name: str, directory: pathlib.Path, smoke: bool) -> Iterator[str]:
    """The lines of a task."""
    yield from rows(TASKS[name](directory, smoke), directory)


if __name__ == "__main__":
    integer_tables.print_parts(TASKS, _COLUMNS, lines)
