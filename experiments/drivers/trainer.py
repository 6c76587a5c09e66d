"""Runs of one method on one dataset, which go on where they were interrupted."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

import fgrad
from experiments.drivers.layouts import ALONE, Layout
from experiments.drivers.programs import Program
from experiments.learners import gradient_quality, metrics, predicted_time
from experiments.learners.classification import Classification
from experiments.learners.learner import TrainState, make_learner
from experiments.registry import Splits
from experiments.workdir import events, runs
from fgrad.analysis import Memory
from fgrad.tracing import primitives
from fgrad.transform import ForwardGradState

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
      seconds: wall time of the steps, without compilation and evaluation; of several
        runs that are one program, their share of it.
      digest: SHA-256 of the state at its end.
      learning_rate: at its start.
    """

    validation: float
    scores: dict[str, float]
    curve: list[list[float]]
    seconds: float
    digest: str = ""
    learning_rate: float | None = None


class Planned(NamedTuple):
    """A run that is to be made.

    Attributes:
      seed: of batches and perturbations.
      learning_rate: at the start; it decays linearly to 0.
      directory: where the run leaves its snapshots.
    """

    seed: int
    learning_rate: float
    directory: runs.RunDirectory


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
        layout: Layout = ALONE,
    ):
        """Compiles the step.

        Args:
          method: see ``configs/quickstart.py``.
          network: ``network(bits=...)`` gives the Flax module.
          params: float parameters, for their shapes.
          data: the splits to train on.
          names: of metrics, keys of `experiments.learners.metrics.METRICS`.
          layout: of the devices.
        """
        self._network = network
        self._names = names
        self._tag = f"test/{names[0]}"
        self._layout = layout.of_method(method)
        objective = Classification(method)
        self.learner = make_learner(method, network, objective)
        self._images = data["train"].images[: method.get("calibration_images")]
        state = self.learner.init(params, self._images, 0)
        # What is frozen does not depend on the seed.
        self._data = self.learner.cached(state, data)
        self._programs: dict[int, Program] = {}
        self._alone = Program(self.learner.step, state, self._data["train"])
        self._equations = self._alone.traced.jaxpr.jaxpr.eqns
        self._logits = jax.jit(self.learner.logits)
        self.temporaries = Memory.planned(self._alone.compiled).temporaries

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
        planned: Sequence[Planned],
        *,
        steps: int,
        num_evals: int,
        progress: Callable[[int], None],
    ) -> list[runs.Snapshot]:
        """Trains from float parameters, or from where the directories' runs were.

        Args:
          params: where the runs start.
          planned: the runs; several are one program.
          steps: length of a run.
          num_evals: points of the curve after the start.
          progress: called with the number of steps just taken.
        """
        done, snapshots = self._begun(params, planned)
        program = self._program(len(planned), snapshots[0].state)
        states = program.joined([snapshot.state for snapshot in snapshots])
        seconds = snapshots[0].seconds
        keeps = self.learner.method.gradient == "forward"
        logs = [
            _Log(one.directory, done, snapshot, keeps)
            for one, snapshot in zip(planned, snapshots, strict=True)
        ]
        progress(done * len(planned))
        evals = set(np.linspace(0, steps, num_evals + 1).astype(int).tolist())
        rates = [one.learning_rate for one in planned]
        arguments = program.arguments(rates, steps)
        with contextlib.ExitStack() as stack:
            for log in logs:
                stack.enter_context(log)
            while done < steps:
                end = min(done + _CHUNK, *(n for n in (*evals, steps) if n > done))
                began = time.perf_counter()
                for _ in range(done, end):
                    states = program(states, *arguments)
                    if logs[0].losses is not None:
                        links = program.each(_link(states.opt_state))
                        for log, link in zip(logs, links, strict=True):
                            log.losses.append(link)
                jax.block_until_ready(states)
                seconds += (time.perf_counter() - began) / len(planned)
                progress((end - done) * len(planned))
                done = end
                now = program.each(states)
                snapshots = [
                    self._further(log, done, state, seconds, evals)
                    for log, state in zip(logs, now, strict=True)
                ]
                if any(one.directory.due() for one in planned):
                    for log in logs:
                        log.write_losses()
                    _save(planned, done, snapshots)
            for log in logs:
                log.write_losses()
        return snapshots

    def run(
        self,
        params: Any,
        planned: Sequence[Planned],
        *,
        steps: int,
        num_evals: int,
        progress: Callable[[int], None],
    ) -> list[Run]:
        """Trains as `train` does, and tells the scores; a finished run's are read."""
        results = [one.directory.result() for one in planned]
        progress(steps * sum(result is not None for result in results))
        left = [
            one for one, result in zip(planned, results, strict=True) if result is None
        ]
        ended = []
        if left:
            snapshots = self.train(
                params, left, steps=steps, num_evals=num_evals, progress=progress
            )
            if len(left) > 1:  # one that is killed now ends all of them from here
                _save(left, steps, snapshots)
            ended = [
                self._finished(one, snapshot)
                for one, snapshot in zip(left, snapshots, strict=True)
            ]
        new = iter(ended)
        return [next(new) if result is None else Run(**result) for result in results]

    def _finished(self, planned: Planned, end: runs.Snapshot) -> Run:
        """The scores of a run at its end, which its directory keeps."""
        validation = self._scores(end.state, "validation")[self._names[0]]
        scores = self._scores(end.state, "test")
        digest = runs.digest(end.state)
        rate = planned.learning_rate
        run = Run(validation, scores, end.curve, end.seconds, digest, rate)
        planned.directory.finish(run._asdict())
        return run

    def _begun(
        self, params: Any, planned: Sequence[Planned]
    ) -> tuple[int, list[runs.Snapshot]]:
        """The last step that all runs have been at, and the runs at that step."""
        states = [self.learner.init(params, self._images, one.seed) for one in planned]
        step: int | None = None
        while step != 0:
            found = [
                one.directory.latest(like=state, until=step)
                for one, state in zip(planned, states, strict=True)
            ]
            last = min(0 if one is None else one[0] for one in found)
            if all(one is not None and one[0] == last for one in found):
                return last, [snapshot for _, snapshot in filter(None, found)]
            step = last
        return 0, [self._start(state) for state in states]

    def _further(
        self, log: "_Log", done: int, state: TrainState, seconds: float, evals: set[int]
    ) -> runs.Snapshot:
        """A run that is some steps further, at one of which its curve has a point."""
        if done in evals:
            log.curve.append(self._curve_point(state))
        if log.add:
            scores = {self._tag: log.curve[-1][0]} if done in evals else {}
            passes = done * self.learner.passes_per_step
            log.points.append(events.point(done, passes, state.opt_state, scores))
            log.add(log.points[-1])
        return runs.Snapshot(state, log.curve, seconds, log.points)

    def _program(self, count: int, like: TrainState) -> Program:
        """The step of so many runs, compiled once."""
        spread = self._layout.spread(self.learner.method)
        if count == 1 and self._layout.mesh is None and spread is None:
            return self._alone
        if count not in self._programs:
            step = dataclasses.replace(self.learner, spread=spread).step
            data = self._data["train"]
            self._programs[count] = Program(step, like, data, count, self._layout)
        return self._programs[count]

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
            arguments = self._alone.arguments([0.0], steps)
            for _ in range(steps):
                state = self._alone(state, *arguments)
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


class _Log(contextlib.AbstractContextManager["_Log"]):
    """What a run tells on its way.

    Attributes:
      curve: see `Run`.
      points: of the event file.
      add: adds a point to the file; None if there is none.
      losses: of all steps; None if they are not kept.
    """

    def __init__(
        self,
        directory: runs.RunDirectory,
        done: int,
        snapshot: runs.Snapshot,
        keeps_losses: bool,
    ) -> None:
        """Goes on from a snapshot.

        Args:
          directory: of the run.
          done: steps taken so far.
          snapshot: of the run at this step.
          keeps_losses: whether the method has losses to keep.
        """
        self.curve = snapshot.curve
        self.points = list(snapshot.points)
        self.add: Callable[[events.Point], None] | None = None
        self.losses: Any = None
        self._directory = directory
        self._file = directory.log(self.points)
        if keeps_losses and directory.keeps_losses:
            self.losses = fgrad.RunLog(snapshot.state.params)
            if done:
                self.losses = fgrad.RunLog.load(directory.losses_file).until(done)

    def __enter__(self) -> "_Log":
        self.add = self._file.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._file.__exit__(*raised)

    def write_losses(self) -> None:
        """Writes the losses so far, if they are kept."""
        if self.losses:
            self.losses.save(self._directory.losses_file)


def _link(opt_state: Any) -> Any:
    """The state of the one estimator of pairs in that of a chain."""

    def is_link(x: Any) -> bool:
        return isinstance(x, ForwardGradState)

    leaves = jax.tree.leaves(opt_state, is_leaf=is_link)
    return next(x for x in leaves if is_link(x))


def _save(
    planned: Sequence[Planned], step: int, snapshots: Sequence[runs.Snapshot]
) -> None:
    """Writes a snapshot of every run."""
    for one, snapshot in zip(planned, snapshots, strict=True):
        one.directory.save(step, snapshot)
