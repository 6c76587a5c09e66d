r"""Where activities are perturbed, and how often: the task of ``fine_tuning.py``.

At a third of its forward passes (11,000) and its learning rate (0.003, not tuned anew):
4, 16 or 64 directions in a step; the adapter before the last two blocks; two sites at
once, both halves of a low-rank change of the last block's projection.

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
_HALVES = {f"blocks_15/project/lora_{half}": _SITE for half in ("down", "up")}
VARIANTS: dict[str, dict[str, Any]] = {
    "directions_4": {"num_perturbations": 4},
    "directions_16": {"num_perturbations": 16},
    "directions_64": {"num_perturbations": 64},
    "two_blocks_after": {
        "adaptation": {"adapter": {"num_blocks": 2}},
        "sites": {"blocks_14/adapter": _SITE, **fine_tuning.HEAD},
    },
    "two_sites": {
        "adaptation": {"lora": {"rank": 8, "kernels": "blocks_15/project"}},
        "sites": {**_HALVES, **fine_tuning.HEAD},
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
    if not smoke:
        config.seeds = (0, 1)
        # Nothing to choose: a run of a step.
        config.tuning_seeds, config.tuning_fraction = (100,), 0.0
    return config
