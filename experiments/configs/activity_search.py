r"""Where activities are perturbed, and how often: the task of ``fine_tuning.py``.

At a third of its forward passes (11,000) and its learning rate (0.003, not tuned anew):
4, 16 or 64 directions in a step; the adapter before the last two blocks; two sites at
once, both halves of a low-rank change of the last block's projection. Then with a
synthetic gradient (`fgrad.activity.SyntheticGradient`): 1, 4 or 16 directions, as a
control variate, without correction, at two and four sites of low-rank changes; at both
layers of an adapter with 16 or 64 hidden values; at two adapters, before the last two
blocks each, by the network's loss or greedily: the first by the loss of a local head
behind its block; and at each layer of the last block and behind it: 1.0 million
weights. The last three stand beside backpropagation through the same, the last block
with rates of its own, tuned with one seed.

    python -m experiments.main \
        --config=experiments/configs/activity_search.py --workdir=workdir/search

A smoke run of three: ``--config=experiments/configs/activity_search.py:smoke``.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import fine_tuning, quickstart
from experiments.learners import optimizers

PASSES = 11_000
_SITE = {"epsilon": 0.03}
_EXACT = fine_tuning.HEAD["classifier"]


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


def _predicted(*sites: str, **adaptation: Any) -> dict[str, Any]:
    """A way to adapt, and sites with synthetic gradients."""
    return {
        "adaptation": adaptation,
        "sites": {**dict.fromkeys(sites, fine_tuning.SYNTHETIC), **fine_tuning.HEAD},
        "num_perturbations": 4,
    }


def _synthetic(directions: int, **settings: Any) -> dict[str, Any]:
    predicted = {"site": "classifier", **settings}
    site = {**_SITE, "synthetic": predicted}
    return {
        "sites": {fine_tuning.ADAPTER: site, **fine_tuning.HEAD},
        "num_perturbations": directions,
    }


# Before each of the last two blocks.
_ADAPTERS = ("blocks_14/adapter", fine_tuning.ADAPTER)
_TWO_ADAPTERS = {"num_blocks": 2, "num_adapters": 2}
_GREEDY = {"adapter": {**_TWO_ADAPTERS, "local_heads": True}}
_GREEDY_SITES = {
    "blocks_14/adapter": {
        **_SITE,
        "synthetic": {"site": "blocks_14/local_head"},
        "loss": "blocks_14",
    },
    "blocks_14/local_head": {**_EXACT, "loss": "blocks_14"},
    fine_tuning.ADAPTER: {**fine_tuning.SYNTHETIC, "loss": "network"},
    "classifier": {**_EXACT, "loss": "network"},
}
_HIDDEN = ("blocks_15/adapter_down", fine_tuning.ADAPTER)
_LAYERS = (*(f"blocks_15/{x}" for x in ("expand", "depthwise", "project")), "head")
_LAST_BLOCK = {"last_blocks": {"num_blocks": 1}}
_OWN_RATES = {"learning_rates": (1e-4, 3e-4, 1e-3), "rate_factors": {}}

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
    "synthetic_width_16": _predicted(*_HIDDEN, adapter={"width": 16}),
    "synthetic_width_64": _predicted(*_HIDDEN, adapter={"width": 64}),
    "synthetic_two_adapters": _predicted(*_ADAPTERS, adapter=_TWO_ADAPTERS),
    "synthetic_greedy": {**_predicted(**_GREEDY), "sites": _GREEDY_SITES},
    "synthetic_last_block": {**_predicted(*_LAYERS, **_LAST_BLOCK), **_OWN_RATES},
}
# The same leaves by backpropagation.
BACKWARD: dict[str, dict[str, Any]] = {
    "backprop_two_adapters": {"adaptation": {"adapter": _TWO_ADAPTERS}},
    "backprop_greedy": {"adaptation": _GREEDY},
    "backprop_last_block": {"adaptation": _LAST_BLOCK, **_OWN_RATES},
}


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration; ``variant`` as in the quickstart's."""
    config = fine_tuning.get_config(variant)
    smoke = variant == "smoke"
    base, backward = config.methods.adapter_activity, config.methods.adapter_backprop
    config.methods, rate = ConfigDict(), {"learning_rates": (3e-3,)}
    for name, changes in VARIANTS.items():
        method = quickstart.changed(base, {**rate, **changes})
        if not smoke:
            method.steps = PASSES // optimizers.forward_passes(method)
        config.methods[name] = method
    for name, changes in BACKWARD.items():
        config.methods[name] = quickstart.changed(backward, {**rate, **changes})
    config.run = (*VARIANTS, *BACKWARD)
    if smoke:  # each compiles for some seconds
        config.run = ("directions_4", "two_blocks_after", "synthetic_two_sites")
    config.early_stopping, config.figure = True, "dots"
    if not smoke:
        config.seeds, config.tuning_seeds = (0, 1), (100,)
    return config
