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

from fgrad import (
    fixed_point,
    low_rank,
    ordering,
    perturbations,
    point_of_use,
    rules,
)
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
        rules.Policy(perturbation, epsilon),
        mask=mask,
    )
    return plus[0], minus[0]


def evaluate_pairs(
    value_fn: Callable[[Any], jax.Array],
    params: Any,
    keys: jax.Array,
    policy: rules.Policy,
    *,
    mask: Mask = None,
    vectorize: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Evaluates a loss on both sides of the weights, for m perturbations.

    Args:
      value_fn: ``value_fn(params) -> scalar loss``; it is traced once.
      params: pytree of float arrays and `QTensor`.
      keys: [m] keys of z.
      policy: how the leaves are perturbed.
      mask: leaves to perturb, as in `dual_forward`.
      vectorize: with 1, the 2m evaluations run one after the other; with V > 1, the 2V
        of V pairs at once.

    Returns:
      ``(losses_plus, losses_minus)``, each [m].
    """
    mask = resolve_mask(mask, params)
    check_params(params, mask)
    traced = Traced(value_fn, params, mask, policy)
    leaf_keys = jax.vmap(lambda key: trained_keys(key, params, mask))(keys)
    pairs = len(keys)
    signs = jnp.tile(jnp.array([1, -1], jnp.int32), pairs)
    leaf_keys = jax.tree.map(lambda k: jnp.repeat(k, 2, axis=0), leaf_keys)

    def evaluate(address: tuple[jax.Array, Any]) -> jax.Array:
        sign, keys_of_leaves = address
        return traced(keys_of_leaves, sign)

    if vectorize >= pairs > 1:
        losses = jax.vmap(evaluate)((signs, leaf_keys))
    else:
        batch_size = 2 * vectorize if vectorize > 1 else None
        losses = jax.lax.map(evaluate, (signs, leaf_keys), batch_size=batch_size)
    plus, minus = losses.reshape(pairs, 2).T
    return plus, minus


class Traced:
    """A loss function, traced once, to be evaluated at perturbed parameters."""

    def __init__(
        self,
        value_fn: Callable[[Any], jax.Array],
        params: Any,
        mask: Any,
        policy: rules.Policy,
    ) -> None:
        with_paths = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor)
        treedef = jax.tree.structure(params, is_leaf=is_qtensor)
        leaves = [leaf for _, leaf in with_paths]
        self.paths = [path for path, _ in with_paths]
        self.trained = [i for i, on in enumerate(jax.tree.leaves(mask)) if on]
        self.rules = {
            i: policy.rule(leaves[i], jax.tree_util.keystr(self.paths[i]))
            for i in self.trained
        }
        self.small = [i for i, rule in self.rules.items() if rule.is_small()]
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
        sign: jax.Array,
        events: list[point_of_use.Event] | None = None,
    ) -> jax.Array:
        """The loss at ``w + sign * εz``, for the keys of the trained leaves."""
        key_of = {i: keys[jax.tree_util.keystr(self.paths[i])] for i in self.trained}
        arrays = dict(zip(self.trained, self.values, strict=True))
        # The vectors that make up low-rank z, and all small leaves, come first: they
        # are no burden to the memory.
        factors = rules.factors_together(self.rules, key_of)
        small = rules.samples_together(
            {i: self.rules[i] for i in self.small}, key_of, factors
        )
        values = [
            self.rules[i].perturbed(array, small[i], sign)
            if i in small
            else point_of_use.Pending(i, array)
            for i, array in arrays.items()
        ]

        def dense(leaf: int, array: Any, block: Any, after: jax.Array) -> jax.Array:
            rule = self.rules[leaf]
            if leaf in factors:
                u, v = factors[leaf]
                z = rules.product_of_block(
                    ordering.delayed(u, after), v, array.shape, block
                )
            else:
                key = ordering.delayed_key(key_of[leaf], after)
                z = rule.sample(key, array.shape, block)
            if is_qtensor(rule.leaf):
                # Or the 32-bit products of equation (6) that no z enters are made for
                # all leaves ahead of the loop over evaluations.
                array = ordering.delayed(array, after)
            return rule.perturbed(array, z, sign, block)

        def factored(leaf: int, array: Any, block: Any, after: jax.Array) -> Any:
            del after  # the base product waits for its activation anyway
            rule = self.rules[leaf]
            if not isinstance(rule, rules.LowRankRule) or array.ndim == 0:
                return None
            u, v = rules.factors_of_block(*factors[leaf], array.shape, block)
            base, amplitude = rule.terms(array, sign, block)
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
    policy = rules.Policy(perturbation, epsilon)
    return perturb_by(policy, params, key, sign=sign, mask=mask)


def perturb_by(
    policy: rules.Policy,
    params: Any,
    key: jax.Array,
    *,
    sign: int | jax.Array = 1,
    mask: Mask = None,
) -> Any:
    """`perturb` for any `rules.Policy`."""
    mask = resolve_mask(mask, params)
    keys = trained_keys(key, params, mask)

    def leaf_fn(path: tuple[Any, ...], leaf: Any, trained: bool) -> Any:
        if not trained:
            return leaf
        name = jax.tree_util.keystr(path)
        rule = policy.rule(leaf, name)
        z = rule.sample(keys[name], jnp.shape(leaf))
        array = leaf.qvalue if is_qtensor(leaf) else jnp.asarray(leaf)
        array = rule.perturbed(array, z, sign)
        return dataclasses.replace(leaf, qvalue=array) if is_qtensor(leaf) else array

    return map_leaves(leaf_fn, params, mask)


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
    traced: list[Traced] = []

    def evaluate() -> jax.Array:
        traced.append(
            Traced(
                lambda p: value_fn(p, **kwargs),
                params,
                mask,
                rules.Policy(perturbation, 1.0),
            )
        )
        keys = trained_keys(jax.random.key(0), params, mask)
        return traced[0](keys, jnp.int32(1), events)

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
    return perturbations.leaf_keys(key, trained_names(params, mask))


def trained_names(params: Any, mask: Any) -> list[str]:
    """``keystr`` of the paths of the trained leaves."""
    names: list[str] = []

    def collect(path: tuple[Any, ...], leaf: Any, trained: bool) -> Any:
        if trained:
            names.append(jax.tree_util.keystr(path))
        return leaf

    map_leaves(collect, params, mask)
    return names


def frozen_fraction(params: Any, policy: rules.Policy, mask: Mask = None) -> jax.Array:
    """Share of the trained weights that ε cannot move, because it rounds to zero.

    Args:
      params: pytree of float arrays and `QTensor`.
      policy: how the leaves are perturbed.
      mask: leaves that are trained, as in `dual_forward`.

    Returns:
      float32 scalar in [0, 1]; 0 if all leaves are floats.
    """
    mask = resolve_mask(mask, params)
    leaves = jax.tree.leaves(params, is_leaf=is_qtensor)
    # Floats, since an int32 ends at 2**31 weights.
    frozen, total = jnp.float32(0), 0.0
    for leaf, trained in zip(leaves, jax.tree.leaves(mask), strict=True):
        if trained:
            size = float(jnp.size(leaf))
            total += size
            frozen += (1 - policy.rule(leaf).moves()) * size
    return frozen / max(total, 1)


def check_epsilon(params: Any, policy: rules.Policy, mask: Mask) -> None:
    """Raises if ε rounds to zero on the grid of a trained leaf: nothing would move.

    Traced values cannot be looked at here: then the check runs with the computation,
    and raises from there.
    """
    name_of_z = policy.perturbation.name
    low_rank_z = isinstance(policy.perturbation, perturbations.LowRank)

    def check(epsilons: dict[str, Any], scales: dict[str, Any]) -> None:
        for name, scale in scales.items():
            unit = policy.perturbation.step if low_rank_z else 1.0
            steps = np.asarray(epsilons[name]) * unit / np.asarray(scale)
            if round(float(np.min(steps))) == 0:
                worst = np.argmin(np.broadcast_to(steps, np.shape(scale)))
                largest = float(np.ravel(scale)[worst]) / unit
                epsilon = float(np.min(steps)) * largest
                raise ValueError(
                    f"epsilon={epsilon:.3g} is at most half a weight step of "
                    f"leaf {name!r} (step {largest:.3g}"
                    + (f" for {name_of_z}" if low_rank_z else "")
                    + "), so it rounds to zero on the grid and the leaf would never "
                    f"move. Use an epsilon above {largest / 2:.3g}, more bits, "
                    "channel_axis=-1, or mask the leaf; fgrad.on_grid trains weights "
                    "of few bits without epsilon."
                )

    mask = resolve_mask(mask, params)
    scales: dict[str, Any] = {}
    epsilons: dict[str, Any] = {}

    def collect(path: tuple[Any, ...], leaf: Any, trained: bool) -> Any:
        if trained and is_qtensor(leaf):
            rule = policy.rule(leaf)
            if isinstance(rule, rules.FloatRule):
                name = fixed_point.path_str(path)
                scales[name], epsilons[name] = leaf.scale, rule.epsilon
        return leaf

    map_leaves(collect, params, mask)
    if all(map(fixed_point.is_concrete, [*epsilons.values(), *scales.values()])):
        check(epsilons, scales)
    else:
        jax.debug.callback(check, epsilons, scales)


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
    if not jax.tree.leaves(params):  # optax.tree.map_params inits with a placeholder
        mask = None
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
