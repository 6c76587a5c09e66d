"""Accuracy against privacy: forward gradients with noise, and DP-SGD."""

import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import rich
from matplotlib import figure
from ml_collections import ConfigDict
from scipy import stats

from experiments.data.arrays import Split
from experiments.drivers import settings, tuning
from experiments.drivers.progress import Progress, show_progress
from experiments.drivers.training import Task, prepare
from experiments.learners import metrics
from experiments.usage import UsageError
from experiments.workdir import report, runs
from fgrad import enhancements

mpl.use("Agg")

_NOT_PRIVATE = "backprop"
# Deviations of the number of examples above the expected one that a batch has room for.
_ROOM = 6


class Ended(NamedTuple):
    """What a run is judged by.

    Attributes:
      test: the first metric on the test split.
      validation: that on the validation split.
      attack: AUC of telling training examples from test examples by their loss.
    """

    test: float
    validation: float
    attack: float


def run(config: ConfigDict, workdir: str, resume: bool = True) -> dict[str, Any]:
    """Trains by every method at every ε.

    Args:
      config: see ``configs/private.py``.
      workdir: results.json, table.md and figure.png go here.
      resume: whether to go on from a pre-trained network that is there.

    Returns:
      What results.json holds: by method and ε the metric and the AUC of the attack over
      seeds, the noise multiplier and the learning rate.

    Raises:
      UsageError: for a configuration that cannot be followed; without dp-accounting.
      InUseError, UsageError: as `experiments.workdir.runs.owned`.
    """
    settings.check_private(config)
    directory = pathlib.Path(workdir)
    results: dict[str, dict[str, Any]] = {}
    with runs.owned(directory, config, resume), show_progress() as progress:
        progress.expect(config.pretrain.steps + _total_steps(config))
        task = prepare(config, directory, progress)
        noise = _noise_multipliers(config, task.target["train"])
        progress.say(f"noise multipliers: {noise}")
        for name in config.run:
            train = _Training(config, config.methods[name], task, progress)
            rate = train.best_rate(noise[config.tuning_epsilon])
            results[name] = {
                f"{e:g}": train.at(rate, noise[e]) for e in config.epsilons
            }
            report.write_json(results, directory)
        plain = ConfigDict({"mechanism": "backward", "learning_rates": (0.1, 0.3)})
        plain.density = None
        clip = ConfigDict({**config, "backward_clip": 1e6})
        train = _Training(clip, plain, task, progress)
        results[_NOT_PRIVATE] = {"inf": train.at(train.best_rate(0.0), 0.0)}
    report.write_json(results, directory)
    _write(config, results, task, directory)
    _draw(config, results, directory)
    rich.print(f"Written to {directory}: results.json, table.md, figure.png")
    return results


def _noise_multipliers(config: ConfigDict, train: Split) -> dict[float, float]:
    """For each ε the noise multiplier that makes a run cost as much."""
    probability = config.batch_size / len(train.labels)

    def spent(sigma: float) -> float:
        try:
            return enhancements.privacy_spent(
                noise_multiplier=sigma,
                sampling_probability=probability,
                steps=config.steps,
                delta=config.delta,
            )
        except ModuleNotFoundError as error:
            raise UsageError(str(error)) from error

    found = {}
    for epsilon in config.epsilons:
        low, high = 0.3, 50.0
        while math.isfinite(epsilon) and high / low > 1.002:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
        found[epsilon] = high if math.isfinite(epsilon) else 0.0
    return found


class _Training:
    """Runs of one method, compiled once for all rates, noises and seeds."""

    def __init__(
        self, config: ConfigDict, method: ConfigDict, task: Task, progress: Progress
    ) -> None:
        self._config, self._method, self._task = config, method, task
        self._progress = progress
        self._model = task.network(bits=None)
        self._kept = _largest(task.start, method.density or 1.0)
        self._run = jax.jit(self._trained)

    def best_rate(self, noise: float) -> float:
        """The learning rate that is best on the validation split."""
        seeds = self._config.tuning_seeds

        def score(rate: float) -> float:
            ended = [self._ended(rate, noise, seed) for seed in seeds]
            return float(np.mean([one.validation for one in ended]))

        tuned = tuning.searched(
            tuning.each(score),
            self._method.learning_rates,
            self._config.wider_tuning,
            lambda: self._progress.expect(len(seeds) * self._config.steps),
        )
        metric = self._config.metrics[0]
        self._progress.say(f"validation {metric} by learning rate: {tuned}")
        return tuning.best(tuned)

    def at(self, rate: float, noise: float) -> dict[str, Any]:
        """Runs all seeds."""
        ended = [self._ended(rate, noise, seed) for seed in self._config.seeds]
        return {
            self._config.metrics[0]: [one.test for one in ended],
            "attack": [one.attack for one in ended],
            "noise_multiplier": noise,
            "learning_rate": rate,
        }

    def _ended(self, rate: float, noise: float, seed: int) -> Ended:
        params = self._run(jnp.float32(rate), jnp.float32(noise), jax.random.key(seed))
        self._progress.advance(self._config.steps)
        target = self._task.target
        losses = {n: np.asarray(self._losses(params, target[n])) for n in target}
        metric = self._config.metrics[0]
        scores = {
            name: metrics.scores(
                [metric], self._logits(params, target[name]), target[name].labels
            )[metric]
            for name in ("test", "validation")
        }
        # How often a training example has a lower loss than a test example.
        rank = stats.mannwhitneyu(losses["test"], losses["train"]).statistic
        attack = float(rank / losses["test"].size / losses["train"].size)
        return Ended(scores["test"], scores["validation"], attack)

    def _trained(self, rate: Any, noise: Any, key: jax.Array) -> Any:
        """The parameters after a run."""
        config, train = self._config, self._task.target["train"]
        keys = jax.random.split(key, 4)
        backward = self._method.mechanism == "backward"
        schedule = optax.linear_schedule(1.0, 0.0, config.steps)
        optimizer = optax.chain(optax.sgd(lambda count: rate * schedule(count)))
        if backward:
            tx = self._dp_sgd(noise, keys[0], optimizer)
        else:
            tx = self._forward(noise, keys[0], keys[1], optimizer)

        def step(carry: Any, batch_key: jax.Array) -> Any:
            params, state = carry
            batch = _poisson(batch_key, train, config.batch_size)
            update = self._backward_update if backward else self._forward_update
            updates, state = update(tx, params, state, batch)
            return (optax.apply_updates(params, updates), state), None

        start = self._task.start
        batch_keys = jax.random.split(keys[2], config.steps)
        (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), batch_keys)
        return params

    def _forward(
        self, noise: Any, key: jax.Array, noise_key: jax.Array, optimizer: Any
    ) -> optax.GradientTransformationExtraArgs:
        config = self._config
        tx = optax.chain(
            enhancements.private_forward_grad(
                key,
                noise_key,
                clip=config.forward_clip,
                batch_size=config.batch_size,
                noise_multiplier=noise,
                mechanism=self._method.mechanism,
                epsilon=config.epsilon,
                num_perturbations=config.num_perturbations,
            ),
            optimizer,
        )
        if self._method.density:
            # The largest of the public weights: the choice tells nothing.
            tx = enhancements.sparse_update(tx, density=self._method.density)
        return optax.with_extra_args_support(tx)

    def _forward_update(self, tx: Any, params: Any, state: Any, batch: Any) -> Any:
        split, present = batch

        def losses_fn(params: Any) -> jax.Array:
            return present * self._losses(params, split)

        return tx.update(params, state, params, value_fn=losses_fn)

    def _dp_sgd(
        self, noise: Any, key: jax.Array, optimizer: Any
    ) -> optax.GradientTransformation:
        config = self._config
        room = _room(config.batch_size, len(self._task.target["train"].labels))
        aggregate = optax.contrib.differentially_private_aggregate(
            config.backward_clip, noise, key
        )
        # It divides by the room of a batch, and not by what is expected in it.
        return optax.chain(aggregate, optax.scale(room / config.batch_size), optimizer)

    def _backward_update(self, tx: Any, params: Any, state: Any, batch: Any) -> Any:
        split, present = batch

        def loss_fn(params: Any, one: Split, there: jax.Array) -> jax.Array:
            return there * self._losses(params, jax.tree.map(lambda x: x[None], one))[0]

        gradients = jax.vmap(jax.grad(loss_fn), (None, 0, 0))(params, split, present)
        # Before they are clipped, so that what is not trained takes no part.
        gradients = jax.tree.map(lambda g, keep: g * keep, gradients, self._kept)
        updates, state = tx.update(gradients, state, params)
        return jax.tree.map(lambda u, keep: u * keep, updates, self._kept), state

    def _logits(self, params: Any, split: Split) -> jax.Array:
        logits: jax.Array = self._model.apply({"params": params}, split.images)
        return logits

    def _losses(self, params: Any, split: Split) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(
            self._logits(params, split), split.labels
        )


def _room(expected: int, examples: int) -> int:
    """For how many examples a batch has room: the probability of more is below 1e-8."""
    deviation = math.sqrt(expected * (1 - expected / examples))
    return min(examples, math.ceil(expected + _ROOM * deviation))


def _poisson(key: jax.Array, train: Split, expected: int) -> tuple[Split, jax.Array]:
    """A batch into which each example comes independently, and which places are taken.

    Args:
      key: PRNG key of the batch.
      train: the examples.
      expected: how many are expected.

    Returns:
      The batch, of a fixed length, and 1.0 for its examples, 0.0 for what is padding.
    """
    size = len(train.labels)
    chosen = jax.random.uniform(key, (size,)) < expected / size
    room = _room(expected, size)
    places = jnp.nonzero(chosen, size=room, fill_value=0)[0]
    present = (jnp.arange(room) < jnp.sum(chosen)).astype(jnp.float32)
    return jax.tree.map(lambda x: x[places], train), present


def _largest(params: Any, density: float) -> Any:
    """1.0 for the share of each leaf's weights that are the largest, 0.0 elsewhere."""

    def of_leaf(leaf: jax.Array) -> np.ndarray:
        order = np.argsort(-np.abs(np.ravel(leaf)), kind="stable")
        flat = np.zeros(leaf.size, np.float32)
        flat[order[: max(1, round(density * leaf.size))]] = 1
        return flat.reshape(leaf.shape)

    return jax.tree.map(of_leaf, params)


def _total_steps(config: ConfigDict) -> int:
    seeds, tuned = len(config.seeds), len(config.tuning_seeds)
    total = 2 * tuned + seeds  # without privacy
    for name in config.run:
        total += len(config.methods[name].learning_rates) * tuned
        total += len(config.epsilons) * seeds
    return int(total * config.steps)


def _write(
    config: ConfigDict,
    results: Mapping[str, Any],
    task: Task,
    directory: pathlib.Path,
) -> None:
    columns = [f"ε = {e:g}" for e in config.epsilons]
    cells = []
    for name, found in results.items():
        cells.append([name])
        for kind in (config.metrics[0], "attack"):
            for epsilon in config.epsilons:
                one = found.get(f"{epsilon:g}")
                cells[-1].append(_spread(one[kind]) if one else "")
    first = results[config.run[0]]
    noise = ", ".join(f"{found['noise_multiplier']:.2f}" for found in first.values())
    note = (
        f"{config.target}, test {config.metrics[0]} in %, and AUC in % of telling "
        "training from test examples by their loss; "
        f"{report.spread(len(config.seeds))}; δ = {config.delta:g}, "
        f"{config.steps} steps of {config.batch_size} of "
        f"{len(task.target['train'].labels)} examples, noise multipliers {noise}; "
        f"m = {config.num_perturbations}; zero-shot "
        f"{100 * _zero_shot(task, config.metrics[0]):.1f}."
    )
    report.write_table(
        ("method", *columns, *(f"attack, {c}" for c in columns)),
        cells,
        note,
        directory,
        wide=1 + len(columns),
    )


def _zero_shot(task: Task, metric: str) -> float:
    test, model = task.target["test"], task.network(bits=None)
    apply = jax.jit(functools.partial(model.apply, {"params": task.start}))
    return metrics.scores([metric], apply(test.images), test.labels)[metric]


def _spread(values: Sequence[float]) -> str:
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * np.std(values, ddof=1):.1f}"


def _draw(
    config: ConfigDict, results: Mapping[str, Any], directory: pathlib.Path
) -> None:
    fig = figure.Figure(figsize=(6, 4), layout="constrained")
    axes = fig.subplots()
    places, metric = range(len(config.epsilons)), config.metrics[0]
    for name in config.run:
        values = [results[name][f"{e:g}"][metric] for e in config.epsilons]
        mean = [100 * np.mean(v) for v in values]
        spread = [100 * np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values]
        axes.errorbar(places, mean, yerr=spread, capsize=3, label=name)
    axes.set_xticks(places, [f"{e:g}" for e in config.epsilons])
    axes.set(xlabel="ε", ylabel=f"test {metric} (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    fig.savefig(directory / "figure.png", dpi=120)
