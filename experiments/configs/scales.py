r"""Digits, from a network whose layers differ 100-fold in scale: one epsilon or many.

The quickstart's CNN after pre-training, its layers multiplied by 10, 1, 0.1 and 1,
which leaves the function as it is (ReLU networks allow it; cf. Dinh et al., "Sharp
Minima Can Generalize For Deep Nets", ICML 2017). Compared are one epsilon for all
leaves, of several sizes, and one relative to each leaf's rms
(``fgrad.relative_epsilon``); with SGD as it is, and with ``kernel_normalization``,
which makes the step relative, too. Sign-m-SPSA in 16w8a with half the quickstart's
forward passes; learning rates are tuned on the validation split by runs of full length:
three rates, then further ones while the best is the last in order.

Expected test accuracy, seeds 0 to 2, 11,200 forward passes. SGD: one epsilon of 3e-3
93.8 ± 0.5, 1e-2 93.7 ± 0.1, 3e-2 90.0 ± 1.5, 1e-1 59.0 ± 6.0; relative 1e-1 91.9 ±
1.0, 3e-1 90.0 ± 1.4. Kernel-normalized: one 90.1 ± 2.2, 89.7 ± 1.7, 73.9 ± 4.1, 46.5 ±
3.2; relative 93.4 ± 0.3, 94.0 ± 0.2.

    python -m experiments.main \
        --config=experiments/configs/scales.py --workdir=workdir/scales

A smoke run, mostly compilation: ``--config=experiments/configs/scales.py:smoke``.
"""

from ml_collections import ConfigDict

from experiments.configs import quickstart

# name: epsilon and its unit.
EPSILONS = {
    "one_3e-3": (3e-3, "weights"),
    "one_1e-2": (1e-2, "weights"),
    "one_3e-2": (3e-2, "weights"),
    "one_1e-1": (1e-1, "weights"),
    "relative_1e-1": (1e-1, "rms"),
    "relative_3e-1": (3e-1, "rms"),
}
# step: middle learning rate.
STEPS = {"sgd": 1e-2, "kernel_normalized": 8e-2}


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration; ``variant`` as in the quickstart's."""
    config = quickstart.base(variant)
    config.layer_scales = (10.0, 1.0, 0.1, 1.0)
    config.figure = "dots"
    if variant == "full":
        config.tuning_fraction, config.wider_tuning = 1.0, 4
    forward = config.methods.forward_16w8a
    forward.estimator = "sign_m_spsa"
    config.methods = ConfigDict()
    for step, middle in STEPS.items():
        for name, (epsilon, unit) in EPSILONS.items():
            method = forward.copy_and_resolve_references()
            method.epsilon, method.epsilon_unit = epsilon, unit
            method.learning_rates = quickstart.rates_around(middle)
            if step == "kernel_normalized":
                method.enhancements = ConfigDict({"kernel_normalization": {}})
            if variant == "full":
                method.steps //= 2
            config.methods[f"{name}_{step}"] = method
    config.run = tuple(f"{name}_{step}" for step in STEPS for name in EPSILONS)
    return config
