"""Extrapolation: the estimate is taken where the next step would lead."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fgrad import _arguments
from fgrad.fixed_point import (
    as_update,
    is_concrete,
    is_qtensor,
    stored,
    update_qvalue,
    with_stored,
)
from fgrad.leaves import map_leaves


class ExtrapolationState(NamedTuple):
    """State of `extrapolation`.

    Attributes:
      last: pytree like params, a `QTensor` being one leaf: the last update, in the
        dtype in which the leaf is stored, on a grid in weight steps; empty in the form
        of two passes, which needs no memory.
      inner_updates: int32 scalar, how often ``inner`` was asked in the last step: its
        forward passes are made so many times.
      inner_state: that of ``inner``.
    """

    last: Any
    inner_updates: jax.Array
    inner_state: Any


def extrapolation(
    inner: optax.GradientTransformation,
    *,
    scale: float = 1.0,
    two_pass: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets a transformation estimate its gradient one step ahead.

    .. math:: w' = w_t + α u_{t-1}, \quad u_t = \text{inner}(w'), \quad
      w_{t+1} = w_t + u_t

    The last update u says where the weights are about to go. The pairs are evaluated
    there, and the new update is applied to the weights themselves. That costs no
    forward pass, and as many numbers as the weights for the last update. In the form of
    two passes (extragradient) the step ahead is the update of this step,

    .. math:: w' = w_t + α \, \text{inner}(w_t),

    with the same directions z and the same batch for both, which costs the forward
    passes of ``inner`` twice, and no memory between steps.

    In fixed point w' lies on the grid: α u is rounded to whole weight steps, and the
    sum is clipped to the grid's ends.

    Args:
      inner: a transformation whose updates can be applied: a chain of
        ``fixed_point_forward_grad``, an optimizer and ``quantized_update``, or a
        wrapper of one. It sees w' in the place of the weights.
      scale: α, the length of the step ahead as a multiple of the update.
      two_pass: whether to take this step's own update for the step ahead.

    Returns:
      A transformation whose ``update`` passes ``value_fn`` and all extra arguments on
      to ``inner``.

    Raises:
      TypeError, ValueError: here for bad options; in ``update`` without params, and
        what ``inner`` raises.

    Example:
      >>> from fgrad import qzo_ff
      >>> tx = extrapolation(qzo_ff(0.01, jax.random.key(0)))
      >>> params = {"w": jnp.array([1.0, -2.0])}
      >>> loss_fn = lambda params: jnp.sum(params["w"] ** 2)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params, value_fn=loss_fn)
      >>> bool((state.last["w"] == updates["w"]).all())
      True

    Reference:
      Lin et al., "Extrapolation for large-batch training in deep learning", ICML 2020
      (arXiv 2006.05720); the form of two passes is Korpelevich's extragradient, 1976.
    """
    inner = _arguments.transformation(inner)
    if is_concrete(scale) and not 0 < scale < math.inf:
        raise ValueError(
            f"scale must be positive and finite, got {scale}: it is the length of the "
            "step ahead in updates, and 0 would be inner itself."
        )
    if not isinstance(two_pass, bool):
        raise TypeError(f"two_pass must be True or False, got {two_pass!r}.")

    def init_fn(params: Any) -> ExtrapolationState:
        def zeros(leaf: Any, trained: bool) -> jax.Array:
            del trained
            return jnp.zeros_like(stored(leaf))

        return ExtrapolationState(
            last=() if two_pass else map_leaves(zeros, None, params),
            inner_updates=jnp.zeros([], jnp.int32),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: Any,
        state: ExtrapolationState,
        params: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, ExtrapolationState]:
        _arguments.given("extrapolation", params)

        def asked(at: Any) -> tuple[Any, Any]:
            found = inner.update(updates, state.inner_state, at, **extra_args)
            return found[0], found[1]

        last = state.last
        if two_pass:
            last = _map_updates(_kept, params, asked(params)[0])
        ahead = _map_updates(lambda leaf, u: _moved(leaf, u, scale), params, last)
        new, inner_state = asked(ahead)
        new = _map_updates(_on_the_grid, params, new)
        return new, ExtrapolationState(
            last=() if two_pass else _map_updates(_kept, params, new),
            inner_updates=jnp.int32(1 + two_pass),
            inner_state=inner_state,
        )

    return _arguments.link(init_fn, update_fn)


def _map_updates(fn: Callable[[Any, Any], Any], params: Any, updates: Any) -> Any:
    """Maps ``fn(leaf, update)`` over params; a `QTensor` is one leaf."""
    return map_leaves(lambda leaf, _, update: fn(leaf, update), None, params, updates)


def _kept(leaf: Any, update: Any) -> jax.Array:
    """An update as it is remembered: in the leaf's dtype, on a grid in weight steps."""
    array = stored(update)
    if not is_qtensor(leaf):
        return array.astype(jnp.result_type(leaf))
    limit = leaf.max_qvalue
    steps = jnp.clip(_in_steps(leaf, array), -limit, limit)
    return steps.astype(leaf.qvalue.dtype)


def _moved(leaf: Any, update: jax.Array, scale: Any) -> Any:
    """The leaf after ``scale`` times an update that was kept."""
    if not is_qtensor(leaf):
        return (leaf + scale * update).astype(jnp.result_type(leaf))
    steps = jnp.round(scale * update.astype(jnp.float32))
    # Beyond the length of the grid there is nothing, and a float may not fit int32.
    steps = jnp.clip(steps, -(2.0**17), 2.0**17).astype(jnp.int32)
    change = update_qvalue(leaf.qvalue, steps, leaf.bits)
    return with_stored(leaf, (leaf.qvalue + change).astype(leaf.qvalue.dtype))


def _on_the_grid(leaf: Any, update: Any) -> Any:
    """An update that ``inner`` made for w', clipped so that the weights can take it."""
    array = stored(update)
    if not is_qtensor(leaf) or not jnp.issubdtype(array.dtype, jnp.integer):
        return update
    return as_update(leaf, update_qvalue(leaf.qvalue, array, leaf.bits))


def _in_steps(leaf: Any, array: jax.Array) -> jax.Array:
    """An update of a `QTensor` in weight steps, whether or not it is on the grid."""
    if jnp.issubdtype(array.dtype, jnp.integer):
        return array
    return jnp.nan_to_num(jnp.round(array / leaf.scale), nan=0.0)
