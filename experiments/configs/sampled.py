r"""Digits: backpropagation that keeps a part of its activations.

A multilayer perceptron with two hidden layers, trained on upright digits, adapts to
rotated ones by momentum SGD. The backward pass of each dense layer keeps all rows of
its input, or 50, 25 or 12.5% of them, by column-row sampling and by winner-take-all
sampling (`experiments.models.sampled`). The cosine is that of a gradient of one batch
with the exact one, at the start of the adaptation. Learning rates are tuned on the
validation split.

Expected: see docs/results.md.

    python -m experiments.main \
        --config=experiments/configs/sampled.py --workdir=workdir/sampled

A smoke run, mostly compilation: ``--config=experiments/configs/sampled.py:smoke``.
"""

from ml_collections import ConfigDict, config_dict


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration; ``variant`` as in the quickstart's."""
    if variant not in ("full", "smoke"):
        raise ValueError(f'variant must be "full" or "smoke", got {variant!r}.')
    smoke = variant == "smoke"
    config = ConfigDict()
    config.driver = "sampled"
    config.dataset = "digits"
    config.source, config.target = "upright", "rotated_30"
    config.data_dir = config_dict.placeholder(str)  # <workdir>/data by default
    config.backbone = ""
    config.seeds = (0,) if smoke else (0, 1, 2)
    config.tuning_seeds = (100,) if smoke else (100, 101, 102)
    config.widths = (16, 16) if smoke else (64, 64)  # of the hidden layers
    config.batch_size = 128
    config.pretrain_steps, config.pretrain_rate = (10 if smoke else 500), 0.1
    config.steps = 10 if smoke else 300
    config.learning_rates = (0.1,) if smoke else (0.03, 0.1, 0.3)
    config.estimates = 2 if smoke else 64  # of the gradient, for the cosine
    config.rows = (32,) if smoke else (64, 32, 16)  # of a batch that are kept
    config.samplers = (
        ("winner_take_all",)
        if smoke
        else (
            "column_row",
            "winner_take_all",
        )
    )
    return config
