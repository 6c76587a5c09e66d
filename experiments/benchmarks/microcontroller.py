"""The quickstart's network, adapted by the C program that a microcontroller would run.

A CNN of 25,866 parameters, pre-trained on upright digits, learns those that are rotated
by 30 degrees, in integers from the image to the weights. The whole adaptation runs in
the generated C on this machine, and its bits are compared with those of JAX; an
emulated Cortex-M3 runs the first steps, for their bits and the instructions executed.

    python -m experiments.benchmarks.microcontroller --out=workdir/microcontroller

Prints its tables as Markdown. A try of some seconds: ``--smoke``.
"""

import ctypes
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.benchmarks import emulation, integer_tables
from experiments.configs import quickstart
from experiments.drivers import training
from experiments.drivers.progress import show_progress
from fgrad import integer
from fgrad.integer import CProgram, Program, TrainStep


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and how finely to adapt.

    Attributes:
      steps: of an adaptation.
      batch_size: examples in a step.
      num_perturbations: m.
      learning_rate: at first; it decays linearly to 0.
      epsilon: of the perturbations.
      emulated_steps: taken by the Cortex-M3 as well.
      seeds: of batches and perturbations.
    """

    steps: int = 700
    batch_size: int = 16
    num_perturbations: int = 16
    learning_rate: float = 2e-2
    epsilon: float = 3e-2
    emulated_steps: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def passes(self) -> int:
        """Forward passes of a step."""
        return 2 * self.num_perturbations * self.batch_size


SMOKE = Settings(3, 2, 1, emulated_steps=1, seeds=(0,))


def prepared(directory: pathlib.Path, smoke: bool) -> tuple[Program, Any, Any]:
    """The calibrated program, and the train and test split of the rotated digits."""
    config = quickstart.get_config("smoke" if smoke else "full")
    with show_progress() as progress:
        progress.expect(config.pretrain.steps)
        task = training.prepare(config, directory, progress)
    network = task.network(bits=None)

    def logits(params: Any, images: jax.Array) -> jax.Array:
        return network.apply({"params": params}, images)

    data = task.target["train"]
    return integer.convert(logits, task.start, data.images), data, task.target["test"]


def made(program: Program, settings: Settings, seed: int) -> TrainStep:
    """The step of a seed."""
    return integer.train_step(
        program,
        jax.random.key(seed),
        learning_rate=settings.learning_rate,
        epsilon=settings.epsilon,
        num_perturbations=settings.num_perturbations,
        decay_steps=settings.steps,
        estimator="normalized",
    )[1]


def adapt(
    step: TrainStep, data: Any, settings: Settings, seed: int, where: pathlib.Path
) -> tuple[Any, bool]:
    """An adaptation in C on this machine: its weights, and whether JAX has the same."""
    written = integer.to_c(step, where, batch_size=settings.batch_size)
    library = emulation.host_library(written)
    weights, state = step.init()
    c_weights = emulation.filled(written, "weights", written.held(weights))
    c_state = emulation.filled(written, "state", list(state))
    advance = jax.jit(step)
    for x, y in batches(step.program, data, settings, seed):
        weights, state = advance(weights, state, (x, y))
        batch = emulation.filled(written, "batch", [x, y])
        library.fgrad_step(*map(ctypes.byref, (c_weights, c_state, batch)))
    found = emulation.arrays(written, "weights", c_weights)
    same = all(map(np.array_equal, found, written.held(weights)))
    return weights, same


def batches(program: Program, data: Any, settings: Settings, seed: int) -> Any:
    """Encoded images and labels of each step, drawn with replacement."""
    images = np.asarray(program.encode(data.images))
    labels = np.asarray(data.labels, np.int32)
    shape = settings.steps, settings.batch_size
    for chosen in np.random.default_rng(seed).integers(0, len(labels), shape):
        yield images[chosen], labels[chosen]


def accuracy(program: Program, weights: Any, data: Any) -> float:
    """Share of the examples that the integer program classifies."""
    logits = jax.jit(program)(weights, program.encode(data.images))
    return float(jnp.mean(jnp.argmax(logits, axis=1) == data.labels))


def emulate(
    step: TrainStep, data: Any, settings: Settings, where: pathlib.Path
) -> dict[str, Any]:
    """The first steps and a prediction on a Cortex-M3: figures, and if bits agree."""
    written = integer.to_c(step, where, batch_size=settings.batch_size)
    machine = emulation.CortexM3(written)
    weights, state = step.init()
    c_structs = {
        "weights": emulation.filled(written, "weights", written.held(weights)),
        "state": emulation.filled(written, "state", list(state)),
        "batch": emulation.structure(written, "batch")(),
        "outputs": emulation.structure(written, "outputs")(),
    }
    at = emulation.pointers(machine, c_structs)
    advance = jax.jit(step)
    every = batches(step.program, data, settings, 0)
    for _, (x, y) in zip(range(settings.emulated_steps), every, strict=False):
        weights, state = advance(weights, state, (x, y))
        batch = emulation.filled(written, "batch", [x, y])
        machine.machine.mem_write(at["batch"], bytes(batch))
        machine.call("fgrad_step", at["weights"], at["state"], at["batch"])
    kind = emulation.structure(written, "weights")
    memory = machine.read(at["weights"], ctypes.sizeof(kind))
    found = emulation.arrays(written, "weights", kind.from_buffer_copy(memory))
    figures: dict[str, Any] = {
        "same": all(map(np.array_equal, found, written.held(weights))),
        "step": machine.instructions,
        "stack": machine.stack_bytes,
        "flash": machine.flash_bytes,
        "arena": written.arena_bytes,
        "weights": written.weight_bytes,
    }
    # A batch begins with the images, which is all that a prediction reads.
    machine.call("fgrad_predict", at["weights"], at["batch"], at["outputs"])
    figures["prediction"] = machine.instructions / settings.batch_size
    figures["prediction_stack"] = machine.stack_bytes
    return figures


def inference_only(program: Program, settings: Settings, where: pathlib.Path) -> Any:
    """What `to_c` writes of the network alone, and its flash on a Cortex-M3."""
    written: CProgram = integer.to_c(program, where, batch_size=settings.batch_size)
    return written, emulation.CortexM3(written).flash_bytes


def print_tables(
    step_of: Callable[[int], TrainStep],
    data: Any,
    test: Any,
    settings: Settings,
    directory: pathlib.Path,
    emulated: bool,
) -> None:
    """Prints the tables of an example.

    Args:
      step_of: the step of a seed.
      data: examples to adapt to.
      test: those that it is tested on.
      settings: how long and how finely.
      directory: for C files.
      emulated: whether to run the Cortex-M3 as well.
    """
    if settings.seeds:
        print("| seed | before | after | bits of JAX |\n|---|---|---|---|")
    for seed in settings.seeds:
        step = step_of(seed)
        program = step.program
        before = accuracy(program, step.init()[0], test)
        weights, same = adapt(step, data, settings, seed, directory / "c")
        after = accuracy(program, weights, test)
        bits = "yes" if same else "NO"
        print(f"| {seed} | {before:.1%} | {after:.1%} | {bits} |", flush=True)
    if not emulated:
        return
    if not emulation.has_emulator():
        print("The Cortex-M3 needs unicorn and ziglang: pip install 'fgrad[integer]'.")
        return
    step = step_of(0)
    found = emulate(step, data, settings, directory / "m3")
    plain, flash = inference_only(step.program, settings, directory / "inference")
    rows = [
        ("flash (code, tables, initial weights), KiB", found["flash"], flash),
        ("RAM: weights that train, KiB", found["weights"], 0),
        ("RAM: arena, KiB", found["arena"], plain.arena_bytes),
    ]
    print("\n| Cortex-M3 | step | inference |\n|---|---|---|")
    for name, ours, theirs in rows:
        print(f"| {name} | {ours / 1024:.1f} | {theirs / 1024:.1f} |")
    stacks = f"{found['stack']} | {found['prediction_stack']}"
    print(f"| RAM: stack, bytes | {stacks} |")
    print(
        f"| halfwords of instructions, millions | {found['step'] / 1e6:.1f} a step of "
        f"{settings.passes} passes | {found['prediction'] / 1e6:.2f} an image |"
    )
    ratio = found["step"] / settings.passes / found["prediction"]
    print(f"| for a pass, of inference's | {ratio:.2f} | 1 |")
    print(f"\nBits of JAX after {settings.emulated_steps} steps: {found['same']}")


class Example(NamedTuple):
    """A network that a microcontroller adapts.

    Attributes:
      prepared: ``prepared(directory, smoke)`` gives the calibrated program, and the
        examples to adapt to and to be tested on.
      made: ``made(program, settings, seed)`` gives the step of a seed.
      full: how long and how finely to adapt.
      smoke: the same for a try.
    """

    prepared: Callable[[pathlib.Path, bool], tuple[Program, Any, Any]]
    made: Callable[[Program, Settings, int], TrainStep]
    full: Settings
    smoke: Settings

    def run(
        self, workdir: str, smoke: bool, settings: Settings, emulated: bool = True
    ) -> None:
        """Prints the tables."""
        directory = pathlib.Path(workdir)
        program, data, test = self.prepared(directory, smoke)

        def step_of(seed: int) -> TrainStep:
            return self.made(program, settings, seed)

        print_tables(step_of, data, test, settings, directory, emulated)

    def start(self) -> None:
        """Runs from the command line."""

        def main(argv: Sequence[str]) -> None:
            integer_tables.check(argv)
            given = flags.FLAGS
            settings = self.smoke if given.smoke else self.full
            if given.batch_size is not None and not given.smoke:
                settings = dataclasses.replace(settings, batch_size=given.batch_size)
            if not given.adapt:
                settings = dataclasses.replace(settings, seeds=())
            self.run(given.out, given.smoke, settings, given.emulate)

        flags.DEFINE_integer("batch_size", None, "Examples in a step.")
        flags.DEFINE_bool("adapt", True, "Whether to take whole adaptations.")
        flags.DEFINE_bool("emulate", True, "Whether to run the Cortex-M3.")
        integer_tables.start(main)


EXAMPLE = Example(prepared, made, Settings(), SMOKE)

if __name__ == "__main__":
    EXAMPLE.start()
