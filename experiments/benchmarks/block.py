"""A transformer block in plain JAX, whose product with weights can be exchanged."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.problem import Problem


class Sizes(NamedTuple):
    """Sizes of a block.

    Attributes:
      width: features of a token.
      num_heads: attention heads.
      mlp_width: hidden units of the perceptron.
      tokens: length of a sequence.
    """

    width: int = 512
    num_heads: int = 8
    mlp_width: int = 2048
    tokens: int = 32


def problem(
    sizes: Sizes,
    batch_size: int,
    dense: Callable[[jax.Array, Any], jax.Array] = jnp.matmul,
) -> Problem:
    """A pre-norm block that fits random targets.

    Args:
      sizes: its sizes.
      batch_size: sequences of a batch.
      dense: product of activations [..., in] and a weight [in, out], or whatever
        stands for the weight.
    """
    width = sizes.width
    shapes = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    shapes |= {"up": (width, sizes.mlp_width), "down": (sizes.mlp_width, width)}
    random = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape, np.float32))

    params = {
        name: {
            "kernel": normal(*shape) * shape[0] ** -0.5,
            "bias": jnp.zeros(shape[1]),
        }
        for name, shape in shapes.items()
    }

    def loss_fn(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        def layer(name: str, x: jax.Array) -> jax.Array:
            return dense(x, params[name]["kernel"]) + params[name]["bias"]

        heads = (*inputs.shape[:-1], sizes.num_heads, width // sizes.num_heads)
        x = jax.nn.standardize(inputs)
        mixed = jax.nn.dot_product_attention(
            *(layer(name, x).reshape(heads) for name in ("query", "key", "value"))
        )
        x = inputs + layer("out", mixed.reshape(inputs.shape))
        y = jax.nn.gelu(layer("up", jax.nn.standardize(x)))
        return jnp.mean((x + layer("down", y) - targets) ** 2)

    shape = (batch_size, sizes.tokens, width)
    data = {"inputs": normal(*shape), "targets": normal(*shape)}
    return Problem(loss_fn, params, data)
