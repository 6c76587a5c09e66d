"""From losses and seeds to a gradient: SPSA, sign-m-SPSA and what lies between.

``ĝ = 1/m Σᵢ cᵢ zᵢ``, where an estimator gives the coefficient cᵢ of a pair of losses.
The perturbations are regenerated from their addresses, never stored. With integer
coefficients the sum is an exact integer sum on the grid of z, equation (7).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fgrad import evaluation, ordering, perturbations, rules
from fgrad.fixed_point import is_qtensor
from fgrad.low_bit import OnGrid

# estimator(loss_plus, loss_minus, epsilon) -> coefficient of z, int32 or float32
Estimator = Callable[[jax.Array, jax.Array, jax.typing.ArrayLike], jax.Array]


def sign_m_spsa(
    loss_plus: jax.Array, loss_minus: jax.Array, epsilon: jax.typing.ArrayLike
) -> jax.Array:
    r"""Coefficient ``sign(L₊ - L₋)`` of sign-m-SPSA, an exact integer.

    .. math:: ĝ = \frac{1}{m} \sum_i sign(L(w + εz_i) - L(w - εz_i)) z_i

    Args:
      loss_plus: losses at w + εz, any shape.
      loss_minus: losses at w - εz, same shape.
      epsilon: not used.

    Returns:
      int32 array in {-1, 0, 1}.

    Example:
      >>> sign_m_spsa(jnp.array([2.0, 1.0]), jnp.array([1.0, 1.0]), 1e-3)
      Array([1, 0], dtype=int32)

    Reference:
      Section 3 of Feng et al., "Stepping Forward on the Last Mile", NeurIPS 2024.
    """
    del epsilon
    return jnp.sign(loss_plus - loss_minus).astype(jnp.int32)


def spsa(
    loss_plus: jax.Array, loss_minus: jax.Array, epsilon: jax.typing.ArrayLike
) -> jax.Array:
    r"""Coefficient ``(L₊ - L₋) / (2ε)`` of SPSA: its mean over z is the gradient.

    .. math:: ĝ = \frac{1}{m} \sum_i \frac{L(w + εz_i) - L(w - εz_i)}{2ε} z_i

    Args:
      loss_plus: losses at w + εz, any shape.
      loss_minus: losses at w - εz, same shape.
      epsilon: perturbation scale ε.

    Returns:
      float32 array.

    Example:
      >>> spsa(jnp.array([2.0]), jnp.array([1.0]), 0.5)
      Array([1.], dtype=float32)

    Reference:
      Section 3 of Feng et al. 2024; Spall 1992.
    """
    return ((loss_plus - loss_minus) / (2 * jnp.asarray(epsilon))).astype(jnp.float32)


def normalized_spsa(
    loss_plus: jax.Array, loss_minus: jax.Array, epsilon: jax.typing.ArrayLike
) -> jax.Array:
    r"""Coefficient ``(L₊ - L₋) / rms(L₊ - L₋)``: SPSA with the step of sign-m-SPSA.

    .. math:: ĝ = \frac{1}{m} \sum_i \frac{d_i}{\sqrt{\frac{1}{m} \sum_j d_j^2}} z_i,
      \quad d_i = L(w + εz_i) - L(w - εz_i)

    The m directions of a step are weighed by how much the loss changes along them,
    which a sign forgets, while the length of the step does not depend on the size of
    the loss: learning rates of sign-m-SPSA carry over. With m = 1 both are the same.

    Args:
      loss_plus: losses at w + εz, [m].
      loss_minus: losses at w - εz, [m].
      epsilon: not used.

    Returns:
      float32 array [m] of unit mean square over the finite pairs, or zeros if all
      differences are zero.

    Example:
      >>> normalized_spsa(jnp.array([4.0, 0.0]), jnp.array([1.0, 4.0]), 1e-3)
      Array([ 0.84852815, -1.1313709 ], dtype=float32)

    Reference:
      The fitness shaping of evolution strategies, e.g. Wierstra et al., "Natural
      Evolution Strategies", JMLR 2014, applied to pairs.
    """
    del epsilon
    differences = (loss_plus - loss_minus).astype(jnp.float32)
    finite = jnp.isfinite(differences)
    # Of the largest first, or squares of tiny differences would vanish.
    largest = jnp.max(jnp.abs(differences), where=finite, initial=0.0)
    some = largest > 0
    shares = jnp.where(finite & some, differences / jnp.where(some, largest, 1), 0)
    mean_square = jnp.mean(jnp.square(shares), where=finite)
    return shares / jnp.where(some, jnp.sqrt(mean_square), 1)


class Estimate(NamedTuple):
    """A gradient and what it was made of.

    Attributes:
      gradient: pytree like params: float leaves in their own dtype; for a `QTensor`
        leaf a `QTensor` with float32 ``qvalue``, in units of loss per unit of the
        weight's value (not per grid step), and a zero ``scale``.
      loss: float32 scalar, mean of the finite pairs' losses.
      loss_differences: float32 [m], ``L₊ - L₋`` of each pair.
      nonfinite_pairs: int32 scalar, pairs left out for a NaN or infinite loss.
    """

    gradient: Any
    loss: jax.Array
    loss_differences: jax.Array
    nonfinite_pairs: jax.Array


def forward_gradient(
    value_fn: Callable[..., jax.Array],
    params: Any,
    key: jax.Array,
    *,
    step: jax.typing.ArrayLike = 0,
    epsilon: rules.Epsilon = 1e-3,
    num_perturbations: int = 3,
    perturbation: perturbations.Perturbation | None = None,
    low_bit: OnGrid | None = None,
    estimator: Estimator = sign_m_spsa,
    vectorize: int = 1,
    mask: evaluation.Mask = None,
    on_nonfinite: str = "skip",
    guidance: rules.Guidance | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Estimate:
    """Estimates a gradient from ``2 * num_perturbations`` forward passes.

    Args:
      value_fn: ``value_fn(params, **kwargs) -> scalar loss``.
      params: pytree of float arrays and `QTensor`.
      key: with ``step`` and the index of the perturbation it addresses z.
      step: step of the training run.
      epsilon: perturbation scale ε in units of the weights, an optax schedule of it,
        or `rules.relative_epsilon` or `rules.step_epsilon` for one of each leaf.
      num_perturbations: m, the number of directions.
      perturbation: where z comes from; ``perturbations.normal()`` by default.
      low_bit: how weights of few bits are trained; see `low_bit.on_grid`.
      estimator: `sign_m_spsa` or `spsa`.
      vectorize: how many directions are evaluated at once, 1 to m. It trades memory
        for speed and leaves the result as it is.
      mask: leaves to train, as in `evaluation.dual_forward`.
      on_nonfinite: "skip" leaves out a pair with a NaN or infinite loss, "raise"
        stops the program.
      guidance: a direction to draw z around, or None.
      kwargs: passed to ``value_fn``.

    Returns:
      An `Estimate`.

    Example:
      >>> w = jnp.array([3.0, -1.0])
      >>> estimate = forward_gradient(
      ...     lambda w: jnp.sum(w**2),
      ...     w,
      ...     jax.random.key(0),
      ...     num_perturbations=2000,
      ...     estimator=spsa,
      ...     vectorize=100,
      ... )
      >>> jnp.round(estimate.gradient)  # the gradient is 2w
      Array([ 6., -2.], dtype=float32)
    """
    policy = rules.policy_at(
        step,
        epsilon,
        perturbation,
        low_bit,
        num_perturbations=num_perturbations,
        guidance=guidance,
    )
    mask = evaluation.resolve_mask(mask, params)
    kwargs = dict(kwargs or {})

    indices = jnp.arange(num_perturbations)
    z_keys = jax.vmap(lambda i: perturbations.sample_key(key, step, i))(indices)
    plus, minus = evaluation.evaluate_pairs(
        lambda p: value_fn(p, **kwargs),
        params,
        z_keys,
        policy,
        mask=mask,
        vectorize=vectorize,
    )
    finite = jnp.isfinite(plus) & jnp.isfinite(minus)
    if on_nonfinite == "raise":
        jax.debug.callback(_raise_nonfinite, finite, plus, minus, step)
    coefficients = jnp.where(finite, estimator(plus, minus, policy.epsilon), 0)
    signs = jnp.where(finite, sign_m_spsa(plus, minus, policy.epsilon), 0)

    def in_real_units(name: str, leaf: Any) -> Any:
        rule = policy.rule(leaf, name)
        gradient = rule.gradient(totals[name], num_perturbations)
        if is_qtensor(leaf):
            zero = jnp.zeros_like(leaf.scale)
            return dataclasses.replace(leaf, qvalue=gradient, scale=zero)
        return gradient.astype(jnp.result_type(leaf))

    totals = _weighted_sums(params, z_keys, coefficients, signs, policy, mask)
    gradient = evaluation.map_leaves(
        lambda path, leaf, trained: (
            in_real_units(jax.tree_util.keystr(path), leaf)
            if trained
            else jax.tree.map(jnp.zeros_like, leaf)
        ),
        params,
        mask,
    )
    both = jnp.stack([plus, minus]).astype(jnp.float32)
    return Estimate(
        gradient=gradient,
        loss=jnp.mean(both, where=finite),
        loss_differences=(plus - minus).astype(jnp.float32),
        nonfinite_pairs=jnp.sum(~finite, dtype=jnp.int32),
    )


def _weighted_sums(
    params: Any,
    z_keys: jax.Array,
    coefficients: jax.Array,
    signs: jax.Array,
    policy: rules.Policy,
    mask: Any,
) -> dict[str, jax.Array]:
    """``Σᵢ cᵢ z_qᵢ`` of each trained leaf, by ``keystr`` of its path."""
    keys = jax.vmap(lambda k: evaluation.trained_keys(k, params, mask))(z_keys)
    leaf_rules: dict[str, rules.Rule] = {}

    def collect(path: tuple[Any, ...], leaf: Any, trained: bool) -> Any:
        if trained:
            name = jax.tree_util.keystr(path)
            leaf_rules[name] = policy.rule(leaf, name)
        return leaf

    evaluation.map_leaves(collect, params, mask)
    totals: dict[str, jax.Array] = {}
    latest = coefficients
    for on_grid in (False, True):  # grid steps are counted by signs
        c = signs if on_grid else coefficients
        group = {
            name: rule
            for name, rule in leaf_rules.items()
            if isinstance(rule, rules.GridRule) == on_grid
        }
        small = {name: rule for name, rule in group.items() if rule.is_small()}
        totals |= rules.weighted_sums_together(small, keys, c)
        for name in [name for name in group if name not in small]:
            # One leaf after the other, or all gradients would be in memory at once.
            delayed = ordering.delayed_key(keys[name], latest)
            total = group[name].weighted_sum(delayed, c)
            latest = total if total.size else latest
            totals[name] = total
    return totals


def _raise_nonfinite(finite: Any, plus: Any, minus: Any, step: Any) -> None:
    if not finite.all():
        raise FloatingPointError(
            f"non-finite loss at step {int(step)}: L(w + εz) = {plus.tolist()}, "
            f"L(w - εz) = {minus.tolist()}. Lower the learning rate or epsilon, or "
            'use on_nonfinite="skip" to leave such pairs out.'
        )
