r"""Where activities are perturbed, and how often: the task of ``fine_tuning.py``.

At a third of its forward passes (11,000) and its learning rate (0.003, not tuned anew):
4, 16 or 64 directions in a step; the adapter before the last two blocks; two sites at
once, both halves of a low-rank change of the last block's projection. Then with a
synthetic gradient (`fgrad.activity.SyntheticGradient`): 1, 4 or 16 directions, as a
control variate, without correction, and at two and four sites of low-rank changes.

    python -m experiments.main \
        --config=experiments/configs/activity_search.py --workdir=workdir/search

A smoke run: ``--config=experiments/configs/activity_search.py:smoke``.
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
}


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration; ``variant`` as in the quickstart's."""
    config = fine_tuning.get_config(variant)
    smoke = variant == "smoke"
    base = config.methods.adapter_activity
    config.methods = ConfigDict()
    for name, changes in VARIANTS.items():
        method = quickstart.changed(base, {**changes, "learning_rates": (3e-3,)})
        if not smoke:
            method.steps = PASSES // optimizers.forward_passes(method)
        config.methods[name] = method
    config.run = tuple(VARIANTS)
    config.early_stopping = True
    if not smoke:
        config.seeds = (0, 1)
        # Nothing to choose: a run of a step.
        config.tuning_seeds, config.tuning_fraction = (100,), 0.0
    return config
