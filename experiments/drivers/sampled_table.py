"""Backpropagation that keeps a part of its activations: accuracy and cosine."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from ml_collections import ConfigDict

from experiments import registry
from experiments.data.arrays import Split
from experiments.drivers import settings
from experiments.drivers.progress import show_progress
from experiments.models import sampled
from experiments.workdir import report, runs
from fgrad import analysis

# loss(params, split, key) of a network whose layers sample their inputs, or do not.
_Loss = Callable[[Any, Split, jax.Array], jax.Array]


def run(config: ConfigDict, workdir: str, resume: bool = True) -> dict[str, Any]:
    """Trains on the source, and adapts with all activations and with parts of them.

    Args:
      config: see ``configs/sampled.py``.
      workdir: results.json and table.md go here.
      resume: there is nothing to go on from.

    Returns:
      What results.json holds: by method the rows that it keeps, the accuracies over
      seeds, the learning rate and the cosine with the exact gradient.

    Raises:
      UsageError: for a configuration that cannot be followed.
      InUseError, UsageError: as `experiments.workdir.runs.owned`.
    """
    settings.check_sampled(config)
    directory = pathlib.Path(workdir)
    methods: list[tuple[str | None, int]] = [(None, config.batch_size)]
    methods += [(name, rows) for rows in config.rows for name in config.samplers]
    results: dict[str, Any] = {}
    with runs.owned(directory, config, resume), show_progress() as progress:
        tuning = len(config.learning_rates) * len(config.tuning_seeds)
        each = config.steps * (tuning + len(config.seeds))
        progress.expect(config.pretrain_steps + each * len(methods))
        source, target = (
            registry.load(config, domain, directory)
            for domain in (config.source, config.target)
        )
        exact = _loss_fn(None, config.batch_size)
        train = _training(config, exact, source["train"], config.pretrain_steps)
        start = train(_drawn(config, source["train"]), config.pretrain_rate, 0)
        progress.advance(config.pretrain_steps)
        for sampler, rows in methods:
            loss_fn = _loss_fn(sampler, rows)
            train = _training(config, loss_fn, target["train"], config.steps)
            tuned = {}
            for rate in config.learning_rates:
                found = [train(start, rate, seed) for seed in config.tuning_seeds]
                scores = [_accuracy(one, target["validation"]) for one in found]
                tuned[rate] = float(np.mean(scores))
            rate = max(tuned, key=lambda rate: tuned[rate])
            ended = [train(start, rate, seed) for seed in config.seeds]
            name = f"{sampler}, {rows}" if sampler else "all rows"
            results[name] = {
                "rows": rows,
                "accuracy": [_accuracy(one, target["test"]) for one in ended],
                "learning_rate": rate,
                "cosine": _cosine(config, loss_fn, exact, start, target["train"]),
            }
            progress.advance(each)
            report.write_json(results, directory)
        zero_shot = _accuracy(start, target["test"])
    _write(config, results, zero_shot, directory)
    rich.print(f"Written to {directory}: results.json, table.md")
    return results


def _drawn(config: ConfigDict, split: Split) -> list[dict[str, jax.Array]]:
    """The weights of the layers, drawn."""
    sizes = [split.images[0].size, *config.widths, int(split.labels.max()) + 1]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return [
        {
            "kernel": (2 / a) ** 0.5 * jax.random.normal(key, (a, b)),
            "bias": jnp.zeros(b),
        }
        for key, a, b in zip(keys, sizes[:-1], sizes[1:], strict=False)
    ]


def _logits(
    params: Any, images: jax.Array, product: Callable[..., jax.Array]
) -> jax.Array:
    """Logits of a network whose layers multiply by ``product(x, kernel, layer)``."""
    x = images.reshape(len(images), -1)
    for layer, one in enumerate(params):
        x = product(x, one["kernel"], layer) + one["bias"]
        x = jax.nn.relu(x) if layer < len(params) - 1 else x
    return x


def _loss_fn(sampler: str | None, rows: int) -> _Loss:
    def loss_fn(params: Any, batch: Split, key: jax.Array) -> jax.Array:
        def product(x: jax.Array, kernel: jax.Array, layer: int) -> jax.Array:
            if sampler is None:
                return x @ kernel
            layer_key = jax.random.fold_in(key, layer)
            return sampled.dense(x, kernel, layer_key, rows, sampler)

        logits = _logits(params, batch.images, product)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return jnp.mean(losses)

    return loss_fn


def _training(
    config: ConfigDict, loss_fn: _Loss, train: Split, steps: int
) -> Callable[[Any, float, int], Any]:
    """``trained(start, rate, seed)``, compiled once."""

    def trained(start: Any, rate: jax.Array, key: jax.Array) -> Any:
        tx = optax.sgd(lambda count: rate * (1 - count / steps), momentum=0.9)

        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            batch_key, sample_key = jax.random.split(key)
            size = (config.batch_size,)
            index = jax.random.randint(batch_key, size, 0, len(train.labels))
            batch = jax.tree.map(lambda x: x[index], train)
            gradient = jax.grad(loss_fn)(params, batch, sample_key)
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, steps)
        return jax.lax.scan(step, (start, tx.init(start)), keys)[0][0]

    compiled = jax.jit(trained)
    return lambda start, rate, seed: compiled(
        start, jnp.float32(rate), jax.random.key(seed)
    )


def _accuracy(params: Any, split: Split) -> float:
    logits = _logits(params, split.images, lambda x, kernel, _: x @ kernel)
    return float(jnp.mean(logits.argmax(-1) == split.labels))


def _cosine(
    config: ConfigDict, loss_fn: _Loss, exact: _Loss, start: Any, train: Split
) -> float:
    """The mean cosine of gradients with the exact one, of one batch."""
    batch = jax.tree.map(lambda x: x[: config.batch_size], train)
    key = jax.random.key(11)
    estimate = jax.jit(lambda key: jax.grad(loss_fn)(start, batch, key))
    true = jax.jit(jax.grad(exact))(start, batch, key)
    return analysis.gradient_quality(
        estimate, true, key, num_estimates=config.estimates
    ).cosine


def _write(
    config: ConfigDict,
    results: dict[str, Any],
    zero_shot: float,
    directory: pathlib.Path,
) -> None:
    cells = [
        [
            name,
            f"{100 * found['rows'] / config.batch_size:g}%",
            report.mean_and_deviation(found["accuracy"]),
            f"{found['cosine']:.2f}",
            f"{found['learning_rate']:g}",
        ]
        for name, found in results.items()
    ]
    note = (
        f"{config.source} to {config.target}, test accuracy in %, "
        f"{report.spread(len(config.seeds))}; zero-shot {100 * zero_shot:.1f}; kept: "
        f"of the {config.batch_size} rows of each dense layer's input; cosine: of a "
        "batch's gradient with the exact one at the start."
    )
    columns = ("method", "kept", "accuracy", "cosine", "learning rate")
    report.write_table(columns, cells, note, directory, wide=len(columns))
