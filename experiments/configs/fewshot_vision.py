r"""Few-shot learning of images: the paper's table 2, on data that needs no download.

A network is pre-trained on the classes of meta-train by backpropagation, then adapted
to 5-way 5-shot tasks of classes that it has not seen (of digits: 3-way), by full
fine-tuning ("ft") and by a linear probe ("lp"), each by backpropagation and by forward
gradients in float32 and in 16w8a; see `experiments.drivers.few_shot`. The head compares
by ProtoNet's distances. All methods have the same tasks, and the same three learning
rates to choose from on ten tasks of the validation split (twenty of digits). Tasks of
the embedded data are 60, and full fine-tuning has 200 forward passes (800 on digits):
what two processor cores manage.

    python -m experiments.main \
        --config=experiments/configs/fewshot_vision.py --workdir=workdir/fewshot_vision

runs all cells and writes one table. One cell, of any dataset and network in
`experiments.registry`, such as the paper's, whose data TFDS or you provide:

    --config=experiments/configs/fewshot_vision.py:characters,resnet12_small
    --config=experiments/configs/fewshot_vision.py:cub,resnet18

which begins at random, or where others ended, at weights that the network reads (see
`experiments.published`; of a vision transformer the positions are interpolated):

    --config=experiments/configs/fewshot_vision.py:cub,resnet18 \
        --config.weights=resnet18-f37072fd.pth
    --config=experiments/configs/fewshot_vision.py:mini_imagenet,vit_tiny \
        --config.weights=deit_tiny_patch16_224.safetensors --config.image_side=96

A smoke run: ``fewshot_vision.py:digits,vit_small,smoke``; most of its half a minute is
compilation, which ``JAX_DISABLE_MOST_OPTIMIZATIONS=1`` shortens.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.configs import quickstart

# Images of 8x8 pixels are cheap.
_MORE_STEPS = {way: {"steps": 100} for way in ("ft_fp32", "ft_16w8a")}
_DIGITS = {"n_way": 3, "tasks": 60, "tuning_tasks": 20, "methods": _MORE_STEPS}
# Name: (dataset, domain, what differs).
DATASETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "characters": ("characters", "16", {"tasks": 60}),
    "digits": ("digit_classes", "", _DIGITS),
    "cifar_fs": ("few_shot_images", "cifar_fs", {}),
    "cub": ("few_shot_images", "cub_84", {}),
    "omniglot": ("few_shot_images", "omniglot_28", {}),
    "mini_imagenet": ("mini_imagenet", "84", {}),
    "tiered_imagenet": ("tiered_imagenet", "84", {}),
}
# Those without a download, and networks for two processor cores.
EMBEDDED = ("characters", "digits")
NETWORKS = ("resnet12_small", "resnet18_small", "vit_small")
WAYS: dict[str, dict[str, Any]] = {"ft": {"full": {}}, "lp": {"linear_probe": {}}}
# Of forward gradients: pairs of evaluations in a step, and steps; a probe's are cheap.
BUDGET = {"ft": (4, 25), "lp": (8, 100)}
RATES = (4e-3, 0.016, 0.064)


def get_config(cell: str = "") -> ConfigDict:
    """The configuration.

    Args:
      cell: "<dataset>,<network>" or "<dataset>,<network>,smoke"; all that needs no
        download by default.
    """
    if cell:
        return _cell(*cell.split(","))
    config = ConfigDict({"driver": "few_shot", "parts": {}})
    for dataset in EMBEDDED:
        for network in NETWORKS:
            config.parts[f"{dataset}_{network}"] = _cell(dataset, network)
    return config


def _cell(dataset: str, network: str, variant: str = "full") -> ConfigDict:
    if dataset not in DATASETS:
        raise ValueError(
            f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}."
        )
    name, domain, changes = DATASETS[dataset]
    if dataset == "digits" and network.startswith("resnet12"):
        # Three poolings for 8x8 pixels.
        network = "resnet12_digits" if network == "resnet12_small" else network
    return common(name, domain, network, variant, changes)


def common(
    dataset: str, domain: str, network: str, variant: str, changes: Mapping[str, Any]
) -> ConfigDict:
    """A cell of the table.

    Args:
      dataset: key of `experiments.registry.DATASETS`.
      domain: of it.
      network: key of `experiments.registry.NETWORKS`.
      variant: "full", or "smoke" for a short run that shows no result.
      changes: fields of the configuration with other values.
    """
    quick = quickstart.base(variant)
    smoke = variant == "smoke"
    config = ConfigDict()
    config.driver = "few_shot"  # which loop runs
    config.dataset, config.domain, config.network = dataset, domain, network
    config.data_dir = quick.get_ref("data_dir")  # <workdir>/data by default

    config.n_way = 5  # classes of a task
    config.k_shot = 5  # examples of each to learn from
    config.num_queries = 15  # examples of each to be tested on
    config.tasks = 100  # of the test split
    config.tuning_tasks = 10  # of the validation split
    config.chunk = 2 if smoke else 20  # tasks that are drawn at once
    config.seed = 0  # of tasks, batches and perturbations

    config.head = "protonet"  # or "simpleshot"
    config.transform = "CL2N"  # of simpleshot's features; or "L2N" or "UN"
    # Squared distances are divided by it. At the start the variances of meta-train's
    # features add up to one: two examples are at a squared distance of 2 on average.
    config.temperature = 0.2
    config.copies = 1  # of each example of the support, to train on, augmented:
    config.input_shift = 1  # pixels at most, each way
    config.input_noise = 0.1  # standard deviation

    config.weights = ""  # random ones, or the path of what `network` reads
    config.normalization, config.image_side = "", 0  # see configs/quickstart.py
    config.deviation_floor = quick.deviation_floor
    config.metrics = ("accuracy",)  # of the pre-training
    config.snapshot_seconds = 30.0
    config.event_files = False
    config.pretrain = quick.pretrain
    config.pretrain.steps = 10 if smoke else 2000
    config.pretrain.learning_rate = 2e-3
    config.pretrain.batch_size = 64
    config.pretrain.input_noise = 0.1  # with 0.3 the ResNets stay at chance

    config.methods = _methods(quick, smoke)
    # In the order of the table.
    ways, kinds = tuple(WAYS), ("backprop", "fp32", "16w8a")
    if smoke:
        ways, kinds = ("lp",), ("backprop", "16w8a")
    config.run = tuple(f"{way}_{kind}" for way in ways for kind in kinds)
    with config.ignore_type():
        config.update(changes)
    if smoke:
        config.tasks, config.tuning_tasks = 4, 2
    return config


def _methods(quick: ConfigDict, smoke: bool) -> ConfigDict:
    """The three kinds of methods for each way to adapt, by "<way>_<kind>"."""
    backward, forward = quick.methods.backprop, quick.methods.forward_fp32
    backward.optimizer = "sgd"
    backward.steps = 2 if smoke else 50
    forward.epsilon = 1e-2
    forward.calibration_images = 256
    methods = ConfigDict()
    for way, adaptation in WAYS.items():
        pairs, steps = (2, 2) if smoke else BUDGET[way]
        budget = {"num_perturbations": pairs, "steps": steps}
        for kind, method, more in (
            ("backprop", backward, {}),
            ("fp32", forward, budget),
            ("16w8a", forward, {**budget, "bits": (16, 8)}),
        ):
            methods[f"{way}_{kind}"] = quickstart.changed(
                method,
                {
                    "adaptation": adaptation,
                    "learning_rates": RATES[:1] if smoke else RATES,
                    **more,
                },
            )
    return methods
