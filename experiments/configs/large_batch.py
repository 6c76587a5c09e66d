r"""Digits and MNIST: does a step ahead help when batches are large?

A network of one hidden layer, pre-trained on upright digits, adapts to rotated ones by
forward gradients (`normalized_spsa`, m = 16, float32) with batches of 64, 256 and 1,024
images, at an equal number of forward passes whatever their batch: plain SGD, momentum,
sharpness-aware perturbation, and extrapolation (`fgrad.enhancements.extrapolation`)
along the last update, once and four times as far, and along this step's own, which
halves the number of steps. Learning rates are tuned on the validation split by runs of
full length, for each batch: three, then further ones while the best is the last in
order.

Expected: see docs/extrapolation.md.

    python -m experiments.main \
        --config=experiments/configs/large_batch.py --workdir=workdir/large_batch

A smoke run, mostly compilation: ``--config=experiments/configs/large_batch.py:smoke``;
one of the two tasks: ``:digits`` and ``:mnist``; MNIST at a quarter of the forward
passes, with two of the batches and some of the methods, and learning rates tuned by
runs of half that length: ``:mnist_short``.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import quickstart
from experiments.learners.optimizers import forward_passes

BUDGET = 6_400  # forward passes of a run
SHORT = 4  # the short variant has this part of them, and larger steps
SHORT_METHODS = ("plain", "momentum", "extrapolation_momentum", "extrapolation")
BATCHES = (64, 256, 1024)
TASKS = {
    "full": ("digits", "mnist"),
    "digits": ("digits",),
    "mnist": ("mnist",),
    "mnist_short": ("mnist",),
    "smoke": ("digits",),
}

# name: what differs from SGD, and a factor of its middle learning rate.
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "plain": ({}, 1),
    "momentum": ({"optimizer": "momentum"}, 0.1),
    "sharpness_aware": ({"enhancements": {"sharpness_aware": {"rho": 1e-2}}}, 1),
    "extrapolation": ({"enhancements": {"extrapolation": {"scale": 1.0}}}, 1),
    "extrapolation_4": ({"enhancements": {"extrapolation": {"scale": 4.0}}}, 1),
    "extrapolation_momentum": (
        {"optimizer": "momentum", "enhancements": {"extrapolation": {"scale": 1.0}}},
        0.1,
    ),
    "two_pass": ({"enhancements": {"extrapolation": {"two_pass": True}}}, 1.6),
}


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration.

    Args:
      variant: "full"; "digits" or "mnist" for one of the two tasks; "mnist_short" for
        MNIST at a quarter of the passes; or "smoke" for a run of some seconds that
        shows no result.
    """
    if variant not in TASKS:
        raise ValueError(f"variant must be one of {list(TASKS)}, got {variant!r}.")
    config = ConfigDict()
    config.parts = ConfigDict()
    for task in TASKS[variant]:
        for batch in _batches(variant):
            config.parts[f"{task}_{batch}"] = _part(variant, task, batch)
    return config


def _batches(variant: str) -> tuple[int, ...]:
    return {"smoke": BATCHES[:1], "mnist_short": BATCHES[::2]}.get(variant, BATCHES)


def _part(variant: str, task: str, batch: int) -> ConfigDict:
    smoke, short = variant == "smoke", variant == "mnist_short"
    config = quickstart.base("smoke" if smoke else "full")
    config.figure = "dots"
    if not smoke:
        config.tuning_fraction = 0.5 if short else 1.0
        config.wider_tuning = 3
    config.network = "mlp_small"
    if task == "mnist":
        config.dataset = "mnist_5k"
        config.target = "rotated_45"
        config.pretrain.input_shift = 3
    forward, backprop = config.methods.forward_fp32, config.methods.backprop
    backprop.batch_size = forward.batch_size = batch
    middle = forward.learning_rates[1] * (8 if short else 1)
    if short:
        backprop.learning_rates = quickstart.rates_around(0.13)
    config.methods = ConfigDict({"backprop": backprop})
    for name, (changes, factor) in METHODS.items():
        method = quickstart.changed(forward, changes)
        method.learning_rates = quickstart.rates_around(middle * factor)
        if not smoke:
            budget = BUDGET // SHORT if short else BUDGET
            method.steps = budget // forward_passes(method)
        config.methods[name] = method
    config.run = ("backprop", *(SHORT_METHODS if short else METHODS))
    return config
