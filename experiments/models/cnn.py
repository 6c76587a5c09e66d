"""A small convolutional network without normalisation, for 8x8 images."""

from typing import Any

import flax.linen as nn
import jax

from fgrad import fixed_point, layers


class CNN(nn.Module):
    """Three 3x3 convolutions (16, 32, 64; strides 2, 1, 2) and a linear head.

    25,866 parameters for 8x8x1 images and 10 classes.

    Attributes:
      num_classes: number of logits.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.
    """

    num_classes: int = 10
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits [batch, classes] of float images [batch, height, width, channels]."""
        settings: dict[str, Any] = {"bits": self.bits, "calibration": self.calibration}
        x = nn.relu(layers.Conv(16, (3, 3), strides=2, **settings)(images))
        x = nn.relu(layers.Conv(32, (3, 3), **settings)(x))
        x = nn.relu(layers.Conv(64, (3, 3), strides=2, **settings)(x))
        x = x.reshape(x.shape[0], -1)
        return layers.Dense(self.num_classes, **settings)(x)
