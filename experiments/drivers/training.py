"""The loop: pre-train on the source, tune and adapt on the target, report."""

import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments import adapt, events, features, metrics, quality, report, runs, tasks
from experiments.learners.learner import Learner, TrainState, make_learner
from experiments.models import cnn
from experiments.registry import Splits
from fgrad.analysis import Memory

_CHUNK = 10  # steps between two looks at the clock
# Steps that stand still, for synthetic gradients to learn before they are judged.
_STANDING = 100


class Run(NamedTuple):
    """What came of one run of a method.

    Attributes:
      validation: the first of the metrics on the validation split at its end.
      scores: all metrics on the test split at its end, by name.
      curve: the first of them on the test and on the validation split, at the start
        and after each part of the run.
      seconds: wall time of the steps, without compilation and evaluation.
    """

    validation: float
    scores: dict[str, float]
    curve: list[list[float]]
    seconds: float


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


class Trainer:
    """A learner with its step compiled once for data of given shapes.

    Attributes:
      learner: the method's functions.
      config: the method.
      temporaries: scratch memory of the compiled step in bytes, beside its arguments.
    """

    def __init__(
        self,
        config: ConfigDict,
        network: Any,
        params: Any,
        data: Splits,
        names: Sequence[str],
    ):
        """Compiles the step.

        Args:
          config: the method, see ``configs/quickstart.py``.
          network: ``network(bits=...)`` gives the Flax module.
          params: float parameters, for their shapes.
          data: the splits to train on.
          names: of metrics, keys of `experiments.learners.metrics.METRICS`.
        """
        self.config = config
        self._network = network
        self._names = names
        self._tag = f"test/{names[0]}"
        self.learner: Learner = make_learner(config, network)
        self._images = data["train"].images[: config.get("calibration_images")]
        state = self.learner.init(params, self._images, 0)
        # What is frozen does not depend on the seed.
        self._data = self.learner.cached(state, data)
        step = jax.jit(self.learner.step, donate_argnums=0)
        lowered = step.lower(state, jnp.float32(0), jnp.float32(1), self._data["train"])
        self._step = lowered.compile()
        self.temporaries = Memory.planned(self._step).temporaries

    def train(
        self,
        params: Any,
        seed: int,
        learning_rate: float,
        *,
        steps: int,
        num_evals: int,
        progress: Callable[[int], None],
        directory: runs.RunDirectory,
    ) -> runs.Snapshot:
        """Trains from float parameters, or from where the directory's run was.

        Args:
          params: where the run starts.
          seed: of batches and perturbations.
          learning_rate: at the start; it decays linearly to 0.
          steps: length of the run.
          num_evals: points of the curve after the start.
          progress: called with the number of steps just taken.
          directory: where the run leaves its snapshots.
        """
        state = self.learner.init(params, self._images, seed)
        done, snapshot = directory.latest(like=state) or (0, self._start(state))
        state, curve, seconds = snapshot.state, snapshot.curve, snapshot.seconds
        points = list(snapshot.points)
        progress(done)
        evals = set(np.linspace(0, steps, num_evals + 1).astype(int).tolist())
        rate, horizon = jnp.float32(learning_rate), jnp.float32(steps)
        with directory.log(points) as log:
            while done < steps:
                end = min(done + _CHUNK, *(n for n in (*evals, steps) if n > done))
                began = time.perf_counter()
                for _ in range(done, end):
                    state = self._step(state, rate, horizon, self._data["train"])
                jax.block_until_ready(state)
                seconds += time.perf_counter() - began
                progress(end - done)
                done = end
                if done in evals:
                    curve.append(self._point(state))
                if log:
                    scores = {self._tag: curve[-1][0]} if done in evals else {}
                    passes = done * self.learner.passes_per_step
                    points.append(events.point(done, passes, state.opt_state, scores))
                    log(points[-1])
                if directory.due():
                    directory.save(done, runs.Snapshot(state, curve, seconds, points))
        return runs.Snapshot(state, curve, seconds, points)

    def cosines(
        self, params: Any, seed: int, count: int
    ) -> dict[str, tuple[float, float]]:
        """Of estimates with the gradient where runs start, layer by layer.

        Args:
          params: where runs start.
          seed: of the run and of the estimates.
          count: how many estimates, all on the first examples.

        Returns:
          Mean and standard deviation by the names of layers; nothing for a method
          that has no estimates to compare, see `experiments.learners.gradient_quality.comparison`.
        """
        compare = quality.comparison(self.config, self._network, self.learner)
        if compare is None:
            return {}
        state = self.learner.init(params, self._images, seed)
        if optax.tree.get(state.opt_state, "jacobians", {}):
            steps = min(_STANDING, self.config.steps)
            still, horizon = jnp.float32(0), jnp.float32(steps)
            for _ in range(steps):
                state = self._step(state, still, horizon, self._data["train"])
        size = self.config.batch_size
        batch = jax.tree.map(lambda x: x[:size], self._data["train"])
        found = {
            layer: compare(state, batch, jax.random.key(seed), count, layer)
            for layer in state.params
        }
        return {layer: (q.cosine, q.cosine_deviation) for layer, q in found.items()}

    def _start(self, state: TrainState) -> runs.Snapshot:
        curve = [self._point(state)]
        # The state's loss is of no step yet.
        point = events.point(0, 0, (), {self._tag: curve[0][0]})
        return runs.Snapshot(state, curve, 0.0, [point])

    def run(
        self,
        *args: Any,
        progress: Callable[[int], None],
        directory: runs.RunDirectory,
        **kwargs: Any,
    ) -> Run:
        """As `train`, but only the numbers; those of a finished run are read."""
        if result := directory.result():
            progress(kwargs["steps"])
            return Run(**result)
        end = self.train(*args, progress=progress, directory=directory, **kwargs)
        validation = self._scores(end.state, "validation")[self._names[0]]
        run = Run(validation, self._scores(end.state, "test"), end.curve, end.seconds)
        directory.finish(run._asdict())
        return run

    def _scores(self, state: TrainState, split: str) -> dict[str, float]:
        data = self._data[split]
        logits = self.learner.logits(state, data.images)
        return metrics.scores(self._names, logits, data.labels)

    def _point(self, state: TrainState) -> list[float]:
        """A point of the curve."""
        return [self._scores(state, x)[self._names[0]] for x in ("test", "validation")]


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
      RuntimeError, ValueError: as `experiments.workdir.runs.owned`.
    """
    directory = pathlib.Path(workdir)
    if "parts" in config:
        parts = config.parts.items()
        results = {
            name: run(part, str(directory / name), resume) for name, part in parts
        }
        report.write_parts(results, config, directory)
        return results
    with runs.owned(directory, config, resume):
        return _run(config, directory)


def _run(config: ConfigDict, directory: pathlib.Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with report.progress() as progress:
        progress.expect(_total_steps(config))
        network, source, target, start = prepare(config, directory, progress)
        apply = jax.jit(functools.partial(network(bits=None).apply, {"params": start}))
        logits = jnp.asarray(features.batched(apply, target["test"].images))
        before = metrics.scores(config.metrics, logits, target["test"].labels)
        results["zero_shot"] = _summary([before] * len(config.seeds))
        if config.realigned:
            scores = _realigned(config, network(bits=None), start, source, target)
            results["realigned"] = _summary([scores] * len(config.seeds))

        def adapt(name: str) -> dict[str, Any]:
            method = config.methods[name]
            where = directory / "runs" / name
            return _adapt(config, method, network, start, target, progress, where)

        # Methods side by side, so that one compiles while another trains.
        with futures.ThreadPoolExecutor(config.parallel_runs) as pool:
            for name, result in zip(
                config.run, pool.map(adapt, config.run), strict=True
            ):
                results[name] = result
                report.write_json(results, directory)
    report.write(results, config, directory)
    return results


def prepare(
    config: ConfigDict, directory: pathlib.Path, progress: report.Progress
) -> Task:
    """Loads the data and pre-trains the network, or reads where it ended before.

    Args:
      config: see ``configs/quickstart.py``.
      directory: the workdir.
      progress: told of the steps; it expects ``config.pretrain.steps``.
    """
    source = tasks.load(config, config.source, directory)
    target = tasks.load(config, config.target, directory)
    num_classes = int(jnp.max(target["train"].labels)) + 1
    network = functools.partial(tasks.NETWORKS[config.network], num_classes=num_classes)
    start = pretrain(config, network, source, progress, directory / "runs")
    if config.layer_scales:
        start = cnn.rescaled(start, config.layer_scales)
    start = tasks.with_statistics(
        network(bits=None), start, target, config.deviation_floor
    )
    return Task(network, source, target, start)


def pretrain(
    config: ConfigDict,
    network: Any,
    data: Splits,
    progress: report.Progress,
    where: pathlib.Path,
) -> Any:
    """The float parameters where all runs start."""
    params = tasks.initial(config, network, data)
    trainer = Trainer(config.pretrain, network, params, data, config.metrics)
    directory = _run_directory(config, where / "pretrain")
    end = trainer.train(
        params,
        config.pretrain.seed,
        config.pretrain.learning_rate,
        steps=config.pretrain.steps,
        num_evals=1,
        progress=progress.advance,
        directory=directory,
    )
    directory.save(config.pretrain.steps, end)  # where runs start after a kill as well
    return adapt.merge(end.state.params, end.state.frozen)


def _realigned(
    config: ConfigDict, model: Any, start: Any, source: Splits, target: Splits
) -> dict[str, float]:
    """Scores of the head on features with the source's mean and deviation."""
    apply = jax.jit(functools.partial(model.apply, {"params": start}, stop=-1))
    test, domain, reference = (
        jnp.asarray(features.batched(apply, split.images))
        for split in (target["test"], target["train"], source["train"])
    )
    aligned = features.aligned(test, domain, reference)
    logits = model.apply({"params": start}, aligned, start=-1)
    return metrics.scores(config.metrics, logits, target["test"].labels)


def _adapt(
    config: ConfigDict,
    method: ConfigDict,
    network: Any,
    start: Any,
    data: Splits,
    progress: report.Progress,
    where: pathlib.Path,
) -> dict[str, Any]:
    """Chooses a learning rate on the validation split, then runs every seed.

    A single rate is taken as it is.
    """
    trainer = Trainer(method, network, start, data, config.metrics)

    def directory(name: str) -> runs.RunDirectory:
        return _run_directory(config, where / name)

    def tune(learning_rate: float) -> float:
        ran = [
            trainer.run(
                start,
                seed,
                learning_rate,
                steps=_tuning_steps(config, method),
                num_evals=1,
                progress=progress.advance,
                directory=directory(f"tune_{learning_rate:g}_{seed}"),
            )
            for seed in config.tuning_seeds
        ]
        return float(np.mean([run.validation for run in ran]))

    def adapt(seed: int) -> Run:
        return trainer.run(
            start,
            seed,
            learning_rate,
            steps=method.steps,
            num_evals=config.num_evals,
            progress=progress.advance,
            directory=directory(f"seed_{seed}"),
        )

    if len(method.learning_rates) == 1:
        tuned, (learning_rate,) = {}, method.learning_rates
    else:
        tuned = {rate: tune(rate) for rate in method.learning_rates}
        for _ in range(config.wider_tuning):
            if not (rate := _beyond(tuned)):
                break
            progress.expect(len(config.tuning_seeds) * _tuning_steps(config, method))
            tuned[rate] = tune(rate)
        learning_rate = _best(tuned)
    adapted = [adapt(seed) for seed in config.seeds]
    count = config.gradient_estimates
    cosines = trainer.cosines(start, config.seeds[0], count) if count else {}
    return {
        **_summary([run.scores for run in adapted]),
        "validation": [run.validation for run in adapted],
        "learning_rate": learning_rate,
        "tuning": {f"{rate:g}": tuned[rate] for rate in sorted(tuned)},
        "steps": method.steps,
        "forward_passes": method.steps * trainer.learner.passes_per_step,
        "seconds": float(np.mean([run.seconds for run in adapted])),
        "temporaries_mib": trainer.temporaries / 2**20,
        "curves": [[test for test, _ in run.curve] for run in adapted],
        "validation_curves": [[x for _, x in run.curve] for run in adapted],
        "early_stopping": _summary(
            [{config.metrics[0]: _best_point(run.curve)} for run in adapted]
        ),
        **({"cosine": cosines} if cosines else {}),
    }


def _run_directory(config: ConfigDict, path: pathlib.Path) -> runs.RunDirectory:
    return runs.RunDirectory(path, config.snapshot_seconds, config.event_files)


def _best(tuned: Mapping[float, float]) -> float:
    """The best learning rate; of equal ones the first tried."""
    return max(tuned, key=lambda rate: tuned[rate])


def _best_point(curve: Sequence[Sequence[float]]) -> float:
    """The test score where the validation score was best; of equal ones the last."""
    return max(reversed(curve), key=lambda point: point[1])[0]


def _beyond(tuned: Mapping[float, float]) -> float | None:
    """The next learning rate in geometric order if the best is the last, or None."""
    rates = sorted(tuned)
    if len(rates) > 1 and _best(tuned) in (rates[0], rates[-1]):
        end, inner = rates[:2] if _best(tuned) == rates[0] else rates[:-3:-1]
        return float(f"{end * end / inner:.2g}")
    return None


def _summary(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean, standard deviation and list of each metric over the runs."""
    summary: dict[str, Any] = {"scores": {}}
    for name in scores[0]:
        values = [run[name] for run in scores]
        summary[name] = float(np.mean(values))
        summary[f"{name}_std"] = float(np.std(values, ddof=1))
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
