"""Small convolutional networks without normalisation, for digits."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from fgrad import fixed_point, layers


class CNN(nn.Module):
    """3x3 convolutions and a linear head.

    By default 25,866 parameters for 8x8x1 images and 10 classes.

    Attributes:
      num_classes: number of logits.
      features: channels of each convolution.
      strides: stride of each convolution.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.
    """

    num_classes: int = 10
    features: Sequence[int] = (16, 32, 64)
    strides: Sequence[int] = (2, 1, 2)
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits [batch, classes] of float images [batch, height, width, channels]."""
        settings: dict[str, Any] = {"bits": self.bits, "calibration": self.calibration}
        x = images
        for features, strides in zip(self.features, self.strides, strict=True):
            x = layers.Conv(features, (3, 3), strides=strides, **settings)(x)
            x = nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        return layers.Dense(self.num_classes, **settings)(x)


def rescaled(params: Mapping[str, Any], factors: Sequence[float]) -> dict[str, Any]:
    """The same function from layers of other sizes, as ReLU networks allow.

    Args:
      params: of a `CNN`.
      factors: what to multiply the kernels of the layers with, in order; a bias takes
        the product of the factors so far. All together they multiply to 1.

    Returns:
      New parameters, in the same structure.
    """
    names = sorted(params, key=lambda name: (name.startswith("Dense"), name))
    products = np.cumprod(factors)
    if len(factors) != len(names) or min(factors) <= 0:
        raise ValueError(f"{names} need as many positive factors, got {factors}.")
    if not np.isclose(products[-1], 1):
        raise ValueError(f"the factors {factors} multiply to {products[-1]}, not to 1.")
    return {
        name: {
            "kernel": params[name]["kernel"] * factor,
            "bias": params[name]["bias"] * product,
        }
        for name, factor, product in zip(names, factors, products, strict=True)
    }
