"""Sparse updates: only a share of each layer's weights is perturbed and updated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from fgrad import _arguments, estimators, fixed_point, perturbations
from fgrad.evaluation import evaluate_pairs
from fgrad.fixed_point import is_qtensor
from fgrad.leaves import Epsilon, Mask, Plan
from fgrad.leaves.arithmetic import Arithmetic
from fgrad.perturbations import LeafKeys
from fgrad.tracing import execution_order

# score(after) is one number per value of a leaf, made no sooner than ``after``.
Score = Callable[[jax.Array], jax.Array]

CRITERIA = ("magnitude", "random", "threshold", "importance")

# Index under which the key of the choice is derived: no estimator has so many
# perturbations, so that the same key here and there gives other random numbers.
_CHOICE = np.uint32(2**32 - 2)

# The indices are sorted, different from each other and inside the leaf.
_KNOWN_INDICES: dict[str, Any] = {
    "mode": "promise_in_bounds",
    "unique_indices": True,
    "indices_are_sorted": True,
    "wrap_negative_indices": False,
}


class SparseUpdateState(NamedTuple):
    """State of `sparse_update`.

    Attributes:
      key: the key of the random choices, or None.
      count: int32 scalar, steps taken.
      indices: pytree like params, a `QTensor` being one leaf: int32 [k], the sorted
        positions of the chosen values in the flattened leaf; [0] for a leaf that is
        not trained.
      importance_passes: int32 scalar, evaluations of the loss that the last step
        spent on choosing weights.
      inner_state: that of ``inner``, for leaves of k values.
    """

    key: jax.Array | None
    count: jax.Array  # type: ignore[assignment]  # optax's name, and tuple's
    indices: Any
    importance_passes: jax.Array
    inner_state: Any


def sparse_update(
    inner: optax.GradientTransformation,
    *,
    density: float,
    criterion: str = "magnitude",
    key: jax.Array | None = None,
    threshold: float | None = None,
    reselect_every: int | None = None,
    mask: Mask = None,
    epsilon: Epsilon = 1e-3,
    num_perturbations: int = 16,
    perturbation: perturbations.Perturbation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Perturbs and updates a share of the weights of each leaf.

    .. math:: w_S \leftarrow w_S + \text{inner}(w_S;\; v \mapsto L(w_{\bar S}, v)),
      \quad |S| = \max(1, \lfloor density \cdot n \rceil)

    ``inner`` sees a tree whose leaves are the ``k = |S|`` chosen values of each trained
    leaf, as a vector (a `QTensor` with its scale, or the k scales of its channels),
    and a loss that puts them back. So z is drawn for k values only, and momenta hold k
    values. All other weights stay as they are, bit for bit.

    A leaf is put together where the loss uses it, from the frozen weights and the
    perturbed values, so that the temporaries are those of one leaf, and the chosen
    values of all. One that a ``lax.scan`` slices is put together before it.

    Args:
      inner: a chain of ``fixed_point_forward_grad``, any optax optimizer, and
        ``quantized_update`` for `QTensor` leaves; `sharpness_aware` of such a chain.
        Its masks see the tree of vectors, in which leaves that are not trained are
        None: give ``mask`` here instead.
      density: share of the values of each leaf, in (0, 1]; at least one value.
      criterion: "magnitude" takes the largest ``|w|``; "random" any; "threshold" those
        with ``|w|`` above ``threshold``, the largest of them up to ``density``;
        "importance" the largest ``|Σᵢ cᵢ zᵢ|`` of SPSA estimates, from forward passes
        only. Ties go to the lower index.
      key: PRNG key for "random" and "importance".
      threshold: for "threshold", in units of the weights.
      reselect_every: steps after which the weights are chosen anew, by the same
        criterion; by default never. It needs scratch memory for sorting one leaf.
        ``inner`` then begins anew with the states that hold momenta, which belonged
        to other weights, bias corrections included; states without, such as counts of
        schedules and keys, go on.
      mask: leaves to train, as in ``fixed_point_forward_grad``.
      epsilon: ε of the importance score, like the two that follow.
      num_perturbations: directions of the importance score: each choice costs twice
        as many forward passes, in the first update and when it is due. Before, the
        state holds the first k indices.
      perturbation: z of the importance score; ``perturbations.normal()`` by default.

    Returns:
      A transformation whose ``update`` takes ``value_fn`` (or ``obj_fn``) as that of
      ``fixed_point_forward_grad``, passes every extra argument on, ignores incoming
      updates, and makes updates like ``params`` that are zero for all weights but the
      chosen ones.

    Raises:
      TypeError, ValueError: here for bad options; in ``init`` if nothing is chosen, for
        "threshold" under ``jax.jit``, and what ``inner`` raises; in ``update`` without
        params or value_fn.

    Example:
      >>> import fgrad
      >>> tx = sparse_update(fgrad.qzo_ff(0.1, jax.random.key(0)), density=0.5)
      >>> params = {"w": jnp.array([3.0, -0.1, 0.2, -4.0])}
      >>> loss_fn = lambda params: jnp.sum(params["w"] ** 2)
      >>> state = tx.init(params)
      >>> state.indices
      {'w': Array([0, 3], dtype=int32)}
      >>> updates, state = tx.update(params, state, params, value_fn=loss_fn)
      >>> updates["w"] != 0
      Array([ True, False, False,  True], dtype=bool)

    Reference:
      Feng et al., "Stepping Forward on the Last Mile", NeurIPS 2024; for importance
      Chen et al., "DeepZero", ICLR 2024 (arXiv 2310.02025).
    """
    inner = _arguments.transformation(inner)
    policy = _arguments.policy(epsilon, num_perturbations, perturbation)
    if isinstance(density, bool) or not 0 < density <= 1:
        raise ValueError(
            f"density must lie in (0, 1], got {density}: it is the share of weights "
            "that are trained, 0.1 for 90% sparsity."
        )
    if criterion not in CRITERIA:
        raise ValueError(
            f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}."
        )
    if key is not None:
        _arguments.key(key)
    elif criterion in ("random", "importance"):
        raise ValueError(
            f"criterion={criterion!r} draws random numbers and got no key: give "
            "key=jax.random.key(0)."
        )
    if (threshold is not None) != (criterion == "threshold"):
        raise ValueError(
            f"threshold={threshold} with criterion={criterion!r}: give both "
            'criterion="threshold" and threshold=, or neither.'
        )
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}.")
    if reselect_every is not None:
        _arguments.count("reselect_every", reselect_every)
        if criterion == "threshold":
            raise ValueError(
                f"reselect_every={reselect_every} with a threshold: how many weights "
                'are above it is known in init only. Use criterion="magnitude", or '
                "call init again."
            )

    def score_functions(
        params: Any, key: Any, count: jax.Array, loss_fn: Any
    ) -> list[Score]:
        """For each leaf what makes its score."""
        with_paths = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor)
        leaves = [leaf for _, leaf in with_paths]
        names = [jax.tree_util.keystr(path) for path, _ in with_paths]
        if criterion in ("magnitude", "threshold"):
            return [functools.partial(_magnitude, leaf) for leaf in leaves]
        now = perturbations.sample_key(key, count, _CHOICE)
        if criterion == "random":
            keys = perturbations.leaf_keys(now, names)
            return [
                functools.partial(_random_words, keys[name], jnp.size(leaf))
                for name, leaf in zip(names, leaves, strict=True)
            ]
        plan = Plan(params, policy, mask=mask, step=count)
        keys = plan.keys(now)
        plus, minus = evaluate_pairs(loss_fn, plan, keys)
        finite = jnp.isfinite(plus) & jnp.isfinite(minus)
        coefficients = estimators.spsa(plus, minus, plan.epsilon)
        coefficients = jnp.where(finite, coefficients, 0)
        return [
            functools.partial(
                _importance, plan.arithmetic.get(name), keys, name, coefficients
            )
            for name in names
        ]

    def init_fn(params: Any) -> SparseUpdateState:
        plan = Plan(params, policy, mask=mask)
        leaves = plan.leaves
        sizes = [
            _share(density, jnp.size(leaf)) if on else 0
            for leaf, on in zip(leaves, plan.trained, strict=True)
        ]
        count = jnp.zeros([], jnp.int32)
        if criterion == "threshold":
            assert threshold is not None
            sizes = [
                min(k, _number_above(leaf, threshold)) if k else 0
                for k, leaf in zip(sizes, leaves, strict=True)
            ]
        if not any(sizes) and jax.tree.leaves(params):
            raise ValueError(
                "no weight is chosen, so nothing would be trained: "
                + (
                    f"none is above threshold={threshold}; lower it."
                    if criterion == "threshold"
                    else "mask leaves out every leaf that has values."
                )
            )
        if criterion == "importance":
            plan.check_epsilon()
            chosen = [jnp.arange(k, dtype=jnp.int32) for k in sizes]
        else:
            functions = score_functions(params, key, count, None)
            chosen = _largest(functions, sizes)
        indices = _unflatten(params, chosen)
        return SparseUpdateState(
            key=None if key is None else jnp.array(key, copy=True),
            count=count,
            indices=indices,
            importance_passes=jnp.zeros([], jnp.int32),
            inner_state=inner.init(_as_floats(_compress(params, indices))),
        )

    def update_fn(
        updates: Any,
        state: SparseUpdateState,
        params: Any = None,
        *,
        value_fn: Callable[..., jax.Array] | None = None,
        obj_fn: Callable[..., jax.Array] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, SparseUpdateState]:
        del updates
        loss_fn = _arguments.loss("sparse_update", params, value_fn, obj_fn)
        named = _arguments.named_arguments(loss_fn, extra_args)

        def choose() -> tuple[Any, Any]:
            functions = score_functions(
                params, state.key, state.count, lambda p: loss_fn(p, **named)
            )
            sizes = [index.size for index in jax.tree.leaves(state.indices)]
            indices = _unflatten(params, _largest(functions, sizes))
            fresh = inner.init(_as_floats(_compress(params, indices)))
            momenta = _momenta(inner, _compress(params, indices), fresh)
            return indices, _restarted(state.inner_state, fresh, momenta)

        due = _due(state.count, reselect_every, at_first=criterion == "importance")
        indices, inner_state = state.indices, state.inner_state
        if due is not None:
            indices, inner_state = lax.cond(
                due, choose, lambda: (state.indices, state.inner_state)
            )
        chosen = _compress(params, indices)

        # With the signature of the loss, which says what extra arguments it is given.
        @functools.wraps(loss_fn, updated=())
        def sparse_fn(values: Any, **kwargs: Any) -> jax.Array:
            return loss_fn(_put_back(params, indices, values), **kwargs)

        changes, inner_state = inner.update(
            jax.tree.map(jnp.zeros_like, chosen),
            inner_state,
            chosen,
            value_fn=sparse_fn,
            **extra_args,
        )
        passes = jnp.zeros([], jnp.int32)
        if due is not None and criterion == "importance":
            passes = due * jnp.int32(2 * num_perturbations)
        return _spread(params, indices, changes), SparseUpdateState(
            key=state.key,
            count=optax.safe_increment(state.count),
            indices=indices,
            importance_passes=passes,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# ------------------------------------------------------------------- the choice


def _share(density: float, size: int) -> int:
    return min(size, max(1, round(density * size)))


def _magnitude(leaf: Any, after: jax.Array) -> jax.Array:
    """``|w|`` as floats."""
    if is_qtensor(leaf):
        values = execution_order.delayed(leaf.qvalue, after).astype(jnp.float32)
        return jnp.abs(values) * leaf.scale
    return jnp.abs(execution_order.delayed(jnp.asarray(leaf), after))


def _random_words(key: jax.Array, size: int, after: jax.Array) -> jax.Array:
    """Random integers of 24 bits, as floats: XLA's sort of integers needs more."""
    places = lax.iota(jnp.uint32, size)
    words = perturbations.counter_hash(execution_order.delayed_key(key, after), places)
    return (words >> 8).astype(jnp.float32)


def _importance(
    arithmetic: Arithmetic,
    keys: LeafKeys,
    name: str,
    coefficients: jax.Array,
    after: jax.Array,
) -> jax.Array:
    """``|Σᵢ cᵢ zᵢ|``, up to a factor for the leaf."""
    delayed = keys.delayed(name, after)
    return jnp.abs(arithmetic.weighted_sum(delayed, coefficients))


def _number_above(leaf: Any, threshold: float) -> int:
    above = jnp.sum(_magnitude(leaf, jnp.zeros([])) > threshold)
    if not fixed_point.is_concrete(above):
        raise TypeError(
            'criterion="threshold" counts the weights above the threshold, which are '
            "not known while init is traced: call tx.init outside jax.jit, or use "
            'criterion="magnitude".'
        )
    return int(above)


def _largest(scores: Sequence[Score], sizes: Sequence[int]) -> list[jax.Array]:
    """Sorted positions of the k largest values of each score, as int32 [k]."""
    chosen: list[jax.Array] = []
    latest = jnp.zeros([], jnp.int32)
    for score, k in zip(scores, sizes, strict=True):
        if k == 0:
            chosen.append(jnp.zeros([0], jnp.int32))
            continue
        # One leaf after the other: a sort needs the leaf several times over.
        latest = jnp.sort(lax.top_k(score(latest).reshape(-1), k)[1])
        chosen.append(latest)
    return chosen


def _due(count: jax.Array, every: int | None, *, at_first: bool) -> jax.Array | None:
    """Whether weights are to be chosen in this step; None if in none."""
    if every is None:
        return count == 0 if at_first else None
    return (count % every == 0) & ((count > 0) | at_first)


def _momenta(inner: optax.GradientTransformation, chosen: Any, state: Any) -> Any:
    """Which arrays of the state of ``inner`` are of the leaves' sizes."""

    def longer(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct([n + 1 for n in x.shape], x.dtype)

    other = jax.eval_shape(inner.init, jax.tree.map(longer, _as_floats(chosen)))
    return jax.tree.map(lambda x, y: x.shape != y.shape, state, other)


def _restarted(old: Any, fresh: Any, momenta: Any) -> Any:
    """``fresh`` where a state holds momenta, ``old`` where it does not.

    A state is taken as a whole, for the count in Adam's corrects the bias of its
    moments; a state inside it is judged by itself. One with a key keeps its count,
    with which the key addresses z: beginning anew would draw the same z again.
    """
    if not _is_state(old):
        return fresh if any(jax.tree.leaves(momenta)) else old
    fields = list(zip(old, fresh, momenta, strict=True))
    own = [not _is_state(x) for x in old]
    of_momenta = [any(jax.tree.leaves(m)) for m in momenta]
    if hasattr(old, "key"):
        replaced = of_momenta
    else:
        restarts = any(m for m, mine in zip(of_momenta, own, strict=True) if mine)
        replaced = [restarts] * len(own)
    parts = [
        (f if new else o) if mine else _restarted(o, f, m)
        for (o, f, m), mine, new in zip(fields, own, replaced, strict=True)
    ]
    return type(old)(*parts) if hasattr(old, "_fields") else tuple(parts)


def _is_state(x: Any) -> bool:
    """Whether it is the state of a link, or a chain's tuple of them."""
    return isinstance(x, tuple) and (hasattr(x, "_fields") or all(map(_is_state, x)))


# ------------------------------------------------------- between vectors and leaves


def _unflatten(params: Any, leaves: Sequence[Any]) -> Any:
    treedef = jax.tree.structure(params, is_leaf=is_qtensor)
    return jax.tree.unflatten(treedef, leaves)


def _pairs(params: Any, indices: Any) -> list[tuple[Any, jax.Array]]:
    leaves = jax.tree.leaves(params, is_leaf=is_qtensor)
    return list(zip(leaves, jax.tree.leaves(indices), strict=True))


def _compress(params: Any, indices: Any) -> Any:
    """The chosen values of each leaf as a vector; None where there is none."""

    def leaf_fn(leaf: Any, index: jax.Array) -> Any:
        if index.size == 0:
            return None
        array = leaf.qvalue if is_qtensor(leaf) else jnp.asarray(leaf)
        values = array.reshape(-1).at[index].get(**_KNOWN_INDICES)
        if not is_qtensor(leaf):
            return values
        scale = leaf.scale
        if scale.ndim:
            places = jnp.unravel_index(index, leaf.shape)
            at = [p if n > 1 else 0 for p, n in zip(places, scale.shape, strict=True)]
            scale = jnp.broadcast_to(scale[tuple(at)], index.shape)
        return dataclasses.replace(leaf, qvalue=values, scale=scale)

    return _unflatten(params, [leaf_fn(*pair) for pair in _pairs(params, indices)])


def _as_floats(chosen: Any) -> Any:
    """Integers as floats that hold them, for momenta that are made like them."""
    return jax.tree.map(
        lambda x: (
            dataclasses.replace(x, qvalue=x.qvalue.astype(jnp.float32))
            if is_qtensor(x)
            else x
        ),
        chosen,
        is_leaf=is_qtensor,
    )


def _put_back(params: Any, indices: Any, chosen: Any) -> Any:
    """The params with the chosen values in place of their own."""
    values = iter(jax.tree.leaves(chosen, is_leaf=is_qtensor))

    def leaf_fn(leaf: Any, index: jax.Array) -> Any:
        if index.size == 0:
            return leaf
        value = next(values)
        if is_qtensor(leaf):
            array = _placed(leaf.qvalue, index, value.qvalue)
            return dataclasses.replace(leaf, qvalue=array)
        return _placed(jnp.asarray(leaf), index, value)

    return _unflatten(params, [leaf_fn(*pair) for pair in _pairs(params, indices)])


def _spread(params: Any, indices: Any, changes: Any) -> Any:
    """Updates of the leaves: those of the chosen values, and zeros."""
    values = iter(jax.tree.leaves(changes, is_leaf=is_qtensor))
    latest: jax.Array | None = None

    def leaf_fn(leaf: Any, index: jax.Array) -> Any:
        nonlocal latest
        if index.size == 0:
            return jax.tree.map(jnp.zeros_like, leaf)
        value = next(values)
        array = value.qvalue if is_qtensor(leaf) else value
        # One leaf after the other, or zeros of all would be in memory at once. The
        # first waits for the update, or it would be there from the start; the others
        # for a sum, since what reads the last leaf itself would keep it.
        after = array if latest is None else jnp.sum(latest.reshape(-1)[:64])
        zero = execution_order.dependent_zero(after).astype(array.dtype)
        array = latest = _placed(jnp.full(jnp.shape(leaf), zero), index, array)
        if not is_qtensor(leaf):
            return array
        return dataclasses.replace(leaf, qvalue=array, scale=jnp.zeros_like(leaf.scale))

    return _unflatten(params, [leaf_fn(*pair) for pair in _pairs(params, indices)])


def _placed(array: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    flat = array.reshape(-1).at[index].set(values, **_KNOWN_INDICES)
    return flat.reshape(array.shape)
