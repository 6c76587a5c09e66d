"""A published keyword network of int8 learns new words and voices from few examples.

By backpropagation in float32, of the head alone and with the last blocks, and by
`fgrad.adapt` in float32, 16w8a and 8w8a: of the head, exactly, and with the blocks.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from ml_collections import ConfigDict

import fgrad
from experiments.data import sounds, voices, words
from experiments.data.arrays import Split
from experiments.drivers import settings, tuning
from experiments.drivers.progress import Progress, show_progress
from experiments.features import batched
from experiments.models import int8_network, keyword
from experiments.models.keyword import HEAD
from experiments.usage import UsageError
from experiments.workdir import report, runs
from fgrad import layers

Splits = Mapping[str, Split]


class Task(NamedTuple):
    """Few examples to learn from, and those that the result is judged by."""

    support: Split
    query: Split


def run(config: ConfigDict, workdir: str, resume: bool = True) -> dict[str, Any]:
    """Adapts the network by every method, to the words and to the voices.

    Args:
      config: see ``configs/keywords.py``.
      workdir: data, features of the frozen layers, results.json and table.md; and under
        runs/ the methods that are finished, with which a killed experiment goes on.
      resume: whether to go on with them; otherwise the experiment begins anew.

    Returns:
      What results.json holds: for each task and method the test accuracies over seeds,
      those on the validation split by learning rate, and the rate.

    Raises:
      UsageError: for a configuration that cannot be followed, or without a package.
      InUseError, UsageError: as `experiments.workdir.runs.owned`.
    """
    settings.check_keywords(config)
    directory = pathlib.Path(workdir)
    results: dict[str, Any] = {}
    with runs.owned(directory, config, resume), show_progress() as progress:
        progress.expect(_total_steps(config))
        try:
            path = keyword.published(config.network)
        except ModuleNotFoundError as error:
            raise UsageError(str(error)) from error
        cut = keyword.cut(int8_network.load(path), config.first, config.last)
        for name in config.tasks:
            data = features(config, name, cut, directory)
            results[name] = adapted(
                config, name, data, cut, progress, directory / "runs"
            )
            report.write_json(results, directory)
    _write(config, results, directory)
    return results


def features(
    config: ConfigDict, name: str, cut: keyword.Cut, directory: pathlib.Path
) -> Splits:
    """What the frozen layers make of the sounds of a task, computed once.

    Args:
      config: see ``configs/keywords.py``.
      name: of the task, in `TASKS`.
      cut: the network.
      directory: the workdir.
    """
    data_dir = config.data_dir or str(directory / "data")
    made = TASKS[name].builder(
        config="1s", data_dir=data_dir, file_format="array_record"
    )
    cache = directory / f"{name}_{config.network}_{config.first}.npz"
    if not cache.exists():
        try:
            heard = sounds.read(made)
        except (ModuleNotFoundError, FileNotFoundError) as error:
            raise UsageError(str(error)) from error
        found: dict[str, Any] = {}
        for split, (samples, labels) in heard.items():
            found |= {split: cut(samples), f"{split}_labels": labels}
        partial = cache.with_suffix(".partial.npz")
        np.savez(partial, **found)
        partial.replace(cache)
    with np.load(cache) as stored:
        return {
            split: Split(jnp.asarray(stored[split]), stored[f"{split}_labels"])
            for split in ("train", "validation", "test")
        }


def words_task(data: Splits, shots: int, seed: int, tuning: bool) -> Task:
    """Ten words: some takes to learn from, and other voices to be judged by.

    Args:
      data: of `experiments.data.words`.
      shots: takes of each word, in any voices of the train split.
      seed: of their choice.
      tuning: whether to take the other ten words, and the validation split's voices.
    """
    half = len(words.WORDS) // 2
    classes = np.arange(half) + half * tuning
    query = data["validation" if tuning else "test"]
    chosen = _drawn(data["train"].labels, classes, shots, seed)
    rest = np.flatnonzero(np.isin(query.labels, classes))
    return Task(_part(data["train"], chosen, classes), _part(query, rest, classes))


def voices_task(data: Splits, shots: int, seed: int, tuning: bool) -> Task:
    """Sets of recordings, each one voice: some to learn from, the others to judge by.

    Args:
      data: of `experiments.data.voices`.
      shots: recordings of each set.
      seed: of their choice.
      tuning: whether to take the sets of the validation split.
    """
    split = data["validation" if tuning else "test"]
    classes = np.unique(split.labels)
    chosen = _drawn(split.labels, classes, shots, seed)
    rest = np.setdiff1d(np.arange(len(split.labels)), chosen)
    return Task(_part(split, chosen, classes), _part(split, rest, classes))


def _drawn(labels: Any, classes: np.ndarray, shots: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    places = [np.flatnonzero(labels == label) for label in classes]
    return np.concatenate([rng.choice(place, shots, False) for place in places])


def _part(split: Split, places: np.ndarray, classes: np.ndarray) -> Split:
    """Some examples, with labels that count from zero."""
    labels = np.searchsorted(classes, np.asarray(split.labels)[places])
    return Split(split.images[places], jnp.asarray(labels, jnp.int32))


class _Kind(NamedTuple):
    builder: Callable[..., Any]
    task: Callable[[Splits, int, int, bool], Task]


TASKS = {
    "words": _Kind(words.Words, words_task),
    "voices": _Kind(voices.Voices, voices_task),
}


def adapted(
    config: ConfigDict,
    name: str,
    data: Splits,
    cut: keyword.Cut,
    progress: Progress,
    where: pathlib.Path,
) -> dict[str, Any]:
    """The results of all methods on a task.

    Args:
      config: see ``configs/keywords.py``.
      name: of the task, in `TASKS`.
      data: of `features`.
      cut: the network.
      progress: told of the steps.
      where: the directory of finished methods; one that is there is read.
    """
    draw = functools.partial(TASKS[name].task, data, config.shots)
    tests = [draw(seed, False) for seed in config.seeds]
    queries = len(tests[0].query.labels)
    found: dict[str, Any] = {"test_examples": queries, "methods": {}}
    where.mkdir(exist_ok=True)
    for method_name in config.run:
        finished = where / f"{name}_{method_name}.json"
        if finished.exists():
            found["methods"][method_name] = json.loads(finished.read_text())
            continue
        method = _Method(config, config.methods[method_name], cut, progress)
        tuned = method.tuned([draw(seed, True) for seed in config.tuning_seeds])
        rate = tuning.best(tuned)
        accuracies = [
            method.accuracy(rate, task, seed)
            for seed, task in zip(config.seeds, tests, strict=True)
        ]
        progress.say(f"{name}, {method_name}: {np.mean(accuracies):.3f} at {rate:g}")
        found["methods"][method_name] = {
            "accuracy": accuracies,
            "validation": {f"{rate:g}": tuned[rate] for rate in sorted(tuned)},
            "learning_rate": rate,
            "forward_passes": config.methods[method_name].passes,
        }
        runs.write_text(finished, json.dumps(found["methods"][method_name]))
    return found


class _Method:
    """Runs of one method, compiled once for all of a task's rates and seeds."""

    def __init__(
        self,
        config: ConfigDict,
        method: ConfigDict,
        cut: keyword.Cut,
        progress: Progress,
    ) -> None:
        self._config, self._method, self._progress = config, method, progress
        self._cut = cut
        bits = tuple(method.bits) if method.bits else None
        self._model = keyword.Tail(cut.windows, cut.widths, config.num_classes, bits)
        self._start = jax.jit(self._started)
        self._run = jax.jit(self._trained)
        self._predict = jax.jit(self._logits)

    def tuned(self, tasks: Sequence[Task]) -> dict[float, float]:
        """Mean accuracies on tasks by learning rate."""

        def score(rate: float) -> float:
            seeds = self._config.tuning_seeds
            scores = [
                self.accuracy(rate, task, seed)
                for seed, task in zip(seeds, tasks, strict=True)
            ]
            return float(np.mean(scores))

        return tuning.searched(
            tuning.each(score),
            self._method.learning_rates,
            self._config.wider_tuning,
            lambda: self._progress.expect(len(tasks) * self._method.steps),
        )

    def accuracy(self, rate: float, task: Task, seed: int) -> float:
        """Adapts to a task and judges by its other examples."""
        variables = self._start(task.support.images)
        variables = self._run(
            variables, task.support, jnp.float32(rate), jax.random.key(seed)
        )
        self._progress.advance(self._method.steps)
        apply = functools.partial(self._predict, variables)
        logits = batched(apply, task.query.images, 128)
        return float(np.mean(logits.argmax(-1) == np.asarray(task.query.labels)))

    def _started(self, images: jax.Array) -> dict[str, Any]:
        """Parameters and scales before the first step: the head is zero."""
        config, bits = self._config, self._method.bits
        # Weights of 8 bits are the integers of the file, others their values.
        blocks = self._cut.params
        if not (bits and bits[0] == 8):
            blocks = fgrad.dequantize(blocks)
        head = {
            "kernel": jnp.zeros((self._cut.widths[-1], config.num_classes)),
            "bias": jnp.zeros(config.num_classes),
        }
        params = {**blocks, HEAD: head}
        if not bits:
            return {"params": params}
        params = fgrad.quantize(
            params,
            bits=bits[0],
            channel_axis=-1,
            headroom=config.headroom,
            zero_bound=config.zero_bound,
        )
        return layers.calibrate(
            self._model,
            {"params": params},
            images,
            headroom=config.activation_headroom,
        )

    def _logits(self, variables: Any, images: jax.Array) -> jax.Array:
        return self._model.apply(variables, images)

    def _losses(self, scales: Any, params: Any, images: Any, labels: Any) -> jax.Array:
        logits = self._logits({"params": params, **scales}, images)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)

    def _trained(
        self, variables: Any, support: Split, rate: jax.Array, key: jax.Array
    ) -> dict[str, Any]:
        """Variables after a run."""
        config, method = self._config, self._method
        scales = {name: v for name, v in variables.items() if name != "params"}
        losses = functools.partial(self._losses, scales)
        z_key, batch_key = jax.random.split(key)
        shapes = jax.tree.map(lambda x: x[: config.batch_size], support)
        params = variables["params"]
        frozen = tuple(self._cut.params) if method.head_alone else ()
        if method.gradient == "backward":
            tx = _backward(rate, method.steps, frozen)
        else:
            tx = fgrad.adapt(
                z_key,
                losses,
                params,
                shapes._asdict(),
                steps=method.steps,
                learning_rate=cast(float, rate),  # it is traced
                head=HEAD,
                frozen=frozen,
                every=config.every,
            )

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            size = len(support.labels)
            chosen = jax.random.randint(key, (config.batch_size,), 0, size)
            batch = jax.tree.map(lambda x: x[chosen], support)._asdict()
            if method.gradient == "backward":
                gradient = jax.grad(lambda p: losses(p, **batch).mean())(params)
                updates, state = tx.update(gradient, state, params)
            else:
                updates, state = tx.update(
                    params, state, params, value_fn=losses, **batch
                )
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(batch_key, method.steps)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
        return {"params": params, **scales}


def _backward(
    rate: jax.Array, steps: int, frozen: Sequence[str]
) -> optax.GradientTransformation:
    """Adam with a rate that decays linearly, as `fgrad.adapt` has it."""
    adam = optax.adam(lambda count: rate * (1 - count / steps))
    return optax.multi_transform(
        {"trained": adam, "frozen": optax.set_to_zero()},
        lambda params: {n: "frozen" if n in frozen else "trained" for n in params},
    )


def _total_steps(config: ConfigDict) -> int:
    total = 0
    for name in config.run:
        method = config.methods[name]
        tuned = len(config.tuning_seeds) * len(method.learning_rates)
        total += (tuned + len(config.seeds)) * method.steps
    return total * len(config.tasks)


def _write(
    config: ConfigDict, results: Mapping[str, Any], directory: pathlib.Path
) -> None:
    rows = []
    for name in config.run:
        found = [results[task]["methods"][name] for task in config.tasks]
        passes = f"{found[0]['forward_passes']:,}"
        rates = ", ".join(f"{one['learning_rate']:g}" for one in found)
        scores = [_spread(one["accuracy"]) for one in found]
        rows.append([name, *scores, passes, rates])
    errors = ", ".join(
        f"{task} {100 * _standard_error(results[task]):.1f}" for task in config.tasks
    )
    note = (
        f"{config.network}, blocks {config.first} to {config.last} and a new head; "
        f"{config.shots} examples of each class; test accuracy in %; "
        f"{report.spread(len(config.seeds))}, each with examples of its own; standard "
        f"error by the test split's size, in points: {errors}; a backward pass counts "
        "as two."
    )
    report.write_table(
        ("method", *config.tasks, "forward passes", "learning rates"),
        rows,
        note,
        directory,
        wide=1 + len(config.tasks),
    )
    rich.print(f"Written to {directory}: results.json, table.md")


def _standard_error(found: Mapping[str, Any]) -> float:
    """Of the mean accuracy of the first method, as a share of the examples."""
    first = next(iter(found["methods"].values()))
    mean = float(np.mean(first["accuracy"]))
    return float(np.sqrt(mean * (1 - mean) / found["test_examples"]))


def _spread(values: Sequence[float]) -> str:
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * np.std(values, ddof=1):.1f}"
