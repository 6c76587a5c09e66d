r"""Solar cells by joint pairs: an adapter, the last block, all blocks of a network.

The task, the pre-trained network and the leaves are those of ``fine_tuning.py`` and
``activity_search.py``: EfficientNet-Lite0 with ImageNet's weights moves from mono- to
polycrystalline cells. The variants are

- "adapter": a residual adapter of 192 x 192 before the last block, and the head;
- "last_block": all layers of the last block and behind it, 1.0 million weights;
- "whole": all blocks and what follows them, 3.4 million weights, at 64 pixels and with
  batches of 16.

Each trains by backpropagation without and with a checkpoint of every stage, and by
joint pairs (``fgrad.activity.joint_forward_grad``) in float32 and 16w8a, with as many
evaluations and, but for "whole", with 6,000 ("joint_long"); beside them stands the head
alone, by its exact gradient.

    python -m experiments.main \
        --config=experiments/configs/joint_fine_tuning.py:adapter \
        --workdir=workdir/joint_fine_tuning/adapter

needs ``pip install -e '.[solar,weights]'``. One method at a time: ``--config.run=...``.
6,000 evaluations take about a minute on a free core, and "whole" compiles for some
minutes. A smoke run, mostly compilation, has ",smoke" behind the name of the variant
and shows no result.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.configs import fine_tuning, quickstart

BITS = {"fp32": None, "16w8a": (16, 8)}
# What trains, and the learning rates to choose from.
WAYS: dict[str, dict[str, Any]] = {
    "adapter": {
        "adaptation": {"adapter": {}},
        "rate_factors": {"classifier": 0.3},
        "learning_rates": (1e-3, 3e-3),
    },
    "last_block": {
        "adaptation": {"last_blocks": {"num_blocks": 1}},
        "learning_rates": (1e-4, 3e-4, 1e-3),
    },
    "whole": {
        "adaptation": {"last_blocks": {"num_blocks": 16}},
        "learning_rates": (3e-5, 1e-4, 3e-4),
    },
}
# Pairs only teach. Where the last convolution trains as well, it has its exact gradient
# from the head; in the whole network so has all that the residual stream reaches.
JOINT: dict[str, dict[str, Any]] = {
    "adapter": {"every": 4, "epsilon": 0.03, "correction": 0.0},
    "last_block": {"every": 4, "transposed_head": True},
    "whole": {"residual": True, "every": 8},
}
# In 16w8a activations have the whole range of their 8 bits. The usual room to grow,
# half as much again, costs the head 1.5 points of AUC.
ACTIVATION_HEADROOM = 1.0
# As many evaluations as backpropagation takes, and for "joint_long" 6,000.
STEPS = {"adapter": 600, "last_block": 600, "whole": 133}
LONG = {"adapter": 4000, "last_block": 4000}


def get_config(variant: str = "adapter") -> ConfigDict:
    """The configuration.

    Args:
      variant: "adapter", "last_block" or "whole", which ",smoke" may follow.
    """
    way, _, length = variant.partition(",")
    if way not in WAYS or length not in ("", "smoke"):
        raise ValueError(
            f"variant must be one of {list(WAYS)}, with ,smoke or not, got {variant!r}."
        )
    smoke = length == "smoke"
    config = fine_tuning.get_config(length or "full")
    config.count_products = True
    config.gradient_estimates = 0
    if not smoke:
        config.seeds, config.tuning_seeds = (0, 1, 2), (100,)
        config.tuning_fraction, config.wider_tuning = 0.5, 0
    steps = 5 if smoke else STEPS[way]
    shared: dict[str, Any] = {"cache_frozen": True, "rate_factors": {}, **WAYS[way]}
    if way == "whole":
        shared["batch_size"] = 16
        _shrink(config, smoke)
    backprop = quickstart.changed(config.methods.adapter_backprop, shared)
    if way == "whole" and not smoke:
        backprop.steps = 100
    # As many passes as the joint pairs of the whole network, which are few.
    exact_steps = 432 if way == "whole" and not smoke else steps
    exact = {"steps": exact_steps, "learning_rates": (1e-4, 3e-4, 1e-3)}
    joint = {
        "gradient": "joint",
        "joint": {"head": "classifier", **JOINT[way]},
        "steps": steps,
    }
    methods = {
        "backprop": backprop,
        "backprop_checkpoints": quickstart.changed(backprop, {"checkpoint": True}),
        **_in_both(config, "exact_head", "probe_exact", exact),
        **_in_both(config, "joint", "adapter_activity", {**shared, **joint}),
    }
    if way in LONG:
        joint["steps"] = 5 if smoke else LONG[way]
        longer = {**shared, **joint}
        methods |= _in_both(config, "joint_long", "adapter_activity", longer)
    config.methods = ConfigDict(methods)
    config.run = tuple(methods)
    return config


def _shrink(config: ConfigDict, smoke: bool) -> None:
    """Takes smaller images, for a network that is not cached."""
    if not smoke:
        config.source, config.target = "mono_64", "poly_64"
    config.num_evals = 1


def _in_both(
    config: ConfigDict, name: str, base: str, changes: Mapping[str, Any]
) -> dict[str, ConfigDict]:
    """A method of ``fine_tuning.py`` with changes, in float32 and in 16w8a."""
    return {
        f"{name}_{arithmetic}": quickstart.changed(
            config.methods[base],
            {**changes, "bits": bits, "activation_headroom": ACTIVATION_HEADROOM},
        )
        for arithmetic, bits in BITS.items()
    }
