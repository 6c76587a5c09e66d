r"""MNIST, 5,000 images: which labels are wrong, by the influence of examples (TracIn).

A tenth of the training labels are replaced by others, and a CNN learns from all of
them. Examples are then checked in the order of their influence on themselves, summed
over checkpoints of the run: how many of the wrong labels are among the first? Influence
by slopes along random directions and by the head's exact traces need forward passes
only (`fgrad.analysis.forward_traces`, `head_traces`); beside them stand the gradient of
all weights by backpropagation and the loss alone. The second part of the table is the
rank correlation with the influence by backpropagation: of examples on themselves, and
on the losses of test examples.

Expected: see docs/influence.md.

    python -m experiments.main \
        --config=experiments/configs/influence.py --workdir=workdir/influence

A smoke run, mostly compilation: ``--config=experiments/configs/influence.py:smoke``;
solar cells of 32 pixels: ``--config=experiments/configs/influence.py:solar``.
"""

from ml_collections import ConfigDict, config_dict


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration.

    Args:
      variant: "full"; "solar" for solar cells; or "smoke" for a short run
        that shows no result.
    """
    if variant not in ("full", "solar", "smoke"):
        raise ValueError(
            f'variant must be "full", "solar" or "smoke", got {variant!r}.'
        )
    smoke, solar = variant == "smoke", variant == "solar"
    config = ConfigDict()
    config.driver = "influence"

    config.network = "cnn" if smoke else "cnn_28"  # 11,018 parameters for 28x28 pixels
    config.dataset = {"smoke": "digits", "solar": "solar_cells"}.get(
        variant, "mnist_5k"
    )
    config.domain = "mono_32" if solar else "upright"
    config.data_dir = config_dict.placeholder(str)  # <workdir>/data by default
    config.backbone = ""
    config.head = "Dense_0"  # name of the last layer
    config.seeds = (0,) if smoke else (0, 1, 2)  # network, batches, labels, directions

    config.flipped = 0.1  # share of the training labels that are replaced
    config.checked = (0.1, 0.2, 0.3)  # shares of the examples that are checked
    config.checkpoints = 2 if smoke else 3  # each in the middle of a part of the run
    config.directions = (1, 4) if smoke else (1, 4, 16, 64)  # m, in rising order
    config.epsilon = 1e-2
    config.tests = 20 if smoke else 100  # test examples whose losses are traced back
    config.chunk = 250  # examples whose gradients are in memory at once

    config.method = ConfigDict()
    config.method.gradient = "backward"
    config.method.optimizer = "momentum"
    config.method.learning_rate = 0.05  # decays linearly to 0
    config.method.steps = 20 if smoke else 400
    config.method.batch_size = 128
    return config
