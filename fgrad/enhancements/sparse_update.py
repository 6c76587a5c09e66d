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

from fgrad import (
    _arguments,
    _checks,
    _loss_and_aux,
    estimators,
    fixed_point,
    perturbations,
)
from fgrad.evaluation import evaluate_pairs
from fgrad.fixed_point import integer_reads, is_qtensor, stored, with_stored
from fgrad.leaves import Epsilon, Mask, Plan, Policy
from fgrad.leaves.arithmetic import Arithmetic
from fgrad.perturbations import LeafKeys
from fgrad.spread import Spread
from fgrad.tracing import execution_order

_LossFn = Callable[..., jax.Array]
# score(after) is one number for each value of a leaf. It is computed no sooner than
# the array ``after``.
_Score = Callable[[jax.Array], jax.Array]

_CRITERIA = ("magnitude", "random", "threshold", "importance")

# The index from which the key of the choice is derived. No estimator has so many
# perturbations, so the same key gives other random numbers here than there.
_CHOICE = np.uint32(2**32 - 2)

# What `jax.numpy` may assume of indices here: they are sorted, differ from each other
# and lie inside the leaf.
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
    spread: Spread | None = None,
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
        criterion; by default never. With "random" all weights train in the course of a
        run, a share of them at a time. It needs scratch memory for sorting one leaf.
        ``inner`` then begins anew with the states that hold momenta, which belonged
        to other weights, bias corrections included; states without, such as counts of
        schedules and keys, go on.
      mask: leaves to train, as in ``fixed_point_forward_grad``.
      epsilon: ε of the importance score, like the two that follow.
      num_perturbations: directions of the importance score: each choice costs twice
        as many forward passes, in the first update and when it is due. Before, the
        state holds the first k indices.
      perturbation: z of the importance score; ``perturbations.normal()`` by default.
      spread: how devices share the evaluations of the importance score; ``inner`` has
        a ``spread`` of its own.

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
    options = _Options(
        inner=_arguments.transformation(inner),
        density=density,
        criterion=criterion,
        key=key,
        threshold=threshold,
        reselect_every=reselect_every,
        mask=mask,
        policy=_arguments.policy(epsilon, num_perturbations, perturbation),
        spread=spread,
    )

    def init_fn(params: Any) -> SparseUpdateState:
        return _init(options, params)

    def update_fn(
        updates: Any,
        state: SparseUpdateState,
        params: Any = None,
        *,
        value_fn: _LossFn | None = None,
        obj_fn: _LossFn | None = None,
        **extra_args: Any,
    ) -> tuple[Any, SparseUpdateState]:
        del updates
        loss_fn = None
        given = _arguments.has_losses(value_fn, obj_fn, extra_args)
        if not given or options.criterion == "importance":  # which evaluates the loss
            loss_fn = _arguments.loss("sparse_update", params, value_fn, obj_fn)
        return _update(options, state, params, loss_fn, extra_args)

    return _arguments.link(init_fn, update_fn, spread)


@dataclasses.dataclass(frozen=True, eq=False)
class _Options:
    """The arguments of `sparse_update`, checked.

    Attributes:
      policy: how the importance score perturbs the leaves.
    """

    inner: optax.GradientTransformationExtraArgs
    density: float
    criterion: str
    key: jax.Array | None
    threshold: float | None
    reselect_every: int | None
    mask: Mask
    policy: Policy
    spread: Spread | None

    def __post_init__(self) -> None:
        _arguments.spread(self.spread, self.policy.num_perturbations)
        share = ": it is the share of weights that are trained, 0.1 for 90% sparsity"
        _checks.number(
            "density", self.density, "in (0, 1]", lambda x: 0 < x <= 1, hint=share
        )
        _checks.choice("criterion", self.criterion, _CRITERIA)
        if self.key is not None:
            _arguments.key(self.key)
        elif self.criterion in ("random", "importance"):
            raise ValueError(
                f"criterion={self.criterion!r} draws random numbers and got no key: "
                "give key=jax.random.key(0)."
            )
        if (self.threshold is not None) != (self.criterion == "threshold"):
            raise ValueError(
                f"threshold={self.threshold} with criterion={self.criterion!r}: give "
                'both criterion="threshold" and threshold=, or neither.'
            )
        if self.threshold is not None:
            _checks.at_least("threshold", self.threshold, 0)
        if self.reselect_every is not None:
            every = _arguments.count("reselect_every", self.reselect_every)
            object.__setattr__(self, "reselect_every", every)
        if self.reselect_every is not None and self.threshold is not None:
            raise ValueError(
                f"reselect_every={self.reselect_every} with a threshold: how many "
                'weights are above it is known in init only. Use criterion="magnitude"'
                ", or call init again."
            )

    def due(self, count: jax.Array) -> jax.Array | None:
        """Whether the weights are chosen in the step ``count``; None if never."""
        at_first = self.criterion == "importance"
        if self.reselect_every is None:
            return count == 0 if at_first else None
        return (count % self.reselect_every == 0) & ((count > 0) | at_first)


def _init(options: _Options, params: Any) -> SparseUpdateState:
    plan = Plan(params, options.policy, mask=options.mask)
    plan.check_values()
    sizes = _sizes(options, plan)
    if not any(sizes) and plan.leaves:
        raise ValueError(
            "no weight is chosen, so nothing would be trained: "
            + (
                f"none is above threshold={options.threshold}; lower it."
                if options.criterion == "threshold"
                else "mask leaves out every leaf that has values."
            )
        )
    count = jnp.zeros([], jnp.int32)
    if options.criterion == "importance":  # the first update chooses
        plan.check_epsilon()
        chosen = [jnp.arange(k, dtype=jnp.int32) for k in sizes]
    else:
        chosen = _largest(_scores(options, params, options.key, count), sizes)
    indices = _unflatten(params, chosen)
    return SparseUpdateState(
        key=None if options.key is None else jnp.array(options.key, copy=True),
        count=count,
        indices=indices,
        importance_passes=jnp.zeros([], jnp.int32),
        inner_state=options.inner.init(_as_floats(_compress(params, indices))),
    )


def _update(
    options: _Options,
    state: SparseUpdateState,
    params: Any,
    loss_fn: _LossFn | None,
    extra_args: dict[str, Any],
) -> tuple[Any, SparseUpdateState]:
    loss = None
    if loss_fn is not None:
        loss = loss_fn, _arguments.named_arguments(loss_fn, extra_args)
    indices, inner_state = state.indices, state.inner_state
    due = options.due(state.count)
    if due is not None:
        indices, inner_state = lax.cond(
            due,
            lambda: _chosen_anew(options, state, params, loss),
            lambda: (state.indices, state.inner_state),
        )
    chosen = _compress(params, indices)
    changes, inner_state = options.inner.update(
        jax.tree.map(jnp.zeros_like, chosen),
        inner_state,
        chosen,
        value_fn=None if loss_fn is None else _loss_of_chosen(loss_fn, params, indices),
        **extra_args,
    )
    passes = jnp.zeros([], jnp.int32)
    if due is not None and options.criterion == "importance":
        passes = due * jnp.int32(2 * options.policy.num_perturbations)
    return _spread(params, indices, changes), SparseUpdateState(
        key=state.key,
        count=optax.safe_increment(state.count),
        indices=indices,
        importance_passes=passes,
        inner_state=inner_state,
    )


def _loss_of_chosen(loss_fn: _LossFn, params: Any, indices: Any) -> _LossFn:
    """The loss as a function of the chosen values alone."""

    # `wraps` passes on the signature, which says what extra arguments the loss takes.
    @functools.wraps(loss_fn, updated=())
    def of_chosen(values: Any, **kwargs: Any) -> jax.Array:
        checked_fn = integer_reads.checked(lambda p: loss_fn(p, **kwargs))
        base, places = execution_order.entered((params, indices))
        return checked_fn(_put_back(base, places, values))

    return of_chosen


# ------------------------------------------------------------------- the choice


def _sizes(options: _Options, plan: Plan) -> list[int]:
    """For each leaf the number of values to choose; 0 if it is not trained."""
    sizes = []
    for leaf, trained in zip(plan.leaves, plan.trained, strict=True):
        size = jnp.size(leaf) if trained else 0
        k = min(size, max(1, round(options.density * size)))
        if k and options.threshold is not None:
            k = min(k, _number_above(leaf, options.threshold))
        sizes.append(k)
    return sizes


def _number_above(leaf: Any, threshold: float) -> int:
    above = jnp.sum(_magnitude(leaf, jnp.zeros([])) > threshold)
    if not fixed_point.is_concrete(above):
        raise TypeError(
            'criterion="threshold" counts the weights above the threshold, which are '
            "not known while init is traced: call tx.init outside jax.jit, or use "
            'criterion="magnitude".'
        )
    return int(above)


def _chosen_anew(
    options: _Options,
    state: SparseUpdateState,
    params: Any,
    loss: tuple[_LossFn, dict[str, Any]] | None,
) -> tuple[Any, Any]:
    """Other indices, and the state of ``inner`` for the values there."""
    scores = _scores(options, params, state.key, state.count, loss)
    sizes = [index.size for index in jax.tree.leaves(state.indices)]
    indices = _unflatten(params, _largest(scores, sizes))
    chosen = _as_floats(_compress(params, indices))
    fresh = options.inner.init(chosen)
    momenta = _momenta(options.inner, chosen, fresh)
    return indices, _restarted(state.inner_state, fresh, momenta)


def _scores(
    options: _Options,
    params: Any,
    key: Any,
    count: jax.Array,
    loss: tuple[_LossFn, dict[str, Any]] | None = None,
) -> list[_Score | None]:
    """For each leaf the score of its values; None for a leaf without one.

    Args:
      options: the criterion, and what it needs.
      params: pytree of float arrays and `QTensor`.
      key: PRNG key, or None for a criterion that draws no random numbers.
      count: number of the step.
      loss: the loss and its arguments beside params, for the importance.
    """
    plan = Plan(params, options.policy, mask=options.mask, step=count)
    if options.criterion in ("magnitude", "threshold"):
        return [functools.partial(_magnitude, leaf) for leaf in plan.leaves]
    key = perturbations.sample_key(key, count, _CHOICE)
    if options.criterion == "random":
        keys = perturbations.leaf_keys(key, plan.names)
        return [
            functools.partial(_random_words, keys[name], jnp.size(leaf))
            for name, leaf in zip(plan.names, plan.leaves, strict=True)
        ]
    assert loss is not None
    value_fn, kwargs = loss
    keys = plan.keys(key)
    plus, minus, _ = evaluate_pairs(
        lambda p, **kw: _loss_and_aux.loss_alone(value_fn(p, **kw)),
        plan,
        keys,
        kwargs=kwargs,
        spread=options.spread,
    )
    finite = jnp.isfinite(plus) & jnp.isfinite(minus)
    coefficients = estimators.spsa(plus, minus, plan.epsilon)
    coefficients = jnp.where(finite, coefficients, 0)
    return [
        functools.partial(_importance, arithmetic, keys, name, coefficients)
        if (arithmetic := plan.arithmetic.get(name)) is not None
        else None
        for name in plan.names
    ]


def _magnitude(leaf: Any, after: jax.Array) -> jax.Array:
    """``|w|`` as floats."""
    values = execution_order.delayed(stored(leaf), after)
    if not is_qtensor(leaf):
        return jnp.abs(values)
    scale: jax.Array = leaf.scale
    return jnp.abs(values.astype(jnp.float32)) * scale


def _random_words(key: jax.Array, size: int, after: jax.Array) -> jax.Array:
    """Random integers of 24 bits, as floats: XLA needs more memory to sort integers."""
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
    """The magnitude of the leaf's gradient, that of SPSA.

    Channels with grids of their own have steps of their own: what the losses say is
    about those, so their realised length counts.
    """
    total = arithmetic.weighted_sum(keys.delayed(name, after), coefficients)
    return jnp.abs(arithmetic.gradient(total, len(coefficients), by_signs=False))


def _largest(scores: Sequence[_Score | None], sizes: Sequence[int]) -> list[jax.Array]:
    """Sorted positions of the k largest values of each score, as int32 [k]."""
    chosen: list[jax.Array] = []
    latest = jnp.zeros([], jnp.int32)
    for score, k in zip(scores, sizes, strict=True):
        if score is None or k == 0:
            chosen.append(jnp.zeros([0], jnp.int32))
            continue
        # The leaves are sorted one after the other, since a sort needs several times
        # the memory of its leaf.
        latest = jnp.sort(lax.top_k(score(latest).reshape(-1), k)[1])
        chosen.append(latest)
    return chosen


# --------------------------------------------------- the state of the inner optimizer


def _momenta(inner: optax.GradientTransformation, chosen: Any, state: Any) -> Any:
    """For each array of the state of ``inner``, whether it has the size of a leaf.

    Such arrays are those whose shape changes when the leaves are made longer.
    """

    def longer(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct([n + 1 for n in x.shape], x.dtype)

    other = jax.eval_shape(inner.init, jax.tree.map(longer, chosen))
    return jax.tree.map(lambda x, y: x.shape != y.shape, state, other)


def _restarted(old: Any, fresh: Any, momenta: Any) -> Any:
    """``fresh`` where a state holds momenta, ``old`` where it does not.

    The state of a link is replaced as a whole if it holds momenta, because a count
    beside them, as in Adam's state, corrects their bias. A state inside another one
    is judged by itself. A state with a key keeps its count: the key and the count
    together address z, so that a count that begins anew would draw the same z again.
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
    """Whether it is the state of a link, or a chain's tuple of states."""
    return isinstance(x, tuple) and (hasattr(x, "_fields") or all(map(_is_state, x)))


# ------------------------------------------------------- between vectors and leaves


def _unflatten(params: Any, leaves: Sequence[Any]) -> Any:
    """A tree like params, in which a `QTensor` is one leaf."""
    treedef = jax.tree.structure(params, is_leaf=is_qtensor)
    return jax.tree.unflatten(treedef, leaves)


def _pairs(params: Any, indices: Any) -> list[tuple[Any, jax.Array]]:
    """Each leaf with the positions of its chosen values."""
    leaves = jax.tree.leaves(params, is_leaf=is_qtensor)
    return list(zip(leaves, jax.tree.leaves(indices), strict=True))


def _compress(params: Any, indices: Any) -> Any:
    """The chosen values of each leaf as a vector; None where there is none."""

    def leaf_fn(leaf: Any, index: jax.Array) -> Any:
        if index.size == 0:
            return None
        values = stored(leaf).reshape(-1).at[index].get(**_KNOWN_INDICES)
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
    """The chosen values with the integers of a `QTensor` as floats.

    An optimizer makes its momenta like them, and momenta are no integers.
    """
    return jax.tree.map(
        lambda x: with_stored(x, stored(x).astype(jnp.float32)) if is_qtensor(x) else x,
        chosen,
        is_leaf=is_qtensor,
    )


def _put_back(params: Any, indices: Any, chosen: Any) -> Any:
    """The params with the chosen values in place of their own."""
    values = iter(jax.tree.leaves(chosen, is_leaf=is_qtensor))

    def leaf_fn(leaf: Any, index: jax.Array) -> Any:
        if index.size == 0:
            return leaf
        array = _placed(stored(leaf), index, stored(next(values)))
        return with_stored(leaf, array)

    return _unflatten(params, [leaf_fn(*pair) for pair in _pairs(params, indices)])


def _spread(params: Any, indices: Any, changes: Any) -> Any:
    """Updates like the params: those of the chosen values, and zeros around them."""
    values = iter(jax.tree.leaves(changes, is_leaf=is_qtensor))
    latest: jax.Array | None = None

    def leaf_fn(leaf: Any, index: jax.Array) -> Any:
        nonlocal latest
        if index.size == 0:
            return jax.tree.map(jnp.zeros_like, leaf)
        value = next(values)
        array = stored(value)
        # The leaves are made one after the other, or the zeros of all of them would be
        # in memory at once. The first one waits for its update, or its zeros would be
        # made at the start of the step. Each other waits for a sum over the leaf before
        # it. If it read that leaf itself, the leaf would have to stay until then.
        after = array if latest is None else jnp.sum(latest.reshape(-1)[:64])
        zero = execution_order.dependent_zero(after).astype(array.dtype)
        array = latest = _placed(jnp.full(jnp.shape(leaf), zero), index, array)
        if not is_qtensor(leaf):
            return array
        # Of the kind that `inner` made: a gradient, or an update on the grid.
        return dataclasses.replace(
            value, qvalue=array, scale=jnp.zeros_like(leaf.scale)
        )

    return _unflatten(params, [leaf_fn(*pair) for pair in _pairs(params, indices)])


def _placed(array: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """A copy of an array with values at positions of the flattened array."""
    flat = array.reshape(-1).at[index].set(values, **_KNOWN_INDICES)
    return flat.reshape(array.shape)
