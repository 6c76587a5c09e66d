r"""Digits: how many steps until the loss has halved, before a step is taken.

A CNN pre-trained on upright digits is to adapt to rotated ones, by backpropagation and
by forward gradients (SPSA with m = 16), with a constant learning rate. A linear model
that forward passes along 16 to 256 random directions measure at the start is trained in
the network's place (`fgrad.analysis.linear_model`, `predicted_losses`), and says when
the mean loss of the training images will be down to shares of what it was. Then the
network is trained.

Expected: see docs/training_time.md.

    python -m experiments.main --config=experiments/configs/training_time.py \
        --workdir=workdir/training_time

A smoke run, mostly compiling: ``--config=experiments/configs/training_time.py:smoke``;
a task of MNIST beside the three of digits, which takes four times as long:
``--config=experiments/configs/training_time.py:all``.
"""

from ml_collections import ConfigDict

from experiments.configs import quickstart

# name: network, dataset and domain.
TASKS = {
    "digits_15": ("cnn", "digits", "rotated_15"),
    "digits_30": ("cnn", "digits", "rotated_30"),
    "digits_45": ("cnn", "digits", "rotated_45"),
    "mnist_30": ("cnn_28", "mnist_5k", "rotated_30"),
}


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration.

    Args:
      variant: "full"; "all" for a task of MNIST as well; or "smoke" for a run of some
        seconds that shows no result.
    """
    if variant not in ("full", "all", "smoke"):
        raise ValueError(f'variant must be "full", "all" or "smoke", got {variant!r}.')
    smoke = variant == "smoke"
    config = ConfigDict()
    config.driver = "training_time"
    config.seeds = (0,) if smoke else (0, 1, 2)
    config.directions = (4,) if smoke else (16, 64, 256)  # k
    config.examples = 32 if smoke else 512  # that train, and whose loss is predicted
    config.batch_size = 16 if smoke else 64
    config.steps = 8 if smoke else 400
    config.targets = (0.9,) if smoke else (0.7, 0.5, 0.3)  # shares of the first loss
    config.epsilon = 1e-2  # of the directions and of SPSA, in units of the weights
    config.num_perturbations = 2 if smoke else 16  # m of SPSA
    config.learning_rates = ConfigDict({"backprop": 0.03, "forward": 0.003})
    config.tasks = ConfigDict()
    for name, (network, dataset, target) in TASKS.items():
        if name == "mnist_30" and variant != "all":
            continue
        task = quickstart.base("smoke" if smoke else "full")
        task.network, task.dataset, task.target = network, dataset, target
        config.tasks[name] = task
        if smoke:
            break
    return config
