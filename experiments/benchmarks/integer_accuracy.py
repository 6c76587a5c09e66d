"""Integer programs beside the networks that they come from: what they predict.

    python -m experiments.benchmarks.integer_accuracy --out=workdir/integer_accuracy

Prints a table of five networks as Markdown. ``--only=digits_cnn,mnist_vit`` takes some
of them; ``--smoke`` tiny settings, which show no result. ``--channels`` gives each
output channel a scale, ``--bounds`` activations the bound of the least mean squared
error; by default a tensor has one scale, and nothing saturates. The workdir keeps what
was pre-trained. The voices need Debian's packages (`experiments.data.voices`), the
solar cells ``pip install -e '.[solar,weights]'``.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import features
from experiments.benchmarks import integer_problems, integer_tables
from experiments.benchmarks.integer_problems import Problem
from fgrad import fixed_point, integer

WIDTHS = ((16, 8), (8, 8))
# Candidates for the bound of an activation, of which the best is taken.
_BOUNDS = 16
_COLUMNS = ("network", "metric", "float32", "16w8a", "same", "8w8a", "same")


def row(problem: Problem, channels: bool = False, bounds: bool = False) -> str:
    """A line of the table: the float network and its integer programs.

    Args:
      problem: the network.
      channels: whether channels have scales of their own.
      bounds: whether activations saturate where the mean squared error is least.
    """
    params = problem.params
    apply = jax.jit(problem.function)
    exact = features.batched(lambda x: apply(params, x), problem.inputs)
    score, predicted = problem.score(exact)
    cells = [problem.what, problem.metric, f"{score:.1%}"]
    for bits in WIDTHS:
        outputs = _outputs(problem, bits, channels, bounds)
        found, ours = problem.score(outputs)
        cells += [f"{found:.1%} ({100 * (found - score):+.2f})"]
        cells += [f"{np.mean(ours == predicted):.1%}"]
    return f"| {' | '.join(cells)} |"


def _outputs(
    problem: Problem, bits: tuple[int, int], channels: bool, bounds: bool
) -> np.ndarray:
    """What the integer program says of all inputs, as floats."""
    program = integer.convert(
        problem.function,
        problem.params,
        problem.calibration,
        bits=bits,
        channel_axis=-1 if channels else None,
        calibration=fixed_point.mse_optimal(_BOUNDS) if bounds else fixed_point.abs_max,
        headroom=1.0,  # nothing is trained
    )
    encoded: Any = program.encode(problem.inputs)
    return features.batched(lambda x: program.decode(program.params, x), encoded)


def lines(name: str, directory: pathlib.Path, smoke: bool) -> Iterator[str]:
    """The line of a network."""
    problem = integer_problems.PROBLEMS[name](directory, smoke)
    yield row(problem, flags.FLAGS.channels, flags.FLAGS.bounds)


if __name__ == "__main__":
    flags.DEFINE_bool("channels", False, "Whether channels have scales of their own.")
    flags.DEFINE_bool("bounds", False, "Whether activations may saturate.")
    integer_tables.print_parts(integer_problems.PROBLEMS, _COLUMNS, lines)
