"""A small decoder of bytes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import vit
from fgrad import fixed_point, layers

VOCABULARY = 256


class Decoder(nn.Module):
    """A transformer that predicts the next byte of a text.

    Its blocks are those of `experiments.models.vit`, with causal attention. The table
    of embeddings is the output's matrix as well. 73,536 parameters.

    Attributes:
      width: features of a byte.
      depth: number of blocks.
      num_heads: attention heads of a block.
      mlp_width: hidden units of a block's perceptron.
      longest: positions that there are.
      checkpointed: whether backpropagation computes a block again rather than keep what
        is inside it.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.
    """

    width: int = 48
    depth: int = 2
    num_heads: int = 4
    mlp_width: int = 192
    longest: int = 96
    checkpointed: bool = False
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the byte after each position.

        Args:
          tokens: int [batch, positions], bytes from 0 to 255.

        Returns:
          Float [batch, positions, 256].

        Raises:
          ValueError: for more positions than ``longest``.
        """
        if tokens.shape[1] > self.longest:
            raise ValueError(
                f"the decoder has {self.longest} positions, got {tokens.shape[1]} "
                "bytes; cut them into shorter pieces."
            )
        settings = {"bits": self.bits, "calibration": self.calibration}
        small = nn.initializers.normal(0.02)
        table = layers.Embed(
            VOCABULARY, self.width, embedding_init=small, name="Embed_0", **settings
        )
        positions = self.param("positions", small, (self.longest, self.width))
        x = table(tokens) + jnp.asarray(positions)[: tokens.shape[1]]
        block = nn.remat(vit.Block) if self.checkpointed else vit.Block
        for index in range(self.depth):
            x = block(
                self.num_heads,
                self.mlp_width,
                causal=True,
                name=f"Block_{index}",
                **settings,
            )(x)
        return table.attend(nn.LayerNorm(epsilon=1e-6, name="LayerNorm_0")(x))
