r"""Scales of branches or a linear probe: what adapts a network at equal passes?

A small network of re-parameterized blocks (`experiments.models.reparameterized`) is
pre-trained and adapted by its 320 scales of branches alone, which fold into the kernels
in every evaluation; by its head alone; or by both. "ood" goes from clean images of
MNIST to the fifteen corruptions of CIFAR-10-C, at severity 3 and 5 (``pip install -e
'.[corruptions]'``); "solar" from mono- to polycrystalline solar cells of 32 pixels
(``pip install -e '.[solar]'``).

Forward gradients (`normalized_spsa`, m = 4) take 3,200 forward passes of 32 images
each, in float32 and in 16w8a, where the int16 kernel is folded from int16 branches and
scales; so does the head by its exact gradient. Backpropagation takes 900 of 64 images.
Learning rates are tuned on the validation split by runs of half the length: three, then
four further ones at most while the best is the last in order.

    python -m experiments.main --config=experiments/configs/reparameterized.py:ood \
        --workdir=workdir/reparameterized/ood

and the same with ``solar``. Expected: perturbed, scales beat the head by 5 to 10
points; see docs/reparameterization.md.

Smoke runs of some seconds: ``:ood_smoke``, on clean images, and ``:solar_smoke``.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import quickstart

SEVERITIES = (3, 5)
PASSES = 3_200
_SCALES: dict[str, Any] = {"adaptation": {"branch_scales": {}}}
_BOTH: dict[str, Any] = {"adaptation": {"branch_scales": {"head": True}}}
_PROBE: dict[str, Any] = {"adaptation": {"linear_probe": {}}, "cache_frozen": True}
_EXACT: dict[str, Any] = {
    "gradient": "activity",
    "optimizer": "adam",
    "sites": {"Dense_0": {"exact": True}},
}
# name: what trains, and in which arithmetics by forward gradients.
WAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "probe": (_PROBE, ("fp32", "16w8a")),
    "scales": (_SCALES, ("fp32", "16w8a")),
    "both": (_BOTH, ("fp32",)),
}
BITS = {"fp32": None, "16w8a": (16, 8)}


def get_config(variant: str = "ood") -> ConfigDict:
    """The configuration.

    Args:
      variant: "ood" or "solar", with "_smoke" behind it for a run of some seconds that
        shows no result.
    """
    task, _, length = variant.partition("_")
    if task not in ("ood", "solar") or length not in ("", "smoke"):
        raise ValueError(
            f'variant must be "ood" or "solar", with _smoke or not, got {variant!r}.'
        )
    smoke = length == "smoke"
    if task == "solar":
        config = _common(smoke)
        config.network, config.dataset = "reparameterized", "solar_cells"
        config.source, config.target = "mono_32", "poly_32"
        config.metrics = ("auc", "accuracy", "balanced_accuracy")
        return config
    config = ConfigDict()
    config.parts = ConfigDict()
    for severity in SEVERITIES:
        part = _common(smoke)
        part.network, part.dataset = "reparameterized", "mnist_5k_c"
        part.source = "clean"
        part.target = "clean" if smoke else f"severity_{severity}"
        config.parts[f"severity_{severity}"] = part
    return config


def _common(smoke: bool) -> ConfigDict:
    config = quickstart.base("smoke" if smoke else "full")
    config.figure = "dots"
    config.parallel_runs = 1
    config.num_evals = 2
    if not smoke:
        config.tuning_fraction, config.wider_tuning = 0.5, 4
    config.pretrain.batch_size = 64
    config.pretrain.input_shift = 2
    backward, forward = config.methods.backprop, config.methods.forward_fp32
    backward = quickstart.changed(backward, {"optimizer": "adam", "batch_size": 64})
    pairs = 2 if smoke else 4
    passes = 40 if smoke else PASSES
    forward = quickstart.changed(
        forward,
        {
            "batch_size": 32,
            "num_perturbations": pairs,
            "steps": passes // (2 * pairs),
            "calibration_images": 1024,
        },
    )
    config.methods = ConfigDict()
    for name, (way, arithmetics) in WAYS.items():
        rates = (1e-2, 3e-2, 1e-1)  # of Adam
        method = quickstart.changed(backward, {**way, "learning_rates": rates})
        config.methods[f"{name}_backprop"] = method
        rates = (1e-2, 3e-2, 1e-1)
        for arithmetic in arithmetics:
            config.methods[f"{name}_{arithmetic}"] = quickstart.changed(
                forward, {**way, "bits": BITS[arithmetic], "learning_rates": rates}
            )
    config.methods["probe_exact"] = quickstart.changed(
        forward,
        # A step is one pass.
        {**_PROBE, **_EXACT, "steps": passes, "learning_rates": (3e-3, 1e-2, 3e-2)},
    )
    kinds = ("backprop", "fp32", "16w8a", "exact")
    names = (f"{way}_{kind}" for way in WAYS for kind in kinds)
    config.run = tuple(name for name in names if name in config.methods)
    return config
