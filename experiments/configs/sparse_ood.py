r"""Why 10% of the weights lose so much out of distribution, and what closes the gap.

The task is severity 5 of ``ood.py``, and the ways to adapt are its linear probes of one
and of three layers and its deep prompts, in 16w8a. Runs are a quarter as long as there,
48,000 forward passes for one layer, 96,000 for three and 24,000 for prompts, passes
that choose weights included. Beside "dense", all weights, stand 10% of each leaf,

- chosen once: by importance as in ``ood.py``, by importance of sixteen times as many
  evaluations, by magnitude, or at random;
- chosen once by importance, and trained by backpropagation ("importance_backprop"),
  which tells what the weights can express from what the estimates cost;
- chosen again and again: by importance ten times, and at random a hundred times.

Learning rates are tuned by runs of a quarter of the length with a seed of their own:
three rates, then further ones while the best is the last in order.

    python -m experiments.main --config=experiments/configs/sparse_ood.py:lp_1 \
        --workdir=workdir/sparse_ood/lp_1

needs ``pip install -e '.[corruptions]'``; "lp_3" and "d_vpt" are the others. Expect for
one layer 72.6 ± 0.4 with all weights, 60.8 ± 1.8 with 10% by importance, 62.1 ± 2.9
with the same 10% by backpropagation, and 71.1 ± 0.3 with 10% chosen at random a hundred
times. A smoke run, on clean images, that shows no result: ``sparse_ood.py:smoke``.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import ood, quickstart
from experiments.learners.optimizers import forward_passes

DENSITY = 0.1
IMPORTANCE: dict[str, Any] = ood.METHODS["sparse"]["enhancements"]["sparse_update"]
SHARE = 4  # of ``ood.py``'s passes one in so many
# How often weights are chosen anew in a run.
BY_IMPORTANCE, AT_RANDOM = 10, 100
# What chooses weights, and how often.
CHOICES: dict[str, tuple[dict[str, Any], int]] = {
    "importance": (IMPORTANCE, 1),
    "importance_exact": ({**IMPORTANCE, "num_perturbations": 1024}, 1),
    "magnitude": ({"density": DENSITY}, 1),
    "random": ({"density": DENSITY, "criterion": "random"}, 1),
    "importance_anew": (IMPORTANCE, BY_IMPORTANCE),
    "random_anew": ({"density": DENSITY, "criterion": "random"}, AT_RANDOM),
}


def get_config(variant: str = "lp_1") -> ConfigDict:
    """The configuration.

    Args:
      variant: "lp_1", "lp_3", "d_vpt", or "smoke".
    """
    if variant not in (*ood.WAYS, "smoke"):
        raise ValueError(
            f"variant must be one of {[*ood.WAYS, 'smoke']}, got {variant!r}."
        )
    smoke = variant == "smoke"
    way = "lp_1" if smoke else variant
    config = ood.get_config("smoke" if smoke else "full").parts.severity_5
    if not smoke:
        config.seeds = (0, 1, 2)
        config.wider_tuning = 5
    dense, backprop = config.methods[f"{way}_16w8a"], config.methods[f"{way}_backprop"]
    budget = dense.steps * forward_passes(dense) / (1 if smoke else SHARE)
    dense.steps = int(budget / forward_passes(dense))
    methods = {"backprop": backprop, "dense": dense}
    for name, (settings, times) in CHOICES.items():
        methods[name] = _sparse(dense, settings, times, budget)
    chosen = {"enhancements": {"sparse_update": IMPORTANCE}}
    methods["importance_backprop"] = quickstart.changed(backprop, chosen)
    config.methods = ConfigDict(methods)
    config.run = tuple(methods)
    return config


def _sparse(
    dense: ConfigDict, settings: dict[str, Any], times: int, budget: float
) -> ConfigDict:
    """The method of all weights with a share of them, within as many passes."""
    settings = dict(settings)
    choosing = 2 * settings.get("num_perturbations", 0) * times
    steps = max(1, int((budget - choosing) / forward_passes(dense)))
    if times > 1:
        settings["reselect_every"] = -(-steps // times)
    return quickstart.changed(
        dense, {"enhancements": {"sparse_update": settings}, "steps": steps}
    )
