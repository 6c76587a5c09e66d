"""Times three runs of a method: one after the other, or as one program.

    python -m experiments.benchmarks.together joint_16w8a forward_16w8a

For methods of ``experiments/configs/quickstart.py``. What counts is the time of the
processor, and of several measurements, taken in turn, the best one. XLA_FLAGS with
``--xla_cpu_multi_thread_eigen=false`` gives all ways one thread.
"""

import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.configs import quickstart
from experiments.drivers import training
from experiments.drivers.layouts import Layout
from experiments.drivers.programs import Program
from experiments.drivers.progress import show_progress
from experiments.learners.classification import Classification
from experiments.learners.learner import make_learner

_SEEDS, _STEPS, _TIMES = (0, 1, 2), 20, 3


def measured(name: str, task: training.Task) -> dict[str, float]:
    """CPU milliseconds of a step of one run, by how the three runs are made.

    Args:
      name: of a method.
      task: the data and the network.
    """
    method = quickstart.get_config().methods[name]
    learner = make_learner(method, task.network, Classification(method))
    data = task.target["train"]
    images = data.images[: method.get("calibration_images")]
    states = [learner.init(task.start, images, seed) for seed in _SEEDS]

    def made(count: int, vmapped: bool = False) -> Program:
        layout = Layout(vmapped=vmapped)
        return Program(learner.step, states[0], data, count, layout)

    one, count = made(1), len(states)
    ways = {
        "separate": [(one, [state]) for state in states],
        "in turn": [(made(count), states)],
    }
    if method.gradient != "joint":  # which JAX cannot vmap
        ways["vmapped"] = [(made(count, vmapped=True), states)]
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(_TIMES):
        for way, programs in ways.items():
            seconds = sum(_seconds(program, runs) for program, runs in programs)
            best[way] = min(best[way], 1e3 * seconds / _STEPS / count)
    return best


def _seconds(program: Program, states: Sequence[Any]) -> float:
    """CPU seconds of some steps of the runs of a program, the first one not counted."""
    step: Callable[..., Any] = program
    arguments = program.arguments([0.01] * len(states), 300)
    joined = jax.block_until_ready(step(program.joined(states), *arguments))
    began = time.process_time()
    for _ in range(_STEPS):
        joined = step(joined, *arguments)
    jax.block_until_ready(joined)
    return time.process_time() - began


def main() -> None:
    """Prints a line for each method that the command line names."""
    names = sys.argv[1:] or quickstart.get_config().run
    with tempfile.TemporaryDirectory() as folder, show_progress() as progress:
        task = training.prepare(quickstart.get_config(), pathlib.Path(folder), progress)
    print("| method | separate | in turn | vmapped | (CPU ms of a step of a run)")
    for name in names:
        best = measured(name, task)
        print(f"| {name} | " + " | ".join(f"{best[way]:.2f}" for way in best) + " |")


if __name__ == "__main__":
    main()
