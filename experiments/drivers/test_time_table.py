"""Adaptation at test time: a stream of corrupted images, one batch after the other."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich
from ml_collections import ConfigDict

from experiments.data import mnist_c
from experiments.data.arrays import Split
from experiments.drivers import settings, tuning
from experiments.drivers.progress import show_progress
from experiments.drivers.training import Task, prepare
from experiments.learners import adapt, test_time
from experiments.learners.learner import TrainState, make_learner
from experiments.workdir import report, runs

_COLUMNS = ("method", "weights that train", "passes", "rate", "online", "after")
_LONG = ("long: online", "after", "clean, at the end")


class _Data(NamedTuple):
    """What streams are made of; images are floats in [0, 1].

    Attributes:
      stream: images [kinds, examples, ...] that come one batch after the other.
      held_out: images [kinds, examples, ...] to judge the adapted network by.
      clean: images of the source, to see what is forgotten.
      source: what the activations are on the source's training images.
    """

    stream: Split
    held_out: Split
    clean: Split
    source: test_time.Statistics


class _Carry(NamedTuple):
    """What a stream carries from batch to batch."""

    state: TrainState
    moving: test_time.Moving


class Scores(NamedTuple):
    """Accuracies along a stream, for each kind that it passed.

    Attributes:
      online: of the batches, each predicted before the network adapts to it.
      after: on held-out images of the kind, at the kind's end.
      clean: on clean images, then.
    """

    online: Any
    after: Any
    clean: Any


def run(config: ConfigDict, workdir: str, resume: bool = True) -> dict[str, Any]:
    """Pre-trains on clean images and adapts to a stream of corrupted ones.

    Args:
      config: see ``configs/test_time.py``.
      workdir: results.json and table.md go here.
      resume: whether to go on with the methods that are not finished.

    Returns:
      What results.json holds: by method the learning rate, the forward passes of a
      batch, and accuracies over seeds: with a reset before each kind, and of a long
      stream without.

    Raises:
      UsageError: for a configuration that cannot be followed.
      InUseError, UsageError: as `experiments.workdir.runs.owned`.
    """
    settings.check_test_time(config)
    directory = pathlib.Path(workdir)
    results: dict[str, Any] = {}
    with runs.owned(directory, config, resume), show_progress() as progress:
        progress.expect(config.pretrain.steps)
        task = prepare(config, directory, progress)
        data = _load(config, task, directory)
        for name in config.run:
            where = directory / "runs" / name
            method = _Method(config, config.methods[name], task, data, where)
            found = results[name] = runs.once(where, method.results)
            after = [float(np.mean(one)) for one in found["reset"]["after"]]
            progress.say(f"{name}: {report.mean_and_deviation(after)}")
            report.write_json(results, directory)
    _write(config, results, directory)
    rich.print(f"Written to {directory}: results.json, table.md")
    return results


def _load(config: ConfigDict, task: Task, directory: pathlib.Path) -> dict[str, _Data]:
    """Data to tune on ("validation") and to report ("test")."""
    data_dir = pathlib.Path(config.data_dir or directory / "data")
    kinds = mnist_c.by_kind(config.severity, data_dir)
    stream = kinds.get("train", kinds["validation"])  # clean images have no other
    images = task.source["train"].images
    source = test_time.source_statistics(
        _outputs(task), images, len(task.network(bits=None).stages) - 1
    )
    return {
        name: _Data(_split(stream), _split(kinds[name]), task.source[name], source)
        for name in ("validation", "test")
    }


def _split(kinds: mnist_c.Kinds) -> Split:
    return Split(
        jnp.asarray(kinds.images, jnp.float32) / 255, jnp.asarray(kinds.labels)
    )


def _outputs(task: Task) -> Any:
    """The float network of the source, as a function of its input."""
    model = adapt.full(task.network(bits=None))
    return functools.partial(model.outputs, {"params": task.start})


class _Method:
    """Streams of one method, compiled once for all rates and seeds."""

    def __init__(
        self,
        config: ConfigDict,
        method: ConfigDict,
        task: Task,
        data: dict[str, _Data],
        where: pathlib.Path,
    ) -> None:
        self._config, self._method, self._task = config, method, task
        self._data, self._where = data, where
        objective: Any = (
            test_time.Labelled(method)
            if method.labels
            else test_time.EntropyAndAlignment(method)
        )
        self._learner = make_learner(method, task.network, objective)
        self._one_kind = jax.jit(self._passed)

    def results(self) -> dict[str, Any]:
        """Tunes the learning rate, and runs every seed with resets and without."""
        config = self._config
        rate, tuned = self._best_rate()
        every = range(len(self._data["test"].stream.images))
        long = list(every) * config.rounds
        found: dict[str, list[Scores]] = {"reset": [], "long": []}
        for seed in config.seeds:
            found["reset"].append(self._kept("test", every, rate, seed, reset=True))
            found["long"].append(self._kept("test", long, rate, seed, reset=False))
        state = self._begin(config.seeds[0])
        trained = adapt.num_weights(state.params)
        updates = self._method.updates
        passes = updates * self._learner.passes_per_step
        return {
            "weights": trained if updates else 0,
            "passes": 1 + passes if updates else 1,
            "learning_rate": rate,
            "tuning": {f"{rate:g}": score for rate, score in sorted(tuned.items())},
            **{name: _summary(runs) for name, runs in found.items()},
        }

    def _best_rate(self) -> tuple[float, dict[float, float]]:
        """The rate that is best on validation images of some kinds, and all tried."""
        config, rates = self._config, self._method.learning_rates

        def score(rate: float) -> float:
            kinds = config.tuning_kinds
            ended = [
                self._kept("validation", kinds, rate, seed, reset=True)
                for seed in config.tuning_seeds
            ]
            return float(np.mean([one.after for one in ended]))

        if len(rates) == 1:
            return rates[0], {}
        tuned = tuning.searched(tuning.each(score), rates, config.wider_tuning)
        return tuning.best(tuned), tuned

    def _kept(
        self, split: str, kinds: Sequence[int], rate: float, seed: int, reset: bool
    ) -> Scores:
        """What `_run` tells, from the workdir if it is there."""
        kind = "reset" if reset else "long"
        found = runs.once(
            self._where / f"{split}_{kind}_{rate:g}_{seed}",
            lambda: _listed(self._run(split, kinds, rate, seed, reset)),
        )
        return Scores(**{name: np.asarray(found[name]) for name in Scores._fields})

    def _run(
        self, split: str, kinds: Sequence[int], rate: float, seed: int, reset: bool
    ) -> Scores:
        """A stream of some kinds, in this order."""
        data = self._data[split]
        channels = len(data.source.means[-1])
        begun = carry = _Carry(self._begin(seed), test_time.moving(channels))
        found = []
        for number, kind in enumerate(kinds):
            key = jax.random.fold_in(jax.random.key(seed), number)
            carry = begun if reset else carry
            carry, scores = self._one_kind(carry, data, kind, jnp.float32(rate), key)
            found.append(scores)
        return jax.tree.map(lambda *x: np.stack(x), *found)

    def _begin(self, seed: int) -> TrainState:
        images = self._task.source["train"].images
        images = images[: self._method.get("calibration_images", 1)]
        return self._learner.init(self._task.start, images, seed)

    def _passed(
        self, carry: _Carry, data: _Data, kind: Any, rate: jax.Array, key: jax.Array
    ) -> tuple[_Carry, Scores]:
        """The stream of one kind, from its first batch to its last."""
        size = self._config.batch_size
        examples = len(data.stream.labels)

        def one_batch(carry: _Carry, index: jax.Array) -> tuple[_Carry, jax.Array]:
            images, labels = data.stream.images[kind, index], data.stream.labels[index]
            carry, logits = self._predicted(carry, images, data.source)
            batch: Any = (
                Split(images, labels)
                if self._method.labels
                else test_time.Unlabelled(images, data.source)
            )
            carry = carry._replace(state=self._adapted(carry.state, rate, batch))
            return carry, jnp.mean(logits.argmax(-1) == labels)

        order = jax.random.permutation(key, examples)
        order = order[: examples // size * size].reshape(-1, size)
        carry, online = jax.lax.scan(one_batch, carry, order)
        judged = (data.held_out.images[kind], data.held_out.labels), data.clean
        after, clean = (self._accuracy(carry, *one, data.source) for one in judged)
        return carry, Scores(online.mean(), after, clean)

    def _adapted(self, state: TrainState, rate: jax.Array, batch: Any) -> TrainState:
        """A state after the updates that one batch is for, at a constant rate."""
        if not self._method.updates:
            return state
        endless = jnp.float32(jnp.inf)

        def update(state: TrainState, _: Any) -> tuple[TrainState, None]:
            return self._learner.step(state, rate, endless, batch), None

        return jax.lax.scan(update, state, length=self._method.updates)[0]

    def _predicted(
        self, carry: _Carry, images: jax.Array, source: test_time.Statistics
    ) -> tuple[_Carry, jax.Array]:
        """Logits of a batch, whose features count for the moving means."""
        if self._method.realigned:
            features = self._features(carry, images, len(source.means))
            memory = self._config.memory
            moving = test_time.moved(carry.moving, features, memory)
            carry = carry._replace(moving=moving)
        return carry, self._logits(carry, images, source)

    def _logits(
        self, carry: _Carry, images: jax.Array, source: test_time.Statistics
    ) -> jax.Array:
        if not self._method.realigned:
            return self._learner.logits(carry.state, images)
        features = self._features(carry, images, len(source.means))
        aligned = test_time.realigned(carry.moving, features, source)
        return self._of(carry)(aligned, start=len(source.means))[0]

    def _features(self, carry: _Carry, images: jax.Array, head: int) -> jax.Array:
        return self._of(carry)(images, stop=head)[0]

    def _of(self, carry: _Carry) -> Any:
        state = carry.state
        return self._learner.outputs(state.params, state.frozen, state.scales)

    def _accuracy(
        self,
        carry: _Carry,
        images: jax.Array,
        labels: jax.Array,
        source: test_time.Statistics,
    ) -> jax.Array:
        return jnp.mean(self._logits(carry, images, source).argmax(-1) == labels)


def _summary(found: Sequence[Scores]) -> dict[str, Any]:
    """By kind of score, for each seed the accuracy at each kind of the stream."""
    listed = [_listed(scores) for scores in found]
    return {name: [one[name] for one in listed] for name in Scores._fields}


def _listed(scores: Scores) -> dict[str, list[float]]:
    """By kind of score, the accuracy at each kind of the stream."""
    return {name: getattr(scores, name).tolist() for name in Scores._fields}


def _write(
    config: ConfigDict, results: dict[str, Any], directory: pathlib.Path
) -> None:
    rows = []
    for name, found in results.items():
        reset, long = found["reset"], found["long"]
        kinds = len(reset["online"][0])
        rows.append(
            [
                name,
                f"{found['weights']:,}",
                f"{found['passes']:g}",
                f"{found['learning_rate']:g}",
                _spread(reset["online"]),
                _spread(reset["after"]),
                _spread([one[-kinds:] for one in long["online"]]),
                _spread([one[-kinds:] for one in long["after"]]),
                _spread([one[-1:] for one in long["clean"]]),
            ]
        )
    note = (
        f"Severity {config.severity}, batches of {config.batch_size}; accuracy in %, "
        f"mean over the kinds, {report.spread(len(config.seeds))}. online: of each "
        "batch before the network adapts to it; after: on the test split's images of "
        f"a kind after its stream; long: without a reset, of {config.rounds} rounds "
        "over all kinds the last. passes: of a batch, its prediction included; a "
        "backward pass counts as two."
    )
    report.write_table((*_COLUMNS, *_LONG), rows, note, directory, wide=1)


def _spread(by_seed: Sequence[Sequence[float]]) -> str:
    """Mean over kinds and seeds, and the deviation over seeds."""
    return report.mean_and_deviation([float(np.mean(one)) for one in by_seed])
