"""A decoder of bytes: pre-trained on one domain of text, adapted to other tasks."""

import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from ml_collections import ConfigDict

import fgrad
from experiments import starts
from experiments.data import texts
from experiments.drivers import settings, tuning
from experiments.drivers.progress import Progress, show_progress
from experiments.learners import adapt, next_byte, optimizers
from experiments.models import decoder
from experiments.workdir import report, runs
from fgrad import analysis, layers

_EVALUATED = 64  # sequences at once
_COLUMNS = ("task", "method", "weights", "nats", "accuracy", "steps", "passes")
_COSTS = ("learning rate", "live MiB", "temporaries MiB")


class Batch(NamedTuple):
    """Sequences of one bucket.

    Attributes:
      tokens: uint8 [batch, positions], padded with zeros.
      counted: bool [batch, positions], whose losses count.
    """

    tokens: Any
    counted: Any


# By the length of a bucket all sequences that are padded to it.
Grouped = Mapping[int, Batch]


class Task(NamedTuple):
    """What is learned.

    Attributes:
      train: sequences.
      validation: sequences to choose learning rates by.
      test: sequences to report.
      words: bytes of the word for each class, or nothing.
      lines: by split the texts to classify, and their classes.
    """

    train: Grouped
    validation: Grouped
    test: Grouped
    words: tuple[bytes, ...] = ()
    lines: Mapping[str, tuple[list[bytes], np.ndarray]] = MappingProxyType({})


def run(config: ConfigDict, workdir: str, resume: bool = True) -> dict[str, Any]:
    """Pre-trains a decoder, or reads it, and adapts it by every method to every task.

    Args:
      config: see ``configs/text.py``.
      workdir: results.json and table.md go here.
      resume: whether to go on with the methods that are not finished.

    Returns:
      What results.json holds: digests of the texts, and by task and method the nats
      per byte and accuracies over seeds, with what they cost.

    Raises:
      UsageError: for a configuration that cannot be followed.
      InUseError, UsageError: as `experiments.workdir.runs.owned`.
    """
    settings.check_text(config)
    directory = pathlib.Path(workdir)
    corpora = {name: texts.read(name) for name in texts.DOMAINS}
    results: dict[str, Any] = {
        "texts": {name: texts.digest(text) for name, text in corpora.items()}
    }
    with runs.owned(directory, config, resume), show_progress() as progress:
        progress.expect(config.pretrain.steps)
        start = _started(config, progress)
        for name in config.tasks:
            task = _TASKS[name](config, corpora)
            before = _untrained(config, start, task)
            results[name] = {"start": before}
            for method in config.run:
                where = directory / "runs" / name / method
                training = _Training(config, config.methods[method], start, task, where)
                found = runs.once(where, functools.partial(training.results, progress))
                results[name][method] = found
                told = report.mean_and_deviation(found["nats"], 1, 3)
                progress.say(f"{name}, {method}: {told} nats")
                report.write_json(results, directory)
    _write(config, results, directory)
    rich.print(f"Written to {directory}: results.json, table.md")
    return results


# ------------------------------------------------------------------------------- tasks


def _language(config: ConfigDict, corpora: Mapping[str, str]) -> Task:
    """The next byte of another domain."""
    splits = _pieces(config, corpora[config.target])
    test = splits["test"]
    every = math.ceil(len(test) / config.test_pieces)
    splits["test"] = test[::every]
    splits["validation"] = splits["validation"][::every]
    train, validation, test = (_whole(splits[name], config) for name in texts.SPLITS)
    return Task(train, validation, test)


def _kinds(config: ConfigDict, corpora: Mapping[str, str]) -> Task:
    """Which domain a line is of."""
    names = tuple(config.words)
    words = tuple(config.words[name].encode() for name in names)
    random = np.random.default_rng(0)
    lines: dict[str, tuple[list[bytes], list[int]]] = {
        split: ([], []) for split in texts.SPLITS
    }
    for number, name in enumerate(names):
        found = texts.lines(corpora[name], *config.line_lengths)
        found = [found[i] for i in random.permutation(len(found))]
        for split in texts.SPLITS:
            count = config.lines[split]
            lines[split][0].extend(found[:count])
            lines[split][1].extend([number] * len(found[:count]))
            found = found[count:]
    train, validation, test = (
        _grouped(found, config.buckets, [words[number] for number in numbers])
        for found, numbers in lines.values()
    )
    classes = {
        split: (found, np.array(numbers)) for split, (found, numbers) in lines.items()
    }
    return Task(train, validation, test, words, classes)


_TASKS: dict[str, Callable[[ConfigDict, Mapping[str, str]], Task]] = {
    "language": _language,
    "kinds": _kinds,
}
TASKS = tuple(_TASKS)


def _pieces(config: ConfigDict, text: str) -> dict[str, list[bytes]]:
    return texts.divided(texts.pieces(text, max(config.buckets)))


def _whole(found: Sequence[bytes], config: ConfigDict) -> Grouped:
    return _grouped(found, config.buckets)


def _grouped(
    found: Sequence[bytes],
    buckets: Sequence[int],
    words: Sequence[bytes] | None = None,
) -> Grouped:
    """Sequences by their buckets; with words behind them only these count."""
    members: dict[int, list[int]] = {}
    for index, one in enumerate(found):
        word = words[index] if words else None
        length = len(next_byte.followed(one, word) if word else one)
        members.setdefault(texts.bucket(length, buckets), []).append(index)
    out = {}
    for length, indices in sorted(members.items()):
        chosen = [found[i] for i in indices]
        if words:
            ends = [words[i] for i in indices]
            out[length] = Batch(*next_byte.prompted(chosen, ends, [length]))
        else:
            tokens = texts.padded(chosen, [length])
            out[length] = Batch(tokens, tokens > 0)
    return out


def drawn(random: np.random.Generator, grouped: Grouped, size: int) -> Batch:
    """A batch of one bucket, which is drawn in proportion to what it holds.

    Args:
      random: where chance comes from.
      grouped: sequences by bucket.
      size: sequences of the batch, drawn with replacement.
    """
    lengths = list(grouped)
    counts = np.array([len(grouped[length].tokens) for length in lengths])
    chosen = grouped[lengths[random.choice(len(lengths), p=counts / counts.sum())]]
    rows = random.integers(len(chosen.tokens), size=size)
    return Batch(chosen.tokens[rows], chosen.counted[rows])


# ---------------------------------------------------------------------------- training


def _network(bits: Any = None, checkpointed: bool = False) -> decoder.Decoder:
    return decoder.Decoder(
        bits=tuple(bits) if bits else None, checkpointed=checkpointed
    )


def _logits(model: decoder.Decoder, params: Any, scales: Any) -> next_byte.Logits:
    return functools.partial(model.apply, {"params": params, **scales})


def _started(config: ConfigDict, progress: Progress) -> Any:
    """The float parameters where all runs begin."""
    if (start := starts.committed(config)) is not None:
        progress.advance(config.pretrain.steps)
        progress.say("begins from the pre-trained network in experiments/models/starts")
        return start
    return pretrained(config, progress.advance)


def pretrained(config: ConfigDict, advance: Callable[[int], None]) -> Any:
    """Trains a new decoder on the source's text.

    Args:
      config: see ``configs/text.py``.
      advance: told of the steps.

    Returns:
      Float parameters.
    """
    chosen, model = config.pretrain, _network()
    train = _whole(_pieces(config, texts.read(config.source))["train"], config)
    key = jax.random.key(chosen.seed)
    params = model.init(key, jnp.zeros((1, 8), jnp.int32))["params"]
    tx = optimizers.make_optimizer(chosen, chosen.learning_rate, chosen.steps, key)

    def loss(params: Any, batch: Batch) -> jax.Array:
        return next_byte.mean_loss(_logits(model, params, {}), *batch)

    @jax.jit
    def step(params: Any, state: Any, batch: Batch) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state, random = tx.init(params), np.random.default_rng(chosen.seed)
    for _ in range(chosen.steps):
        params, state = step(params, state, drawn(random, train, chosen.batch_size))
        advance(1)
    return params


class _Training:
    """The runs of one method on one task; a step is compiled once for each bucket."""

    def __init__(
        self,
        config: ConfigDict,
        method: ConfigDict,
        start: Any,
        task: Task,
        where: pathlib.Path,
    ) -> None:
        self._config, self._method, self._task = config, method, task
        self._where = where
        self._model = _network(method.bits, method.get("checkpoint", False))
        first = next(iter(task.train.values()))
        self.compilations = 0  # of the step, one for each bucket
        self._scales: Any = {}
        self._params = start
        if method.bits:
            self._params, self._scales = _quantized(method, self._model, start, first)
        self._first = jax.tree.map(lambda x: x[: method.batch_size], first)
        self._step = jax.jit(self._stepped, donate_argnums=(0, 1))
        self._jitted_losses = jax.jit(self._losses)

    def results(self, progress: Progress) -> dict[str, Any]:
        """Tunes the learning rate, and runs every seed."""
        config, method = self._config, self._method
        rate, tuned = self._best_rate()
        progress.expect(method.steps * len(config.seeds))
        scores = []
        for seed in config.seeds:
            scores.append(self._kept("test", rate, seed, method.steps))
            progress.advance(method.steps)
        trained, frozen = self._begun(0)
        state = self._optimizer(0.0, 1, 0).init(trained)
        memory = analysis.memory_report(
            self._step, trained, state, frozen, self._scales, 0.0, 1.0, 0, self._first
        )
        return {
            "weights": adapt.num_weights(trained),
            "nats": [one["nats"] for one in scores],
            "accuracy": [one.get("accuracy") for one in scores],
            "learning_rate": rate,
            "tuning": {f"{rate:g}": nats for rate, nats in sorted(tuned.items())},
            "steps": method.steps,
            "passes": method.steps * optimizers.forward_passes(method),
            "live_mib": memory.live / 2**20,
            "temporaries_mib": memory.memory.temporaries / 2**20,
            "compilations": max(one["compilations"] for one in scores),
        }

    def _best_rate(self) -> tuple[float, dict[float, float]]:
        config, method = self._config, self._method
        if len(method.learning_rates) == 1:
            return method.learning_rates[0], {}
        steps = max(1, int(config.tuning_fraction * method.steps))

        def score(rate: float) -> float:
            seeds = config.tuning_seeds
            ended = [self._kept("validation", rate, seed, steps) for seed in seeds]
            found = [one["nats"] for one in ended]
            return -float(np.nan_to_num(np.mean(found), nan=np.inf))

        tuned = tuning.searched(
            tuning.each(score), method.learning_rates, config.wider_tuning
        )
        return tuning.best(tuned), {rate: -score for rate, score in tuned.items()}

    def _kept(self, split: str, rate: float, seed: int, steps: int) -> dict[str, float]:
        """Scores of a run, from the workdir if they are there."""

        def compute() -> dict[str, float]:
            scores = self._scores(self._trained(rate, seed, steps), split)
            return {**scores, "compilations": self.compilations}

        return runs.once(self._where / f"{split}_{rate:g}_{seed}", compute)

    def _trained(self, rate: float, seed: int, steps: int) -> Any:
        """What trains, after a run."""
        trained, frozen = self._begun(seed)
        state = self._optimizer(0.0, 1, seed).init(trained)
        random = np.random.default_rng(seed)
        for _ in range(steps):
            batch = drawn(random, self._task.train, self._method.batch_size)
            trained, state = self._step(
                trained, state, frozen, self._scales, rate, float(steps), seed, batch
            )
        return trained

    def _begun(self, seed: int) -> tuple[Any, Any]:
        """What trains and what does not, before the first step."""
        params = jax.tree.map(jnp.copy, self._params)  # a step donates its own
        if self._method.trains == "full":
            return params, {}
        adapters = self._lora(self._mean, seed).adapters
        if self._method.bits:
            adapters = fgrad.quantize(adapters, 16)
        return adapters, params

    def _lora(self, function: Any, seed: int = 0) -> fgrad.adapters.Adaptation:
        """LoRA for a function of (params, scales, batch)."""
        batch = jax.tree.map(jnp.asarray, self._first)
        key = jax.random.key(seed)
        given = {"scales": self._scales, "batch": batch}
        return fgrad.lora(function, self._params, key, **self._config.lora, **given)

    def _evaluated(
        self, function: Any, trained: Any, frozen: Any, scales: Any, batch: Batch
    ) -> jax.Array:
        """A function of (params, scales, batch) where some of the weights train."""
        if self._method.trains == "full":
            return function(trained, scales, batch)
        value_fn = self._lora(function).value_fn
        return value_fn(trained, base=frozen, scales=scales, batch=batch)

    def _mean(self, params: Any, scales: Any, batch: Batch) -> jax.Array:
        return next_byte.mean_loss(_logits(self._model, params, scales), *batch)

    def _each(self, params: Any, scales: Any, batch: Batch) -> jax.Array:
        return next_byte.byte_losses(_logits(self._model, params, scales), batch.tokens)

    def _loss(self, trained: Any, frozen: Any, scales: Any, batch: Batch) -> jax.Array:
        return self._evaluated(self._mean, trained, frozen, scales, batch)

    def _losses(
        self, trained: Any, frozen: Any, scales: Any, batch: Batch
    ) -> jax.Array:
        return self._evaluated(self._each, trained, frozen, scales, batch)

    def _scores(self, trained: Any, split: str) -> dict[str, float]:
        """Nats per byte that counts, and the accuracy if there are classes."""
        frozen = {} if self._method.trains == "full" else self._params

        def losses(batch: Batch) -> jax.Array:
            return self._jitted_losses(trained, frozen, self._scales, batch)

        return scored(losses, self._task, split, max(self._config.buckets))

    def _optimizer(self, rate: Any, steps: Any, seed: Any) -> Any:
        key = jax.random.key(seed)
        return optimizers.make_optimizer(self._method, rate, steps, key)

    def _stepped(
        self,
        trained: Any,
        state: Any,
        frozen: Any,
        scales: Any,
        rate: Any,
        steps: Any,
        seed: Any,
        batch: Batch,
    ) -> tuple[Any, Any]:
        self.compilations += 1  # Python runs when JAX traces, once for each shape
        optimizer = self._optimizer(rate, steps, seed)
        given = {"frozen": frozen, "scales": scales, "batch": batch}
        if self._method.gradient == "backward":
            incoming, extra = jax.grad(self._loss)(trained, **given), {}
        else:
            incoming, extra = trained, {"value_fn": self._loss, **given}
        updates, state = optimizer.update(incoming, state, trained, **extra)
        return optax.apply_updates(trained, updates), state


def _quantized(
    method: ConfigDict, model: decoder.Decoder, start: Any, batch: Batch
) -> tuple[Any, Any]:
    """Parameters as integers, and the scales of activations."""
    params = fgrad.quantize(start, method.bits[0], headroom=method.headroom)
    tokens = jnp.asarray(batch.tokens[: method.calibration_images], jnp.int32)
    variables = layers.calibrate(
        model, {"params": params}, tokens, headroom=method.activation_headroom
    )
    return params, {layers.SCALES: variables[layers.SCALES]}


# -------------------------------------------------------------------------- evaluation


def scored(
    losses: Callable[[Batch], jax.Array], task: Task, split: str, longest: int
) -> dict[str, float]:
    """Scores of one split.

    Args:
      losses: gives the losses of all bytes of a batch.
      task: what is learned.
      split: "validation" or "test".
      longest: length of the longest bucket.

    Returns:
      "nats" per byte that counts, and "accuracy" if there are classes.
    """
    grouped: Grouped = getattr(task, split)
    total, count = 0.0, 0
    for batch in grouped.values():
        total += float(np.sum(_in_batches(losses, batch), where=batch.counted))
        count += int(batch.counted.sum())
    scores = {"nats": total / count}
    if task.words:
        lines, classes = task.lines[split]
        repeated = [line for line in lines for _ in task.words]
        words = list(task.words) * len(lines)
        batch = Batch(*next_byte.prompted(repeated, words, [longest]))
        found = next_byte.word_scores(_in_batches(losses, batch), batch.counted)
        guessed = found.reshape(len(lines), -1).argmax(-1)
        scores["accuracy"] = float(np.mean(guessed == classes))
    return scores


def _in_batches(losses: Callable[[Batch], jax.Array], batch: Batch) -> np.ndarray:
    """Losses of all sequences, some at a time; empty ones fill the last batch."""
    rest = -len(batch.tokens) % _EVALUATED
    filled = jax.tree.map(lambda x: np.pad(x, ((0, rest), (0, 0))), batch)
    chosen = (slice(i, i + _EVALUATED) for i in range(0, len(filled[0]), _EVALUATED))
    parts = [np.asarray(losses(Batch(*(x[rows] for x in filled)))) for rows in chosen]
    return np.concatenate(parts)[: len(batch.tokens)]


def _untrained(config: ConfigDict, start: Any, task: Task) -> dict[str, Any]:
    """Scores of the float network as the source left it."""
    model = _network()

    @jax.jit
    def losses(batch: Batch) -> jax.Array:
        return next_byte.byte_losses(_logits(model, start, {}), batch.tokens)

    return scored(losses, task, "test", max(config.buckets))


def _write(
    config: ConfigDict, results: dict[str, Any], directory: pathlib.Path
) -> None:
    rows = []
    for task in config.tasks:
        for name, found in results[task].items():
            if name == "start":
                accuracy = found.get("accuracy")
                told = "" if accuracy is None else f"{100 * accuracy:.1f}"
                cells = [f"{found['nats']:.3f}", told]
                rows.append([task, name, "0", *cells, "0", "0", "", "", ""])
                continue
            accuracies = found["accuracy"]
            rows.append(
                [
                    task,
                    name,
                    f"{found['weights']:,}",
                    report.mean_and_deviation(found["nats"], 1, 3),
                    "" if None in accuracies else report.mean_and_deviation(accuracies),
                    f"{found['steps']:,}",
                    f"{found['passes']:,.0f}",
                    f"{found['learning_rate']:g}",
                    f"{found['live_mib']:.2f}",
                    f"{found['temporaries_mib']:.2f}",
                ]
            )
    note = (
        f"{config.source} to {config.target}, and kinds of lines; nats per byte and "
        f"accuracy in % of the test split, {report.spread(len(config.seeds))}. A "
        "backward pass counts as two forward passes. live: what a compiled step needs "
        "in all, weights included; temporaries: of it, what is neither argument nor "
        f"result. Texts: {results['texts']}."
    )
    report.write_table((*_COLUMNS, *_COSTS), rows, note, directory, wide=2)
