r"""Digits, as in the quickstart: weights of 16, 8, 6 and 4 bits.

Sign-m-SPSA with the quickstart's budget of forward passes, 8-bit activations and
per-channel weight scales. Below 16 bits the weights move by sparse integer steps
(``fgrad.on_grid``), with no state beside them; the ``rounded`` methods are the paper's
way instead, whose updates are rounded to the grid, and ``residual`` keeps what the
rounding leaves in a byte for each weight (``enhancements.error_feedback``). Learning
rates are tuned on the validation split by three runs of full length with seeds of their
own: three rates, then further ones while the best is the last in order.

Expected test accuracy, seeds 0 to 4, 22,400 forward passes each (backpropagation: 900):
backpropagation 97.7 ± 0.1; 16w8a 95.0 ± 0.7, 8w8a 95.2 ± 1.0, 6w8a 93.8 ± 0.5, 4w8a
93.5 ± 0.9; residual 8w8a 94.5 ± 0.6, 6w8a 94.9 ± 0.2; rounded 8w8a 94.9 ± 0.7, 6w8a
91.6 ± 1.4.

    python -m experiments.main \
        --config=experiments/configs/low_bit.py --workdir=workdir/low_bit

A smoke run, mostly compilation: ``--config=experiments/configs/low_bit.py:smoke``.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import quickstart

BITS = (16, 8, 6, 4)
ROUNDED = (8, 6)  # at 4 bits epsilon rounds to zero, which is an error


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration; ``variant`` as in the quickstart's."""
    config = quickstart.base(variant)
    forward = config.methods.forward_16w8a
    forward.estimator = "sign_m_spsa"
    forward.per_channel = True
    if variant == "full":
        config.seeds = (0, 1, 2, 3, 4)
        config.tuning_fraction = 1.0  # short runs choose rates that are too large
        config.wider_tuning = 4
        config.tuning_seeds = (100, 101, 102)
    forward.learning_rates = quickstart.rates_around(2e-2)
    backprop = config.methods.backprop
    config.methods = ConfigDict({"backprop": backprop})
    feedback: dict[str, Any] = {"error_feedback": {}}
    for bits in BITS:
        on_grid = {"bits": (bits, 8)}
        rounded = {**on_grid, "low_bit": False}
        config.methods[f"forward_{bits}w8a"] = quickstart.changed(forward, on_grid)
        if bits in ROUNDED:
            config.methods[f"rounded_{bits}w8a"] = quickstart.changed(forward, rounded)
            config.methods[f"residual_{bits}w8a"] = quickstart.changed(
                forward, {**rounded, "enhancements": feedback}
            )
    config.run = tuple(config.methods)
    return config
