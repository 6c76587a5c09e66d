"""Runs of one method on one dataset, which go on where they were interrupted."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments.learners import gradient_quality, metrics, predicted_time
from experiments.learners.classification import Classification
from experiments.learners.learner import TrainState, make_learner
from experiments.registry import Splits
from experiments.workdir import events, runs
from fgrad.analysis import Memory
from fgrad.tracing import primitives

_CHUNK = 10  # steps between two looks at the clock
# Steps at a learning rate of zero, in which synthetic gradients learn before they are
# compared with the gradient.
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


class Trainer:
    """A learner with its step compiled once for data of given shapes.

    Attributes:
      learner: the method applied to the network.
      temporaries: scratch memory of the compiled step in bytes, beside its arguments.
    """

    def __init__(
        self,
        method: ConfigDict,
        network: Callable[..., Any],
        params: Any,
        data: Splits,
        names: Sequence[str],
    ):
        """Compiles the step.

        Args:
          method: see ``configs/quickstart.py``.
          network: ``network(bits=...)`` gives the Flax module.
          params: float parameters, for their shapes.
          data: the splits to train on.
          names: of metrics, keys of `experiments.learners.metrics.METRICS`.
        """
        self._network = network
        self._names = names
        self._tag = f"test/{names[0]}"
        self.learner = make_learner(method, network, Classification(method))
        self._images = data["train"].images[: method.get("calibration_images")]
        state = self.learner.init(params, self._images, 0)
        # What is frozen does not depend on the seed.
        self._data = self.learner.cached(state, data)
        step = jax.jit(self.learner.step, donate_argnums=0)
        traced = step.trace(state, jnp.float32(0), jnp.float32(1), self._data["train"])
        self._equations = traced.jaxpr.jaxpr.eqns
        self._step = traced.lower().compile()
        self._logits = jax.jit(self.learner.logits)
        self.temporaries = Memory.planned(self._step).temporaries

    def multiply_adds(self, steps: int) -> float:
        """Multiply-adds of a run, as its traced step has them.

        Args:
          steps: length of the run. Of a method that perturbs in some of its steps only,
            those do more.
        """
        every = self.learner.method.get("joint", {}).get("every", 1)
        rare = -(-steps // every)
        long, short = (
            primitives.multiply_adds(self._equations, branch) for branch in (max, min)
        )
        return rare * long + (steps - rare) * short

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
                    curve.append(self._curve_point(state))
                if log:
                    scores = {self._tag: curve[-1][0]} if done in evals else {}
                    passes = done * self.learner.passes_per_step
                    points.append(events.point(done, passes, state.opt_state, scores))
                    log(points[-1])
                if directory.due():
                    directory.save(done, runs.Snapshot(state, curve, seconds, points))
        return runs.Snapshot(state, curve, seconds, points)

    def run(
        self,
        *args: Any,
        progress: Callable[[int], None],
        directory: runs.RunDirectory,
        **kwargs: Any,
    ) -> Run:
        """Trains as `train` does, and tells the scores; a finished run's are read."""
        if result := directory.result():
            progress(kwargs["steps"])
            return Run(**result)
        end = self.train(*args, progress=progress, directory=directory, **kwargs)
        validation = self._scores(end.state, "validation")[self._names[0]]
        run = Run(validation, self._scores(end.state, "test"), end.curve, end.seconds)
        directory.finish(run._asdict())
        return run

    def cosines(
        self, params: Any, seed: int, count: int
    ) -> dict[str, tuple[float, float]]:
        """Cosines of estimates with the gradient where runs start, layer by layer.

        Args:
          params: where runs start.
          seed: of the run and of the estimates.
          count: how many estimates, all on the first examples.

        Returns:
          Mean and standard deviation by the names of layers; nothing for a method that
          has no estimates to compare, see `gradient_quality.comparison`.
        """
        compare = gradient_quality.comparison(self._network, self.learner)
        if compare is None:
            return {}
        method = self.learner.method
        state = self.learner.init(params, self._images, seed)
        if optax.tree.get(state.opt_state, "jacobians", {}):
            steps = min(_STANDING, method.steps)
            still, horizon = jnp.float32(0), jnp.float32(steps)
            for _ in range(steps):
                state = self._step(state, still, horizon, self._data["train"])
        batch = jax.tree.map(lambda x: x[: method.batch_size], self._data["train"])
        found = {
            layer: compare(state, batch, jax.random.key(seed), count, layer)
            for layer in state.params
        }
        return {layer: (q.cosine, q.cosine_deviation) for layer, q in found.items()}

    def predicted_steps(
        self,
        params: Any,
        seed: int,
        learning_rate: float,
        question: predicted_time.Question,
    ) -> int | None:
        """Predicts how long a run takes to a share of its first loss.

        Args:
          params: where the run starts.
          seed: of the run.
          learning_rate: at the start; it decays linearly to 0.
          question: which share, and what the answer may cost.
        """
        state = self.learner.init(params, self._images, seed)
        train, steps = self._data["train"], self.learner.method.steps
        return predicted_time.predicted_steps(
            self.learner, state, train, learning_rate, steps, question
        )

    def _start(self, state: TrainState) -> runs.Snapshot:
        """The snapshot before the first step."""
        curve = [self._curve_point(state)]
        # The loss in the state is of no step yet, so the optimizer's state is left out.
        point = events.point(0, 0, (), {self._tag: curve[0][0]})
        return runs.Snapshot(state, curve, 0.0, [point])

    def _scores(self, state: TrainState, split: str) -> dict[str, float]:
        data = self._data[split]
        logits = self._logits(state, data.images)
        return metrics.scores(self._names, logits, data.labels)

    def _curve_point(self, state: TrainState) -> list[float]:
        """The first metric on the test and on the validation split."""
        return [self._scores(state, x)[self._names[0]] for x in ("test", "validation")]
