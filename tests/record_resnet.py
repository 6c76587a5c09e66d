"""Records what torchvision's residual networks say, for test_resnet.py.

pip install torch torchvision
python tests/record_resnet.py
"""

import numpy as np
import recording

REFERENCES = recording.REFERENCES / "resnet.npz"
CLASSES = 10
STAGES = {"resnet18": (2, 2, 2, 2), "uneven": (1, 3, 1)}  # blocks
# Name: (weights, number of images, pixels); 75 is odd at most strides.
CASES = {
    "resnet18_64": ("resnet18", 2, 64),
    "resnet18_75": ("resnet18", 2, 75),
    "uneven_32": ("uneven", 2, 32),
}


def random_state_dict(weights):
    """Weights and statistics in the ranges of a trained network's, from a seed."""
    rng = np.random.default_rng(0)
    state = {}

    def convolution(name, norm, size, inputs, outputs):
        shape = (outputs, inputs, size, size)
        recording.convolution(state, rng, name, norm, shape)

    convolution("conv1", "bn1", 7, 3, 64)
    inputs = 64
    for stage, blocks in enumerate(STAGES[weights], start=1):
        outputs = 32 * 2**stage
        for index in range(blocks):
            block = f"layer{stage}.{index}"
            convolution(f"{block}.conv1", f"{block}.bn1", 3, inputs, outputs)
            convolution(f"{block}.conv2", f"{block}.bn2", 3, outputs, outputs)
            if inputs != outputs:
                shortcut = f"{block}.downsample"
                convolution(f"{shortcut}.0", f"{shortcut}.1", 1, inputs, outputs)
            inputs = outputs
    recording.dense(state, rng, "fc", CLASSES, inputs)
    return recording.float32(state)


def main():
    import torch
    import torchvision
    from torchvision.models import resnet

    def make(weights, pixels):
        del pixels  # any
        state = random_state_dict(weights)
        if weights == "resnet18":
            return torchvision.models.resnet18(num_classes=CLASSES), state
        # torchvision's class wants four stages.
        model = resnet.ResNet(resnet.BasicBlock, [*STAGES[weights], 1], CLASSES)
        model.layer4 = torch.nn.Identity()
        model.fc = torch.nn.Linear(len(state["fc.weight"][0]), CLASSES)
        return model, state

    recording.record(REFERENCES.name, CASES, make)


if __name__ == "__main__":
    main()
