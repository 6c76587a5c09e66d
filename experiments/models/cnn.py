"""Small convolutional networks without normalisation, for digits."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from fgrad import fixed_point, layers


class CNN(nn.Module):
    """3x3 convolutions and a linear head.

    By default 25,866 parameters for 8x8x1 images and 10 classes. Its stages are the
    convolutions, the flattening of the image, and the head.

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

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Names of the parameters of each stage."""
        convolutions = ((f"Conv_{i}",) for i in range(len(self.features)))
        return (*convolutions, (), ("Dense_0",))

    @nn.compact
    def __call__(
        self, x: jax.Array, start: int = 0, stop: int | None = None
    ) -> jax.Array:
        """Runs the network, or a slice of its stages.

        Args:
          x: float images [batch, height, width, channels]; with ``start`` what the
            stages before it return.
          start: first stage to run.
          stop: stage to stop before, as in a slice.

        Returns:
          Logits [batch, classes]; with ``stop`` what the stage before it returns.
        """
        settings: dict[str, Any] = {"bits": self.bits, "calibration": self.calibration}

        def convolution(index: int, x: jax.Array) -> jax.Array:
            layer = layers.Conv(
                self.features[index],
                (3, 3),
                strides=self.strides[index],
                name=f"Conv_{index}",
                **settings,
            )
            return nn.relu(layer(x))

        def flatten(x: jax.Array) -> jax.Array:
            return x.reshape(x.shape[0], -1)

        def classify(x: jax.Array) -> jax.Array:
            return layers.Dense(self.num_classes, name="Dense_0", **settings)(x)

        indices = range(len(self.features))
        stages: list[Callable[[jax.Array], jax.Array]] = [
            *(functools.partial(convolution, i) for i in indices),
            flatten,
            classify,
        ]
        for stage in stages[start:stop]:
            x = stage(x)
        return x


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
