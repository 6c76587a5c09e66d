r"""Out of distribution by exact heads and joint sites, with backpropagation's passes.

The task and the three ways to adapt are those of ``ood.py``; "full" trains all weights.
Beside backpropagation stand

- for a probe of one layer ("lp_1") the exact head (``fgrad.activity_forward_grad``);
- for a probe of three layers ("lp_3"), which are residual, the exact gradient at the
  end of their stream, handed down (``fgrad.activity.joint_forward_grad`` with
  ``residual=True``); and joint pairs that teach the first of them;
- for deep prompts and the head ("d_vpt") the exact head, and four pairs in a step that
  perturb the prompts, 192 weights; and the exact head alone, with prompts as drawn;
- for all weights ("full") the transformer's residual stream as in "lp_3";

in float32 and in 16w8a, by Adam but for "lp_3", whose backpropagation is by SGD with
momentum as well. All take 900 evaluations, where a backward pass counts as two,
but for the pairs of deep prompts, which take 3,600, and "lp_3_pairs_long" with 5,400.
Learning rates are chosen as in ``ood.py``.

    python -m experiments.main --config=experiments/configs/joint_ood.py:severity_5 \
        --workdir=workdir/joint_ood

needs ``pip install -e '.[corruptions]'``. A smoke run, mostly compilation, on clean
images: ``joint_ood.py:smoke``.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import ood, quickstart

BITS = {"fp32": None, "16w8a": (16, 8)}
# Weights may grow to this multiple of the largest in their leaf. A head's grow to eight
# times that; with the usual 1.5 many end at their limit, and a probe 1.3 points lower.
HEADROOM = 12.0
HEAD = {"Dense_0": {"exact": True}}
# Hidden layers of a probe are inside the head's scope.
_PROBE = ("Dense_0/bias", "Dense_0/kernel")
_RESIDUAL = {"head": _PROBE, "residual": True}
_EXACT: dict[str, Any] = {"gradient": "activity", "sites": HEAD}
_STREAM: dict[str, Any] = {"gradient": "joint", "joint": _RESIDUAL}
_PAIRS: dict[str, Any] = {
    "gradient": "joint",
    "joint": {"head": _PROBE, "transposed_head": True, "every": 4},
}
# As backpropagation through the same.
_SGD: dict[str, Any] = {"optimizer": "momentum", "batch_size": 128}

# By way: what differs of methods by forward passes, and their steps and middle rate.
FORWARD: dict[str, dict[str, Any]] = {
    "lp_1_exact": {**_EXACT, "steps": 900, "rate": 0.05},
    "lp_3_joint": {**_STREAM, **_SGD, "steps": 450, "rate": 0.16},
    "lp_3_pairs": {**_PAIRS, **_SGD, "steps": 600, "rate": 0.16},
    "lp_3_pairs_long": {**_PAIRS, **_SGD, "steps": 3600, "rate": 0.16},
    "d_vpt_head": {**_EXACT, "steps": 900, "rate": 0.05},
    "d_vpt_pairs": {
        **_EXACT,
        "others": True,
        "num_perturbations": 4,
        "epsilon": 0.1,
        "steps": 400,
        "rate": 0.05,
    },
    "full_joint": {**_STREAM, "steps": 450, "rate": 3e-3},
}
# Of backpropagation by Adam, in the place of ``ood.py``'s SGD with momentum.
ADAM_RATE = 0.03
ORDER = ("lp_1", "lp_3", "d_vpt", "full")


def get_config(variant: str = "severity_5") -> ConfigDict:
    """The configuration.

    Args:
      variant: "severity_1", "severity_3", "severity_5" or "smoke".
    """
    smoke = variant == "smoke"
    parts = ood.get_config("smoke" if smoke else "full").parts
    part = "severity_5" if smoke else variant
    if part not in parts:
        raise ValueError(
            f"variant must be one of {[*parts, 'smoke']}, got {variant!r}."
        )
    config = parts[part]
    config.count_products = True
    if not smoke:
        config.seeds = (0, 1, 2)
    full = quickstart.changed(
        config.methods.d_vpt_backprop,
        {
            "adaptation": {},
            "cache_frozen": False,
            "optimizer": "adam",
            "learning_rates": quickstart.rates_around(3e-3),
        },
    )
    config.methods.full_backprop = full
    config.methods.full_backprop_checkpoints = quickstart.changed(
        full, {"checkpoint": True}
    )
    for way in ("lp_1", "lp_3", "d_vpt"):
        rates = quickstart.rates_around(ADAM_RATE)
        config.methods[f"{way}_backprop_adam"] = quickstart.changed(
            config.methods[f"{way}_backprop"],
            {"optimizer": "adam", "learning_rates": rates},
        )
    for name, changes in FORWARD.items():
        _add(config, name, dict(changes), smoke)
    backward = ("backprop", "backprop_adam", "backprop_checkpoints")
    found = [f"{way}_{kind}" for way in ORDER for kind in backward]
    found += [f"{name}_{arithmetic}" for name in FORWARD for arithmetic in BITS]
    config.run = tuple(name for name in found if name in config.methods)
    return config


def _add(config: ConfigDict, name: str, changes: dict[str, Any], smoke: bool) -> None:
    """Adds a forward method in both arithmetics, with what trains as in ``ood.py``."""
    way = next(way for way in ORDER if name.startswith(way))
    rates = quickstart.rates_around(changes.pop("rate"))
    adapted = "adaptation", "cache_frozen", "zero_bound", "activation_headroom"
    if way == "full":
        base = config.methods.d_vpt_fp32
        kept: dict[str, Any] = {"adaptation": {}, "cache_frozen": False}
    else:
        base = config.methods[f"{way}_fp32"]
        kept = {field: base[field] for field in adapted}
    common = {**kept, "optimizer": "adam", "batch_size": 64, "learning_rates": rates}
    if smoke:
        changes["steps"] = 10
    for arithmetic, bits in BITS.items():
        config.methods[f"{name}_{arithmetic}"] = quickstart.changed(
            base, {**common, **changes, "bits": bits, "headroom": HEADROOM}
        )
