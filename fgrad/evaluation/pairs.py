"""Pairs of evaluations: ``L(w + εz)`` and ``L(w - εz)`` of any JAX function.

The type of each leaf decides its arithmetic (`fgrad.leaves`). Each leaf is perturbed
where the function first uses it (`fgrad.evaluation.point_of_use`), so that no second
copy of the model exists.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from fgrad import _checks, perturbations
from fgrad import spread as spreads
from fgrad._loss_and_aux import is_pair, split
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
    has_aux: bool = False,
    **kwargs: Any,
) -> tuple[Any, Any]:
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
      has_aux: whether ``value_fn`` returns ``(loss, aux)``, a pytree of arrays beside
        the loss.
      **kwargs: passed to ``value_fn``.

    Returns:
      ``(loss_plus, loss_minus)``, scalars in the dtype that ``value_fn`` returns; with
      ``has_aux`` ``((loss_plus, aux_plus), (loss_minus, aux_minus))``.

    Raises:
      TypeError: for an integer leaf that is no `QTensor`, a loss that is no real
        scalar, or an aux of other things than arrays.

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
    _checks.key(key)
    if not callable(value_fn) or isinstance(value_fn, type):
        raise TypeError(
            f"value_fn must be a function of the parameters, got {value_fn!r}."
        )
    _checks.function("value_fn", value_fn, "params", **kwargs)
    plan = Plan(params, _policy(epsilon, perturbation), mask=mask)
    keys = jax.vmap(plan.leaf_keys)(key[None])
    losses, aux = _evaluations(lambda p: value_fn(p, **kwargs), plan, keys, 1, has_aux)
    if not has_aux:
        return losses[0], losses[1]
    plus, minus = (jax.tree.map(operator.itemgetter(i), aux) for i in (0, 1))
    return (losses[0], plus), (losses[1], minus)


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
    _checks.key(key)
    _checks.number("sign", sign, "1 or -1", lambda x: x in (1, 0, -1))
    plan = Plan(params, _policy(epsilon, perturbation), mask=mask)
    return plan.perturbed(key, sign)


def evaluate_pairs(
    value_fn: Callable[..., jax.Array],
    plan: Plan,
    keys: LeafKeys,
    *,
    kwargs: Mapping[str, Any] | None = None,
    vectorize: int = 1,
    has_aux: bool = False,
    spread: spreads.Spread | None = None,
) -> tuple[jax.Array, jax.Array, Any]:
    """Evaluates a loss on both sides of the weights, for m perturbations.

    Args:
      value_fn: ``value_fn(params, **kwargs) -> scalar loss``, or ``(loss, aux)``; it is
        traced once.
      plan: the leaves of the step.
      keys: [m, leaves], of z.
      kwargs: passed to ``value_fn``.
      vectorize: with 1, the 2m evaluations run one after the other; with V > 1, the 2V
        of V pairs at once.
      has_aux: whether ``value_fn`` returns an aux; not with ``spread``.
      spread: how devices share the evaluations; None leaves that to the compiler.

    Returns:
      ``(losses_plus, losses_minus, aux)``, the losses [m] each, and the aux of the last
      evaluation whose loss was finite, of the last one if none was. Without ``has_aux``
      it is ``()``.
    """
    kwargs = kwargs or {}
    if spread is not None:
        return _evaluate_spread(value_fn, plan, keys, kwargs, vectorize, spread)
    value_fn = functools.partial(value_fn, **kwargs)
    losses, aux = _evaluations(value_fn, plan, keys, vectorize, has_aux)
    plus, minus = losses.reshape(-1, 2).T
    if has_aux:
        # What a loss that is no number comes with, such as statistics of a batch, would
        # be kept by who trains on.
        order = jnp.where(jnp.isfinite(losses), jnp.arange(len(losses)), -1)
        last = jnp.max(order) % len(losses)
        aux = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, last, keepdims=False), aux
        )
    return plus, minus, aux


def evaluate_examples(
    value_fn: Callable[[Any], jax.Array],
    plan: Plan,
    keys: LeafKeys,
    *,
    vectorize: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """`evaluate_pairs` of each example's own loss.

    Args:
      value_fn: ``value_fn(params) -> losses [examples]``.
      plan: the leaves of the step.
      keys: [m, leaves], of z.
      vectorize: how many pairs are evaluated at once.

    Returns:
      ``(losses_plus, losses_minus)``, each [m, examples].
    """

    def beside(params: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros([]), _check_losses(value_fn(params))

    _, losses = _evaluations(beside, plan, keys, vectorize, has_aux=True)
    return losses[::2], losses[1::2]


def _evaluations(
    value_fn: Callable[[Any], Any],
    plan: Plan,
    keys: LeafKeys,
    vectorize: int,
    has_aux: bool,
) -> tuple[jax.Array, Any]:
    """The losses [2m], of each pair the positive side first, and their aux, stacked."""
    loss = TracedLoss(value_fn, plan, has_aux=has_aux)
    losses, *leaves = compiled_once.call(
        _of_all_sides, loss.program, loss.arithmetic, keys, vectorize=vectorize
    )
    return losses, jax.tree.unflatten(loss.aux, leaves)


def _of_all_sides(
    program: core.ClosedJaxpr,
    arithmetic: Sequence[Arithmetic],
    keys: LeafKeys,
    *,
    vectorize: int,
) -> list[jax.Array]:
    """What a traced loss returns in each evaluation, stacked; see `_evaluations`."""
    pairs = len(keys.stacked)
    signs = jnp.tile(jnp.array([1, -1], jnp.int32), pairs)
    keys = jax.tree.map(lambda k: jnp.repeat(k, 2, axis=0), keys)

    def evaluate(address: tuple[jax.Array, LeafKeys]) -> list[jax.Array]:
        sign, keys_of_z = address
        return _run(program, arithmetic, keys_of_z, sign, together=vectorize > 1)

    found: list[jax.Array]
    if vectorize >= pairs > 1:
        found = jax.vmap(evaluate)((signs, keys))
    else:
        batch_size = 2 * vectorize if vectorize > 1 else None
        found = jax.lax.map(evaluate, (signs, keys), batch_size=batch_size)
    return found


def _evaluate_spread(
    value_fn: Callable[..., jax.Array],
    plan: Plan,
    keys: LeafKeys,
    kwargs: Mapping[str, Any],
    vectorize: int,
    spread: spreads.Spread,
) -> tuple[jax.Array, jax.Array, Any]:
    """`evaluate_pairs` shared by devices; each loss is the mean over the shards."""

    def evaluate(sign: jax.Array, keys: LeafKeys, kwargs: Any) -> jax.Array:
        loss = TracedLoss(functools.partial(value_fn, **kwargs), plan)
        return loss(keys, sign, together=vectorize > 1)

    table = spread.table(evaluate, keys, kwargs, vectorize=vectorize)
    plus, minus = spreads.mean_over_shards(table)
    return plus, minus, ()


class TracedLoss:
    """A loss function, traced once, to be evaluated at perturbed parameters.

    Attributes:
      program: the jaxpr: the loss, and the leaves of an aux.
      arithmetic: of the leaves.
      has_aux: whether the function returns an aux beside the loss.
      aux: the structure of the aux.
    """

    def __init__(
        self,
        value_fn: Callable[[Any], Any],
        plan: Plan,
        *,
        has_aux: bool | None = False,
    ) -> None:
        """Traces a loss function for the leaves of a plan.

        Args:
          value_fn: ``value_fn(params) -> scalar loss``, or ``(loss, aux)``.
          plan: the leaves of the step.
          has_aux: whether the function must return an aux; None for either.
        """
        self.arithmetic = list(plan.arithmetic.values())

        @integer_reads.checked
        def loss_fn(params: Any) -> Any:
            result = value_fn(params)
            self.has_aux = is_pair(result) if has_aux is None else has_aux
            loss, aux = split(result) if self.has_aux else (result, ())
            return _check_loss(loss), aux

        def function(values: Sequence[jax.Array], scales: Sequence[jax.Array]) -> Any:
            loss, aux = loss_fn(plan.with_stored(values, scales))
            leaves, self.aux = jax.tree.flatten(aux)
            return [loss, *leaves]

        self.program = point_of_use.trace(function, *_arrays(self.arithmetic))

    def __call__(
        self,
        keys: LeafKeys,
        sign: jax.Array,
        events: list[point_of_use.Event] | None = None,
        *,
        together: bool = False,
    ) -> jax.Array:
        """The loss at ``w + sign * εz``, for the keys [leaves] of z."""
        arithmetic = self.arithmetic
        return _run(self.program, arithmetic, keys, sign, events, together=together)[0]

    def with_aux(
        self,
        keys: LeafKeys,
        sign: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """The loss at ``w + sign * εz`` and what it came with, ``()`` if nothing."""
        loss, *leaves = _run(self.program, self.arithmetic, keys, sign)
        return loss, jax.tree.unflatten(self.aux, leaves)


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
) -> list[jax.Array]:
    """What a traced loss returns at ``w + sign * εz``.

    See `TracedLoss` and `point_of_use.run`.
    """
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
            "with jnp.mean. To return more beside it return (loss, aux), and say "
            "has_aux=True."
        )
    return _check_real(loss)


def _check_losses(losses: Any) -> jax.Array:
    if isinstance(losses, tuple | list | dict) or jnp.ndim(losses) != 1:
        got = (
            f"a {type(losses).__name__}"
            if isinstance(losses, tuple | list | dict)
            else f"shape {jnp.shape(losses)}"
        )
        raise TypeError(
            f"value_fn must return one loss for each example, [examples], got {got}. "
            "Leave out the mean over the batch, and return nothing else."
        )
    return _check_real(losses)


def _check_real(loss: Any) -> jax.Array:
    if not hasattr(loss, "dtype") and not isinstance(loss, int | float | complex):
        raise TypeError(
            f"value_fn must return a scalar loss, got {loss!r}"
            + (": it has no return." if loss is None else ".")
        )
    loss = jnp.asarray(loss)
    wide = jnp.issubdtype(loss.dtype, jnp.floating) and jnp.finfo(loss.dtype).bits > 8
    if not wide and not jnp.issubdtype(loss.dtype, jnp.signedinteger):
        raise TypeError(
            f"value_fn must return a real loss, got dtype {loss.dtype}; make it a "
            "float of 16 bits or more, such as loss.astype(jnp.float32)."
        )
    return loss
