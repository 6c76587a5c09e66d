"""The loop of ordinary training: pre-train on the source, tune and adapt on the target.

All methods start from one pre-trained network. Each chooses its learning rate on the
validation split by short runs, then runs with every seed.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import features, registry, starts
from experiments.drivers import layouts, settings, tuning
from experiments.drivers.progress import Progress, show_progress
from experiments.drivers.trainer import Planned, Run, Trainer
from experiments.learners import adapt, metrics, optimizers, predicted_time
from experiments.models import cnn
from experiments.registry import Splits
from experiments.workdir import report, runs


class Task(NamedTuple):
    """What methods start from.

    Attributes:
      network: ``network(bits=...)`` gives the Flax module.
      source: the splits of the domain of pre-training.
      target: those of the domain of adaptation.
      start: pre-trained float parameters.
    """

    network: Callable[..., Any]
    source: Splits
    target: Splits
    start: Any


def run(config: ConfigDict, workdir: str, resume: bool = True) -> dict[str, Any]:
    """Runs an experiment, or goes on with it, and writes its results into the workdir.

    Args:
      config: see ``configs/quickstart.py``; one with ``parts``, such as
        ``configs/ablation.py``, holds experiments by name.
      workdir: results.json, config.json, table.md and figure.png go here, those of a
        part into a folder of its name, beside a table and a figure of all parts; and
        under runs/ what a killed experiment goes on from, and event files.
      resume: whether to go on from there; otherwise the experiment begins anew.

    Returns:
      What results.json holds: by method (and "zero_shot") the metrics on the target's
      test split as mean, standard deviation and list over seeds, and what it cost; of
      parts by their names.

    Raises:
      UsageError: for a configuration that cannot be followed; before any work.
      InUseError, UsageError: as `experiments.workdir.runs.owned`.
    """
    settings.check_training(config)
    directory = pathlib.Path(workdir)
    if "parts" in config:
        parts = config.parts.items()
        results = {
            name: run(part, str(directory / name), resume) for name, part in parts
        }
        report.write_parts(results, config, directory)
        return results
    layout = layouts.resolved(config)
    with runs.owned(directory, config, resume):
        return _run(config, directory, layout)


def _run(
    config: ConfigDict, directory: pathlib.Path, layout: layouts.Layout
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with show_progress() as progress:
        progress.expect(_total_steps(config))
        task = prepare(config, directory, progress)
        results.update(_untrained(config, task))
        for name, result in _side_by_side(config, task, progress, directory, layout):
            results[name] = result
            report.write_json(results, directory)
    report.write(results, config, directory)
    return results


def _untrained(config: ConfigDict, task: Task) -> dict[str, Any]:
    """Scores on the target of the network as the source left it."""
    model, test = task.network(bits=None), task.target["test"]
    apply = jax.jit(functools.partial(model.apply, {"params": task.start}))
    logits = jnp.asarray(features.batched(apply, test.images))
    scores = {"zero_shot": metrics.scores(config.metrics, logits, test.labels)}
    if config.realigned:
        scores["realigned"] = _realigned(config, task)
    return {name: _summary([x] * len(config.seeds)) for name, x in scores.items()}


def _side_by_side(
    config: ConfigDict,
    task: Task,
    progress: Progress,
    directory: pathlib.Path,
    layout: layouts.Layout,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the results of the methods; one compiles while another trains."""

    def adapt(name: str) -> dict[str, Any]:
        return _adapt(config, name, task, progress, directory, layout)

    # Programs of many devices must not meet: each would wait for devices of the other.
    at_a_time = config.parallel_runs if layout.mesh is None else 1
    with futures.ThreadPoolExecutor(at_a_time) as pool:
        try:
            yield from zip(config.run, pool.map(adapt, config.run), strict=True)
        except BaseException:  # an interrupt as well: nobody waits for the other runs
            progress.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def prepare(config: ConfigDict, directory: pathlib.Path, progress: Progress) -> Task:
    """Loads the data and pre-trains the network, or reads where it ended before.

    Args:
      config: see ``configs/quickstart.py``.
      directory: the workdir.
      progress: told of the steps; it expects ``config.pretrain.steps``.
    """
    source = registry.load(config, config.source, directory)
    target = registry.load(config, config.target, directory)
    num_classes = int(jnp.max(target["train"].labels)) + 1
    network = functools.partial(
        registry.NETWORKS[config.network], num_classes=num_classes
    )
    start = pretrain(config, network, source, progress, directory / "runs")
    if config.layer_scales:
        start = cnn.rescaled(start, config.layer_scales)
    start = registry.with_statistics(
        network(bits=None), start, target, config.deviation_floor
    )
    return Task(network, source, target, start)


def pretrain(
    config: ConfigDict,
    network: Any,
    data: Splits,
    progress: Progress,
    where: pathlib.Path,
) -> Any:
    """Gives the float parameters where all runs start.

    Args:
      config: see ``configs/quickstart.py``.
      network: ``network(bits=...)`` gives the Flax module.
      data: splits of the domain of pre-training.
      progress: told of the steps.
      where: the directory of the runs.
    """
    if (start := starts.committed(config)) is not None:
        progress.advance(config.pretrain.steps)
        progress.say("begins from the pre-trained network in experiments/models/starts")
        return start
    params = registry.initial(config, network, data)
    trainer = Trainer(config.pretrain, network, params, data, config.metrics)
    directory = _run_directory(config, where / "pretrain")
    rate, seed = config.pretrain.learning_rate, config.pretrain.seed
    (end,) = trainer.train(
        params,
        [Planned(seed, rate, directory)],
        steps=config.pretrain.steps,
        num_evals=1,
        progress=progress.advance,
    )
    directory.save(config.pretrain.steps, end)  # read when the experiment goes on
    progress.say("the pre-training is finished")
    return adapt.merge(end.state.params, end.state.frozen)


def _realigned(config: ConfigDict, task: Task) -> dict[str, float]:
    """Scores of the head on features with the source's mean and deviation."""
    model, variables = task.network(bits=None), {"params": task.start}
    apply = jax.jit(functools.partial(model.apply, variables, stop=-1))
    test, domain, reference = (
        jnp.asarray(features.batched(apply, split.images))
        for split in (task.target["test"], task.target["train"], task.source["train"])
    )
    aligned = features.aligned(test, domain, reference)
    logits = model.apply(variables, aligned, start=-1)
    return metrics.scores(config.metrics, logits, task.target["test"].labels)


class _Method:
    """The runs of one method."""

    def __init__(
        self,
        config: ConfigDict,
        method: ConfigDict,
        task: Task,
        progress: Progress,
        where: pathlib.Path,
        layout: layouts.Layout,
    ):
        """Compiles the step of the method.

        Args:
          config: see ``configs/quickstart.py``.
          method: one of its methods.
          task: where the runs start.
          progress: told of the steps.
          where: directory of the runs.
          layout: of the devices.
        """
        self._config = config
        self._method = method
        self._start = task.start
        self._progress = progress
        self._where = where
        self._layout = layout.of_method(method)
        self.trainer = Trainer(
            method, task.network, task.start, task.target, config.metrics, layout
        )

    @property
    def _tuning_steps(self) -> int:
        return _tuning_steps(self._config, self._method)

    def tuned(self) -> dict[float, float]:
        """Validation scores by learning rate; nothing if there is a single rate."""
        rates = self._method.learning_rates
        if len(rates) == 1:
            return {}
        steps = len(self._config.tuning_seeds) * self._tuning_steps
        return tuning.searched(
            self._tuned,
            rates,
            self._config.wider_tuning,
            lambda: self._progress.expect(steps),
        )

    def adapted(self, learning_rate: float) -> list[Run]:
        """The runs of all seeds at a learning rate."""
        runs_of = [(f"seed_{x}", x, learning_rate) for x in self._config.seeds]
        return self._made(runs_of, self._method.steps, self._config.num_evals)

    def estimated(self, name: str, learning_rate: float) -> dict[str, int | None]:
        """Predicts the length of a run and tells it; nothing if nobody asks.

        Args:
          name: of the method.
          learning_rate: of the run.
        """
        question = predicted_time.Question.of(self._config.get("estimate", {}))
        if question is None:
            return {}
        if not predicted_time.can_be_predicted(self._method):
            self._progress.note(
                f"{name}: no estimate, which there is for SGD and momentum only"
            )
            return {}
        seed, steps = self._config.seeds[0], self._method.steps
        found = self.trainer.predicted_steps(self._start, seed, learning_rate, question)
        self._progress.note(f"{name}: {predicted_time.told(found, steps, question)}")
        return {"predicted_steps": found}

    def cosines(self) -> dict[str, tuple[float, float]]:
        """See `Trainer.cosines`; nothing if the configuration asks for none."""
        if not (count := self._config.gradient_estimates):
            return {}
        return self.trainer.cosines(self._start, self._config.seeds[0], count)

    def _tuned(self, rates: Sequence[float]) -> dict[float, float]:
        """Mean validation scores of short runs with seeds of their own, by rate."""
        seeds = self._config.tuning_seeds
        runs_of = [(f"tune_{x:g}_{seed}", seed, x) for x in rates for seed in seeds]
        scores = [run.validation for run in self._made(runs_of, self._tuning_steps, 1)]
        each = np.reshape(scores, (len(rates), len(seeds)))
        return dict(zip(rates, each.mean(1).tolist(), strict=True))

    def _made(
        self, runs_of: Sequence[tuple[str, int, float]], steps: int, num_evals: int
    ) -> list[Run]:
        """Runs by their names, seeds and learning rates, as one program or in turn."""
        planned = [
            Planned(seed, rate, _run_directory(self._config, self._where / name))
            for name, seed, rate in runs_of
        ]
        groups = [planned] if self._layout.one_program else [[x] for x in planned]
        return [
            run
            for group in groups
            for run in self.trainer.run(
                self._start,
                group,
                steps=steps,
                num_evals=num_evals,
                progress=self._progress.advance,
            )
        ]


def _adapt(
    config: ConfigDict,
    name: str,
    task: Task,
    progress: Progress,
    directory: pathlib.Path,
    layout: layouts.Layout = layouts.ALONE,
) -> dict[str, Any]:
    """Chooses a learning rate on the validation split, then runs every seed."""
    method, metric = config.methods[name], config.metrics[0]
    where = directory / "runs" / name
    runs_of = _Method(config, method, task, progress, where, layout)
    tuned = runs_of.tuned()
    learning_rate = tuning.best(tuned) if tuned else method.learning_rates[0]
    progress.say(f"{name}: the learning rate is {learning_rate:g}")
    estimated = runs_of.estimated(name, learning_rate)
    adapted = runs_of.adapted(learning_rate)
    cosines = runs_of.cosines()
    trainer = runs_of.trainer
    result = {
        **_summary([run.scores for run in adapted]),
        "validation": [run.validation for run in adapted],
        "learning_rate": learning_rate,
        "tuning": {f"{rate:g}": tuned[rate] for rate in sorted(tuned)},
        "steps": method.steps,
        "forward_passes": round(method.steps * trainer.learner.passes_per_step),
        "passes_with_products": round(
            method.steps * optimizers.passes_with_products(method)
        ),
        "multiply_adds": trainer.multiply_adds(method.steps),
        "seconds": float(np.mean([run.seconds for run in adapted])),
        "temporaries_mib": trainer.temporaries / 2**20,
        "curves": [[test for test, _ in run.curve] for run in adapted],
        "validation_curves": [[x for _, x in run.curve] for run in adapted],
        "early_stopping": _summary(
            [{metric: _best_point(run.curve)} for run in adapted]
        ),
        **estimated,
        **({"cosine": cosines} if cosines else {}),
    }
    progress.say(f"{name}: finished, test {metric} {100 * result[metric]:.1f}%")
    return result


def _run_directory(config: ConfigDict, path: pathlib.Path) -> runs.RunDirectory:
    return runs.RunDirectory(
        path,
        config.snapshot_seconds,
        config.event_files,
        config.get("loss_files", False),
    )


def _best_point(curve: Sequence[Sequence[float]]) -> float:
    """The test score where the validation score was best; of equal ones the last."""
    return max(reversed(curve), key=lambda point: point[1])[0]


def _summary(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean, standard deviation and list of each metric over the runs.

    A single run has no deviation: it is None.
    """
    summary: dict[str, Any] = {"scores": {}}
    for name in scores[0]:
        values = [run[name] for run in scores]
        summary[name] = float(np.mean(values))
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        summary[f"{name}_std"] = deviation
        summary["scores"][name] = values
    return summary


def _tuning_steps(config: ConfigDict, method: ConfigDict) -> int:
    return max(1, int(method.steps * config.tuning_fraction))


def _total_steps(config: ConfigDict) -> int:
    """Steps of all runs together, for the progress bar."""
    total = config.pretrain.steps
    for name in config.run:
        method = config.methods[name]
        if len(method.learning_rates) > 1:
            tuned = len(method.learning_rates) * len(config.tuning_seeds)
            total += tuned * _tuning_steps(config, method)
        total += len(config.seeds) * method.steps
    return total
