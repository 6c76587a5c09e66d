r"""Where activities are perturbed, and how often: the task of ``fine_tuning.py``.

At a third of its forward passes (11,000) and its learning rate (0.003, not tuned anew):
4, 16 or 64 directions in a step; the adapter before the last two blocks; two sites at
once, both halves of a low-rank change of the last block's projection. Then with a
synthetic gradient (`fgrad.activity.SyntheticGradient`): 1, 4 or 16 directions, as a
control variate, without correction, at two and four sites of low-rank changes, and at
each layer of the last block and behind it: 1.0 million weights, beside backpropagation
through the same, both with rates of their own, tuned with one seed.

    python -m experiments.main \
        --config=experiments/configs/activity_search.py --workdir=workdir/search

A smoke run of three: ``--config=experiments/configs/activity_search.py:smoke``.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import optimizers
from experiments.configs import fine_tuning, quickstart

PASSES = 11_000
_SITE = {"epsilon": 0.03}


def _low_rank(site: dict[str, Any], *blocks: int, rank: int = 8) -> dict[str, Any]:
    """Changes of the projections of blocks, each half a site of its own."""
    halves = {
        f"blocks_{block}/project/lora_{half}": site
        for block in blocks
        for half in ("down", "up")
    }
    kernels = f"blocks_({'|'.join(map(str, blocks))})/project"
    return {
        "adaptation": {"lora": {"rank": rank, "kernels": kernels}},
        "sites": {**halves, **fine_tuning.HEAD},
    }


def _synthetic(directions: int, **settings: Any) -> dict[str, Any]:
    predicted = {"site": "classifier", **settings}
    site = {**_SITE, "synthetic": predicted}
    return {
        "sites": {fine_tuning.ADAPTER: site, **fine_tuning.HEAD},
        "num_perturbations": directions,
    }


_LAST_BLOCK = {
    "adaptation": {"last_blocks": {"num_blocks": 1}},
    "learning_rates": (1e-4, 3e-4, 1e-3),
    "rate_factors": {},
}
_LAYERS = (*(f"blocks_15/{x}" for x in ("expand", "depthwise", "project")), "head")
VARIANTS: dict[str, dict[str, Any]] = {
    "directions_4": {"num_perturbations": 4},
    "directions_16": {"num_perturbations": 16},
    "directions_64": {"num_perturbations": 64},
    "two_blocks_after": {
        "adaptation": {"adapter": {"num_blocks": 2}},
        "sites": {"blocks_14/adapter": _SITE, **fine_tuning.HEAD},
    },
    "two_sites": _low_rank(_SITE, 15),
    "synthetic_1": _synthetic(1),
    "synthetic_4": _synthetic(4),
    "synthetic_16": _synthetic(16),
    "synthetic_4_unbiased": _synthetic(4, correction=1.0),
    "synthetic_4_uncorrected": _synthetic(4, correction=0.0),
    "synthetic_4_memory_20": _synthetic(4, memory=20),
    "synthetic_two_sites": {
        **_low_rank(fine_tuning.SYNTHETIC, 15),
        "num_perturbations": 4,
    },
    "synthetic_four_sites": {
        **_low_rank(fine_tuning.SYNTHETIC, 14, 15),
        "num_perturbations": 4,
    },
    "synthetic_last_block": {
        **_LAST_BLOCK,
        "sites": {
            **dict.fromkeys(_LAYERS, fine_tuning.SYNTHETIC),
            **fine_tuning.HEAD,
        },
        "num_perturbations": 4,
    },
}


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration; ``variant`` as in the quickstart's."""
    config = fine_tuning.get_config(variant)
    smoke = variant == "smoke"
    base, backward = config.methods.adapter_activity, config.methods.adapter_backprop
    config.methods = ConfigDict()
    for name, changes in VARIANTS.items():
        method = quickstart.changed(base, {"learning_rates": (3e-3,), **changes})
        if not smoke:
            method.steps = PASSES // optimizers.forward_passes(method)
        config.methods[name] = method
    config.methods.backprop_last_block = quickstart.changed(backward, _LAST_BLOCK)
    config.run = (*VARIANTS, "backprop_last_block")
    if smoke:  # each compiles for some seconds
        config.run = ("directions_4", "two_blocks_after", "synthetic_two_sites")
    config.early_stopping = True
    if not smoke:
        config.seeds, config.tuning_seeds = (0, 1), (100,)
    return config
