"""A network of sounds whose backbone is frozen: its head learns new voices, in C.

A CRNN is pre-trained on recordings of 20 voices. Its weights get 8 bits and stay in
flash, as those of an NPU do; a new head of 16 bits, all zero at first, learns ten
voices in languages that the network has never heard, by its exact gradient in integers,
one recording at a time. The whole adaptation runs in the generated C on this machine,
and its bits are compared with those of JAX; an emulated Cortex-M3 runs the first steps.

    python -m experiments.benchmarks.microcontroller_head --out=workdir/new_voices

Prints its tables as Markdown. The recordings are those of Debian's packages
(`experiments.data.voices`). A try with tiny settings: ``--smoke``.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

import fgrad
from experiments.benchmarks import integer_problems
from experiments.benchmarks.integer_problems import applied
from experiments.benchmarks.microcontroller import Example, Settings
from experiments.drivers.progress import show_progress
from fgrad import integer
from fgrad.integer import Program, TrainStep

HEAD = "Dense_0"
# Weights of a head that starts at zero may grow to 1.5 times as much.
_ZERO_BOUND = 4.0


class OneByOne(Settings):
    """Steps by the exact gradient of one recording, which cost one forward pass."""

    @property
    def passes(self) -> int:
        """Forward passes of a step."""
        return self.batch_size


# The rate is the best of 0.1, 0.3 and 1 on the validation recordings.
FULL = OneByOne(steps=3000, batch_size=1, learning_rate=1.0, emulated_steps=3)
SMOKE = OneByOne(steps=3, batch_size=1, learning_rate=0.1, seeds=(0,))


def prepared(directory: pathlib.Path, smoke: bool) -> tuple[Program, Any, Any]:
    """The calibrated program with a new head, and ten new voices: train and test."""
    config = integer_problems.voices_config(smoke)
    with show_progress() as progress:
        network, params, data = integer_problems.features_network(
            config, directory, progress
        )
    new = integer_problems.new_voices(data["test"])
    classes = int(jnp.max(new["train"].labels)) + 1
    head = {
        "kernel": jnp.zeros((params[HEAD]["kernel"].shape[0], classes)),
        "bias": jnp.zeros(classes),
    }
    backbone = {name: part for name, part in params.items() if name != HEAD}
    start = {
        **fgrad.quantize(backbone, bits=8),
        HEAD: fgrad.quantize(head, bits=16, zero_bound=_ZERO_BOUND),
    }
    program = integer.convert(
        applied(network(num_classes=classes)), start, data["train"].images[:256]
    )
    return program, new["train"], new["test"]


def made(program: Program, settings: Settings, seed: int) -> TrainStep:
    """The step of a seed."""
    return integer.train_step(
        program,
        jax.random.key(seed),
        learning_rate=settings.learning_rate,
        decay_steps=settings.steps,
        exact_head=HEAD,
    )[1]


EXAMPLE = Example(prepared, made, FULL, SMOKE)

if __name__ == "__main__":
    EXAMPLE.start()
