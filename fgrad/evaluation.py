"""Dual forward evaluations: ``L(w + εz)`` and ``L(w - εz)`` of any JAX function.

The type of each leaf decides its arithmetic: a float leaf is perturbed in floating
point, a `QTensor` leaf by the integer equation (6). The two evaluations run one after
the other, so one perturbed copy of the weights lives at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fgrad import fixed_point, perturbations
from fgrad.fixed_point import is_qtensor

Mask = Any  # None, a pytree of bools (or a prefix of one), or a function of the params


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
    perturbation = perturbations.normal() if perturbation is None else perturbation
    mask = resolve_mask(mask, params)
    check_params(params, mask)

    def evaluate(sign: jax.Array) -> jax.Array:
        perturbed = perturb(params, key, epsilon, perturbation, sign=sign, mask=mask)
        return _check_loss(value_fn(perturbed, **kwargs))

    plus, minus = jax.lax.map(evaluate, jnp.array([1, -1], jnp.int32))
    return plus, minus


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
    mask = resolve_mask(mask, params)
    keys = trained_keys(key, params, mask)

    def leaf_fn(path: tuple[Any, ...], leaf: Any, trained: bool) -> Any:
        if not trained:
            return leaf
        z = perturbation.sample(keys[jax.tree_util.keystr(path)], jnp.shape(leaf))
        if is_qtensor(leaf):
            qvalue = fixed_point.perturb_qvalue(
                leaf.qvalue,
                z,
                sign * quantized_epsilon(epsilon, leaf.scale),
                perturbation.step,
                leaf.bits,
            )
            return dataclasses.replace(leaf, qvalue=qvalue)
        scale = jnp.float32(perturbation.step) * epsilon * sign
        return (leaf + scale * z.astype(jnp.float32)).astype(jnp.result_type(leaf))

    return map_leaves(leaf_fn, params, mask)


def trained_keys(key: jax.Array, params: Any, mask: Any) -> dict[str, jax.Array]:
    """The key of z for each trained leaf, by ``keystr`` of its path."""
    names: list[str] = []

    def collect(path: tuple[Any, ...], leaf: Any, trained: bool) -> Any:
        if trained:
            names.append(jax.tree_util.keystr(path))
        return leaf

    map_leaves(collect, params, mask)
    return perturbations.leaf_keys(key, names)


def quantized_epsilon(
    epsilon: jax.typing.ArrayLike, scale: jax.typing.ArrayLike
) -> jax.Array:
    """``ε_q = ⌊ε/Δ_w⌉`` as int32, saturating: the perturbation in grid steps."""
    return jnp.clip(jnp.round(epsilon / scale), 0, 2**30).astype(jnp.int32)


def frozen_fraction(
    params: Any, epsilon: jax.typing.ArrayLike, mask: Mask = None
) -> jax.Array:
    """Share of the trained weights that ε cannot move, because ``ε_q = 0``.

    Args:
      params: pytree of float arrays and `QTensor`.
      epsilon: perturbation scale ε in units of the weights.
      mask: leaves that are trained, as in `dual_forward`.

    Returns:
      float32 scalar in [0, 1]; 0 if all leaves are floats.
    """
    mask = resolve_mask(mask, params)
    leaves = jax.tree.leaves(params, is_leaf=is_qtensor)
    frozen, total = jnp.float32(0), 0
    for leaf, trained in zip(leaves, jax.tree.leaves(mask), strict=True):
        if not trained:
            continue
        total += jnp.size(leaf)
        if is_qtensor(leaf):
            zero = quantized_epsilon(epsilon, leaf.scale) == 0
            frozen += jnp.mean(zero.astype(jnp.float32)) * leaf.size
    return frozen / max(total, 1)


def check_epsilon(params: Any, epsilon: jax.typing.ArrayLike, mask: Mask) -> None:
    """Raises if ε rounds to zero on the grid of a trained leaf: nothing would move.

    Traced values cannot be looked at here: then the check runs with the computation,
    and raises from there.
    """

    def check(epsilon: Any, scales: dict[str, Any]) -> None:
        for name, scale in scales.items():
            largest = float(np.max(scale))
            if round(float(epsilon) / largest) == 0:
                raise ValueError(
                    f"epsilon={float(epsilon):.3g} is at most half a weight step of "
                    f"leaf {name!r} (step {largest:.3g}), so it rounds to zero on "
                    "the grid and the leaf would never move. Use an epsilon above "
                    f"{largest / 2:.3g}, more bits, channel_axis=-1, or mask the leaf."
                )

    mask = resolve_mask(mask, params)
    scales: dict[str, Any] = {}

    def collect(path: tuple[Any, ...], leaf: Any, trained: bool) -> Any:
        if trained and is_qtensor(leaf):
            scales[fixed_point.path_str(path)] = leaf.scale
        return leaf

    map_leaves(collect, params, mask)
    if all(map(fixed_point.is_concrete, [epsilon, *scales.values()])):
        check(epsilon, scales)
    else:
        jax.debug.callback(check, epsilon, scales)


def check_params(params: Any, mask: Any) -> None:
    """Raises if a leaf that is to be trained has no perturbation: integers, complex."""

    def check(path: tuple[Any, ...], leaf: Any, trained: bool) -> Any:
        dtype = jnp.result_type(leaf)
        if trained and not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"leaf {fixed_point.path_str(path)!r} has dtype {dtype} and is no "
                "QTensor, so it has no weight step to be perturbed on. Wrap it as "
                "fgrad.QTensor(qvalue, scale), quantize it with fgrad.quantize, or "
                "exclude it with mask=."
            )
        return leaf

    map_leaves(check, params, mask)


def resolve_mask(mask: Mask, params: Any) -> Any:
    """A pytree of bools with one entry per leaf; a `QTensor` counts as one leaf."""
    if callable(mask):
        mask = mask(params)
    try:
        full = jax.tree.map(
            lambda trained, subtree: jax.tree.map(
                lambda _: trained, subtree, is_leaf=is_qtensor
            ),
            True if mask is None else mask,
            params,
        )
    except ValueError as error:
        raise ValueError(
            "mask must be a bool, or a pytree of bools that has the structure of "
            f"params or is a prefix of it, got {mask!r}."
        ) from error
    for value in jax.tree.leaves(full):
        if not isinstance(value, bool | np.bool_):
            raise TypeError(
                "mask must hold Python bools, since it decides at trace time which "
                f"leaves exist for the estimator; got {value!r}."
            )
    return full


def map_leaves(
    fn: Callable[[tuple[Any, ...], Any, bool], Any], params: Any, mask: Any
) -> Any:
    """Maps ``fn(path, leaf, trained)`` over params; a `QTensor` is one leaf."""
    return jax.tree_util.tree_map_with_path(fn, params, mask, is_leaf=is_qtensor)


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
