"""The convolutional recurrent network of MetaAudio, for spectrograms."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fgrad import fixed_point, layers


class ElmanCell(nn.RNNCellBase):
    r"""A recurrent cell without gates, with float or fixed-point kernels.

    .. math:: h' = \tanh(W x + U h + b)

    Attributes:
      features: size of the hidden state.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of input and hidden state are found.

    Example:
      >>> rnn = layers.RNN(ElmanCell(3))
      >>> x = jnp.ones((2, 7, 4))
      >>> rnn.apply(rnn.init(jax.random.key(0), x), x).shape
      (2, 7, 3)

    Reference:
      Elman, "Finding structure in time", Cognitive Science 14, 1990.
    """

    features: int
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @nn.compact
    def __call__(
        self, carry: jax.Array, inputs: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """One step: ``h, x -> h', h'``."""
        dense = functools.partial(
            layers.Dense, self.features, bits=self.bits, calibration=self.calibration
        )
        orthogonal = nn.initializers.orthogonal()
        recurrent = dense(use_bias=False, kernel_init=orthogonal, name="h")(carry)
        h = jnp.tanh(dense(name="i")(inputs) + recurrent)
        return h, h

    @nn.nowrap
    def initialize_carry(
        self, rng: jax.Array, input_shape: tuple[int, ...]
    ) -> jax.Array:
        """Zeros, shaped after the input of one step."""
        del rng
        return jnp.zeros((*input_shape[:-1], self.features))

    @property
    def num_feature_axes(self) -> int:
        """Axes of the input that are features."""
        return 1


CELLS: dict[str, Callable[..., nn.RNNCellBase]] = {
    "elman": ElmanCell,
    "lstm": layers.LSTMCell,
}


class CRNN(nn.Module):
    """Four convolutions with max pooling, a recurrent layer beside an identity.

    120,005 parameters for 5 classes: the reference's 120,709 with the scale and shift
    of each normalised channel folded into the layer beside it, and one bias of the
    recurrent cell for PyTorch's two.

    The recurrent layer goes over time, on the mean over the mel bins that the poolings
    leave: that is one bin for the reference's 128. The features are its last output and
    input, added.

    Attributes:
      num_classes: number of logits.
      width: channels of each convolution, and features.
      depth: number of convolutions.
      pool: frames and mel bins of every pooling.
      cell: "elman", as in the reference's configuration, or "lstm".
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.

    Example:
      >>> model, spectrograms = CRNN(num_classes=5), jnp.zeros((1, 157, 128, 1))
      >>> params = jax.eval_shape(model.init, jax.random.key(0), spectrograms)["params"]
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      120005

    Reference:
      Heggan et al., "MetaAudio: a few-shot audio classification benchmark", ICANN 2022,
      section 4; the cell is that of the configuration they published.
    """

    num_classes: int = 5
    width: int = 64
    depth: int = 4
    pool: tuple[int, int] = (3, 3)
    cell: str = "elman"
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Parameters of each stage: convolutions, recurrent layer, head."""
        convolutions = ((f"Conv_{index}",) for index in range(self.depth))
        return *convolutions, ("recurrent",), ("Dense_0",)

    @nn.compact
    def __call__(
        self, x: jax.Array, start: int = 0, stop: int | None = None
    ) -> jax.Array:
        """Logits of spectrograms.

        Args:
          x: floats [batch, frames, mels, 1]. With ``start`` what the stages before it
            return.
          start: first stage to run.
          stop: stage to stop before, as in a slice; -1 for the features.

        Returns:
          [batch, classes]; with ``stop`` what the stage before it returns.

        Raises:
          ValueError: for another cell; if a pooling would leave nothing.
        """
        if self.cell not in CELLS:
            raise ValueError(
                f"cell must be one of {', '.join(CELLS)}, got {self.cell!r}."
            )
        settings: dict[str, Any] = {"bits": self.bits, "calibration": self.calibration}

        def convolve(index: int, x: jax.Array) -> jax.Array:
            if x.shape[1] < self.pool[0] or x.shape[2] < self.pool[1]:
                raise ValueError(
                    f"convolution {index} of {self.depth} leaves {x.shape[1]} frames "
                    f"of {x.shape[2]} mel bins, fewer than pool={self.pool}: give "
                    "larger spectrograms or a smaller pool."
                )
            kernel_init = nn.initializers.he_normal()
            x = layers.Conv(
                self.width,
                (3, 3),
                padding=1,
                kernel_init=kernel_init,
                name=f"Conv_{index}",
                **settings,
            )(x)
            return nn.max_pool(nn.relu(x), self.pool, strides=self.pool)

        def recur(x: jax.Array) -> jax.Array:
            x = x.mean(axis=2)
            cell = CELLS[self.cell](self.width, name="recurrent", **settings)
            return (layers.RNN(cell)(x) + x)[:, -1]

        def classify(features: jax.Array) -> jax.Array:
            return layers.Dense(self.num_classes, name="Dense_0", **settings)(features)

        convolutions = [functools.partial(convolve, i) for i in range(self.depth)]
        stages: list[Callable[[jax.Array], jax.Array]]
        stages = [*convolutions, recur, classify]
        for stage in stages[start:stop]:
            x = stage(x)
        return x
