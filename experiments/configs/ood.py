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

What the paper ran is CIFAR-10-C with a ViT-tiny that others pre-trained, whose weights
and data are not in packages. TFDS prepares the data, and the weights are a file of
timm's deit_tiny_patch16_224:

    python -m experiments.main --config=experiments/configs/ood.py:cifar10 \
        --config.weights=deit_tiny_patch16_224.safetensors --config.data_dir=data \
        --workdir=workdir/cifar10
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from experiments.configs import quickstart

SEVERITIES = (1, 3, 5)
# Of the variant "cifar10": a file, and pixels of a side, to which the images of 32
# pixels are enlarged and the positions of 224 interpolated.
WEIGHTS, SIDE = "deit_tiny_patch16_224.safetensors", 96

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
    """The configuration.

    Args:
      variant: "full", "smoke", or "cifar10" for the paper's data and network.
    """
    config = ConfigDict()
    # Of all parts.
    config.weights = WEIGHTS if variant == "cifar10" else ""
    config.data_dir = config_dict.placeholder(str)  # <workdir>/<part>/data by default
    config.parts = ConfigDict()
    for severity in SEVERITIES:
        part = config.parts[f"severity_{severity}"] = _part(variant, severity)
        part.weights = config.get_ref("weights")
        part.data_dir = config.get_ref("data_dir")
    return config


def _part(variant: str, severity: int) -> ConfigDict:
    published = variant == "cifar10"
    config = quickstart.base("full" if published else variant)
    smoke = variant == "smoke"
    config.network = "vit_tiny" if published else "vit_32"
    config.dataset = "cifar10" if published else "mnist_5k_c"
    config.source = "clean"
    config.target = "clean" if smoke else f"severity_{severity}"
    if published:
        config.target = f"all_{severity}"
        config.image_side = SIDE
    config.realigned = True
    config.figure = "dots"
    config.parallel_runs = 1
    config.num_evals = 2
    if not smoke:
        config.seeds = (0, 1, 2, 3, 4)
        config.tuning_fraction, config.wider_tuning = 0.25, 1
        config.pretrain.steps = 2500
    config.pretrain.batch_size = 64
    adapted(config, WAYS, METHODS, smoke=smoke)
    return config


def adapted(
    config: ConfigDict,
    ways: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]],
    *,
    smoke: bool,
) -> None:
    """Puts every way by backpropagation and by methods of forward gradients.

    Args:
      config: as the quickstart's; its methods are replaced.
      ways: as `WAYS`.
      methods: as `METHODS`.
      smoke: whether the runs are short.
    """
    backward, forward = config.methods.backprop, config.methods.forward_fp32
    forward.epsilon = 1e-2
    forward.calibration_images = 1024
    config.methods = ConfigDict()
    for name, (way, backward_changes, changes, backward_rate, rate) in ways.items():
        common = {"adaptation": way, "cache_frozen": True}
        if smoke:
            changes = {**changes, "steps": forward.steps}
        method = quickstart.changed(backward, {**common, **backward_changes})
        method.learning_rates = quickstart.rates_around(backward_rate)
        config.methods[f"{name}_backprop"] = method
        for kind, more in methods.items():
            method = quickstart.changed(forward, {**common, **changes, **more})
            method.learning_rates = quickstart.rates_around(rate)
            config.methods[f"{name}_{kind}"] = method
    config.run = tuple(
        f"{way}_{kind}" for way in ways for kind in ("backprop", *methods)
    )
