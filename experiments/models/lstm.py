"""A recurrent network for short sequences, such as keywords in speech."""

from typing import Any

import flax.linen as nn
import jax

from fgrad import fixed_point, layers


class LSTM(nn.Module):
    """One LSTM layer, and a linear head on its last hidden state.

    307,212 parameters for 40 features and 12 classes: four gates of 40·256 + 256·256
    + 256, and a head of 256·12 + 12.

    Attributes:
      num_classes: number of logits.
      features: size of the hidden state.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.
    """

    num_classes: int = 12
    features: int = 256
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @nn.compact
    def __call__(self, sequences: jax.Array) -> jax.Array:
        """Logits [batch, classes] of float sequences [batch, steps, features]."""
        settings: dict[str, Any] = {"bits": self.bits, "calibration": self.calibration}
        hidden = layers.RNN(layers.LSTMCell(self.features, **settings))(sequences)
        return layers.Dense(self.num_classes, **settings)(hidden[:, -1])
