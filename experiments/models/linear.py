"""A linear head, which a linear probe trains on features."""

import flax.linen as nn
import jax

from fgrad import fixed_point, layers


class Linear(nn.Module):
    """Logits of features.

    Attributes:
      num_classes: number of logits.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.
    """

    num_classes: int = 10
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Logits [batch, classes] of float features [batch, size]."""
        return layers.Dense(
            self.num_classes, bits=self.bits, calibration=self.calibration
        )(features)
