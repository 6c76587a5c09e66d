"""The loop: pre-train on the source, tune and adapt on the target, report."""

import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from experiments import report
from experiments.data import arrays, digits, mnist
from experiments.methods import Learner, TrainState, make_learner
from experiments.models import cnn

NETWORKS = {
    "cnn": cnn.CNN,
    # 11,018 parameters for 28x28 images, at the cost of "cnn" for 8x8 ones.
    "cnn_28": functools.partial(cnn.CNN, features=(8, 16, 32), strides=(2, 2, 2)),
}
DATASETS = {"digits": digits.Digits, "mnist_5k": mnist.Mnist5k}

Splits = Mapping[str, arrays.Split]


class Run(NamedTuple):
    """One run of a method.

    Attributes:
      state: where it ended.
      validation: accuracy on the validation split at its end.
      curve: test accuracies, at the start and after each part of the run.
      seconds: wall time of the steps, without compilation and evaluation.
    """

    state: TrainState
    validation: float
    curve: list[float]
    seconds: float


class Trainer:
    """A learner with its step compiled once for data of given shapes.

    Attributes:
      learner: the method's functions.
      config: the method.
      temporaries: scratch memory of the compiled step in bytes, beside its arguments.
    """

    def __init__(self, config: ConfigDict, network: Any, params: Any, data: Splits):
        """Compiles the step.

        Args:
          config: the method, see ``configs/quickstart.py``.
          network: ``network(bits=...)`` gives the Flax module.
          params: float parameters, for their shapes.
          data: the splits to train on.
        """
        self.config = config
        self.learner: Learner = make_learner(config, network)
        self._data = data
        state = self.learner.init(params, data["train"].images, 0)
        step = jax.jit(self.learner.step, donate_argnums=0)
        lowered = step.lower(state, jnp.float32(0), jnp.float32(1), data["train"])
        self._step = lowered.compile()
        memory: Any = self._step.memory_analysis()
        self.temporaries = memory.temp_size_in_bytes

    def run(
        self,
        params: Any,
        seed: int,
        learning_rate: float,
        *,
        steps: int,
        num_evals: int,
        progress: Callable[[int], None],
    ) -> Run:
        """Trains from float parameters.

        Args:
          params: where the run starts.
          seed: of batches and perturbations.
          learning_rate: at the start; it decays linearly to 0.
          steps: length of the run.
          num_evals: points of the curve after the start.
          progress: called with the number of steps just taken.
        """
        state = self.learner.init(params, self._data["train"].images, seed)
        curve, seconds = [self._accuracy(state, "test")], 0.0
        ends = np.linspace(0, steps, num_evals + 1).astype(int)
        rate, horizon = jnp.float32(learning_rate), jnp.float32(steps)
        for start, end in itertools.pairwise(ends):
            began = time.perf_counter()
            for _ in range(start, end):
                state = self._step(state, rate, horizon, self._data["train"])
            jax.block_until_ready(state)
            seconds += time.perf_counter() - began
            curve.append(self._accuracy(state, "test"))
            progress(int(end - start))
        return Run(state, self._accuracy(state, "validation"), curve, seconds)

    def _accuracy(self, state: TrainState, split: str) -> float:
        return float(self.learner.accuracy(state, self._data[split]))


def run(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Runs an experiment and writes its results into the workdir.

    Args:
      config: see ``configs/quickstart.py``; one with ``parts``, such as
        ``configs/ablation.py``, holds experiments by name.
      workdir: results.json, config.json, table.md and accuracy.png go here, those of a
        part into a folder of its name.

    Returns:
      What results.json holds: by method (and "zero_shot") the accuracy on the target's
      test split as mean, standard deviation and list over seeds, and what it cost; of
      parts by their names.
    """
    directory = pathlib.Path(workdir)
    if "parts" in config:
        parts = config.parts.items()
        return {name: run(part, str(directory / name)) for name, part in parts}
    directory.mkdir(parents=True, exist_ok=True)
    source = _load(config, config.source, directory)
    target = _load(config, config.target, directory)
    network = NETWORKS[config.network]
    results: dict[str, Any] = {}
    with report.progress() as progress:
        progress.expect(_total_steps(config))
        start = _pretrain(config, network, source, progress)
        if config.layer_scales:
            start = cnn.rescaled(start, config.layer_scales)

        def adapt(name: str) -> dict[str, Any]:
            method = config.methods[name]
            return _adapt(config, method, network, start, target, progress)

        # Methods side by side, so that one compiles while another trains.
        with futures.ThreadPoolExecutor(config.parallel_runs) as pool:
            for name, result in zip(
                config.run, pool.map(adapt, config.run), strict=True
            ):
                if not results:
                    zero_shot = _summary([curve[0] for curve in result["curves"]])
                    results["zero_shot"] = {**zero_shot, "forward_passes": 0}
                results[name] = result
                report.write_json(results, config, directory)
    report.write(results, config, directory)
    return results


def _pretrain(
    config: ConfigDict, network: Any, data: Splits, progress: report.Progress
) -> Any:
    """The float parameters where all runs start."""
    key = jax.random.key(config.pretrain.seed)
    params = network(bits=None).init(key, data["train"].images[:1])["params"]
    trainer = Trainer(config.pretrain, network, params, data)
    pretrained = trainer.run(
        params,
        config.pretrain.seed,
        config.pretrain.learning_rate,
        steps=config.pretrain.steps,
        num_evals=1,
        progress=progress.advance,
    )
    return pretrained.state.params


def _adapt(
    config: ConfigDict,
    method: ConfigDict,
    network: Any,
    start: Any,
    data: Splits,
    progress: report.Progress,
) -> dict[str, Any]:
    """Chooses a learning rate on the validation split, then runs every seed."""
    trainer = Trainer(method, network, start, data)

    def tune(learning_rate: float) -> float:
        return trainer.run(
            start,
            config.tuning_seed,
            learning_rate,
            steps=_tuning_steps(config, method),
            num_evals=1,
            progress=progress.advance,
        ).validation

    def adapt(seed: int) -> Run:
        return trainer.run(
            start,
            seed,
            learning_rate,
            steps=method.steps,
            num_evals=config.num_evals,
            progress=progress.advance,
        )

    tuned = {rate: tune(rate) for rate in method.learning_rates}
    for _ in range(config.wider_tuning):
        if not (rate := _beyond(tuned)):
            break
        progress.expect(_tuning_steps(config, method))
        tuned[rate] = tune(rate)
    learning_rate = _best(tuned)
    runs = [adapt(seed) for seed in config.seeds]
    return {
        **_summary([r.curve[-1] for r in runs]),
        "validation_accuracies": [r.validation for r in runs],
        "learning_rate": learning_rate,
        "tuning": {f"{rate:g}": tuned[rate] for rate in sorted(tuned)},
        "steps": method.steps,
        "forward_passes": method.steps * trainer.learner.passes_per_step,
        "seconds": float(np.mean([r.seconds for r in runs])),
        "temporaries_mib": trainer.temporaries / 2**20,
        "curves": [r.curve for r in runs],
    }


def _best(tuned: Mapping[float, float]) -> float:
    """The learning rate of the best accuracy; of equal ones the first tried."""
    return max(tuned, key=lambda rate: tuned[rate])


def _beyond(tuned: Mapping[float, float]) -> float | None:
    """The next learning rate in geometric order if the best is the last, or None."""
    rates = sorted(tuned)
    if len(rates) > 1 and _best(tuned) in (rates[0], rates[-1]):
        end, inner = rates[:2] if _best(tuned) == rates[0] else rates[:-3:-1]
        return float(f"{end * end / inner:.2g}")
    return None


def _summary(accuracies: list[float]) -> dict[str, Any]:
    return {
        "accuracy": float(np.mean(accuracies)),
        "accuracy_std": float(np.std(accuracies, ddof=1)),
        "accuracies": accuracies,
    }


def _load(config: ConfigDict, domain: str, directory: pathlib.Path) -> Splits:
    tfds.disable_progress_bar()
    data_dir = config.data_dir or str(directory / "data")
    # array_record is read without TensorFlow.
    builder = DATASETS[config.dataset](
        config=domain, data_dir=data_dir, file_format="array_record"
    )
    return arrays.load(builder)


def _tuning_steps(config: ConfigDict, method: ConfigDict) -> int:
    return max(1, int(method.steps * config.tuning_fraction))


def _total_steps(config: ConfigDict) -> int:
    """Steps of all runs together, for the progress bar."""
    total = config.pretrain.steps
    for name in config.run:
        method = config.methods[name]
        total += len(method.learning_rates) * _tuning_steps(config, method)
        total += len(config.seeds) * method.steps
    return total
