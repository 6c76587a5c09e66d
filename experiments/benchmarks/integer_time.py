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

_RESNET = functools.partial(resnet12.ResNet12, widths=(8, 16, 24, 32))
_VIT = functools.partial(vit.ViT, patch=4, width=32, depth=3, num_heads=4, mlp_width=64)
# The quickstart's, those of the few-shot experiments on letters, and DeiT-tiny.
SUBJECTS = {
    "cnn": Subject(cnn.CNN, (8, 8, 1)),
    "resnet12_small": Subject(_RESNET, (28, 28, 1), 5),
    "vit_small": Subject(_VIT, (28, 28, 1)),
    "vit": subjects.SUBJECTS["vit"],
}
# Weights and activations, and whether each output channel has a scale.
INTEGERS = {
    "integer 16w8a": ((16, 8), None),
    "integer 8w8a per channel": ((8, 8), -1),
}
_BATCH_SIZE = 16
_REFERENCE = "16w8a"


def tables(smoke: bool) -> Iterator[Table]:
    """Times the forward passes, in seconds of the processor.

    Args:
      smoke: whether to take a tiny network and one batch.
    """
    chosen = subjects.chosen(smoke) if smoke else SUBJECTS
    effort = measure.SMOKE if smoke else Effort(rounds=7)
    for name, subject in chosen.items():
        times = measured(subject, 2 if smoke else _BATCH_SIZE, effort)
        reference = times[_REFERENCE]
        ratios = {what: t.ratio(reference) for what, t in times.items()}
        yield Table(
            title=f"Time of inference of {name}, over the library's 16w8a",
            columns=("arithmetic", "milliseconds", "ratio"),
            rows=[
                [what, f"{1e3 * t.median:.2f}", f"{ratios[what]['median']:.2f}"]
                for what, t in times.items()
            ],
            note=f"Logits of {_BATCH_SIZE} examples; medians of seconds of the "
            f"processor, {effort.rounds} rounds in turn. The library's 16w8a rounds "
            "activations to calibrated scales and rescales in float32.",
            raw=[
                {
                    "subject": name,
                    "ratios": ratios,
                    "times": {what: t.asdict() for what, t in times.items()},
                }
            ],
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
