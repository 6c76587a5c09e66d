"""How good an estimated gradient is, beside the true one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fgrad import _checks
from fgrad.fixed_point import is_qtensor


class GradientQuality(NamedTuple):
    r"""Estimates over several keys, beside the gradient.

    Attributes:
      cosine: mean cosine between an estimate and the gradient.
      cosine_deviation: its standard deviation over the keys.
      mean_cosine: cosine between the mean of the estimates and the gradient; grows
        with the number of keys if the estimator has the gradient's direction.
      relative_variance: total variance of the estimates over the squared length of
        their mean (the mean of n estimates keeps 1/n of it).
      effective_rank: how many directions the estimates' deviations spread over,
        :math:`(\sum_i \lambda_i)^2 / \sum_i \lambda_i^2` of their covariance; at
        most one less than there are keys.
    """

    cosine: float
    cosine_deviation: float
    mean_cosine: float
    relative_variance: float
    effective_rank: float


def gradient_quality(
    estimate: Callable[[jax.Array], Any],
    gradient: Any,
    key: jax.Array,
    *,
    num_estimates: int = 16,
) -> GradientQuality:
    r"""Compares estimates of a gradient with it.

    .. math:: \cos_i = \frac{\hat g_i \cdot g}{\|\hat g_i\| \, \|g\|}

    Args:
      estimate: ``estimate(key)`` gives one estimate, a pytree like ``gradient``; an
        update of a `QTensor` leaf counts with its ``qvalue``, as in
        `fgrad.fixed_point_forward_grad`. Called for one key after the other: jit it.
      gradient: the true gradient, such as `jax.grad`'s; only for this comparison.
      key: random key, split into one for each estimate.
      num_estimates: how many are drawn, at least 2.

    Returns:
      A `GradientQuality`; a cosine with a vector of zeros counts as 0.

    Raises:
      ValueError: if ``num_estimates`` is below 2.

    Example:
      >>> import fgrad
      >>> import jax.numpy as jnp
      >>> def loss_fn(w):
      ...     return jnp.sum(w**2)
      >>> w = jnp.ones(8)
      >>> tx = fgrad.fixed_point_forward_grad(
      ...     jax.random.key(0), num_perturbations=64, estimator=fgrad.estimators.spsa
      ... )
      >>> @jax.jit
      ... def estimate(key):
      ...     state = tx.init(w)._replace(key=key)
      ...     return tx.update(w, state, w, value_fn=loss_fn)[0]
      >>> found = gradient_quality(estimate, jax.grad(loss_fn)(w), jax.random.key(1))
      >>> found.cosine > 0.9 and found.mean_cosine > found.cosine
      True
    """
    num_estimates = _checks.integer("num_estimates", num_estimates, 2, 2**20)
    _checks.key(key)
    _checks.function("estimate", estimate, "key")
    true = _flat(gradient)
    drawn = np.stack([_flat(estimate(k)) for k in jax.random.split(key, num_estimates)])
    cosines = np.array([_cosine(row, true) for row in drawn])
    mean = drawn.mean(axis=0)
    deviations = drawn - mean
    # The eigenvalues of the covariance, from the small matrix of inner products.
    values = np.linalg.eigvalsh(deviations @ deviations.T).clip(min=0)
    total, squares = values.sum(), (values**2).sum()
    return GradientQuality(
        float(cosines.mean()),
        float(cosines.std(ddof=1)),
        _cosine(mean, true),
        float(total / (num_estimates - 1) / max(mean @ mean, 1e-300)),
        float(total**2 / squares) if squares else 0.0,
    )


def _flat(tree: Any) -> np.ndarray:
    leaves = jax.tree.leaves(tree, is_leaf=is_qtensor)
    arrays = [leaf.qvalue if is_qtensor(leaf) else leaf for leaf in leaves]
    return np.concatenate([np.ravel(x) for x in arrays]).astype(np.float64)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / lengths) if lengths else 0.0
