"""What the scripts that record PyTorch's outputs share, with the tests that read them.

The logits are computed in float64 and stored in float32. Images and random weights
come from integers and NumPy, so that a test makes the same without PyTorch.
"""

import pathlib

import numpy as np

REFERENCES = pathlib.Path(__file__).parent / "references"


def images(count, size):
    """Smooth patterns of all colours, float32 [count, size, size, 3]."""
    n, row, column, channel = np.ogrid[:count, :size, :size, :3]
    waves = row * (3 + n) + column * (5 - channel) + row * column // (7 + channel)
    pixels = (waves * 2 + 40 * channel * n) % 512
    return ((np.minimum(pixels, 511 - pixels) - 127) / 128).astype(np.float32)


def convolution(state, rng, name, norm, shape):
    """Adds a kernel and the statistics of its normalisation, in a trained one's range.

    ``shape`` is PyTorch's: [out, in, height, width].
    """
    outputs = shape[0]
    state[f"{name}.weight"] = rng.normal(0, np.prod(shape[1:]) ** -0.5, shape)
    state[f"{norm}.weight"] = rng.uniform(0.5, 1.5, outputs)
    state[f"{norm}.bias"] = rng.normal(0.5, 0.5, outputs)
    state[f"{norm}.running_mean"] = rng.normal(0, 0.3, outputs)
    state[f"{norm}.running_var"] = rng.uniform(0.2, 1, outputs)


def dense(state, rng, name, outputs, inputs):
    """Adds a dense layer."""
    state[f"{name}.weight"] = rng.normal(0, inputs**-0.5, (outputs, inputs))
    state[f"{name}.bias"] = rng.normal(0, 0.1, outputs)


def float32(state):
    return {name: value.astype(np.float32) for name, value in state.items()}


def record(file, cases, make):
    """Writes what PyTorch says.

    Args:
      file: name of the npz file in `REFERENCES`.
      cases: name to (weights, number of images, pixels).
      make: ``make(weights, pixels)`` gives PyTorch's module and its state dict, of
        NumPy arrays or of tensors.
    """
    import torch

    recorded = {}
    for name, (weights, count, size) in cases.items():
        model, state = make(weights, size)
        tensors = {k: torch.as_tensor(v) for k, v in state.items()}
        keys = model.load_state_dict(tensors, strict=False)
        assert not keys.unexpected_keys
        assert all(key.endswith("num_batches_tracked") for key in keys.missing_keys)
        x = torch.tensor(images(count, size)).permute(0, 3, 1, 2)
        with torch.no_grad():
            logits = model.double().eval()(x.double())
        recorded[name] = logits.numpy().astype(np.float32)
        spread = recorded[name].std(-1).mean()
        print(f"{name}: {recorded[name].shape}, deviation of the logits {spread:.3f}")
    REFERENCES.mkdir(exist_ok=True)
    np.savez_compressed(REFERENCES / file, **recorded)
