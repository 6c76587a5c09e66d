"""Kernel-wise normalisation: each layer's step is as long as its weights ask for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fgrad import _arguments, _checks, fixed_point
from fgrad.fixed_point import is_qtensor, words
from fgrad.leaves import Mask, map_leaves, trained_leaves

# A gradient of a smaller norm counts as zero: the square of anything smaller is no
# normal float32.
_TINY = 1e-18


def kernel_normalization(
    *, per: str = "layer", floor: float = 1e-3, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    r"""Gives every layer's gradient the norm of its weights.

    .. math:: ĝ(w^i) \leftarrow \frac{ĝ(w^i)}{‖ĝ(w^i)‖} ‖w^i‖

    It follows ``fixed_point_forward_grad``. With m = 1 this is the paper's
    ``ĝ(wⁱ) = sign(L₊ − L₋) zⁱ/‖zⁱ‖ · ‖wⁱ‖``. With m > 1 the mean of the m directions is
    normalised, not each of them.

    ``‖w‖`` of a `QTensor` is exact up to one float32 rounding for each scale: it is the
    integer square root of the sum of ``w_q²``, in two 32-bit words, times the scale. A
    learning rate after this link is relative: 0.01 moves a layer by 1% of its norm.

    Args:
      per: "layer" for one norm per leaf; "channel" for one per entry of the last axis
        (the outputs of a Flax kernel) of leaves with two axes or more.
      floor: the least root mean square of weights, in their units, so that zero
        weights can move: ``‖w‖`` counts as at least ``floor √n``. A gradient of zeros,
        which a bias of two values often has, stays zero.
      mask: leaves to normalise, as in ``fixed_point_forward_grad``; the gradient of
        any other passes as it is.

    Returns:
      A transformation without state. It takes gradients like ``params`` (floats, or
      `QTensor` with float32 ``qvalue``) in loss per unit of weight, and makes gradients
      of the same dtypes in units of the weights.

    Raises:
      ValueError: for an unknown ``per`` or a ``floor`` that is not positive; in
        ``update`` without params.

    Example:
      >>> tx = kernel_normalization()
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> gradient = {"w": jnp.array([0.0, -2.0])}
      >>> updates, _ = tx.update(gradient, tx.init(params), params)
      >>> updates["w"]
      Array([ 0., -5.], dtype=float32)

    Reference:
      Section 3.3 of Feng et al., "Stepping Forward on the Last Mile", NeurIPS 2024.
      The floor is that of Adafactor (Shazeer and Stern 2018).
    """
    _checks.choice("per", per, ("layer", "channel"))
    least = ": it is the least root mean square of weights, for example 1e-3, and "
    _checks.positive("floor", floor, hint=least + "without it zero weights cannot move")

    def init_fn(params: Any) -> optax.EmptyState:
        trained_leaves(mask, params)
        return optax.EmptyState()

    def update_fn(
        updates: Any,
        state: optax.EmptyState,
        params: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, optax.EmptyState]:
        del extra_args
        _arguments.given("kernel_normalization", params)
        trained = trained_leaves(mask, params)
        leaves = jax.tree.leaves(params, is_leaf=is_qtensor)
        chosen = [leaf for leaf, on in zip(leaves, trained, strict=True) if on]
        norms = iter(_weight_norms(chosen, per))

        def leaf_fn(leaf: Any, normalised: bool, update: Any) -> Any:
            if not normalised:
                return update
            array = fixed_point.stored(update)
            axes = _axes(leaf, per)
            count = math.prod(jnp.shape(leaf)[a] for a in axes)
            length = _float_norm(array, axes)
            target = jnp.maximum(next(norms), floor * math.sqrt(count))
            ratio = target / jnp.maximum(length, _TINY)
            array = (array.astype(jnp.float32) * ratio).astype(array.dtype)
            return fixed_point.with_stored(update, array)

        return map_leaves(leaf_fn, mask, params, updates), state

    return _arguments.link(init_fn, update_fn)


def _axes(leaf: Any, per: str) -> tuple[int, ...]:
    """The axes that a norm is taken over."""
    axes = len(jnp.shape(leaf))
    return tuple(range(axes - 1 if per == "channel" and axes > 1 else axes))


def _float_norm(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The norm of an array, which keeps the axes with length 1."""
    squares = jnp.square(array.astype(jnp.float32))
    return jnp.sqrt(jnp.sum(squares, axis=axes, keepdims=True))


def _weight_norms(leaves: Sequence[Any], per: str) -> list[jax.Array]:
    """``‖w‖`` of each leaf, float32; an axis that it is taken over has length 1.

    One loop makes the integer roots of all leaves. A loop for each leaf would cost more
    than the sums.
    """
    sums = [_grid_sums(leaf, per) for leaf in leaves if is_qtensor(leaf)]
    roots: list[jax.Array] = []
    if sums:
        high, low = (jnp.concatenate([s[i].reshape(-1) for s in sums]) for i in (0, 1))
        ends = list(itertools.accumulate(s[0].size for s in sums))
        parts = jnp.split(words.square_root(high, low), ends[:-1])
        roots = [p.reshape(s[0].shape) for p, s in zip(parts, sums, strict=True)]
    root = iter(roots)
    return [
        _scaled(leaf, next(root), per)
        if is_qtensor(leaf)
        else _float_norm(jnp.asarray(leaf), _axes(leaf, per))
        for leaf in leaves
    ]


def _grid_sums(leaf: fixed_point.QTensor, per: str) -> tuple[jax.Array, jax.Array]:
    """Exact ``Σ w_q²`` over the axes of the norm along which the scale is shared."""
    scale: tuple[int, ...] = leaf.scale.shape
    shared = [a for a in _axes(leaf, per) if not scale or scale[a] == 1]
    high, low = words.sum_of_squares(leaf.qvalue, tuple(shared))
    shape = [1 if a in shared else n for a, n in enumerate(leaf.shape)]
    return high.reshape(shape), low.reshape(shape)


def _scaled(leaf: fixed_point.QTensor, root: jax.Array, per: str) -> jax.Array:
    """Roots times scales, and the norm over the axes that have scales of their own."""
    norm = root * leaf.scale.astype(jnp.float32)
    axes = tuple(a for a in _axes(leaf, per) if norm.ndim and norm.shape[a] != 1)
    return _float_norm(norm, axes) if axes else norm
