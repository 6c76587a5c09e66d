r"""Loss landscapes: where backpropagation and forward gradients go.

The quickstart's task: a CNN pre-trained on upright digits adapts to rotated ones by
backpropagation and by forward gradients in float32, 16w8a and 8w8a. Each forward run is
drawn with backpropagation's into the plane through the pre-trained network and the ends
of both, where the network is evaluated in the forward run's arithmetic. Along the runs
the quality of the gradient estimates is measured against backpropagation of the float
network with the same values: cosine, variance over keys, effective rank; and the share
of the weights that moved. docs/landscape.md shows what came out.

    python -m experiments.main \
        --config=experiments/configs/landscape.py --workdir=workdir/landscape

A smoke run, mostly compilation: ``--config=experiments/configs/landscape.py:smoke``.
"""

from ml_collections import ConfigDict

from experiments.configs import quickstart

# Those that the quickstart chooses on its validation split.
LEARNING_RATES = {
    "backprop": 0.05,
    "forward_fp32": 0.04,
    "forward_16w8a": 0.03,
    "forward_8w8a": 0.04,
}


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration; ``variant`` as in the quickstart's."""
    config = quickstart.base(variant)
    smoke = variant == "smoke"
    config.driver = "landscape"
    config.seeds = (0,)
    config.num_points = 3 if smoke else 15  # of a run that are kept
    config.num_estimates = 2 if smoke else 16  # of the gradient, at each of them
    config.batch = 64 if smoke else 512  # images that the losses are means over
    config.resolution = 3 if smoke else 25  # points on a side of the landscape
    config.chunk = 25  # of them evaluated at once
    for name, rate in LEARNING_RATES.items():
        config.methods[name].learning_rate = rate
    return config
