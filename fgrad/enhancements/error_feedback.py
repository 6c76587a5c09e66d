"""Error feedback: what rounding leaves of an update is kept for the next one."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fgrad import _arguments, _checks
from fgrad.fixed_point import is_qtensor, stored, with_stored
from fgrad.leaves import Mask, map_leaves

# The residual counts in 256ths of a weight step, so that half a step fits into int8.
_PARTS = 256


class ErrorFeedbackState(NamedTuple):
    """State of `error_feedback`.

    Attributes:
      residual: pytree like params, a `QTensor` being one leaf: int8, what is left of
        the updates so far, in 256ths of a weight step; None for leaves without.
    """

    residual: Any


def error_feedback(
    *, below: int = 16, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    r"""Rounds updates to the weight grid and adds what is left to the next one.

    .. math:: t = \lfloor 256\, u / Δ_w \rceil + r, \quad
      \bar w_q = \lfloor t / 256 \rceil, \quad r \leftarrow t - 256\, \bar w_q

    `fgrad.quantized_update` alone rounds an update of less than half a step to nothing.
    Here such updates add up, and move their weight once they make a step together. The
    link stands between the optimizer and ``quantized_update``, which then has nothing
    left to round. It costs one byte for each weight. Weights trained by
    ``fgrad.on_grid`` take whole steps and do not need it.

    Args:
      below: `QTensor` leaves of fewer bits have a residual; all others pass through.
      mask: leaves that may move, as in ``fixed_point_forward_grad``.

    Returns:
      A transformation. A NaN in an update counts as no change; a part of an update
      beyond 2**22 steps is lost.

    Raises:
      ValueError: here for an impossible ``below``; in ``update`` without params.

    Example:
      >>> import dataclasses
      >>> import fgrad
      >>> params = fgrad.quantize(jnp.array([1.0]), bits=8, headroom=1.0)
      >>> tx = optax.chain(error_feedback(), fgrad.quantized_update())
      >>> state = tx.init(params)
      >>> third = dataclasses.replace(params, qvalue=params.scale * jnp.array([-1 / 3]))
      >>> for _ in range(3):
      ...     updates, state = tx.update(third, state, params)
      ...     print(int(updates.qvalue[0]), int(state[0].residual[0]))
      0 -85
      -1 86
      0 1

    Reference:
      Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014.
    """
    below = _checks.integer("below, in bits,", below, 3, 17)

    def init_fn(params: Any) -> ErrorFeedbackState:
        def leaf_fn(leaf: Any, trained: bool) -> Any:
            kept = trained and is_qtensor(leaf) and leaf.bits < below
            return jnp.zeros_like(leaf.qvalue, jnp.int8) if kept else None

        return ErrorFeedbackState(map_leaves(leaf_fn, mask, params))

    def update_fn(
        updates: Any,
        state: ErrorFeedbackState,
        params: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, ErrorFeedbackState]:
        del extra_args
        _arguments.given("error_feedback", params)
        leaves = jax.tree.leaves(params, is_leaf=is_qtensor)
        treedef: Any = jax.tree.structure(params, is_leaf=is_qtensor)
        rounded = [
            _round(leaf, update, residual)
            for leaf, update, residual in zip(
                leaves,
                treedef.flatten_up_to(updates),
                treedef.flatten_up_to(state.residual),
                strict=True,
            )
        ]
        updates = treedef.unflatten([update for update, _ in rounded])
        residual = treedef.unflatten([rest for _, rest in rounded])
        return updates, ErrorFeedbackState(residual)

    return _arguments.link(init_fn, update_fn)


def _round(leaf: Any, update: Any, residual: Any) -> tuple[Any, Any]:
    """The update as whole steps, in units of the weights, and what is left of it."""
    if residual is None:
        return update, None
    parts = jnp.nan_to_num(jnp.round(stored(update) * (_PARTS / leaf.scale)), nan=0.0)
    limit = _PARTS * 2.0**22
    total = jnp.clip(parts, -limit, limit).astype(jnp.int32) + residual
    steps = (total + _PARTS // 2) // _PARTS
    rest = (total - _PARTS * steps).astype(jnp.int8)
    return with_stored(update, steps * leaf.scale), rest
