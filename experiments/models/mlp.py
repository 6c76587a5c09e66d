"""A multilayer perceptron, to grow in width and depth."""

from typing import Any

import flax.linen as nn
import jax

from fgrad import fixed_point, layers


class MLP(nn.Module):
    """Hidden layers of one width with ReLU, and a linear head.

    Attributes:
      num_classes: number of logits.
      width: units of a hidden layer.
      depth: number of hidden layers.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.
    """

    num_classes: int = 10
    width: int = 512
    depth: int = 4
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @nn.compact
    def __call__(self, rows: jax.Array) -> jax.Array:
        """Logits [batch, classes] of float rows [batch, ...], images for one."""
        rows = rows.reshape(rows.shape[0], -1)
        settings: dict[str, Any] = {"bits": self.bits, "calibration": self.calibration}
        for _ in range(self.depth):
            he = nn.initializers.he_normal()
            rows = layers.Dense(self.width, kernel_init=he, **settings)(rows)
            rows = nn.relu(rows)
        return layers.Dense(self.num_classes, **settings)(rows)
