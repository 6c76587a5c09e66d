"""Sharpness-aware perturbation: the estimate is taken one ascent step away."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fgrad import _arguments, _loss_and_aux, perturbations, transform
from fgrad.evaluation import TracedLoss, evaluate_pairs
from fgrad.leaves import LeafEpsilon, Mask, Plan
from fgrad.leaves.epsilon import Schedule
from fgrad.spread import Spread

# The index of the ascent's z. No estimator has so many perturbations, so the same key
# gives other directions here than in the estimator.
_ASCENT = np.uint32(2**32 - 1)


class SharpnessAwareState(NamedTuple):
    """State of `sharpness_aware`.

    Attributes:
      key: the key that, with ``count``, addresses every z₀.
      count: int32 scalar, steps taken.
      ascent: int32 scalar c₀ in {-1, 0, 1}, the side that the last step went to; 0
        where both losses are equal or one is not finite.
      forward_passes: int32 scalar, evaluations of the loss in the last step: two and
        those of ``inner``.
      inner_state: that of ``inner``.
    """

    key: jax.Array
    count: jax.Array  # type: ignore[assignment]  # optax's name, and tuple's
    ascent: jax.Array
    forward_passes: jax.Array
    inner_state: Any


def sharpness_aware(
    inner: optax.GradientTransformation,
    key: jax.Array,
    *,
    rho: Schedule,
    perturbation: perturbations.Perturbation | None = None,
    mask: Mask = None,
    spread: Spread | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets a transformation estimate its gradient at the worse of two neighbours.

    .. math:: c_0 = sign(L(w + ρz_0) - L(w - ρz_0)), \quad
      u = \text{inner}(w;\; w' \mapsto L(w' + ρ c_0 z_0))

    The first pair of forward calls finds which side has the larger loss. Every
    evaluation of ``inner`` is then made from the neighbour on that side, and the update
    of ``inner`` is applied to the original weights. No second copy of the weights
    exists: each leaf gets ``ρ c_0 z_0`` where the loss uses it, on top of the
    perturbation of ``inner``. In fixed point the two are added one after the other, by
    equation (6). After each the sum is clipped and, for a Δ_z that is no power of two,
    rounded.

    Args:
      inner: a transformation that contains ``fixed_point_forward_grad``. The loss in
        its state is that of the neighbour.
      key: PRNG key; z₀ is a function of it and the step.
      rho: ρ, how far the ascent moves each weight for a unit of z₀, in units of the
        weights; or an optax schedule of it.
      perturbation: where z₀ comes from; ``perturbations.normal()`` by default.
      mask: leaves that take part in the ascent, as in ``fixed_point_forward_grad``.
      spread: how devices share the examples of the ascent's pair, which each of those
        that share pairs evaluates; ``inner`` has a ``spread`` of its own.

    Returns:
      A transformation whose ``update`` takes ``value_fn`` (or ``obj_fn``) and what it
      names, as that of ``fixed_point_forward_grad``; ``inner`` gets all extra
      arguments.

    Raises:
      TypeError, ValueError: here for bad options; in ``init`` for a rho of at most half
        a weight step; in ``update`` without params or value_fn.

    Example:
      >>> from fgrad import qzo_ff
      >>> inner = qzo_ff(0.01, jax.random.key(0))
      >>> tx = sharpness_aware(inner, jax.random.key(1), rho=0.05)
      >>> params = {"w": jnp.array([1.0, -2.0])}
      >>> loss_fn = lambda params: jnp.sum(params["w"] ** 2)
      >>> updates, state = tx.update(params, tx.init(params), params, value_fn=loss_fn)
      >>> int(state.forward_passes)  # 2 for the ascent, 2m for the estimate
      8

    Reference:
      Feng et al., "Stepping Forward on the Last Mile", NeurIPS 2024, after Foret et
      al., "Sharpness-Aware Minimization", ICLR 2021.
    """
    inner = _arguments.transformation(inner)
    _arguments.key(key)
    _check_kind(rho)
    policy = _arguments.policy(rho, 1, perturbation, name="rho")
    _arguments.spread(spread)
    ascents = None if spread is None else spread.without_pairs()

    def init_fn(params: Any) -> SharpnessAwareState:
        plan = Plan(params, policy, mask=mask)
        plan.check_values()
        _check_rho(plan)
        return SharpnessAwareState(
            key=jnp.array(key, copy=True),
            count=jnp.zeros([], jnp.int32),
            ascent=jnp.zeros([], jnp.int32),
            forward_passes=jnp.zeros([], jnp.int32),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: Any,
        state: SharpnessAwareState,
        params: Any = None,
        *,
        value_fn: Callable[..., jax.Array] | None = None,
        obj_fn: Callable[..., jax.Array] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, SharpnessAwareState]:
        if _arguments.has_losses(value_fn, obj_fn, extra_args):
            return _from_losses(inner, updates, state, params, extra_args)
        loss_fn = _arguments.loss("sharpness_aware", params, value_fn, obj_fn)
        named = _arguments.named_arguments(loss_fn, extra_args)
        plan_of = functools.partial(Plan, policy=policy, mask=mask, step=state.count)
        z_key = perturbations.sample_key(state.key, state.count, _ASCENT)
        ascent = _worse_side(loss_fn, named, plan_of(params), z_key, ascents)
        neighbour_fn = _shifted(loss_fn, z_key, ascent, plan_of)
        updates, inner_state = inner.update(
            updates, state.inner_state, params, value_fn=neighbour_fn, **extra_args
        )
        return updates, SharpnessAwareState(
            key=state.key,
            count=optax.safe_increment(state.count),
            ascent=ascent,
            forward_passes=jnp.int32(2 + _forward_passes(inner_state)),
            inner_state=inner_state,
        )

    return _arguments.link(init_fn, update_fn, spread)


def _check_kind(rho: Any) -> None:
    """Raises for a ρ of each leaf."""
    if isinstance(rho, LeafEpsilon):
        raise TypeError(
            f"rho must be a number or a schedule, got {rho.name}: a rho of each leaf "
            "would be that of the perturbed leaf."
        )


def _from_losses(
    inner: optax.GradientTransformationExtraArgs,
    updates: Any,
    state: SharpnessAwareState,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, SharpnessAwareState]:
    """A step of losses at the neighbour, which tell nothing of the ascent."""
    updates, inner_state = inner.update(
        updates, state.inner_state, params, **extra_args
    )
    return updates, state._replace(
        count=optax.safe_increment(state.count),
        ascent=jnp.zeros([], jnp.int32),
        forward_passes=jnp.zeros([], jnp.int32),
        inner_state=inner_state,
    )


def _worse_side(
    loss_fn: Callable[..., Any],
    kwargs: dict[str, Any],
    plan: Plan,
    z_key: jax.Array,
    spread: Spread | None,
) -> jax.Array:
    """int32 scalar, the sign of z where the loss is larger; 0 if none is known."""
    plus, minus, _ = evaluate_pairs(
        lambda p, **kw: _loss_and_aux.loss_alone(loss_fn(p, **kw)),
        plan,
        jax.vmap(plan.leaf_keys)(z_key[None]),
        kwargs=kwargs,
        spread=spread,
    )
    finite = jnp.isfinite(plus[0]) & jnp.isfinite(minus[0])
    return jnp.where(finite, jnp.sign(plus[0] - minus[0]), 0).astype(jnp.int32)


def _shifted(
    value_fn: Callable[..., jax.Array],
    z_key: jax.Array,
    sign: jax.Array,
    plan_of: Callable[[Any], Plan],
) -> Callable[..., jax.Array]:
    """The loss as a function of weights that it moves by ``sign * ρz`` before use.

    It can be traced inside another evaluation: then a leaf gets both perturbations
    where it is first used.

    Args:
      value_fn: ``value_fn(params, **kwargs) -> scalar loss``.
      z_key: key of z, from `perturbations.sample_key`.
      sign: int32 scalar, -1, 0 or 1.
      plan_of: ``plan_of(params)`` is the plan of the step, with ρ as its epsilon.

    Returns:
      A function of the signature of ``value_fn``.

    Example:
      >>> from fgrad.leaves import Policy
      >>> plan_of = lambda params: Plan(params, Policy(0.5))
      >>> there = _shifted(lambda w: w**2, jax.random.key(0), jnp.int32(0), plan_of)
      >>> there(jnp.float32(3))
      Array(9., dtype=float32)
    """

    # `wraps` passes on the signature, which says what extra arguments the loss takes.
    @functools.wraps(value_fn, updated=())
    def neighbour_fn(params: Any, **kwargs: Any) -> Any:
        plan = plan_of(params)
        loss = TracedLoss(lambda p: value_fn(p, **kwargs), plan, has_aux=None)
        pair = loss.with_aux(plan.leaf_keys(z_key), sign)
        return pair if loss.has_aux else pair[0]

    return neighbour_fn


def _check_rho(plan: Plan) -> None:
    """Raises if ρ rounds to zero on the grid of a leaf."""
    try:
        plan.check_epsilon()
    except ValueError as error:
        raise ValueError(f"rho of sharpness_aware, read as epsilon: {error}") from error


def _forward_passes(state: Any) -> Any:
    """How many evaluations of the loss the links of ``inner`` made in the last step."""
    if isinstance(state, transform.ForwardGradState):
        return 2 * state.loss_differences.size
    if isinstance(state, SharpnessAwareState):
        return state.forward_passes
    parts = state.values() if isinstance(state, dict) else state
    inside = isinstance(state, tuple | list | dict)
    times = getattr(state, "inner_updates", 1)
    return getattr(state, "importance_passes", 0) + times * (
        sum(map(_forward_passes, parts)) if inside else 0
    )
