r"""Out of distribution: a vision transformer adapts to corrupted images, three ways.

A ViT of 28,682 parameters is pre-trained on 3,600 clean images of MNIST and adapted to
others in the fifteen corruptions of CIFAR-10-C, at severity 1 (easy), 3 (medium) and 5
(hard): by a linear probe of one or of three layers, or by deep visual prompts and the
head (`experiments.learners.adapt`). Each by backpropagation and by forward gradients
(``normalized_spsa``) in float32, in 16w8a, and in 16w8a with 10% of the weights, chosen
by a zeroth-order importance score. Controls without training are the source's network
("zero_shot") and the same with features that have the source's mean and deviation
("realigned", which needs no labels).

Learning rates are tuned on the validation split by runs of a quarter of the length with
a seed of their own: three rates, then one more if the best is the last in order. What
is frozen before the weights that train runs once, on the whole dataset. The corruptions
are a package's: ``pip install -e '.[corruptions]'``.

    python -m experiments.main \
        --config=experiments/configs/ood.py --workdir=workdir/ood

Some four hours on one core. Expect 16w8a 3 to 5 points below backpropagation at
severity 5 (docs/results.md).

A smoke run, on clean images: ``--config=experiments/configs/ood.py:smoke``.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import quickstart

SEVERITIES = (1, 3, 5)

# name: the way, what differs in its methods by backpropagation and by forward
# gradients, and the middle learning rates of both.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], float, float]] = {
    "lp_1": ({"linear_probe": {}}, {}, {"steps": 6000}, 0.32, 0.08),
    "lp_3": (
        {"linear_probe": {"num_layers": 3}},
        {},
        # The hidden layers begin as zeros, from which they grow.
        {"steps": 12000, "zero_bound": 0.5, "activation_headroom": 2.0},
        0.16,
        0.024,
    ),
    "d_vpt": (
        {"deep_prompts": {"num_prompts": 2}},
        {"batch_size": 64},
        {"steps": 3000, "batch_size": 16, "epsilon": 0.1},
        0.16,
        0.064,
    ),
}
METHODS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "16w8a": {"bits": (16, 8)},
    "sparse": {
        "bits": (16, 8),
        "enhancements": {
            "sparse_update": {
                "density": 0.1,
                "criterion": "importance",
                "epsilon": 3e-2,
                "num_perturbations": 64,
            }
        },
    },
}


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration; ``variant`` as in the quickstart's."""
    config = ConfigDict()
    config.parts = ConfigDict()
    for severity in SEVERITIES:
        config.parts[f"severity_{severity}"] = _part(variant, severity)
    return config


def _part(variant: str, severity: int) -> ConfigDict:
    config = quickstart.base(variant)
    smoke = variant == "smoke"
    config.network = "vit_32"
    config.dataset = "mnist_5k_c"
    config.source = "clean"
    config.target = "clean" if smoke else f"severity_{severity}"
    config.realigned = True
    config.figure = "dots"
    config.parallel_runs = 1
    config.num_evals = 2
    if not smoke:
        config.seeds = (0, 1, 2, 3, 4)
        config.tuning_fraction, config.wider_tuning = 0.25, 1
        config.pretrain.steps = 2500
    config.pretrain.batch_size = 64

    backward, forward = config.methods.backprop, config.methods.forward_fp32
    forward.epsilon = 1e-2
    forward.calibration_images = 1024
    config.methods = ConfigDict()
    for name, (way, backward_changes, changes, backward_rate, rate) in WAYS.items():
        common = {"adaptation": way, "cache_frozen": True}
        if smoke:
            changes = {**changes, "steps": forward.steps}
        method = quickstart.changed(backward, {**common, **backward_changes})
        method.learning_rates = quickstart.rates_around(backward_rate)
        config.methods[f"{name}_backprop"] = method
        for kind, more in METHODS.items():
            method = quickstart.changed(forward, {**common, **changes, **more})
            method.learning_rates = quickstart.rates_around(rate)
            config.methods[f"{name}_{kind}"] = method
    config.run = tuple(
        f"{way}_{kind}" for way in WAYS for kind in ("backprop", *METHODS)
    )
    return config
