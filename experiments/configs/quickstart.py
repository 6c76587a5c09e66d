r"""Digits: from upright to rotated by 30 degrees, four ways.

A small CNN is pre-trained on upright digits with backpropagation, then adapted to the
rotated ones by backpropagation, by forward gradients (``normalized_spsa``) in float32
and in 16w8a fixed point, and in 8w8a, whose weights move by sparse integer steps
(``fgrad.on_grid``).
Learning rates are chosen per method on the validation split, by runs of 0.3 of the
length; runs of 0.1 choose rates that are too large.

Expected test accuracy, seeds 0 to 2: 45.3% before, 98.0 ± 0.1 (backpropagation), 95.1 ±
0.4 (float32), 95.3 ± 0.5 (16w8a), 94.3 ± 0.2 (8w8a).

    python -m experiments.main \
        --config=experiments/configs/quickstart.py --workdir=workdir/quickstart

A smoke run of some seconds: ``--config=experiments/configs/quickstart.py:smoke``.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration.

    Args:
      variant: "full", or "smoke" for a run of some seconds that shows no result.
    """
    if variant not in ("full", "smoke"):
        raise ValueError(f'variant must be "full" or "smoke", got {variant!r}.')
    smoke = variant == "smoke"
    config = ConfigDict()

    config.network = "cnn"  # 25,866 parameters
    config.weights = ""  # or "imagenet": published ones, to pre-train the head upon
    config.backbone = ""  # or "efficientnet_lite0": its features instead of images
    config.dataset = "digits"  # scikit-learn's 1,797 real images
    config.source = "upright"  # domain of pre-training
    config.target = "rotated_30"  # domain of adaptation
    config.data_dir = config_dict.placeholder(str)  # <workdir>/data by default

    # Whether to score the source's network also on features that have the source's mean
    # and deviation, for which no labels are needed; a network with stages can.
    config.realigned = False
    config.deviation_floor = 0.1  # of features, as a share of their mean deviation
    # Names in experiments.learners.metrics; the first one decides.
    config.metrics = ("accuracy",)
    config.seeds = (0, 1) if smoke else (0, 1, 2)  # batches and perturbations
    # Short runs with these seeds choose the learning rates.
    config.tuning_seeds = (100,)
    config.tuning_fraction = 0.3  # their length, as a share of a run's steps
    # How many further rates may be tried while the best one is the smallest or largest.
    config.wider_tuning = 0
    config.parallel_runs = 2  # methods that train at a time, each with one run
    # Seconds between two snapshots of a run; a killed run goes on from the last one.
    config.snapshot_seconds = 30.0
    config.event_files = False  # for TensorBoard, of every run, in <workdir>/runs
    config.num_evals = 2 if smoke else 10  # points of a curve after its start
    # Whether to tell also the test scores where the validation score was best.
    config.early_stopping = False
    # How many estimates of each method to compare with the gradient; 0 for none.
    config.gradient_estimates = 0
    # Whether to count the products of the weights' gradients as passes of their own.
    config.count_products = False
    config.figure = "curves"  # or "dots", for many methods

    # Factors that the layers of the network are multiplied with before it is adapted;
    # its function stays the same, see `experiments.models.cnn.rescaled`.
    config.layer_scales = ()

    config.pretrain = _pretrain(smoke)
    backward, forward = _backward(smoke), _forward(smoke)

    # Ways to adapt, names in experiments.learners.adapt, and their options; by default
    # all weights train. With cache_frozen, the frozen stages before the weights that
    # train run once for all steps.
    for method in (backward, forward):
        method.adaptation = ConfigDict()
        # Factors of the learning rate, by the names of layers.
        method.rate_factors = ConfigDict()
        method.cache_frozen = False

    # Methods to run, in the order of the table.
    config.run = ("backprop", "forward_fp32", "forward_16w8a", "forward_8w8a")
    config.methods = ConfigDict()
    config.methods.backprop = backward
    config.methods.forward_fp32 = forward
    config.methods.forward_16w8a = forward.copy_and_resolve_references()
    config.methods.forward_16w8a.bits = (16, 8)
    config.methods.forward_8w8a = forward.copy_and_resolve_references()
    config.methods.forward_8w8a.bits = (8, 8)
    return config


def _pretrain(smoke: bool) -> ConfigDict:
    """The training of the network from which all runs start.

    Shifts, noise and soft labels make its minimum wide, which forward gradients need
    more than backpropagation does.
    """
    pretrain = ConfigDict()
    # Whether to begin from the network in experiments/models/starts, where there is one
    # that was pre-trained by the same settings; its end differs between processors.
    pretrain.committed = True
    pretrain.seed = 0
    pretrain.gradient = "backward"
    pretrain.optimizer = "adam"
    pretrain.learning_rate = 3e-3  # decays linearly to 0, like all here
    pretrain.steps = 30 if smoke else 800
    pretrain.batch_size = 128
    pretrain.input_shift = 1  # pixels at most, each way
    pretrain.input_noise = 0.3  # standard deviation; pixels lie in [0, 1]
    pretrain.label_smoothing = 0.1
    return pretrain


def _backward(smoke: bool) -> ConfigDict:
    """The method of backpropagation in float32."""
    method = ConfigDict()
    method.gradient = "backward"
    method.optimizer = "momentum"  # SGD with momentum 0.9
    method.bits = None  # float32
    # Whether to keep nothing of a stage but its input, and to evaluate it once more.
    method.checkpoint = False
    method.steps = 20 if smoke else 300
    method.batch_size = 128
    method.learning_rates = (1e-2, 3e-2, 5e-2)  # to choose from
    return method


def _forward(smoke: bool) -> ConfigDict:
    """The method of forward gradients in float32."""
    method = ConfigDict()
    method.gradient = "forward"
    method.optimizer = "sgd"
    method.bits = None
    method.steps = 20 if smoke else 700
    method.batch_size = 64
    method.learning_rates = (2e-2, 3e-2, 4e-2)
    method.num_perturbations = 2 if smoke else 16  # m; a step costs 2m forward passes
    method.vectorize = 1  # perturbations evaluated at once
    # Other names are in experiments.learners.optimizers.
    method.perturbation = "normal"
    method.rank = 1  # of "low_rank" only
    method.estimator = "normalized_spsa"
    method.enhancements = ConfigDict()  # names in fgrad.enhancements, and arguments
    method.epsilon = 3e-2
    # For the gradient "activity": the settings of each layer whose output is perturbed,
    # and whether all other weights that train are perturbed as well; see
    # fgrad.activity_forward_grad.
    method.sites = ConfigDict()
    method.others = False
    # For the gradient "joint": the arguments of fgrad.activity.joint_forward_grad.
    method.joint = ConfigDict()
    method.epsilon_unit = "weights"  # or each leaf's "rms" or weight "step"
    method.low_bit = True  # weights of less than 16 bits move by sparse grid steps
    method.per_channel = False  # one weight scale per output channel
    method.headroom = 1.5  # weights may grow to this multiple of max|w|
    method.zero_bound = 0.05  # taken for max|w| where all weights are zero
    method.activation_headroom = 1.5  # the same for activations
    # At most so many images, the first of the train split, calibrate activations.
    method.calibration_images = 4096
    return method


def changed(method: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """Copies a method with some fields changed, which may also change in type."""
    method = method.copy_and_resolve_references()
    with method.ignore_type():
        for field, value in changes.items():
            method[field] = ConfigDict(value) if isinstance(value, dict) else value
    return method


def rates_around(middle: float) -> tuple[float, float, float]:
    """Three learning rates to choose from, each 1.6 times the one before."""
    low, high = (float(f"{middle * factor:.2g}") for factor in (1 / 1.6, 1.6))
    return low, float(f"{middle:.2g}"), high
