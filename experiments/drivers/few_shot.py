"""The loop of few-shot learning: pre-train, then adapt to one task after another.

A network is pre-trained on the classes of meta-train by backpropagation. Its head makes
way for a linear layer that keeps the features as they are, but for their scale, and
these are told apart by their distance to the centroids of a task's support. Every task
begins from there: a method trains on augmented copies of the support, which are to be
near the support of their class, and is tested on the query. Learning rates are chosen
on tasks of the validation split; all methods have the same tasks.

Full fine-tuning trains everything, a linear probe that layer only.
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
import optax
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from experiments import adapt, features, fewshot, methods, report, runs, tasks, train
from experiments.data import arrays
from experiments.learners.optimizers import forward_passes, make_optimizer
from experiments.registry import Splits


class Start(NamedTuple):
    """Where a method begins in every task.

    Attributes:
      trained: weights that train, float or `fgrad.QTensor`.
      frozen: those that do not.
      scales: of activations; empty for float networks.
      base_mean: [features], the mean of what the start makes of meta-train.
    """

    trained: Any
    frozen: Any
    scales: Any
    base_mean: jax.Array


class TaskState(NamedTuple):
    """A method within a task.

    Attributes:
      params: weights that train.
      opt_state: state of the optax chain.
      frozen: weights that do not train.
      scales: of activations.
      base_mean: as in `Start`.
      support: [ways, shots, ...]: images, or what the frozen stages make of them.
      copies: [ways, shots * copies, ...], the augmented support.
      query: [ways, queries, ...].
      key: PRNG key of the perturbations.
    """

    params: Any
    opt_state: Any
    frozen: Any
    scales: Any
    base_mean: jax.Array
    support: jax.Array
    copies: jax.Array
    query: jax.Array
    key: jax.Array


class TaskLearner(NamedTuple):
    """A method as pure functions, none of them jitted.

    They are not one program: on a CPU, XLA's gradient of a convolution takes twenty
    times as long within a loop.

    Attributes:
      start: ``start(params, images, base_mean) -> Start`` from float params, with
        images of meta-train to calibrate activations with.
      begin: ``begin(start, support, query, key) -> TaskState``, of images [ways, shots
        or queries, ...].
      step: ``step(state, learning_rate) -> TaskState``.
      accuracy: ``accuracy(state)`` of the query.
    """

    start: Callable[[Any, jax.Array, jax.Array], Start]
    begin: Callable[[Start, jax.Array, jax.Array, jax.Array], TaskState]
    step: Callable[[TaskState, Any], TaskState]
    accuracy: Callable[[TaskState], jax.Array]


def make_task_learner(
    config: ConfigDict, method: ConfigDict, network: Callable[..., nn.Module]
) -> TaskLearner:
    """Builds the functions of a method.

    Args:
      config: the head and its transform, see ``configs/fewshot_vision.py``.
      method: see there; with no steps nothing is trained.
      network: ``network(bits=...)`` gives the Flax module, whose output is compared.

    Raises:
      ValueError: for another head.
    """
    if config.head not in ("protonet", "simpleshot"):
        raise ValueError(
            f'head must be "protonet" or "simpleshot", got {config.head!r}.'
        )
    bits = method.get("bits")
    model = adapt.make(network(bits=tuple(bits) if bits else None), method.adaptation)

    def transformed(x: jax.Array, base_mean: jax.Array) -> jax.Array:
        if config.head == "protonet":
            return x
        mean = {"base_mean": base_mean} if config.transform == "CL2N" else {}
        return fewshot.simpleshot_transform(x, config.transform, **mean)

    def start(params: Any, images: jax.Array, base_mean: jax.Array) -> Start:
        scales: dict[str, Any] = {}
        if bits:
            quantize = jax.jit(functools.partial(methods.quantized, method, model))
            params, scales = quantize(params, images[: method.calibration_images])
        return Start(*model.split(params), scales, base_mean)

    def apply(params: Any, scales: Any, x: jax.Array, **stages: Any) -> jax.Array:
        """What the network makes of [ways, examples, ...]."""
        flat = x.reshape(-1, *x.shape[2:])
        found = model.apply({"params": params, **scales}, flat, **stages)
        return found.reshape(*x.shape[:2], *found.shape[1:])

    def optimizer(learning_rate: Any, key: jax.Array) -> Any:
        return make_optimizer(method, learning_rate, method.steps, key)

    def begin(
        start: Start, support: jax.Array, query: jax.Array, key: jax.Array
    ) -> TaskState:
        *keys, z_key = jax.random.split(key, 3)
        copies = jnp.tile(support, (1, config.copies, *[1] * (support.ndim - 2)))
        flat = copies.reshape(-1, *copies.shape[2:])
        copies = methods.augmented(config, keys, flat).reshape(copies.shape)
        examples = (support, copies, query)
        if cut := model.cut(start.trained):
            # What is frozen before the weights that train runs once.
            sizes = np.cumsum([part.shape[1] for part in examples])[:-1]
            joined = jnp.concatenate(examples, axis=1)
            found = apply(start.frozen, start.scales, joined, stop=cut)
            examples = tuple(jnp.split(found, sizes, axis=1))
        opt_state = optimizer(0.0, z_key).init(start.trained) if method.steps else ()
        support, copies, query = examples
        return TaskState(
            params=start.trained,
            opt_state=opt_state,
            frozen=start.frozen,
            scales=start.scales,
            base_mean=start.base_mean,
            support=support,
            copies=copies,
            query=query,
            key=z_key,
        )

    def logits_fn(params: Any, state: TaskState, query: jax.Array) -> jax.Array:
        both = jnp.concatenate([state.support, query], axis=1)
        cut = model.cut(params)
        stages = {"start": cut} if cut else {}
        merged = adapt.merge(params, state.frozen)
        found = apply(merged, state.scales, both, **stages)
        found = transformed(found, state.base_mean)
        parts = jnp.split(found, [state.support.shape[1]], axis=1)
        return fewshot.protonet_logits(*parts) / config.temperature

    def loss_fn(params: Any, task: TaskState) -> jax.Array:
        return fewshot.cross_entropy(logits_fn(params, task, task.copies))

    def step(state: TaskState, learning_rate: Any) -> TaskState:
        tx = optimizer(learning_rate, state.key)
        if method.gradient == "backward":
            gradient = jax.grad(loss_fn)(state.params, state)
            updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        else:
            updates, opt_state = tx.update(
                state.params,
                state.opt_state,
                state.params,
                value_fn=loss_fn,
                task=state._replace(params=(), opt_state=()),
            )
        params = optax.apply_updates(state.params, updates)
        return state._replace(params=params, opt_state=opt_state)

    def accuracy(state: TaskState) -> jax.Array:
        return fewshot.accuracy(logits_fn(state.params, state, state.query))

    return TaskLearner(start, begin, step, accuracy)


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
      RuntimeError, ValueError: as `experiments.workdir.runs.owned`; as `fewshot.episodes`.
    """
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
    data = tasks.DATASETS[config.dataset](config.domain, data_dir)
    fewshot.check_disjoint({name: split.labels for name, split in data.items()})
    base = base_splits(data["train"])
    num_classes = 1 + int(jnp.max(base["train"].labels))
    network = functools.partial(tasks.NETWORKS[config.network], num_classes=num_classes)
    results: dict[str, Any] = {}
    with report.progress() as progress:
        progress.expect(config.pretrain.steps + _total_tasks(config))
        params = train.pretrain(config, network, base, progress, directory / "runs")
        images = data["train"].images
        params, base_mean = with_identity(network(bits=None), params, images)
        embedding = functools.partial(
            tasks.NETWORKS[config.network], num_classes=len(base_mean)
        )
        begin = (params, images, base_mean)
        samplers = _samplers(config, data)
        for name, method in {"zero_shot": _ZERO_SHOT, **_chosen(config)}.items():
            where = runs.RunDirectory(directory / "runs" / name, np.inf)
            found = where.result()
            if found is None:
                learner = make_task_learner(config, method, embedding)
                found = _adapt(
                    config, method, learner, learner.start(*begin), samplers, progress
                )
                where.finish(found)
            else:
                progress.advance(_tasks_of(config, method))
            results[name] = found
            report.write_json(results, directory)
    for name, result in results.items():
        _add_gap(name, result, results)
    report.write_json(results, directory)
    _write(results, config, directory)
    return results


_ZERO_SHOT = ConfigDict({"steps": 0, "gradient": "backward", "adaptation": {}})


def _chosen(config: ConfigDict) -> dict[str, ConfigDict]:
    return {name: config.methods[name] for name in config.run}


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
        sample = fewshot.episodes(
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


def _adapt(
    config: ConfigDict,
    method: ConfigDict,
    learner: TaskLearner,
    start: Start,
    samplers: Mapping[str, _Sampler],
    progress: report.Progress,
) -> dict[str, Any]:
    """Chooses a learning rate on validation's tasks, then goes through test's."""
    # Tasks of both splits have the same shapes: all is compiled once.
    begin, step = jax.jit(learner.begin), jax.jit(learner.step)
    score = jax.jit(learner.accuracy)

    def accuracies(split: str, learning_rate: float, count: int) -> np.ndarray:
        numbers = jnp.arange(count + -count % config.chunk)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(numbers)
        rate = jnp.float32(learning_rate)
        found = []
        for number in range(count):
            first = number - number % config.chunk
            if first == number:  # draws the next tasks
                part = keys[first : first + config.chunk]
                task_keys, train_keys = jax.vmap(jax.random.split, out_axes=1)(part)
                drawn = samplers[split](task_keys)
            support, query = (x[number - first] for x in drawn)
            state = begin(start, support, query, train_keys[number - first])
            for _ in range(method.steps):
                state = step(state, rate)
            found.append(float(score(state)))
            progress.advance(1)
        return np.array(found)

    key = jax.random.key(config.seed)
    rates: Sequence[float] = method.get("learning_rates", ())
    tuned = {
        rate: float(accuracies("validation", rate, config.tuning_tasks).mean())
        for rate in rates
    }
    best = max(tuned, key=lambda rate: tuned[rate]) if tuned else 0.0
    began = time.perf_counter()
    found = accuracies("test", best, config.tasks)
    return {
        "accuracy": float(found.mean()),
        "accuracy_interval": fewshot.interval(found).half,
        "accuracies": found.tolist(),
        "learning_rate": best,
        "tuning": {f"{rate:g}": value for rate, value in tuned.items()},
        "steps": method.steps,
        "forward_passes": method.steps * forward_passes(method) if method.steps else 0,
        "seconds": time.perf_counter() - began,
    }


def _tasks_of(config: ConfigDict, method: ConfigDict) -> int:
    return config.tasks + config.tuning_tasks * len(method.get("learning_rates", ()))


def _total_tasks(config: ConfigDict) -> int:
    every = {"zero_shot": _ZERO_SHOT, **_chosen(config)}
    return sum(_tasks_of(config, method) for method in every.values())


def _add_gap(name: str, result: dict[str, Any], results: Mapping[str, Any]) -> None:
    """The difference to backpropagation in the same way, task by task."""
    reference = results.get(f"{name.split('_')[0]}_backprop")
    if reference is None or reference is result:
        return
    difference = np.subtract(result["accuracies"], reference["accuracies"])
    mean, half = fewshot.interval(difference)
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
        gap = f" ({100 * result['gap']:+.1f})" if "gap" in result else ""
        return _points(result["accuracy"], result["accuracy_interval"]) + gap

    methods = next(iter(results.values()))
    rows = [[name, *map(cell, part.values())] for name, part in results.items()]
    integers = [
        (part, name)
        for part in results.values()
        for name in part
        if name.endswith("_16w8a") and "gap" in part[name]
    ]
    near = sum(part[name]["gap"] >= -0.05 for part, name in integers)
    note = (
        "Test accuracy in % as mean ± half of the 95% interval over tasks, in brackets "
        f"the gap to backpropagation; {near} of {len(integers)} cells in 16w8a are at "
        "most 5 points below it."
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
