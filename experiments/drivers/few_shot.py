"""The loop of few-shot learning: pre-train, then adapt to one task after another.

A network is pre-trained on the classes of meta-train by backpropagation. A linear layer
then replaces its head, at first one that gives the features as they are, but for their
scale. A task's images are classified by the distance of these features to the centroids
of its support.

Every task begins from there. A method trains the network, so that augmented copies of
the support come near the support of their class, and is tested on the query. Full
fine-tuning trains all weights, a linear probe those of the linear layer. Learning rates
are chosen on tasks of the validation split; all methods have the same tasks.
"""

import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from experiments import features, registry
from experiments.data import arrays
from experiments.drivers import settings, training
from experiments.drivers.progress import Progress, show_progress
from experiments.learners import episodes, optimizers
from experiments.learners.learner import make_learner
from experiments.learners.nearest_centroid import NearestCentroid
from experiments.registry import Splits
from experiments.workdir import report, runs

_ZERO_SHOT = ConfigDict(
    {"steps": 0, "gradient": "backward", "optimizer": "sgd", "adaptation": {}}
)


def run(config: ConfigDict, workdir: str, resume: bool = True) -> dict[str, Any]:
    """Runs an experiment, or goes on with it, and writes its results into the workdir.

    Args:
      config: see ``configs/fewshot_vision.py``; one with ``parts`` holds experiments by
        name.
      workdir: results.json, config.json and table.md go here, those of a part into a
        folder of its name, beside a table of all parts; under runs/ what a killed
        experiment goes on from.
      resume: whether to go on from there; otherwise the experiment begins anew.

    Returns:
      What results.json holds: by method (and "zero_shot") the mean accuracy over the
      test tasks, half of its 95% interval, the gap to backpropagation with its own, and
      what it cost; of parts by their names.

    Raises:
      UsageError: for a configuration that cannot be followed; before any work.
      InUseError, UsageError: as `experiments.workdir.runs.owned`; UsageError for tasks
        that the dataset has too few examples for.
    """
    settings.check_few_shot(config)
    directory = pathlib.Path(workdir)
    if "parts" in config:
        results = {
            name: run(part, str(directory / name), resume)
            for name, part in config.parts.items()
        }
        report.write_json(results, directory)
        _write_parts(results, directory)
        return results
    with runs.owned(directory, config, resume):
        return _run(config, directory)


def _run(config: ConfigDict, directory: pathlib.Path) -> dict[str, Any]:
    tfds.disable_progress_bar()
    data_dir = config.data_dir or str(directory / "data")
    data = registry.prepared(
        config, registry.DATASETS[config.dataset](config.domain, data_dir)
    )
    episodes.check_disjoint({name: split.labels for name, split in data.items()})
    samplers = _samplers(config, data)
    results: dict[str, Any] = {}
    with show_progress() as progress:
        progress.expect(config.pretrain.steps + _total_tasks(config))
        start = _pretrained(config, data, progress, directory)
        for name, method in _all_methods(config).items():
            where = runs.RunDirectory(directory / "runs" / name, np.inf)
            found = where.result()
            if found is None:
                adaptation = _Adaptation(config, method, start, samplers, progress)
                found = adaptation.result()
                where.finish(found)
            else:
                progress.advance(_tasks_of(config, method))
            progress.say(f"{name}: finished, accuracy {100 * found['accuracy']:.1f}%")
            results[name] = found
            report.write_json(results, directory)
    for name, result in results.items():
        _add_gap(name, result, results)
    report.write_json(results, directory)
    _write(results, config, directory)
    return results


class _Start(NamedTuple):
    """Where every method begins.

    Attributes:
      network: ``network(bits=...)`` gives the Flax module, whose outputs are features.
      params: float parameters.
      images: of meta-train, to calibrate activations with.
      base_mean: [features], the mean output over these images.
    """

    network: Callable[..., nn.Module]
    params: Any
    images: jax.Array
    base_mean: jax.Array


def _pretrained(
    config: ConfigDict, data: Splits, progress: Progress, directory: pathlib.Path
) -> _Start:
    """Pre-trains on the classes of meta-train; the new head gives the features."""
    base = base_splits(data["train"])
    num_classes = 1 + int(jnp.max(base["train"].labels))
    make = registry.NETWORKS[config.network]
    network = functools.partial(make, num_classes=num_classes)
    params = training.pretrain(config, network, base, progress, directory / "runs")
    images = data["train"].images
    params, base_mean = with_identity(network(bits=None), params, images)
    embedding = functools.partial(make, num_classes=len(base_mean))
    return _Start(embedding, params, images, base_mean)


def _all_methods(config: ConfigDict) -> dict[str, ConfigDict]:
    chosen = {name: config.methods[name] for name in config.run}
    return {"zero_shot": _ZERO_SHOT, **chosen}


def base_splits(meta_train: arrays.Split) -> dict[str, arrays.Split]:
    """Splits to pre-train on, of the images of meta-train.

    Args:
      meta_train: with labels of any numbers.

    Returns:
      "train" with nine of ten images of each class, "validation" and "test" with the
      others, or with one of a class of two to nine images; labels count from 0.

    Raises:
      ValueError: if no class has two images.
    """
    labels = np.asarray(meta_train.labels)
    _, counted = np.unique(labels, return_inverse=True)
    held_out = np.zeros(len(labels), bool)
    for label in range(counted.max() + 1):
        (own,) = np.nonzero(counted == label)
        if len(own) > 1:
            every = min(10, len(own))
            held_out[own[every - 1 :: every]] = True
    if not held_out.any():
        raise ValueError(
            "meta-train has one image of each class; pre-training needs two, to test "
            "with the other."
        )

    def split(chosen: np.ndarray) -> arrays.Split:
        (indices,) = np.nonzero(chosen)
        return arrays.Split(
            meta_train.images[indices], jnp.asarray(counted[indices], jnp.int32)
        )

    rest = split(held_out)
    return {"train": split(~held_out), "validation": rest, "test": rest}


def with_identity(
    network: nn.Module, params: Mapping[str, Any], images: jax.Array
) -> tuple[dict[str, Any], jax.Array]:
    """Parameters whose head gives the features, at a scale of one.

    Args:
      network: a module with stages, whose last is a dense layer.
      params: its parameters.
      images: the variances of their features add up to one at the new head.

    Returns:
      The parameters, and the mean of what the new head gives [features].
    """
    apply = functools.partial(network.apply, {"params": params}, stop=-1)
    found = features.batched(jax.jit(apply), images)
    scale = 1 / np.sqrt(max(float(found.var(axis=0).sum()), 1e-12))
    size = found.shape[-1]
    (head,) = network.stages[-1]
    identity = {"kernel": scale * jnp.eye(size), "bias": jnp.zeros(size)}
    return {**params, head: identity}, jnp.asarray(scale * found.mean(axis=0))


# Support and query, [tasks, ways, shots or queries, ...], of tasks of these keys.
_Sampler = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def _samplers(config: ConfigDict, data: Splits) -> dict[str, _Sampler]:
    """Those of the splits that tasks are of."""

    def sampler(split: arrays.Split) -> _Sampler:
        sample = episodes.sampler(
            split.labels,
            n_way=config.n_way,
            k_shot=config.k_shot,
            num_queries=config.num_queries,
        )

        @jax.jit
        def draw(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = jax.vmap(sample)(keys)
            return split.images[found.support], split.images[found.query]

        return draw

    return {name: sampler(data[name]) for name in ("validation", "test")}


class _Adaptation:
    """One method on one task after another.

    Tasks of both splits have the same shapes, so all is compiled once. Beginning,
    step and score are programs of their own, since on a CPU XLA's gradient of a
    convolution takes twenty times as long within a loop.
    """

    def __init__(
        self,
        config: ConfigDict,
        method: ConfigDict,
        start: _Start,
        samplers: Mapping[str, _Sampler],
        progress: Progress,
    ):
        """Prepares the weights.

        Args:
          config: see ``configs/fewshot_vision.py``.
          method: one of its methods.
          start: where every task begins.
          samplers: of the splits "validation" and "test".
          progress: told of the tasks.
        """
        self._config, self._method = config, method
        self._samplers, self._progress = samplers, progress
        self._key = jax.random.key(config.seed)
        objective = NearestCentroid(config)
        learner = make_learner(method, start.network, objective, skips_frozen=True)
        images = start.images[: method.get("calibration_images")]
        weights = learner.weights(start.params, images, self._key)
        begin = jax.jit(functools.partial(objective.begin, learner))
        self._begin = functools.partial(begin, weights, start.base_mean)
        self._step = jax.jit(
            lambda state, rate, task: learner.step(state, rate, method.steps, task)
        )
        self._score = jax.jit(functools.partial(objective.accuracy, learner))

    def result(self) -> dict[str, Any]:
        """Chooses a learning rate on validation's tasks, then goes through test's."""
        config, method = self._config, self._method
        rates: Sequence[float] = method.get("learning_rates", ())
        tuned = {
            rate: float(self.accuracies("validation", rate, config.tuning_tasks).mean())
            for rate in rates
        }
        best = max(tuned, key=lambda rate: tuned[rate]) if tuned else 0.0
        began = time.perf_counter()
        found = self.accuracies("test", best, config.tasks)
        passes = optimizers.forward_passes(method) if method.steps else 0
        return {
            "accuracy": float(found.mean()),
            "accuracy_interval": episodes.interval(found).half,
            "accuracies": found.tolist(),
            "learning_rate": best,
            "tuning": {f"{rate:g}": value for rate, value in tuned.items()},
            "steps": method.steps,
            "forward_passes": method.steps * passes,
            "seconds": time.perf_counter() - began,
        }

    def accuracies(self, split: str, learning_rate: float, count: int) -> np.ndarray:
        """Adapts to the first tasks of a split.

        Args:
          split: "validation" or "test".
          learning_rate: at the first step of each task.
          count: how many tasks.

        Returns:
          The accuracies of their queries [count].
        """
        chunk = self._config.chunk
        numbers = jnp.arange(count + -count % chunk)
        keys = jax.vmap(functools.partial(jax.random.fold_in, self._key))(numbers)
        rate = jnp.float32(learning_rate)
        found = []
        for number in range(count):
            first = number - number % chunk
            if first == number:  # draws the next tasks
                part = keys[first : first + chunk]
                task_keys, train_keys = jax.vmap(jax.random.split, out_axes=1)(part)
                drawn = self._samplers[split](task_keys)
            images = tuple(x[number - first] for x in drawn)
            state, task = self._begin(images, train_keys[number - first])
            for _ in range(self._method.steps):
                state = self._step(state, rate, task)
            found.append(float(self._score(state, task)))
            self._progress.advance(1)
        return np.array(found)


def _tasks_of(config: ConfigDict, method: ConfigDict) -> int:
    return config.tasks + config.tuning_tasks * len(method.get("learning_rates", ()))


def _total_tasks(config: ConfigDict) -> int:
    methods = _all_methods(config).values()
    return sum(_tasks_of(config, method) for method in methods)


def _add_gap(name: str, result: dict[str, Any], results: Mapping[str, Any]) -> None:
    """The difference to backpropagation in the same way, task by task."""
    reference = results.get(f"{name.split('_')[0]}_backprop")
    if reference is None or reference is result:
        return
    difference = np.subtract(result["accuracies"], reference["accuracies"])
    mean, half = episodes.interval(difference)
    result["gap"], result["gap_interval"] = mean, half


def _points(mean: float, half: float, sign: str = "") -> str:
    return f"{100 * mean:{sign}.1f} ± {100 * half:.1f}"


def _note(config: ConfigDict) -> str:
    return (
        f"{config.n_way}-way {config.k_shot}-shot with {config.num_queries} queries of "
        f"each class, {config.head}; test accuracy in % as mean ± half of the 95% "
        f"interval over {config.tasks} tasks; the gap is that to backpropagation, task "
        "by task; forward passes are those of a task's training batch, a backward pass "
        "counts as two."
    )


def _write(
    results: Mapping[str, Any], config: ConfigDict, directory: pathlib.Path
) -> None:
    columns = (
        "method",
        "accuracy",
        "gap",
        "forward passes",
        "learning rate",
        "seconds",
    )
    rows = [
        [
            name,
            _points(result["accuracy"], result["accuracy_interval"]),
            _points(result["gap"], result["gap_interval"], "+")
            if "gap" in result
            else "",
            f"{result['forward_passes']:,}",
            f"{result['learning_rate']:g}" if result["learning_rate"] else "",
            f"{result['seconds']:.1f}",
        ]
        for name, result in results.items()
    ]
    dataset = f"{config.dataset} {config.domain}".strip()
    title = f"{config.network} on {dataset}: "
    report.write_table(columns, rows, title + _note(config), directory, wide=3)


def _write_parts(
    results: Mapping[str, Mapping[str, Any]], directory: pathlib.Path
) -> None:
    """One row for each part: accuracy and gap of each method."""

    def cell(result: Mapping[str, Any]) -> str:
        found = _points(result["accuracy"], result["accuracy_interval"])
        if "gap" not in result:
            return found
        return f"{found} ({_points(result['gap'], result['gap_interval'], '+')})"

    methods = next(iter(results.values()))
    rows = [[name, *map(cell, part.values())] for name, part in results.items()]
    integers = [
        (part, name)
        for part in results.values()
        for name in part
        if name.endswith("_16w8a") and "gap" in part[name]
    ]
    near = sum(part[name]["gap"] >= -0.05 for part, name in integers)
    below = [part[name] for part, name in integers if part[name]["gap"] < -0.01]
    sure = sum(result["gap"] + result["gap_interval"] < -0.01 for result in below)
    note = (
        "Test accuracy in % as mean ± half of the 95% interval over tasks, in brackets "
        "the gap to backpropagation, with the interval of the tasks' differences; "
        f"{near} of {len(integers)} cells in 16w8a are at most 5 points below it. "
        f"{len(below)} are more than a point below, {sure} of them with all of the "
        "interval."
    )
    losses = [
        part[floats]["accuracy"] - part[name]["accuracy"]
        for part, name in integers
        if (floats := name.replace("16w8a", "fp32")) in part
    ]
    if losses:
        near = sum(loss <= 0.01 for loss in losses)
        note += f" {near} of {len(losses)} are at most a point below float32."
    report.write_table(("", *methods), rows, note, directory, wide=1)
