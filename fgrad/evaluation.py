"""Dual forward evaluations: ``L(w + εz)`` and ``L(w - εz)`` of any JAX function.

The type of each leaf decides its arithmetic: a float leaf is perturbed in floating
point, a `QTensor` leaf by the integer equation (6). Each leaf is perturbed where the
function first uses it (`fgrad.point_of_use`), so no second copy of the model exists.
`explain` says for a given function which leaf went which way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fgrad import fixed_point, low_rank, ordering, perturbations, point_of_use
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
    plus, minus = evaluate_pairs(
        lambda p: value_fn(p, **kwargs),
        params,
        key[None],
        epsilon,
        perturbation,
        mask=mask,
    )
    return plus[0], minus[0]


def evaluate_pairs(
    value_fn: Callable[[Any], jax.Array],
    params: Any,
    keys: jax.Array,
    epsilon: jax.typing.ArrayLike,
    perturbation: perturbations.Perturbation,
    *,
    mask: Mask = None,
    vectorize: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Evaluates a loss on both sides of the weights, for m perturbations.

    Args:
      value_fn: ``value_fn(params) -> scalar loss``; it is traced once.
      params: pytree of float arrays and `QTensor`.
      keys: [m] keys of z.
      epsilon: perturbation scale ε in units of the weights.
      perturbation: where z comes from.
      mask: leaves to perturb, as in `dual_forward`.
      vectorize: with 1, the 2m evaluations run one after the other; with V > 1, the 2V
        of V pairs at once.

    Returns:
      ``(losses_plus, losses_minus)``, each [m].
    """
    mask = resolve_mask(mask, params)
    check_params(params, mask)
    traced = _Traced(value_fn, params, mask, perturbation)
    leaf_keys = jax.vmap(lambda key: trained_keys(key, params, mask))(keys)
    pairs = len(keys)
    signs = jnp.tile(jnp.array([1, -1], jnp.int32), pairs)
    leaf_keys = jax.tree.map(lambda k: jnp.repeat(k, 2, axis=0), leaf_keys)

    def evaluate(address: tuple[jax.Array, Any]) -> jax.Array:
        sign, keys_of_leaves = address
        return traced(keys_of_leaves, epsilon, sign)

    if vectorize >= pairs > 1:
        losses = jax.vmap(evaluate)((signs, leaf_keys))
    else:
        batch_size = 2 * vectorize if vectorize > 1 else None
        losses = jax.lax.map(evaluate, (signs, leaf_keys), batch_size=batch_size)
    plus, minus = losses.reshape(pairs, 2).T
    return plus, minus


class _Traced:
    """A loss function, traced once, to be evaluated at perturbed parameters."""

    def __init__(
        self,
        value_fn: Callable[[Any], jax.Array],
        params: Any,
        mask: Any,
        perturbation: perturbations.Perturbation,
    ) -> None:
        with_paths = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor)
        treedef = jax.tree.structure(params, is_leaf=is_qtensor)
        leaves = [leaf for _, leaf in with_paths]
        self.perturbation = perturbation
        self.paths = [path for path, _ in with_paths]
        self.leaves = leaves
        self.trained = [i for i, on in enumerate(jax.tree.leaves(mask)) if on]
        self.small = {
            i for i in self.trained if perturbation.is_small(jnp.shape(leaves[i]))
        }
        chosen = [leaves[i] for i in self.trained]
        self.values = [
            x.qvalue if is_qtensor(x) else jnp.asarray(x, jnp.result_type(x))
            for x in chosen
        ]
        self.scales = [x.scale for x in chosen if is_qtensor(x)]

        def function(values: Sequence[jax.Array], scales: Sequence[jax.Array]) -> Any:
            full, scale = list(leaves), iter(scales)  # the frozen leaves as they are
            for i, value in zip(self.trained, values, strict=True):
                full[i] = (
                    dataclasses.replace(leaves[i], qvalue=value, scale=next(scale))
                    if is_qtensor(leaves[i])
                    else value
                )
            return _check_loss(value_fn(jax.tree.unflatten(treedef, full)))

        self.program = point_of_use.trace(function, self.values, self.scales)

    def __call__(
        self,
        keys: dict[str, jax.Array],
        epsilon: jax.typing.ArrayLike,
        sign: jax.Array,
        events: list[point_of_use.Event] | None = None,
    ) -> jax.Array:
        """The loss at ``w + sign * εz``, for the keys of the trained leaves."""
        z = self.perturbation

        def key_of(leaf: int, after: jax.Array) -> jax.Array:
            key = keys[jax.tree_util.keystr(self.paths[leaf])]
            return ordering.delayed_key(key, after)

        def stacked_keys(chosen: Sequence[int]) -> jax.Array:
            return jnp.stack(
                [keys[jax.tree_util.keystr(self.paths[i])] for i in chosen]
            )

        # The vectors that make up low-rank z, and all small leaves, come first: they
        # are no burden to the memory.
        values: list[Any] = [
            point_of_use.Pending(i, value)
            for i, value in zip(self.trained, self.values, strict=True)
        ]
        factors = {}
        if isinstance(z, perturbations.LowRank) and self.trained:
            shapes = [jnp.shape(self.leaves[i]) for i in self.trained]
            pairs = z.factors_together(stacked_keys(self.trained), shapes)
            factors = dict(zip(self.trained, pairs, strict=True))
        small = [n for n, i in enumerate(self.trained) if i in self.small]
        if small:
            indices = [self.trained[n] for n in small]
            rows = (
                [perturbations.product(*factors[i]) for i in indices]
                if factors
                else z.sample_together(
                    stacked_keys(indices), [self.values[n].shape for n in small]
                )
            )
            for n, z_q in zip(small, rows, strict=True):
                leaf, array = self.leaves[self.trained[n]], self.values[n]
                z_q = z_q.reshape(array.shape)
                values[n] = _perturb_array(leaf, array, None, z_q, epsilon, z, sign)

        def dense(leaf: int, array: Any, block: Any, after: jax.Array) -> jax.Array:
            if leaf in factors:
                u, v = factors[leaf]
                z_q = _block_of_product(ordering.delayed(u, after), v, array, block)
            else:
                z_q = z.sample(key_of(leaf, after), array.shape, block)
            if is_qtensor(self.leaves[leaf]):
                # Or the 32-bit products of equation (6) that no z enters are made for
                # all leaves ahead of the loop over evaluations.
                array = ordering.delayed(array, after)
            return _perturb_array(
                self.leaves[leaf], array, block, z_q, epsilon, z, sign
            )

        def factored(leaf: int, array: Any, block: Any, after: jax.Array) -> Any:
            del after  # the base product waits for its activation anyway
            if leaf not in factors or array.ndim == 0:
                return None
            assert isinstance(z, perturbations.LowRank)
            u, v = _block_of_factors(*factors[leaf], array, block)
            base, amplitude = _low_rank_terms(
                self.leaves[leaf], array, block, epsilon, z, sign
            )
            return low_rank.factored(base, u, v, amplitude)

        perturber = point_of_use.Perturber(dense, factored)
        return point_of_use.run(
            self.program, [*values, *self.scales], perturber, sign, events
        )


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
        array = leaf.qvalue if is_qtensor(leaf) else jnp.asarray(leaf)
        array = _perturb_array(leaf, array, None, z, epsilon, perturbation, sign)
        return dataclasses.replace(leaf, qvalue=array) if is_qtensor(leaf) else array

    return map_leaves(leaf_fn, params, mask)


def _perturb_array(
    leaf: Any,
    array: jax.Array,
    block: Any,
    z: jax.Array,
    epsilon: jax.typing.ArrayLike,
    perturbation: perturbations.Perturbation,
    sign: int | jax.Array,
) -> jax.Array:
    """The values of a leaf, or of one block of it, plus ``sign * εz``."""
    if isinstance(perturbation, perturbations.LowRank):
        base, amplitude = _low_rank_terms(
            leaf, array, block, epsilon, perturbation, sign
        )
        return (base + amplitude * z).astype(array.dtype)
    if is_qtensor(leaf):
        scale = _block_scale(leaf, array, block)
        return fixed_point.perturb_qvalue(
            array,
            z,
            sign * quantized_epsilon(epsilon, scale),
            perturbation.step,
            leaf.bits,
        )
    amplitude = jnp.float32(perturbation.step) * epsilon * sign
    return (array + amplitude * z.astype(jnp.float32)).astype(array.dtype)


def _low_rank_terms(
    leaf: Any,
    array: jax.Array,
    block: Any,
    epsilon: jax.typing.ArrayLike,
    perturbation: perturbations.LowRank,
    sign: int | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Base and amplitude of ``base + amplitude * z_q``.

    On a grid the amplitude is a whole number of steps, and the base keeps as far from
    the ends as z reaches: no sum is rounded or clipped, so it can be taken apart.
    """
    if not is_qtensor(leaf):
        amplitude = jnp.float32(perturbation.step) * epsilon * sign
        return array, jnp.asarray(amplitude, jnp.float32)
    limit = fixed_point.max_qvalue(leaf.bits)
    scale = _block_scale(leaf, array, block)
    steps = quantized_epsilon(epsilon, scale, perturbation)
    steps = jnp.minimum(steps, limit // perturbation.rank)
    room = (limit - steps * perturbation.rank).astype(array.dtype)
    return jnp.clip(array, -room, room), sign * steps


def _block_of_factors(
    u: jax.Array, v: jax.Array, array: jax.Array, block: Any
) -> tuple[jax.Array, jax.Array]:
    """The factors for one block of a leaf, of one axis or more: blocks share v."""
    if block is None:
        return u, v
    rank = len(u)
    u = u.reshape(rank, -1, *array.shape[:-1], 1)[:, block]
    return u, v.reshape(rank, *[1] * (array.ndim - 1), array.shape[-1])


def _block_of_product(
    u: jax.Array, v: jax.Array, array: jax.Array, block: Any
) -> jax.Array:
    """The z_q of a leaf, or of one block of it."""
    if block is not None and array.ndim == 0:
        return perturbations.product(u, v).reshape(-1)[block]
    z_q = perturbations.product(*_block_of_factors(u, v, array, block))
    return z_q.reshape(array.shape)


def _block_scale(leaf: Any, array: jax.Array, block: Any) -> jax.Array:
    """The scale of a block, which has fewer axes than its leaf."""
    scale = leaf.scale
    if block is None or scale.ndim == 0:
        return scale
    stacked = leaf.ndim - array.ndim
    scale = jnp.broadcast_to(scale, leaf.shape[:stacked] + scale.shape[stacked:])
    return scale.reshape(-1, *scale.shape[stacked:])[block]


class Explanation(NamedTuple):
    """What `explain` says of a leaf.

    Attributes:
      name: path of the leaf.
      way: "at use"; "low rank", as base product plus correction; "first", with all
        other small leaves; "before", ahead of a call that cannot be followed or of a
        loop that uses it many times; "unused".
      primitives: the equations that used it, or that it was perturbed before.
    """

    name: str
    way: str
    primitives: tuple[str, ...]


def explain(
    value_fn: Callable[..., jax.Array],
    params: Any,
    perturbation: perturbations.Perturbation | None = None,
    *,
    mask: Mask = None,
    **kwargs: Any,
) -> list[Explanation]:
    """Says where the evaluator perturbs each trained leaf of a function.

    Nothing is computed. A leaf that goes "before" costs memory of its own size for as
    long as the call or loop lasts, and is right all the same.

    Args:
      value_fn: as in `dual_forward`, like all that follow.
      params: pytree of float arrays and `QTensor`.
      perturbation: where z comes from.
      mask: leaves to perturb.
      **kwargs: passed to ``value_fn``.

    Returns:
      An `Explanation` for each trained leaf and way.

    Example:
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
      >>> loss = lambda p, x: jnp.sum(x @ p["w"] + p["b"])
      >>> for line in explain(
      ...     loss, params, perturbations.low_rank(), x=jnp.ones((4, 3))
      ... ):
      ...     print(line.name, "|", line.way, "|", *line.primitives)
      b | first |
      w | low rank | dot_general
    """
    perturbation = perturbations.normal() if perturbation is None else perturbation
    mask = resolve_mask(mask, params)
    check_params(params, mask)
    events: list[point_of_use.Event] = []
    traced: list[_Traced] = []

    def evaluate() -> jax.Array:
        traced.append(
            _Traced(lambda p: value_fn(p, **kwargs), params, mask, perturbation)
        )
        keys = trained_keys(jax.random.key(0), params, mask)
        return traced[0](keys, 1.0, jnp.int32(1), events)

    jax.eval_shape(evaluate)
    lines = []
    for leaf, trained in enumerate(jax.tree.leaves(mask)):
        found: dict[str, list[str]] = {}
        for event in events:
            if event.leaf == leaf:
                found.setdefault(event.way, []).append(event.primitive)
        if trained:
            name = fixed_point.path_str(traced[0].paths[leaf])
            found = {"first": []} if leaf in traced[0].small else found
            lines += [
                Explanation(name, way, tuple(dict.fromkeys(primitives)))
                for way, primitives in (found or {"unused": []}).items()
            ]
    return lines


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
    epsilon: jax.typing.ArrayLike,
    scale: jax.typing.ArrayLike,
    perturbation: perturbations.Perturbation | None = None,
) -> jax.Array:
    """``ε_q = ⌊ε/Δ_w⌉`` as int32, saturating: the perturbation in grid steps.

    For a `LowRank` perturbation ``⌊ε Δ_z/Δ_w⌉``, what a unit of its z_q moves.
    """
    if isinstance(perturbation, perturbations.LowRank):
        epsilon = epsilon * perturbation.step
    return jnp.clip(jnp.round(epsilon / scale), 0, 2**30).astype(jnp.int32)


def frozen_fraction(
    params: Any,
    epsilon: jax.typing.ArrayLike,
    mask: Mask = None,
    perturbation: perturbations.Perturbation | None = None,
) -> jax.Array:
    """Share of the trained weights that ε cannot move, because ``ε_q = 0``.

    Args:
      params: pytree of float arrays and `QTensor`.
      epsilon: perturbation scale ε in units of the weights.
      mask: leaves that are trained, as in `dual_forward`.
      perturbation: where z comes from.

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
            zero = quantized_epsilon(epsilon, leaf.scale, perturbation) == 0
            frozen += jnp.mean(zero.astype(jnp.float32)) * leaf.size
    return frozen / max(total, 1)


def check_epsilon(
    params: Any,
    epsilon: jax.typing.ArrayLike,
    mask: Mask,
    perturbation: perturbations.Perturbation | None = None,
) -> None:
    """Raises if ε rounds to zero on the grid of a trained leaf: nothing would move.

    Traced values cannot be looked at here: then the check runs with the computation,
    and raises from there.
    """
    low_rank_z = (
        perturbation if isinstance(perturbation, perturbations.LowRank) else None
    )
    unit = low_rank_z.step if low_rank_z else 1.0

    def check(epsilon: Any, scales: dict[str, Any]) -> None:
        for name, scale in scales.items():
            largest = float(np.max(scale)) / unit
            if round(float(epsilon) / largest) == 0:
                raise ValueError(
                    f"epsilon={float(epsilon):.3g} is at most half a weight step of "
                    f"leaf {name!r} (step {largest:.3g}"
                    + (f" for {low_rank_z.name}" if low_rank_z else "")
                    + "), so it rounds to zero on the grid and the leaf would never "
                    f"move. Use an epsilon above {largest / 2:.3g}, more bits, "
                    "channel_axis=-1, or mask the leaf."
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
