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

The paper drew a ViT-tiny's. That of one which others pre-trained, adapted from CIFAR-10
to CIFAR-10-C, takes data that TFDS prepares and a file of timm's weights:

    python -m experiments.main --config=experiments/configs/landscape.py:vit_tiny \
        --config.weights=deit_tiny_patch16_224.safetensors --config.data_dir=data \
        --workdir=workdir/landscape_vit
"""

from ml_collections import ConfigDict

from experiments.configs import ood, quickstart

# Those that the quickstart chooses on its validation split.
LEARNING_RATES = {
    "backprop": 0.05,
    "forward_fp32": 0.04,
    "forward_16w8a": 0.03,
    "forward_8w8a": 0.04,
}


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration.

    Args:
      variant: "full", "smoke", or "vit_tiny" for the paper's network.
    """
    published = variant == "vit_tiny"
    config = quickstart.base("full" if published else variant)
    smoke = variant == "smoke"
    if published:
        config.network, config.dataset = "vit_tiny", "cifar10"
        config.source, config.target = "clean", "all_5"
        config.weights, config.image_side = ood.WEIGHTS, ood.SIDE
    config.driver = "landscape"
    config.seeds = (0,)
    config.num_points = 3 if smoke else 15  # of a run that are kept
    config.num_estimates = 2 if smoke else 16  # of the gradient, at each of them
    # Images that the losses are means over.
    config.batch = 64 if smoke or published else 512
    config.resolution = 3 if smoke else 25  # points on a side of the landscape
    config.chunk = 25  # of them evaluated at once
    for name, rate in LEARNING_RATES.items():
        config.methods[name].learning_rate = rate
    return config
