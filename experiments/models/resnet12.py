"""The residual network of few-shot learning, batch normalisation folded into biases."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from fgrad import fixed_point, layers

_SLOPE = 0.1  # of the leaky ReLU's negative side


class Block(nn.Module):
    """Three 3x3 convolutions beside a 1x1, then a 2x2 max pooling.

    Attributes:
      features: output channels.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.
    """

    features: int
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, channels] to [batch, height // 2, …, features]."""
        conv = functools.partial(
            layers.Conv,
            self.features,
            kernel_init=nn.initializers.he_normal(),
            bits=self.bits,
            calibration=self.calibration,
        )
        y = nn.leaky_relu(conv((3, 3), padding=1)(x), _SLOPE)
        y = nn.leaky_relu(conv((3, 3), padding=1)(y), _SLOPE)
        y = conv((3, 3), padding=1)(y)
        y = nn.leaky_relu(y + conv((1, 1))(x), _SLOPE)
        return nn.max_pool(y, (2, 2), strides=(2, 2))


class ResNet12(nn.Module):
    """The modified ResNet12 of FEAT: four residual blocks of growing width.

    12,419,584 parameters without the head: the published 12,424,320 with the scale and
    shift of each of its 4,736 normalised channels folded into one bias. Like those of
    `experiments.models.resnet`, it has no normalisation left: statistics of a task's
    few examples would leak from the query, and running ones are none of a deployed
    network. DropBlock, which the reference trains with, is not there.

    Attributes:
      num_classes: number of logits.
      widths: channels of each block.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.

    Example:
      >>> import jax.numpy as jnp
      >>> model, images = ResNet12(), jnp.zeros((1, 84, 84, 3))
      >>> params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
      >>> del params["Dense_0"]
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      12419584

    Reference:
      Ye et al., "Few-shot learning via embedding adaptation with set-to-set functions",
      CVPR 2020, section 4.1 and its supplement.
    """

    num_classes: int = 64
    widths: Sequence[int] = (64, 160, 320, 640)
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Parameters of each stage: blocks, pooling, head."""
        return *((f"Block_{i}",) for i, _ in enumerate(self.widths)), (), ("Dense_0",)

    @nn.compact
    def __call__(
        self, x: jax.Array, start: int = 0, stop: int | None = None
    ) -> jax.Array:
        """Logits of images.

        Args:
          x: floats [batch, height, width, channels], of 16 pixels a side or more. With
            ``start`` what the stages before it return.
          start: first stage to run.
          stop: stage to stop before, as in a slice; -1 for the features.

        Returns:
          [batch, classes]; with ``stop`` what the stage before it returns.

        Raises:
          ValueError: if a pooling would leave nothing.
        """
        settings: dict[str, Any] = {"bits": self.bits, "calibration": self.calibration}

        def block(index: int, x: jax.Array) -> jax.Array:
            if min(x.shape[1:3]) < 2:
                raise ValueError(
                    f"block {index} cannot halve {x.shape[1]}x{x.shape[2]} pixels: "
                    f"images need {2 ** len(self.widths)} a side for "
                    f"{len(self.widths)} blocks; resize them, or give fewer widths."
                )
            return Block(self.widths[index], name=f"Block_{index}", **settings)(x)

        def pool(x: jax.Array) -> jax.Array:
            return x.mean(axis=(1, 2))

        def classify(features: jax.Array) -> jax.Array:
            return layers.Dense(self.num_classes, name="Dense_0", **settings)(features)

        blocks = [functools.partial(block, i) for i, _ in enumerate(self.widths)]
        stages: list[Callable[[jax.Array], jax.Array]] = [*blocks, pool, classify]
        for stage in stages[start:stop]:
            x = stage(x)
        return x
