"""Integer programs beside the networks that they come from: what they predict.

    python -m experiments.benchmarks.integer_accuracy --out=workdir/integer_accuracy

Prints a table of five networks as Markdown. ``--only=digits_cnn,mnist_vit`` takes some
of them; ``--smoke`` tiny settings, which show no result. The workdir keeps what was
pre-trained. The voices need Debian's packages (`experiments.data.voices`), the solar
cells ``pip install -e '.[solar,weights]'``.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from experiments import features
from experiments.benchmarks import integer_problems
from experiments.benchmarks.integer_problems import Problem
from fgrad import fixed_point, integer

WIDTHS = ((16, 8), (8, 8))
# Candidates for the bound of an activation, of which the best is taken.
_BOUNDS = 16
_COLUMNS = ("network", "metric", "float32", "16w8a", "same", "8w8a", "same")


def row(problem: Problem) -> str:
    """A line of the table: the float network and its integer programs."""
    params = problem.params
    apply = jax.jit(problem.function)
    exact = features.batched(lambda x: apply(params, x), problem.inputs)
    score, predicted = problem.score(exact)
    cells = [problem.what, problem.metric, f"{score:.1%}"]
    for bits in WIDTHS:
        outputs = _outputs(problem, bits)
        found, ours = problem.score(outputs)
        cells += [f"{found:.1%} ({100 * (found - score):+.2f})"]
        cells += [f"{np.mean(ours == predicted):.1%}"]
    return f"| {' | '.join(cells)} |"


def _outputs(problem: Problem, bits: tuple[int, int]) -> np.ndarray:
    """What the integer program says of all inputs, as floats."""
    program = integer.convert(
        problem.function,
        problem.params,
        problem.calibration,
        bits=bits,
        channel_axis=-1,
        calibration=fixed_point.mse_optimal(_BOUNDS),
        headroom=1.0,  # nothing is trained
    )
    encoded: Any = program.encode(problem.inputs)
    return features.batched(lambda x: program.decode(program.params, x), encoded)


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # orbax tells much of every snapshot
    given = flags.FLAGS
    print(f"| {' | '.join(_COLUMNS)} |\n{'|---' * len(_COLUMNS)}|", flush=True)
    for name in given.only:
        make = integer_problems.PROBLEMS[name]
        problem = make(pathlib.Path(given.out) / name, given.smoke)
        print(row(problem), flush=True)


if __name__ == "__main__":
    # Here, so that a program may import this module beside others with such flags.
    flags.DEFINE_string("out", None, "Directory for data and runs.", required=True)
    flags.DEFINE_list("only", list(integer_problems.PROBLEMS), "Which networks.")
    flags.DEFINE_bool("smoke", False, "Tiny settings, which show no result.")
    app.run(main)
