"""Measures memory and time beside inference, backpropagation and other libraries.

    python -m experiments.benchmarks.main --workdir=workdir/benchmarks

Prints its tables as Markdown; results.json and tables.md in the workdir hold them, with
the raw numbers and the device. Memory is the compiler's plan; times are ratios within
the run, which wants a machine to itself and takes tens of minutes on two cores, most
of them for compilation. Some of the tables: ``--only=bars,growth``; what compilation
takes: ``--only=compile``, or in parts `experiments.benchmarks.compile_run`; the memory
of joint pairs: ``--only=joint``, or in parts such as ``--only=joint_vit_16w8a`` and,
with half of the programs, ``joint_vit_16w8a_way``; the time of integer programs:
``--only=integer``. A try of some seconds: ``--smoke``. On a machine that others use,
``--processor_seconds`` with
``XLA_FLAGS=--xla_cpu_multi_thread_eigen=false`` compares work rather than waiting.
"""

import contextlib
from collections.abc import Sequence

from absl import app, flags

from experiments.benchmarks import measure, subjects, suite

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for the results.")
_ONLY = flags.DEFINE_list("only", suite.DEFAULT, "Tables to make.")
_NETWORKS = flags.DEFINE_list(
    "networks", [], "Networks of the tables memory, time and floor; all by default."
)
_PROCESSOR = flags.DEFINE_bool(
    "processor_seconds", False, "Times the processor, which wants a single thread."
)
_SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes, which show no result.")
flags.mark_flag_as_required("workdir")


def main(argv: Sequence[str]) -> None:
    """Makes the tables that the flags name."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    clock = measure.seconds_of_the_processor if _PROCESSOR.value else None
    with (
        clock() if clock else contextlib.nullcontext(),
        subjects.only(_NETWORKS.value),
    ):
        suite.run(_WORKDIR.value, _ONLY.value, _SMOKE.value)


if __name__ == "__main__":
    app.run(main)
