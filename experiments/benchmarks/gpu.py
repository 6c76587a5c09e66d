"""Measures steps, memory and kernels on one GPU, in minutes.

    python -m experiments.benchmarks.gpu --out=workdir/gpu

Prints one Markdown table with the name of the device, a row as soon as it is measured;
results.json and table.md in the directory hold it with the raw numbers. Each section
runs in a process of its own, since PyTorch and JAX, or two large models, would share
one GPU's memory badly, and is stopped when its time is up. Sections come in order of
importance; what no longer fits into the budget is left out and said to be.
``--only=vit,int8`` takes some of them, ``--smoke`` tiny sizes on any device.
``--only=plan`` compiles the largest steps without arrays, on a CPU as well.
"""

from collections.abc import Sequence

from absl import app, flags

from experiments.benchmarks import gpu_run

_OUT = flags.DEFINE_string("out", None, "Directory for the results.")
_ONLY = flags.DEFINE_list("only", gpu_run.MEASURED, "Sections to measure.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes, which show no result.")
_BUDGET = flags.DEFINE_float("budget", 345.0, "Seconds for all of it.")
flags.mark_flag_as_required("out")


def main(argv: Sequence[str]) -> None:
    """Measures what the flags name."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    gpu_run.run(_OUT.value, _ONLY.value, _SMOKE.value, _BUDGET.value)


if __name__ == "__main__":
    app.run(main)
