r"""Memory on a device: the paper's five networks, by the way they are trained.

Weights, activations and gradients in bytes as a device needs them that plans its
buffers itself (`fgrad.analysis.device_budget` says how they are counted), for full
fine-tuning (FT) and a linear probe (LP), by backpropagation (BP) and by forward
gradients (FF), in 16 bits and in 16w8a. Nothing runs; it takes seconds. What the
compiler allocates on the machine at hand is
``python -m experiments.benchmarks.main --only=memory,fine_tuning``.

    python -m experiments.main \
        --config=experiments/configs/memory.py --workdir=workdir/memory

Beside the paper's figures (its appendix B) stand the assumptions that come nearest:
ViT-tiny sees 224x224 pixels; forward gradients hold the gradient of all weights in 16
bits, and in "16w8a, leaf by leaf" that of one leaf at a time: a tenth of the 5.5
million 8-bit gradients, for the paper's 90% sparse update, would be 0.55 MB alone.
"""

from typing import Any

from ml_collections import ConfigDict

# Name: (key of experiments.registry.NETWORKS, shape of an input, the paper's scratch in
# MB by method). MetaAudio's and AST's inputs are 500 and 1,024 frames of 128 mel bins.
NETWORKS = {
    "ViT-tiny": (
        "vit_tiny",
        (224, 224, 3),
        {"FT, BP": 31.64, "FT, FF": 11.43, "FT, FF, 16w8a, leaf by leaf": 0.40},
    ),
    "ResNet12": ("resnet12", (84, 84, 3), {}),
    "ResNet18": ("resnet18", (84, 84, 3), {}),
    "CRNN": ("crnn", (500, 128, 1), {}),
    "AST": ("ast", (1024, 128, 1), {}),
}
_WAYS: dict[str, dict[str, Any]] = {"FT": {"full": {}}, "LP": {"linear_probe": {}}}


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration.

    Args:
      variant: "full", or "smoke" for the first network alone.
    """
    if variant not in ("full", "smoke"):
        raise ValueError(f'variant must be "full" or "smoke", got {variant!r}.')
    config = ConfigDict()
    config.driver = "memory"
    config.devices = (256 * 1024, 2**20, 8 * 2**20)  # bytes
    config.networks = ConfigDict()
    for title, (name, shape, paper) in NETWORKS.items():
        config.networks[title] = ConfigDict(
            {"name": name, "input_shape": shape, "num_classes": 5, "paper": paper}
        )
        if variant == "smoke":
            break
    config.methods = ConfigDict()
    for way, adaptation in _WAYS.items():
        kinds = (
            ("BP", "backward", (16, 16), True),
            ("FF", "forward", (16, 16), True),
            ("FF, 16w8a, leaf by leaf", "forward", (16, 8), False),
        )
        for kind, method, bits, whole in kinds:
            config.methods[f"{way}, {kind}"] = ConfigDict(
                {
                    "adaptation": adaptation,
                    "method": method,
                    "bits": bits,
                    "whole_gradient": whole,
                }
            )
    return config
