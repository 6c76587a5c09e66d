r"""Adaptation at test time: corrupted digits come in a stream, and nobody has labels.

A ViT of 28,682 parameters, pre-trained on clean images of MNIST, meets the fifteen
corruptions of CIFAR-10-C at severity 5, one after the other: of each 800 images, in
batches of 50. It predicts a batch, then takes a step on it, which sees no label
(`experiments.learners.test_time`): the entropy of its predictions, and how far the
statistics of its class token are from those on clean images. What trains are the 448
scales and shifts of its normalisations, or prompts.

* ``unadapted``: the network as it is.
* ``realigned``: features get the mean and the deviation that the source's have, by a
  moving mean over the batches. Nothing trains.
* ``tent``: entropy alone, by backpropagation; ``aligned``: with statistics.
* ``forward``: forward passes only (``fgrad.fixed_point_forward_grad``).
* ``labels``: the same steps with the batch's labels, by backpropagation and by forward
  passes.

Each method is measured with the network reset before each corruption, and on a long
stream of 12,000 images that passes all corruptions without a reset. Learning rates are
chosen by labelled images of the validation split of four corruptions.

    python -m experiments.main \
        --config=experiments/configs/test_time.py --workdir=workdir/test_time

Expected, mean over the corruptions of the test accuracy after a stream, 3 seeds: tent
53.8 ± 0.0, aligned 72.9 ± 0.2, labels 76.1 ± 0.9; realigned in 8w8a 66.2 ± 0.0; forward
66.4 ± 0.7 in float32 and 64.3 ± 0.3 in 8w8a (docs/results.md). A method takes a minute.

The corruptions are a package's: ``pip install -e '.[corruptions]'``.

A smoke run, on clean images: ``--config=experiments/configs/test_time.py:smoke``.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import quickstart

NORMS: dict[str, Any] = {"adaptation": {"norms": {}}}
PROMPTS: dict[str, Any] = {
    "adaptation": {"deep_prompts": {"num_prompts": 4, "with_head": False}}
}
RATES = (3e-3, 1e-2, 3e-2)  # Adam's, to choose from
ENTROPY, BOTH = (1.0, 0.0), (1.0, 1.0)  # weights of entropy and alignment


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration; ``variant`` as in the quickstart's."""
    config = quickstart.base(variant)
    smoke = variant == "smoke"
    config.driver = "test_time"
    config.network = "vit_32"
    config.dataset = "mnist_5k_c"
    config.source = config.target = "clean"  # the stream is made beside the dataset
    config.severity = 0 if smoke else 5  # of the corruptions; 0 for clean images
    config.batch_size = 50  # images of the stream that come at once
    config.rounds = 1  # of the long stream over all corruptions
    config.memory = 0.9  # of the moving mean that realigns features
    # Corruptions of which validation images choose the learning rate: a noise, a blur,
    # a weather, a digital one.
    config.tuning_kinds = (0,) if smoke else (0, 4, 9, 12)
    config.wider_tuning = 0 if smoke else 1
    if not smoke:
        config.seeds = (0, 1, 2)
        config.pretrain.steps = 2500
    config.pretrain.batch_size = 64
    config.pretrain.seed = 1

    backward, forward = config.methods.backprop, config.methods.forward_fp32
    config.methods = ConfigDict()
    rows: dict[str, tuple[ConfigDict, dict[str, Any]]] = {}
    for arithmetic, bits in quickstart.BITS.items():
        common = _bits(bits)
        rows[f"unadapted_{arithmetic}"] = forward, {**common, "updates": 0}
        rows[f"realigned_{arithmetic}"] = (
            forward,
            {**common, "updates": 0, "realigned": True},
        )
    rows["tent"] = backward, {**_losses(ENTROPY), "learning_rates": (1e-4, 3e-4, 1e-3)}
    rows["aligned"] = backward, {**_losses(BOTH), "learning_rates": RATES}
    rows["labels"] = backward, {"labels": True, "learning_rates": RATES}
    for arithmetic, bits in quickstart.BITS.items():
        common = {**_losses(BOTH), **_bits(bits), "learning_rates": RATES}
        rows[f"forward_{arithmetic}"] = forward, common
        if arithmetic != "16w8a":
            rows[f"forward_prompts_{arithmetic}"] = forward, {**common, **PROMPTS}
    rows["forward_labels_8w8a"] = (
        forward,
        {"labels": True, **_bits((8, 8)), "learning_rates": RATES},
    )
    for name, (method, changes) in rows.items():
        config.methods[name] = quickstart.changed(
            method, {**_method(method, smoke), **changes}
        )
    config.run = tuple(rows)
    return config


def _method(method: ConfigDict, smoke: bool) -> dict[str, Any]:
    """What the methods have in common."""
    common: dict[str, Any] = {
        "labels": False,  # whether the steps see them
        "entropy": 0.0,  # weights of the two terms without labels
        "alignment": 0.0,
        "realigned": False,  # whether the head sees features with the source's moments
        "updates": 1,  # steps on each batch
        **NORMS,
        "optimizer": "adam",
        "learning_rates": (0.0,),
    }
    if method.gradient == "backward":
        return common
    return {
        **common,
        "epsilon": 1e-2,
        "num_perturbations": 2 if smoke else 8,
        "estimator": "spsa",
        "calibration_images": 1024,
    }


def _losses(weights: tuple[float, float]) -> dict[str, float]:
    return dict(zip(("entropy", "alignment"), weights, strict=True))


def _bits(bits: tuple[int, int] | None) -> dict[str, Any]:
    """The arithmetic; what trains has 16 bits, also where the kernels have 8."""
    return {"bits": bits, "trained_bits": 16 if bits else None}
