"""Digits, as in the quickstart: weights of 16, 8, 6 and 4 bits.

Sign-m-SPSA with the quickstart's budget of forward passes and tuning, 8-bit activations
and per-channel weight scales. Below 16 bits the weights move by sparse integer steps
(``fgrad.on_grid``), with no state beside them; the ``rounded`` methods are the
paper's way instead, whose updates are rounded to the grid. Every learning rate is
tuned on the validation split by a run of full length with a seed of its own.

Expected test accuracy, seeds 0 to 4, 22,400 forward passes each (backpropagation: 900):
backpropagation 97.9 ± 0.0, 16w8a 94.8 ± 0.9, 8w8a 94.9 ± 1.4, 6w8a 94.4 ± 0.6, 4w8a
94.3 ± 0.6; rounded 8w8a 95.2 ± 0.8, rounded 6w8a 91.3 ± 1.6. A rate of 2e-2, the least
of those tried, was chosen at 16, 8 and 4 bits, 4e-2, the largest, for rounded 6w8a.

    python -m experiments.main \
        --config=experiments/configs/low_bit.py --workdir=workdir/low_bit

A smoke run of some seconds: ``--config=experiments/configs/low_bit.py:smoke``.
"""

from ml_collections import ConfigDict

from experiments.configs import quickstart

BITS = (16, 8, 6, 4)
ROUNDED = (8, 6)  # at 4 bits epsilon rounds to zero, which is an error


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration; ``variant`` as in the quickstart's."""
    config = quickstart.get_config(variant)
    forward = config.methods.forward_16w8a
    forward.per_channel = True
    if variant == "full":
        config.seeds = (0, 1, 2, 3, 4)
        config.tuning_fraction = 1.0  # short runs choose rates that are too large
    backprop = config.methods.backprop
    config.methods = ConfigDict()
    config.methods.backprop = backprop
    for bits in BITS:
        method = forward.copy_and_resolve_references()
        method.bits = (bits, 8)
        config.methods[f"forward_{bits}w8a"] = method
        if bits in ROUNDED:
            rounded = method.copy_and_resolve_references()
            rounded.low_bit = False
            config.methods[f"rounded_{bits}w8a"] = rounded
    config.run = tuple(config.methods)
    return config
