"""A residual network as it is deployed: batch normalisation folded into biases."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from fgrad import fixed_point, layers


class Block(nn.Module):
    """A basic block: two 3x3 convolutions, and a 1x1 where the shape changes.

    Attributes:
      features: output channels.
      stride: of the first convolution and of the shortcut.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.
    """

    features: int
    stride: int = 1
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, channels] to [batch, height / stride, …, features]."""
        settings: dict[str, Any] = {
            "kernel_init": nn.initializers.he_normal(),
            "bits": self.bits,
            "calibration": self.calibration,
        }
        y = layers.Conv(
            self.features, (3, 3), strides=self.stride, padding=1, **settings
        )(x)
        y = layers.Conv(self.features, (3, 3), padding=1, **settings)(nn.relu(y))
        if self.stride != 1 or x.shape[-1] != self.features:
            x = layers.Conv(self.features, (1, 1), strides=self.stride, **settings)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet18 in torchvision's topology, or with other stages a relative of it.

    11,684,712 parameters for 1,000 classes: torchvision's 11,689,512 with the scale
    and shift of each of its 4,800 normalised channels folded into one bias.

    Attributes:
      num_classes: number of logits.
      width: channels of the first stage; every stage doubles them.
      stage_sizes: blocks of each stage.
      small_images: starts with a 3x3 convolution at full resolution, as is usual for
        32x32 pixels, rather than with a 7x7 of stride 2 and a pooling of stride 2.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.

    Reference:
      He et al., "Deep residual learning for image recognition", CVPR 2016, table 1.
    """

    num_classes: int = 10
    width: int = 64
    stage_sizes: Sequence[int] = (2, 2, 2, 2)
    small_images: bool = False
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits [batch, classes] of float images [batch, height, width, channels]."""
        settings: dict[str, Any] = {"bits": self.bits, "calibration": self.calibration}
        side, stride = (3, 1) if self.small_images else (7, 2)
        x = layers.Conv(
            self.width,
            (side, side),
            strides=stride,
            padding=side // 2,
            kernel_init=nn.initializers.he_normal(),
            **settings,
        )(images)
        x = nn.relu(x)
        if not self.small_images:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, size in enumerate(self.stage_sizes):
            for block in range(size):
                stride = 2 if stage and not block else 1
                x = Block(self.width * 2**stage, stride, **settings)(x)
        x = x.mean(axis=(1, 2))
        return layers.Dense(self.num_classes, **settings)(x)
