"""Time of an integer program's inference, over that of the library's 16w8a network."""

import functools
from collections.abc import Iterator
from typing import Any

import jax

import fgrad
from experiments.benchmarks import measure, subjects
from experiments.benchmarks.measure import Effort, Program, Times
from experiments.benchmarks.subjects import Subject
from experiments.benchmarks.table import Table
from experiments.models import cnn, resnet12, vit
from fgrad import integer, layers

_TINY_VIT = functools.partial(vit.ViT, patch=4, width=64, depth=4, num_heads=4)
SUBJECTS = {
    "cnn": Subject(cnn.CNN, (8, 8, 1)),
    "vit_small": Subject(functools.partial(_TINY_VIT, mlp_width=128), (28, 28, 1)),
    "vit": subjects.SUBJECTS["vit"],
    "resnet12": Subject(resnet12.ResNet12, (28, 28, 1), 5),
}
# Weights and activations, and whether each output channel has a scale.
INTEGERS = {
    "integer 16w8a": ((16, 8), None),
    "integer 8w8a": ((8, 8), None),
    "integer 8w8a per channel": ((8, 8), -1),
}
_REFERENCE = "16w8a"


def tables(smoke: bool) -> Iterator[Table]:
    """Times the forward passes, in seconds of the processor.

    Args:
      smoke: whether to take a tiny network and one batch.
    """
    chosen = subjects.chosen(smoke) if smoke else SUBJECTS
    effort = measure.SMOKE if smoke else Effort(rounds=9)
    rows, raw = [], []
    for name, subject in chosen.items():
        for batch_size in (2,) if smoke else (1, 16):
            times = measured(subject, batch_size, effort)
            reference = times[_REFERENCE]
            ratios = {what: t.ratio(reference) for what, t in times.items()}
            cells = [f"{ratio['median']:.2f}" for ratio in ratios.values()]
            rows.append(
                [name, str(batch_size), f"{1e3 * reference.median:.2f} ms", *cells]
            )
            raw.append(
                {
                    "subject": name,
                    "batch_size": batch_size,
                    "ratios": ratios,
                    "times": {what: t.asdict() for what, t in times.items()},
                }
            )
    yield Table(
        title="Time of inference, over the library's 16w8a",
        columns=("network", "batch", "library", _REFERENCE, "float32", *INTEGERS),
        rows=rows,
        note="Logits of a batch; ratios of medians of processor seconds, "
        f"{effort.rounds} rounds in turn. The library rounds activations with "
        "calibrated scales and rescales in float32; a program has integers only.",
        raw=raw,
    )


def measured(subject: Subject, batch_size: int, effort: Effort) -> dict[str, Times]:
    """Times of the library's network, of the float one and of integer programs."""
    with measure.seconds_of_the_processor():
        return measure.interleave(programs(subject, batch_size), effort)


def programs(subject: Subject, batch_size: int) -> dict[str, Program]:
    """What is timed, by its name."""
    found = {}
    for name in (_REFERENCE, "float32"):
        problem = subjects.problem(subject, batch_size, name)
        found[name] = logits(subject, problem.params, problem.data, name)
    float_params, inputs = problem.params, problem.data["batch"].inputs
    model = subject.network(num_classes=subject.num_classes)

    def function(params: Any, images: jax.Array) -> jax.Array:
        result: jax.Array = model.apply({"params": params}, images)
        return result

    for name, (bits, channel_axis) in INTEGERS.items():
        program = integer.convert(
            function, float_params, inputs, bits=bits, channel_axis=channel_axis
        )
        weights = integer.integers(program.params)
        found[name] = Program(program, weights, program.encode(inputs))
    return found


def logits(subject: Subject, params: Any, data: Any, arithmetic: str) -> Program:
    """Inference of the network of the library."""
    bits = subjects.ARITHMETIC[arithmetic]
    model = subject.network(num_classes=subject.num_classes, bits=bits)
    scales = {layers.SCALES: data["scales"][layers.SCALES]} if bits else {}

    def function(params: Any, scales: Any, inputs: jax.Array) -> jax.Array:
        values = fgrad.dequantize(params) if not bits else params
        result: jax.Array = model.apply({"params": values, **scales}, inputs)
        return result

    return Program(function, params, scales, data["batch"].inputs)
