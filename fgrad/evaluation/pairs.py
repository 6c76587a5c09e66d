"""Pairs of evaluations: ``L(w + εz)`` and ``L(w - εz)`` of any JAX function.

The type of each leaf decides its arithmetic (`fgrad.leaves`). Each leaf is perturbed
where the function first uses it (`fgrad.evaluation.point_of_use`), so that no second
copy of the model exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from fgrad import perturbations
from fgrad.evaluation import point_of_use
from fgrad.fixed_point import integer_reads, is_qtensor, stored
from fgrad.leaves import Mask, Plan, Policy
from fgrad.leaves.arithmetic import Arithmetic
from fgrad.leaves.plan import sides
from fgrad.perturbations import LeafKeys
from fgrad.tracing import compiled_once
from fgrad.tracing.promotion import usual_rules


@usual_rules
def dual_forward(
    value_fn: Callable[..., jax.Array],
    params: Any,
    key: jax.Array,
    epsilon: jax.typing.ArrayLike,
    perturbation: perturbations.Perturbation | None = None,
    *,
    mask: Mask = None,
    **kwargs: Any,
) -> tuple[jax.Array, jax.Array]:
    r"""Evaluates a loss on both sides of the weights.

    .. math:: L(w + εz), \quad L(w - εz)

    Args:
      value_fn: ``value_fn(params, **kwargs) -> scalar loss``.
      params: pytree of float arrays and `QTensor`.
      key: key of this z; each leaf folds in the hash of its path.
      epsilon: perturbation scale ε in units of the weights.
      perturbation: where z comes from; ``perturbations.normal()`` by default.
      mask: leaves to perturb: a pytree of bools, a prefix of one, or a function from
        params to it; all by default.
      **kwargs: passed to ``value_fn``.

    Returns:
      ``(loss_plus, loss_minus)``, scalars in the dtype that ``value_fn`` returns.

    Raises:
      TypeError: for an integer leaf that is no `QTensor`, or a loss that is no
        real scalar.

    Example:
      >>> plus, minus = dual_forward(
      ...     lambda w, x: jnp.sum(w * x),
      ...     jnp.array([1.0, 2.0]),
      ...     jax.random.key(0),
      ...     0.125,
      ...     perturbations.rademacher(),
      ...     x=jnp.array([8.0, 0.0]),
      ... )
      >>> sorted([float(plus), float(minus)])
      [7.0, 9.0]

    Reference:
      Section 3.1 of Feng et al., "Stepping Forward on the Last Mile", NeurIPS 2024.
    """
    plan = Plan(params, _policy(epsilon, perturbation), mask=mask)
    keys = jax.vmap(plan.leaf_keys)(key[None])
    plus, minus = evaluate_pairs(lambda p: value_fn(p, **kwargs), plan, keys)
    return plus[0], minus[0]


@usual_rules
def perturb(
    params: Any,
    key: jax.Array,
    epsilon: jax.typing.ArrayLike,
    perturbation: perturbations.Perturbation,
    *,
    sign: int | jax.Array = 1,
    mask: Mask = None,
) -> Any:
    """The parameters ``w + sign * εz``, each leaf in its own arithmetic.

    Args:
      params: pytree of float arrays and `QTensor`.
      key: key of this z.
      epsilon: perturbation scale ε in units of the weights.
      perturbation: where z comes from.
      sign: 1 or -1; may be traced.
      mask: leaves to perturb, as in `dual_forward`.

    Returns:
      A pytree like ``params``, with the same dtypes.
    """
    plan = Plan(params, _policy(epsilon, perturbation), mask=mask)
    return plan.perturbed(key, sign)


def evaluate_pairs(
    value_fn: Callable[[Any], jax.Array],
    plan: Plan,
    keys: LeafKeys,
    *,
    vectorize: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Evaluates a loss on both sides of the weights, for m perturbations.

    Args:
      value_fn: ``value_fn(params) -> scalar loss``; it is traced once.
      plan: the leaves of the step.
      keys: [m, leaves], of z.
      vectorize: with 1, the 2m evaluations run one after the other; with V > 1, the 2V
        of V pairs at once.

    Returns:
      ``(losses_plus, losses_minus)``, each [m].
    """
    losses: tuple[jax.Array, jax.Array] = compiled_once.call(
        _losses,
        TracedLoss(value_fn, plan).program,
        list(plan.arithmetic.values()),
        keys,
        vectorize=vectorize,
    )
    return losses


def _losses(
    program: core.ClosedJaxpr,
    arithmetic: Sequence[Arithmetic],
    keys: LeafKeys,
    *,
    vectorize: int,
) -> tuple[jax.Array, jax.Array]:
    """The losses of a traced loss; see `evaluate_pairs`."""
    pairs = len(keys.stacked)
    signs = jnp.tile(jnp.array([1, -1], jnp.int32), pairs)
    keys = jax.tree.map(lambda k: jnp.repeat(k, 2, axis=0), keys)

    def evaluate(address: tuple[jax.Array, LeafKeys]) -> jax.Array:
        sign, keys_of_z = address
        return _run(program, arithmetic, keys_of_z, sign, together=vectorize > 1)

    if vectorize >= pairs > 1:
        losses = jax.vmap(evaluate)((signs, keys))
    else:
        batch_size = 2 * vectorize if vectorize > 1 else None
        losses = jax.lax.map(evaluate, (signs, keys), batch_size=batch_size)
    plus, minus = losses.reshape(pairs, 2).T
    return plus, minus


class TracedLoss:
    """A loss function, traced once, to be evaluated at perturbed parameters."""

    def __init__(self, value_fn: Callable[[Any], jax.Array], plan: Plan) -> None:
        """Traces ``value_fn(params) -> scalar loss`` for the leaves of a plan."""
        self._arithmetic = list(plan.arithmetic.values())
        loss_fn = integer_reads.checked(lambda params: _check_loss(value_fn(params)))

        def function(values: Sequence[jax.Array], scales: Sequence[jax.Array]) -> Any:
            return loss_fn(plan.with_stored(values, scales))

        self.program = point_of_use.trace(function, *_arrays(self._arithmetic))

    def __call__(
        self,
        keys: LeafKeys,
        sign: jax.Array,
        events: list[point_of_use.Event] | None = None,
    ) -> jax.Array:
        """The loss at ``w + sign * εz``, for the keys [leaves] of z."""
        return _run(self.program, self._arithmetic, keys, sign, events)


def _arrays(
    arithmetic: Sequence[Arithmetic],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The stored values of the leaves, and the scales of those on a grid."""
    leaves = [one.leaf for one in arithmetic]
    scales = [leaf.scale for leaf in leaves if is_qtensor(leaf)]
    return [stored(leaf) for leaf in leaves], scales


def _run(
    program: core.ClosedJaxpr,
    arithmetic: Sequence[Arithmetic],
    keys: LeafKeys,
    sign: jax.Array,
    events: list[point_of_use.Event] | None = None,
    *,
    together: bool = False,
) -> jax.Array:
    """The loss at ``w + sign * εz``; see `TracedLoss` and `point_of_use.run`."""
    values, scales = _arrays(arithmetic)
    with integer_reads.library_arithmetic():
        pending = [
            x if isinstance(x, jax.Array) else point_of_use.Pending(x, array)
            for x, array in zip(sides(arithmetic, keys, sign), values, strict=True)
        ]
        return point_of_use.run(
            program, [*pending, *scales], sign, events, together=together
        )


def _policy(epsilon: Any, perturbation: perturbations.Perturbation | None) -> Policy:
    if perturbation is None:
        return Policy(epsilon)
    return Policy(epsilon, perturbation=perturbation)


def _check_loss(loss: Any) -> jax.Array:
    if isinstance(loss, tuple | list | dict) or jnp.shape(loss) != ():
        got = (
            f"a {type(loss).__name__}"
            if isinstance(loss, tuple | list | dict)
            else f"shape {jnp.shape(loss)}"
        )
        raise TypeError(
            f"value_fn must return a scalar loss, got {got}. Reduce it, for example "
            "with jnp.mean, and return nothing else."
        )
    loss = jnp.asarray(loss)
    if not (
        jnp.issubdtype(loss.dtype, jnp.floating)
        or jnp.issubdtype(loss.dtype, jnp.signedinteger)
    ):
        raise TypeError(f"value_fn must return a real loss, got dtype {loss.dtype}.")
    return loss
