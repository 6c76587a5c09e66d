r"""Dense products that keep a part of their input for the backward pass.

The gradient of a kernel is a sum over examples, which are rows of the input and of the
gradient at the output, :math:`X^T D = \sum_i x_i d_i^T`. Backpropagation keeps all rows
of X for it. Column-row sampling keeps k of them, drawn with probabilities p, and
divides by k p, so that the sum is right on average. Winner-take-all sampling keeps the
rows of the largest probabilities as they are, which have no variance, and draws the
rest. It is the backpropagation that forward gradients have to be compared with where
memory is short.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def column_row(
    key: jax.Array, probabilities: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """Draws rows with replacement.

    Args:
      key: PRNG key.
      probabilities: p of each row [rows], which sum to 1.
      count: k, how many are drawn.

    Returns:
      Indices [k], and the weight 1 / (k p) of each.
    """
    chosen = jax.random.categorical(key, jnp.log(probabilities), shape=(count,))
    return chosen, 1 / (count * probabilities[chosen])


def winner_take_all(
    key: jax.Array, probabilities: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    r"""Keeps the most probable rows as they are, and draws the others.

    .. math:: \sum_{i \in C} x_i d_i^T +
      \frac{1 - P_C}{k - |C|} \sum_{j \sim p, \, j \notin C} \frac{x_j d_j^T}{p_j},
      \quad P_C = \sum_{i \in C} p_i

    C is the set of the largest probabilities that makes
    :math:`(1 - P_C) / (k - |C|)` least, to which the variance is proportional. With
    equal probabilities, C is empty and this is `column_row`.

    Args:
      key: PRNG key.
      probabilities: p of each row [rows], which sum to 1.
      count: k, how many rows are kept in all; at most as many as there are.

    Returns:
      Indices [k], and the weight of each: 1 for those in C.

    Reference:
      Liu et al., "Winner-take-all column row sampling for memory efficient adaptation
      of language model", NeurIPS 2023 (arXiv 2305.15265).
    """
    order = jnp.argsort(-probabilities)
    ranked = probabilities[order]
    left = 1 - jnp.concatenate([jnp.zeros(1), jnp.cumsum(ranked[: count - 1])])
    left = jnp.maximum(left, 0)  # of sizes 0 to k - 1 of C
    winners = jnp.argmin(left / (count - jnp.arange(count)))
    outside = jnp.arange(len(ranked)) >= winners
    others = jnp.where(outside, ranked, 0)
    drawn = jax.random.categorical(key, jnp.log(others), shape=(count,))
    places = jnp.arange(count)
    keeps = places < winners
    rank = jnp.where(keeps, places, drawn)
    scale = left[winners] / jnp.maximum(count - winners, 1)
    return order[rank], jnp.where(keeps, 1.0, scale / ranked[rank])


SAMPLERS = {"column_row": column_row, "winner_take_all": winner_take_all}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def dense(
    x: jax.Array, kernel: jax.Array, key: jax.Array, count: int, sampler: str
) -> jax.Array:
    """``x @ kernel``, of whose input the backward pass keeps ``count`` rows.

    The gradient by x needs the kernel only and is exact. That by the kernel is right on
    average over keys. A row is drawn with a probability proportional to its length,
    since the gradient at the output is not known yet.

    Args:
      x: [rows, inputs], rows being examples, or examples and positions.
      kernel: [inputs, outputs].
      key: PRNG key of the choice, another in each step and layer.
      count: how many rows are kept.
      sampler: a key of `SAMPLERS`.

    Raises:
      ValueError: for a count that is not 1 to the number of rows, and for an input of
        other than two axes.
    """
    del key
    if x.ndim != 2:
        raise ValueError(f"x must be [rows, inputs], got shape {x.shape}.")
    if not 1 <= count <= len(x):
        raise ValueError(f"count must be 1 to {len(x)} rows, got {count}.")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {list(SAMPLERS)}, got {sampler!r}.")
    return x @ kernel


def row_probabilities(x: jax.Array) -> jax.Array:
    """Of each row of x [rows, inputs] in proportion to its length; equal for zeros."""
    lengths = jnp.linalg.norm(x, axis=1)
    total = jnp.sum(lengths)
    return jnp.where(total > 0, lengths / jnp.where(total > 0, total, 1), 1 / len(x))


def _forward(
    x: jax.Array, kernel: jax.Array, key: jax.Array, count: int, sampler: str
) -> tuple[jax.Array, Any]:
    y = dense(x, kernel, key, count, sampler)
    rows, weights = SAMPLERS[sampler](key, row_probabilities(x), count)
    return y, (weights[:, None] * x[rows], rows, kernel)


def _backward(count: int, sampler: str, kept: Any, cotangent: jax.Array) -> Any:
    del count, sampler
    x, rows, kernel = kept
    return cotangent @ kernel.T, x.T @ cotangent[rows], None


dense.defvjp(_forward, _backward)
