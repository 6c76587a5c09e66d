r"""What else the field has for forward passes, beside pairs, on digits and mnist.

All weights are perturbed, in float32, by as many forward passes for every method:

- ``pairs``: what `fgrad` does by default here (``normalized_spsa``);
- ``one_sided``: m points and one shared base, differences over the losses' deviation
  (FZOO, arXiv 2506.09034), with nearly twice the directions;
- ``cone``: directions within a cone around the momentum (ConMeZO, arXiv 2511.02757);
- ``muon``: directions of low rank, and steps of orthogonal matrices (ZO-Muon, arXiv
  2602.17155); ``low_rank`` is the same with plain steps;
- ``ahead``: the pair is evaluated a step ahead (Extragradient's extrapolation).

Directions in the span of a layer's inputs (AGZO, arXiv 2601.17261) are what perturbed
activations make, see ``configs/joint.py``. Learning rates are tuned on the validation
split: three rates, then further ones while the best is the last in order.

    python -m experiments.main \
        --config=experiments/configs/rivals.py --workdir=workdir/rivals

``rivals.py:mnist`` is the harder task, and ``:smoke`` a run of some seconds.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import quickstart
from experiments.learners.optimizers import forward_passes

# name: what differs from the quickstart's float32, and the middle learning rate.
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "pairs": ({}, 0.02),
    "one_sided": ({"estimator": "one_sided", "num_perturbations": 31}, 0.02),
    "cone": ({"enhancements": {"cone": {"angle": 1.4}}}, 0.02),
    "low_rank": ({"perturbation": "low_rank"}, 0.02),
    "muon": ({"perturbation": "low_rank", "optimizer": "muon"}, 0.005),
    "ahead": ({"enhancements": {"extrapolation": {}}}, 0.02),
}


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration.

    Args:
      variant: "full", "mnist" or "smoke".
    """
    mnist = variant == "mnist"
    config = quickstart.base("full" if mnist else variant)
    if mnist:
        quickstart.to_mnist(config)
    config.wider_tuning = 4
    config.methods = ConfigDict(
        {
            name: quickstart.changed(
                config.methods.forward_fp32,
                {**changes, "learning_rates": quickstart.rates_around(rate)},
            )
            for name, (changes, rate) in METHODS.items()
        }
    )
    pairs = config.methods.pairs
    for method in config.methods.values():
        method.steps = round(
            pairs.steps * forward_passes(pairs) / forward_passes(method)
        )
    config.run = tuple(METHODS)
    return config
