"""The memory of a step beside inference, as planned for an H100 that is not there.

    python -m experiments.benchmarks.h100_plan --arithmetic=8w8a

Nothing runs, so that no GPU is needed; see `h100` for what has to be installed. An
optimizer of another version of JAX plans otherwise: the table says which one this is.
To plan for the largest, ``--network="decoder of 60 B"``, takes minutes.
"""

import os
from collections.abc import Sequence

import jax
from absl import app, flags

from experiments.benchmarks import gpu_sections, h100, transformer
from experiments.benchmarks.table import Table, mib
from experiments.benchmarks.transformer import Transformer

NETWORKS = {
    "ViT-B/16": transformer.VIT_B16._replace(outputs_first=True),
    "decoder of 1.3 B": transformer.DECODER._replace(outputs_first=True),
    "decoder of 60 B": gpu_sections.LARGEST["8w8a"],
}


def row(name: str, network: Transformer, arithmetic: str) -> list[str]:
    """A line of the table: plans of an inference and of a step, and the products."""
    result = gpu_sections.planned(network.staged(), arithmetic, for_h100=True)
    inference, step = result.memory
    return [
        *(name, arithmetic, mib(inference.live), mib(step.live)),
        f"{step.live / inference.live:.2f}",
        gpu_sections.product_kernels(result.step.as_text()),
    ]


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    os.environ.update(h100.ENVIRONMENT)
    table = Table(
        title="Live memory as planned for an H100, MiB",
        columns=(
            *("network", "arithmetic", "inference", "step", "step / inference"),
            "products of the step",
        ),
        rows=[
            row(name, NETWORKS[name], arithmetic)
            for name in flags.FLAGS.network
            for arithmetic in flags.FLAGS.arithmetic
        ],
        note=f"Batch 1, matrices stored as [out, in], m = 1, JAX {jax.__version__}.",
        raw=[],
    )
    print(table.markdown())


if __name__ == "__main__":
    flags.DEFINE_list("network", list(NETWORKS)[:2], "Some of the `NETWORKS`.")
    flags.DEFINE_list(
        "arithmetic", ["bfloat16", "16w8a", "8w8a"], "Arithmetics of the weights."
    )
    app.run(main)
