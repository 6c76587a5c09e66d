r"""Solar cells: deeper than the head, from mono- to polycrystalline, with activities.

EfficientNet-Lite0 with ImageNet's weights, its head trained on monocrystalline cells,
gets a residual adapter (192 x 192) before its last block. Adapter and head train on
polycrystalline cells: by backpropagation, with all activations and with an eighth of
them (`experiments.models.sampled`); by perturbing the adapter's output
(``fgrad.activity_forward_grad``) with the head's exact gradient; the same with a
synthetic gradient (``fgrad.activity.SyntheticGradient``) and a quarter of the forward
passes; both in float32 and 16w8a; and by perturbing the adapter's weights, with the
head's exact gradient as well. Beside them probes, which train the head alone: exact,
and sign-m-SPSA. All see features standardized by the target's statistics, without
labels.

What is frozen before the adapter runs once on the whole dataset. Adam with linear
decay; learning rates are tuned on the validation split by three runs of half the length
with seeds of their own. Every evaluation counts as a whole forward pass, though those
after the adapter run only its block and the head.

The images are under CC BY-NC-SA 4.0 (see `experiments.data.solar`):
``pip install -e '.[solar,weights]'``.

    python -m experiments.main \
        --config=experiments/configs/fine_tuning.py --workdir=workdir/fine_tuning

Expect (AUC, 5 seeds): backpropagation through the adapter 89.1 ± 0.8, synthetic
gradients 88.8 ± 0.7 in float32 and 88.5 ± 0.8 in 16w8a, activities alone 87.8 ± 0.7 in
float32, weights 85.9 ± 0.8; heads alone 86.9 ± 0.4 (backpropagation), 86.2 ± 0.1
(exact), 85.8 ± 1.6 (sign-m-SPSA). On one core a run with synthetic gradients takes some
two minutes, with activities alone or weights four to five.

A smoke run of three methods: ``--config=experiments/configs/fine_tuning.py:smoke``.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import quickstart

ADAPTER = "blocks_15/adapter"
HEAD = {"classifier": {"exact": True, "epsilon": 0.01}}
SYNTHETIC = {"epsilon": 0.03, "synthetic": {"site": "classifier"}}
_PROBE: dict[str, Any] = {"adaptation": {"linear_probe": {}}, "cache_frozen": True}
# The head sees 1,280 features, so it moves the logits as much at a lower rate.
_ADAPTED: dict[str, Any] = {
    "adaptation": {"adapter": {}},
    "cache_frozen": True,
    "rate_factors": {"classifier": 0.3},
}


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration; ``variant`` as in the quickstart's."""
    config = quickstart.base(variant)
    smoke = variant == "smoke"
    config.network = "efficientnet_lite0"
    config.weights = "imagenet"
    config.dataset = "solar_cells"
    size = 32 if smoke else 96  # pixels
    config.source, config.target = f"mono_{size}", f"poly_{size}"
    # At 96 pixels many features are rare; the default would blow them up.
    config.deviation_floor = 1.0
    config.metrics = ("auc", "accuracy", "balanced_accuracy")
    config.gradient_estimates = 0 if smoke else 16
    if not smoke:
        config.seeds = (0, 1, 2, 3, 4)
        # One run of its validation images chooses by noise.
        config.tuning_seeds = (100, 101, 102)
        config.tuning_fraction, config.wider_tuning = 0.5, 1

    pretrain = {
        "learning_rate": 1e-3,
        "steps": 30 if smoke else 500,
        "input_shift": 0,
        "input_noise": 0.0,
    }
    config.pretrain = quickstart.changed(config.pretrain, {**_PROBE, **pretrain})
    config.methods = ConfigDict(
        {**_backward_methods(config), **_forward_methods(config, smoke)}
    )
    # Each compiles for some seconds.
    short = ("adapter_backprop", "probe_sign", "adapter_synthetic_16w8a")
    config.run = short if smoke else tuple(config.methods)
    return config


def _backward_methods(config: ConfigDict) -> dict[str, ConfigDict]:
    """Backpropagation through the head alone, and through the adapter as well."""
    backprop = quickstart.changed(
        config.methods.backprop,
        {"optimizer": "adam", "learning_rates": (1e-3, 3e-3, 1e-2), "batch_size": 32},
    )
    return {
        "probe_backprop": quickstart.changed(backprop, _PROBE),
        "adapter_backprop": quickstart.changed(backprop, _ADAPTED),
        "adapter_sampled": quickstart.changed(
            backprop, {**_ADAPTED, "sampled": quickstart.SAMPLED}
        ),
    }


def _forward_methods(config: ConfigDict, smoke: bool) -> dict[str, ConfigDict]:
    """Methods that perturb activations or weights, and the exact head."""
    activity = quickstart.changed(
        config.methods.forward_fp32,
        {
            "gradient": "activity",
            "optimizer": "adam",
            "batch_size": 32,
            "steps": 5 if smoke else 1000,
            "learning_rates": (1e-3, 3e-3, 1e-2),
            "epsilon": 1e-2,
            "epsilon_unit": "rms",
        },
    )
    through = {"sites": {ADAPTER: {"epsilon": 0.03}, **HEAD}}
    predicted = {"sites": {ADAPTER: SYNTHETIC, **HEAD}, "num_perturbations": 4}
    changes: dict[str, dict[str, Any]] = {
        # A step costs one forward pass, so it may take as many steps as the others
        # have forward passes.
        "probe_exact": {
            **_PROBE,
            "sites": HEAD,
            "steps": 5 if smoke else 33_000,
            "learning_rates": (3e-5, 1e-4, 3e-4),
        },
        "probe_sign": {
            **_PROBE,
            "gradient": "forward",
            "batch_size": 256,
            "estimator": "sign_m_spsa",
            "epsilon_unit": "weights",
        },
        "adapter_activity": {**_ADAPTED, **through},
        "adapter_activity_16w8a": {**_ADAPTED, **through, "bits": (16, 8)},
        "adapter_synthetic": {**_ADAPTED, **predicted},
        "adapter_synthetic_16w8a": {**_ADAPTED, **predicted, "bits": (16, 8)},
        "adapter_weights": {**_ADAPTED, "sites": HEAD, "others": True},
    }
    return {
        name: quickstart.changed(activity, change) for name, change in changes.items()
    }
