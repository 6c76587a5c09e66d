"""A deep equilibrium network, adapted by several gradients of its fixed point."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from ml_collections import ConfigDict

import fgrad
from experiments import registry
from experiments.data.arrays import Split
from experiments.drivers import settings
from experiments.drivers.progress import Progress, show_progress
from experiments.models.equilibrium import Equilibrium, solver_steps
from experiments.workdir import report, runs
from fgrad import analysis, estimators

_FORWARD = "forward"


def run(config: ConfigDict, workdir: str, resume: bool = True) -> dict[str, Any]:
    """Trains the network on the source, and adapts it by every method.

    Args:
      config: see ``configs/equilibrium.py``.
      workdir: results.json and table.md go here.
      resume: there is nothing to go on from.

    Returns:
      What results.json holds: by method the accuracies over seeds, the cosine with the
      implicit derivative, the steps of the solver and what a run costs.

    Raises:
      UsageError: for a configuration that cannot be followed.
      InUseError, UsageError: as `experiments.workdir.runs.owned`.
    """
    settings.check_equilibrium(config)
    directory = pathlib.Path(workdir)
    results: dict[str, Any] = {}
    with runs.owned(directory, config, resume), show_progress() as progress:
        counts = [
            config.methods[n].steps
            * (len(config.methods[n].learning_rates) + len(config.seeds))
            for n in config.run
        ]
        progress.expect(config.pretrain_steps + sum(counts))
        source, target = (
            registry.load(config, domain, directory)
            for domain in (config.source, config.target)
        )
        network = functools.partial(
            Equilibrium,
            num_classes=int(source["train"].labels.max()) + 1,
            width=config.width,
            tolerance=config.tolerance,
            max_steps=config.max_steps,
        )
        start = _pretrained(config, network(), source["train"])
        progress.advance(config.pretrain_steps)
        zero_shot = _accuracy(network(), start, target["test"])
        for name in config.run:
            method = _Method(config, config.methods[name], network, start, target)
            results[name] = method.result(progress)
            report.write_json(results, directory)
    _write(config, results, zero_shot, directory)
    rich.print(f"Written to {directory}: results.json, table.md")
    return results


def _pretrained(config: ConfigDict, model: Equilibrium, train: Split) -> Any:
    key = jax.random.key(0)
    params = model.init(key, train.images[:1])["params"]
    tx = optax.adam(config.pretrain_rate)
    step = _step_fn(config, model, tx, train)
    keys = jax.random.split(key, config.pretrain_steps)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0])
    return run((params, tx.init(params)))[0]


def _loss_fn(model: Equilibrium) -> Callable[..., jax.Array]:
    def loss_fn(params: Any, batch: Split) -> jax.Array:
        logits = model.apply({"params": params}, batch.images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return jnp.mean(losses)

    return loss_fn


def _step_fn(
    config: ConfigDict,
    model: Equilibrium,
    tx: optax.GradientTransformation,
    train: Split,
) -> Callable[[Any, jax.Array], Any]:
    """A step of any kind, for a scan over keys of batches."""
    loss_fn, chain = _loss_fn(model), optax.with_extra_args_support(tx)

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        index = jax.random.randint(key, (config.batch_size,), 0, len(train.labels))
        batch = jax.tree.map(lambda x: x[index], train)
        # Before an estimator nothing of it is used, and nothing is computed.
        gradient = jax.grad(loss_fn)(params, batch)
        updates, state = chain.update(
            gradient, state, params, value_fn=loss_fn, batch=batch
        )
        return (optax.apply_updates(params, updates), state), None

    return step


def _accuracy(model: Equilibrium, params: Any, split: Split) -> float:
    logits = jax.jit(model.apply)({"params": params}, split.images)
    return float(jnp.mean(logits.argmax(-1) == split.labels))


class _Method:
    """The runs of one method."""

    def __init__(
        self,
        config: ConfigDict,
        method: ConfigDict,
        network: Callable[..., Equilibrium],
        start: Any,
        target: Mapping[str, Split],
    ) -> None:
        self._config, self._method = config, method
        self._exact, self._start, self._target = network(), start, target
        self._forward = method.kind == _FORWARD
        unrolled = 0 if self._forward else method.kind
        self._model = network(phantom_steps=unrolled)
        self._run = jax.jit(self._trained)

    def result(self, progress: Progress) -> dict[str, Any]:
        """Tunes the rate, runs all seeds, and counts."""
        config, method, target = self._config, self._method, self._target
        tuned = {}
        for rate in method.learning_rates:
            params = self._run(jnp.float32(rate), jax.random.key(config.tuning_seed))
            tuned[rate] = _accuracy(self._exact, params, target["validation"])
            progress.advance(method.steps)
        rate = max(tuned, key=lambda rate: tuned[rate])
        scores, solves = [], []
        for seed in config.seeds:
            params = self._run(jnp.float32(rate), jax.random.key(seed))
            scores.append(_accuracy(self._exact, params, target["test"]))
            images = target["train"].images[: config.batch_size]
            solves.append(int(solver_steps(self._exact, params, images)))
            progress.advance(method.steps)
        solve = float(np.mean(solves))
        return {
            "accuracy": scores,
            "learning_rate": rate,
            "cosine": self._cosines(),
            "solver_steps": solves,
            "cells": method.steps * config.batch_size * self._cells(solve),
        }

    def _cells(self, solve: float) -> float:
        """Evaluations of the layer for an example in a step."""
        if self._forward:
            return 2 * self._config.num_perturbations * solve
        # The second solve takes about as many steps, each with a derivative; unrolled
        # steps are evaluated and derived.
        unrolled = self._method.kind
        return solve + (3 * unrolled if unrolled else 2 * solve)

    def _trained(self, rate: Any, key: jax.Array) -> Any:
        config, steps = self._config, self._method.steps
        z_key, batch_key = jax.random.split(key)

        def schedule(count: jax.Array) -> jax.Array:
            return rate * (1 - count / steps)

        if self._forward:
            estimator = self._estimator(z_key, estimators.normalized_spsa)
            tx: Any = optax.chain(estimator, optax.sgd(schedule))
        else:
            tx = optax.sgd(schedule, momentum=0.9)
        step = _step_fn(config, self._model, tx, self._target["train"])
        keys = jax.random.split(batch_key, steps)
        carry, _ = jax.lax.scan(step, (self._start, tx.init(self._start)), keys)
        return carry[0]

    def _estimator(
        self, key: jax.Array, estimator: estimators.Estimator
    ) -> optax.GradientTransformationExtraArgs:
        return fgrad.fixed_point_forward_grad(
            key,
            epsilon=self._config.epsilon,
            num_perturbations=self._config.num_perturbations,
            estimator=estimator,
        )

    def _cosines(self) -> list[float]:
        """With the implicit derivative of a batch at the start: mean and deviation."""
        config, start = self._config, self._start
        batch = jax.tree.map(lambda x: x[: config.batch_size], self._target["train"])
        true = jax.jit(jax.grad(_loss_fn(self._exact)))(start, batch)

        @jax.jit
        def estimate(key: jax.Array) -> Any:
            loss_fn = _loss_fn(self._model)
            if not self._forward:
                return jax.grad(loss_fn)(start, batch)
            tx = self._estimator(key, estimators.spsa)
            state = tx.init(start)
            return tx.update(start, state, start, value_fn=loss_fn, batch=batch)[0]

        found = analysis.gradient_quality(
            estimate, true, jax.random.key(7), num_estimates=config.estimates
        )
        return [found.cosine, found.cosine_deviation]


def _write(
    config: ConfigDict,
    results: Mapping[str, Any],
    zero_shot: float,
    directory: pathlib.Path,
) -> None:
    cells = [
        [
            name,
            _spread(found["accuracy"], 100, 1),
            f"{found['cosine'][0]:.3f}",
            _spread(found["solver_steps"], 1, 0),
            f"{found['cells'] / 1e6:.1f}",
            f"{found['learning_rate']:g}",
        ]
        for name, found in results.items()
    ]
    note = (
        f"{config.source} to {config.target}, test accuracy in %, "
        f"{report.spread(len(config.seeds))}; zero-shot {100 * zero_shot:.1f}; cosine: "
        "with the implicit derivative at the start; solver steps: of a batch at the "
        "end; layer evaluations: millions in a run, a derivative counting as two; "
        f"tolerance {config.tolerance:g}."
    )
    columns = (
        *("method", "accuracy", "cosine", "solver steps"),
        *("layer evaluations", "learning rate"),
    )
    report.write_table(columns, cells, note, directory, wide=2)


def _spread(values: Sequence[float], factor: int, digits: int) -> str:
    mean = f"{factor * np.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {factor * np.std(values, ddof=1):.{digits}f}"
