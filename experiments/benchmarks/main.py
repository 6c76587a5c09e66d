"""Measures memory and time beside inference, backpropagation and other libraries.

    python -m experiments.benchmarks.main --workdir=workdir/benchmarks

Prints its tables as Markdown; results.json and tables.md in the workdir hold them, with
the raw numbers and the device. Memory is the compiler's plan; times are ratios within
the run, which wants a machine to itself and takes tens of minutes on two cores, most
of them for compilation. Some of the tables: ``--only=bars,growth``; what compilation
takes: ``--only=compile``, or ``compile_deep`` for 48 blocks; the memory of joint pairs:
``--only=joint``. A try of some seconds: ``--smoke``.
"""

from collections.abc import Sequence

from absl import app, flags

from experiments.benchmarks import suite

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for the results.")
_ONLY = flags.DEFINE_list("only", suite.DEFAULT, "Tables to make.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes, which show no result.")
flags.mark_flag_as_required("workdir")


def main(argv: Sequence[str]) -> None:
    """Makes the tables that the flags name."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    suite.run(_WORKDIR.value, _ONLY.value, _SMOKE.value)


if __name__ == "__main__":
    app.run(main)
