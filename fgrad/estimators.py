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
import numpy as np

from fgrad import _checks
from fgrad.evaluation import evaluate_pairs
from fgrad.leaves import Mask, Plan, Policy
from fgrad.perturbations import LeafKeys
from fgrad.spread import Spread
from fgrad.tracing import execution_order
from fgrad.tracing.promotion import usual_rules

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
    # A difference could overflow, and a comparison cannot.
    above, below = loss_plus > loss_minus, loss_plus < loss_minus
    return above.astype(jnp.int32) - below.astype(jnp.int32)


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
    half = half_difference(loss_plus, loss_minus)
    return (half / jnp.asarray(epsilon)).astype(jnp.float32)


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
    differences = half_difference(loss_plus, loss_minus).astype(jnp.float32)
    finite = jnp.isfinite(differences)
    # Of the largest first, or squares of tiny differences would vanish.
    largest = jnp.max(jnp.abs(differences), where=finite, initial=0.0)
    # The reciprocal of the largest floats is no normal float, and XLA makes it zero.
    shrink = jnp.where(largest > 2.0**100, 2.0**-30, 1.0)
    differences, largest = differences * shrink, largest * shrink
    some = largest > 0
    shares = jnp.where(finite & some, differences / jnp.where(some, largest, 1), 0)
    mean_square = jnp.mean(jnp.square(shares), where=finite)
    return shares / jnp.where(some, jnp.sqrt(mean_square), 1)


def half_difference(loss_plus: jax.Array, loss_minus: jax.Array) -> jax.Array:
    """``(L₊ - L₋) / 2``, which is finite for all finite losses.

    The difference itself can be beyond the range of its type: of two int32, or of two
    floats near the largest.

    Args:
      loss_plus: losses of a real dtype, any shape.
      loss_minus: losses of the same dtype and shape.

    Returns:
      Half of the difference, rounded once: float32, or float64 for such losses.

    Example:
      >>> half_difference(jnp.int32(2_000_000_000), jnp.int32(-2_000_000_000))
      Array(2.e+09, dtype=float32)
    """
    plus, minus = jnp.asarray(loss_plus), jnp.asarray(loss_minus)
    if jnp.issubdtype(plus.dtype, jnp.integer):
        # Modulo 2**32 the magnitude of a difference of two int32 is right as uint32.
        unsigned = jnp.dtype(f"uint{8 * plus.dtype.itemsize}")
        above = plus > minus
        magnitude = jnp.where(above, plus - minus, minus - plus).astype(unsigned)
        half = magnitude.astype(jnp.float32) / 2
        return jnp.where(above, half, -half)
    wide = jnp.promote_types(plus.dtype, jnp.float32)
    return plus.astype(wide) / 2 - minus.astype(wide) / 2


class Estimate(NamedTuple):
    """A gradient and what it was made of.

    Attributes:
      gradient: pytree like params: float leaves in their own dtype; for a `QTensor`
        leaf a `QTensor` with float32 ``qvalue``, in units of loss per unit of the
        weight's value (not per grid step), and a zero ``scale``.
      loss: float32 scalar, mean of the finite pairs' losses.
      loss_differences: float32 [m], ``L₊ - L₋`` of each pair.
      nonfinite_pairs: int32 scalar, pairs left out for a NaN or infinite loss.
      losses: float32 [2, m], L₊ and L₋ of each pair.
      aux: what the loss came with in the last evaluation, ``w - εz`` of the last pair,
        or in the last of those with a finite loss; ``()`` without ``has_aux``.
    """

    gradient: Any
    loss: jax.Array
    loss_differences: jax.Array
    nonfinite_pairs: jax.Array
    losses: jax.Array
    aux: Any = ()


@usual_rules
def forward_gradient(
    value_fn: Callable[..., jax.Array],
    params: Any,
    key: jax.Array,
    *,
    step: jax.typing.ArrayLike = 0,
    mask: Mask = None,
    estimator: Estimator = sign_m_spsa,
    vectorize: int = 1,
    on_nonfinite: str = "skip",
    has_aux: bool = False,
    kwargs: Mapping[str, Any] | None = None,
    spread: Spread | None = None,
    num_perturbations: int = 3,
    **policy: Any,
) -> Estimate:
    r"""Estimates a gradient from 2m forward passes.

    .. math:: ĝ = \frac{1}{m} \sum_{i=1}^m c_i z_i, \quad
      c_i = \text{estimator}(L(w + εz_i), L(w - εz_i), ε)

    Args:
      value_fn: ``value_fn(params, **kwargs) -> scalar loss``.
      params: pytree of float arrays and `QTensor`.
      key: with ``step`` and the index of the perturbation it addresses z.
      step: step of the training run.
      mask: leaves to train, as in `fgrad.dual_forward`.
      estimator: `sign_m_spsa`, `normalized_spsa` or `spsa`.
      vectorize: how many directions are evaluated at once, 1 to m. It trades memory
        for speed. The directions are the same; the losses may differ in their last
        bits, since XLA adds up in another order.
      on_nonfinite: "skip" leaves out a pair with a NaN or infinite loss, "raise"
        stops the program.
      has_aux: whether ``value_fn`` returns ``(loss, aux)``.
      kwargs: passed to ``value_fn``.
      spread: how the devices of a mesh share the evaluations.
      num_perturbations: m, the number of directions.
      **policy: ``epsilon``, ``perturbation`` and ``low_bit``, as in
        `fgrad.fixed_point_forward_grad`.

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
    _checks.key(key)
    _checks.step(step)
    options = _policy(num_perturbations, policy)
    _checks.function("estimator", estimator, "loss_plus", "loss_minus", "epsilon")
    return estimate(
        value_fn,
        Plan(params, options, mask=mask, step=step),
        key,
        estimator=estimator,
        on_nonfinite=_checks.choice("on_nonfinite", on_nonfinite, ("skip", "raise")),
        has_aux=has_aux,
        kwargs=kwargs,
        vectorize=Policy.count("vectorize", vectorize),
        spread=spread,
    )


@usual_rules
def pair_losses(
    value_fn: Callable[..., jax.Array],
    params: Any,
    key: jax.Array,
    step: jax.typing.ArrayLike,
    *,
    mask: Mask = None,
    vectorize: int = 1,
    kwargs: Mapping[str, Any] | None = None,
    spread: Spread | None = None,
    num_perturbations: int = 3,
    **policy: Any,
) -> jax.Array:
    """The first half of `forward_gradient`: the losses of a step, and no gradient.

    A client of a server evaluates them on data of its own. Of their mean over the
    clients, whoever has the parameters makes the step: by ``losses=`` of ``update`` or
    by `gradient_from_losses`.

    Args:
      value_fn: ``value_fn(params, **kwargs) -> scalar loss``.
      params: pytree of float arrays and `QTensor`.
      key: the key of the run.
      step: step of the training run.
      mask: leaves to train, as in `fgrad.dual_forward`.
      vectorize: how many directions are evaluated at once.
      kwargs: passed to ``value_fn``.
      spread: how the devices of a mesh share the evaluations.
      num_perturbations: m.
      **policy: ``epsilon``, ``perturbation`` and ``low_bit``, as in
        `fgrad.fixed_point_forward_grad`. A chain with a ``guide`` draws other z.

    Returns:
      [2, m], the losses at ``w + εz_i`` and those at ``w - εz_i``.

    Example:
      >>> w, key = jnp.array([3.0, -1.0]), jax.random.key(0)
      >>> losses = pair_losses(lambda w: jnp.sum(w**2), w, key, 0, num_perturbations=4)
      >>> losses.shape
      (2, 4)
      >>> gradient_from_losses(w, key, 0, *losses).gradient.shape
      (2,)
    """
    options = Policy(num_perturbations=num_perturbations, **policy)
    plan = Plan(params, options, mask=mask, step=step)
    plus, minus, _ = evaluate_pairs(
        value_fn,
        plan,
        plan.keys(key),
        kwargs=kwargs,
        vectorize=vectorize,
        spread=spread,
    )
    return jnp.stack([plus, minus])


@usual_rules
def gradient_from_losses(
    params: Any,
    key: jax.Array,
    step: jax.typing.ArrayLike,
    loss_plus: jax.Array,
    loss_minus: jax.Array,
    *,
    mask: Mask = None,
    estimator: Estimator = sign_m_spsa,
    **policy: Any,
) -> Estimate:
    """The second half of `forward_gradient`: the gradient, from losses that are given.

    Nothing is evaluated. Whoever knows the parameters, the key and the losses of a step
    makes the same gradient of them, bit for bit: a server of clients that send losses
    only, or the replay of a run from its log.

    Args:
      params: pytree of float arrays and `QTensor`.
      key: the key of the run.
      step: step of the training run.
      loss_plus: [m] losses at ``w + εz_i``.
      loss_minus: [m] losses at ``w - εz_i``.
      mask: leaves to train, as in `fgrad.dual_forward`.
      estimator: `sign_m_spsa`, `normalized_spsa` or `spsa`.
      **policy: ``epsilon``, ``perturbation`` and ``low_bit``, as in
        `fgrad.fixed_point_forward_grad`.

    Returns:
      An `Estimate`. A pair with a NaN or infinite loss is left out.

    Raises:
      ValueError: if the losses are not two arrays [m].

    Example:
      >>> w, key = jnp.array([3.0, -1.0]), jax.random.key(0)
      >>> loss_fn = lambda w: jnp.sum(w**2)
      >>> whole = forward_gradient(loss_fn, w, key, num_perturbations=2)
      >>> plus = whole.loss + whole.loss_differences / 2
      >>> minus = whole.loss - whole.loss_differences / 2
      >>> half = gradient_from_losses(w, key, 0, plus, minus)
      >>> bool((half.gradient == whole.gradient).all())
      True
    """
    _checks.key(key)
    _checks.step(step)
    _checks.function("estimator", estimator, "loss_plus", "loss_minus", "epsilon")
    plus, minus = (_as_losses(x) for x in (loss_plus, loss_minus))
    if plus.ndim != 1 or plus.shape != minus.shape or not plus.size:
        raise ValueError(
            "gradient_from_losses needs two arrays [m] of the losses of m pairs, got "
            f"shapes {plus.shape} and {minus.shape}."
        )
    kinds = jnp.floating, jnp.signedinteger
    if not any(jnp.issubdtype(plus.dtype, kind) for kind in kinds):
        raise TypeError(f"losses are real numbers, got dtype {plus.dtype}.")
    options = _policy(len(plus), policy)
    plan = Plan(params, options, mask=mask, step=step)
    return estimate_from_losses(plan, plan.keys(key), plus, minus, estimator)


def _policy(num_perturbations: int, options: dict[str, Any]) -> Policy:
    """A `Policy` of keyword arguments; one that it does not have is named."""
    known = {field.name for field in dataclasses.fields(Policy)}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise TypeError(
            f"there is no option {unknown[0]!r}; there are "
            f"{', '.join(sorted(known))}. What value_fn needs goes into kwargs="
        )
    return Policy(num_perturbations=num_perturbations, **options)


def _as_losses(x: Any) -> jax.Array:
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(
            f"gradient_from_losses needs two arrays [m] of losses, got {x!r}."
        ) from None


def estimate(
    value_fn: Callable[..., jax.Array],
    plan: Plan,
    key: jax.Array,
    *,
    estimator: Estimator,
    on_nonfinite: str,
    **how: Any,
) -> Estimate:
    """The estimate of one step, whose leaves a plan knows; see `forward_gradient`.

    The arguments ``how`` are those of `evaluate_pairs`.
    """
    keys = plan.keys(key)
    plus, minus, aux = evaluate_pairs(value_fn, plan, keys, **how)
    if on_nonfinite == "raise":
        jax.debug.callback(_raise_nonfinite, plus, minus, plan.step)
    found = estimate_from_losses(plan, keys, plus, minus, estimator)
    return found._replace(aux=aux)


def estimate_from_losses(
    plan: Plan,
    keys: LeafKeys,
    plus: jax.Array,
    minus: jax.Array,
    estimator: Estimator,
) -> Estimate:
    """The estimate of a step whose losses are known; see `gradient_from_losses`."""
    # Sums over the losses are compiled by themselves, so that they are rounded alike
    # wherever the losses come from: this step, other devices, the log of a run.
    both = execution_order.stored(jnp.concatenate([plus, minus]))
    plus, minus = both.reshape(2, -1)
    coefficients = estimator(plus, minus, plan.epsilon)
    _check_coefficients(estimator, coefficients, plus)
    finite = jnp.isfinite(plus) & jnp.isfinite(minus) & jnp.isfinite(coefficients)
    coefficients = jnp.where(finite, coefficients, 0)
    signs = jnp.where(finite, sign_m_spsa(plus, minus, plan.epsilon), 0)
    differences = 2 * half_difference(plus, minus).astype(jnp.float32)
    return Estimate(
        gradient=plan.gradient(keys, coefficients, signs),
        loss=_mean_loss(plus, minus, finite),
        loss_differences=jnp.where(finite, _saturated(differences), differences),
        nonfinite_pairs=jnp.sum(~finite, dtype=jnp.int32),
        losses=jnp.stack([plus, minus]).astype(jnp.float32),
    )


def _mean_loss(plus: jax.Array, minus: jax.Array, finite: jax.Array) -> jax.Array:
    """Mean of the finite pairs' losses, float32, also where their sum overflows."""
    both = jnp.stack([plus, minus]).astype(jnp.float32)
    mean = jnp.mean(both, where=finite)
    shares = both / (2 * jnp.maximum(jnp.sum(finite), 1))
    return jnp.where(jnp.isinf(mean), jnp.sum(shares, where=finite), mean)


def _saturated(x: jax.Array) -> jax.Array:
    largest = jnp.finfo(x.dtype).max
    return jnp.clip(x, -largest, largest)


def _check_coefficients(
    estimator: Estimator, coefficients: Any, losses: jax.Array
) -> None:
    shape = getattr(coefficients, "shape", None)
    dtype = getattr(coefficients, "dtype", None)
    kinds = jnp.floating, jnp.signedinteger
    real = dtype is not None and any(jnp.issubdtype(dtype, kind) for kind in kinds)
    if shape != losses.shape or not real:
        name = getattr(estimator, "__name__", repr(estimator))
        got = f"coefficients of shape {shape} and dtype {dtype}"
        raise ValueError(
            f"estimator {name} returned "
            f"{got if dtype is not None else repr(coefficients)} for losses of shape "
            f"{losses.shape}; it takes (loss_plus, loss_minus, epsilon) and returns "
            "one real coefficient for each pair."
        )


def _raise_nonfinite(plus: Any, minus: Any, step: Any) -> None:
    if not (np.isfinite(plus) & np.isfinite(minus)).all():
        raise FloatingPointError(
            f"non-finite loss at step {int(step)}: L(w + εz) = {plus.tolist()}, "
            f"L(w - εz) = {minus.tolist()}. Lower the learning rate or epsilon, or "
            'use on_nonfinite="skip" to leave such pairs out.'
        )
