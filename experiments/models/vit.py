"""A vision transformer; by default DeiT-tiny."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fgrad import fixed_point, layers


class Block(nn.Module):
    """A pre-norm encoder block: attention, then a perceptron, both residual.

    Attributes:
      num_heads: attention heads.
      mlp_width: hidden units of the perceptron.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.
    """

    num_heads: int
    mlp_width: int
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens [batch, tokens, width] to tokens of the same shape."""
        settings: dict[str, Any] = {"bits": self.bits, "calibration": self.calibration}
        width = tokens.shape[-1]
        x = nn.LayerNorm(epsilon=1e-6)(tokens)
        x = layers.MultiHeadDotProductAttention(self.num_heads, **settings)(x)
        tokens += x
        x = nn.LayerNorm(epsilon=1e-6)(tokens)
        x = layers.Dense(self.mlp_width, **settings)(x)
        x = nn.gelu(x, approximate=False)
        return tokens + layers.Dense(width, **settings)(x)


class ViT(nn.Module):
    """DeiT-tiny, or with other attributes any plain vision transformer.

    5,717,416 parameters for 224x224x3 images and 1,000 classes; 5,495,626 for
    96x96x3 (36 patches and the class token) and 10.

    Attributes:
      num_classes: number of logits.
      patch: side of a patch in pixels.
      width: features of a token.
      depth: number of blocks.
      num_heads: attention heads of a block.
      mlp_width: hidden units of a block's perceptron.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.

    Reference:
      Touvron et al., "Training data-efficient image transformers & distillation
      through attention", ICML 2021, table 1.
    """

    num_classes: int = 10
    patch: int = 16
    width: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_width: int = 768
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Parameters of each stage: embedding, blocks, last normalisation, head."""
        blocks = ((f"Block_{i}",) for i in range(self.depth))
        embedding = ("Conv_0", "class_token", "positions")
        return embedding, *blocks, ("LayerNorm_0",), ("Dense_0",)

    @nn.compact
    def __call__(
        self, x: jax.Array, start: int = 0, stop: int | None = None
    ) -> jax.Array:
        """Logits [batch, classes] of float images [batch, height, width, channels].

        ``start`` and ``stop`` choose stages as in a slice: what those before ``start``
        return goes in, and what the last chosen one returns comes out.
        """
        settings: dict[str, Any] = {"bits": self.bits, "calibration": self.calibration}

        def embed(images: jax.Array) -> jax.Array:
            patch = (self.patch, self.patch)
            x = layers.Conv(
                self.width, patch, strides=patch, name="Conv_0", **settings
            )(images)
            x = x.reshape(x.shape[0], -1, self.width)
            small = nn.initializers.truncated_normal(0.02)
            # A QTensor here stands for its value.
            token = jnp.asarray(self.param("class_token", small, (1, 1, self.width)))
            x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
            return x + jnp.asarray(self.param("positions", small, (1, *x.shape[1:])))

        def block(index: int, tokens: jax.Array) -> jax.Array:
            return Block(
                self.num_heads, self.mlp_width, name=f"Block_{index}", **settings
            )(tokens)

        def normalise(tokens: jax.Array) -> jax.Array:
            return nn.LayerNorm(epsilon=1e-6, name="LayerNorm_0")(tokens)[:, 0]

        def classify(features: jax.Array) -> jax.Array:
            return layers.Dense(self.num_classes, name="Dense_0", **settings)(features)

        blocks = [functools.partial(block, index) for index in range(self.depth)]
        for stage in (embed, *blocks, normalise, classify)[start:stop]:
            x = stage(x)
        return x
