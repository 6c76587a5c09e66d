"""The plan of a step: every leaf's name, value, arithmetic and key, decided once.

A plan is made from the parameters, the mask and the policy when a step is traced.
Everything that a step does with leaves is a method of it, so that no other module asks
what kind a leaf is or whether it is trained.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fgrad import _checks, perturbations
from fgrad._trees import is_concrete, numbers, path_str
from fgrad.fixed_point import (
    as_gradient,
    check_values,
    is_qtensor,
    stored,
    with_stored,
)
from fgrad.leaves import epsilon as epsilons
from fgrad.leaves.arithmetic import (
    Arithmetic,
    Side,
    all_frozen,
    arithmetic_of,
    factors_together,
    frozen_weights,
    samples_together,
)
from fgrad.leaves.guidance import Guidance
from fgrad.leaves.low_bit import OnGrid
from fgrad.perturbations import LeafKeys
from fgrad.tracing import compiled_once, execution_order

Mask = Any  # None, a pytree of bools (or a prefix of one), or a function of the params


@dataclasses.dataclass(frozen=True)
class Policy:
    """How the leaves of a tree are perturbed in all steps of a run.

    Attributes:
      epsilon: perturbation scale ε in units of the weights, an optax schedule of it,
        or ``fgrad.relative_epsilon`` or ``fgrad.step_epsilon`` for one of each leaf.
      num_perturbations: m, the number of directions of a step.
      perturbation: where z comes from.
      low_bit: how `QTensor` leaves of few bits are trained, or None to treat them as
        any other.
    """

    epsilon: epsilons.Epsilon = 1e-3
    num_perturbations: int = 1
    perturbation: perturbations.Perturbation = dataclasses.field(
        default_factory=perturbations.normal
    )
    low_bit: OnGrid | None = None

    def __post_init__(self) -> None:
        """Raises for options of the wrong kind."""
        value = epsilons.value_of(self.epsilon)
        if callable(value):
            _checks.function("epsilon", value, "step")
        else:
            epsilons.check("epsilon", value)
        perturbations.checked(self.perturbation)
        count = self.count("num_perturbations", self.num_perturbations)
        object.__setattr__(self, "num_perturbations", count)
        if self.low_bit is not None and not isinstance(self.low_bit, OnGrid):
            raise TypeError(
                "low_bit must be fgrad.on_grid(learning_rate) or None, got "
                f"{self.low_bit!r}."
            )

    @staticmethod
    def count(name: str, value: Any) -> int:
        """The value as a Python integer; raises unless it is a positive integer."""
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or not 1 <= value < 2**31:
            raise ValueError(
                f"{name} must be a positive integer, got {value!r}; under "
                "optax.inject_hyperparams list it in static_args."
            )
        return int(value)

    def epsilon_at(self, count: jax.Array) -> jax.Array:
        """ε of a step as a float32 scalar, in units of the leaves if they have one."""
        return epsilons.at("epsilon", epsilons.value_of(self.epsilon), count)


class Plan:
    """The leaves of a tree in one step.

    Attributes:
      step: number of the step.
      policy: how the leaves are perturbed.
      epsilon: ε of the step, float32 scalar.
      leaves: all leaves in flat order; a `QTensor` is one leaf.
      names: their paths as text, ``keystr``.
      trained: for each leaf whether it is trained.
      arithmetic: of each trained leaf by its name, in flat order.
    """

    def __init__(
        self,
        params: Any,
        policy: Policy,
        *,
        mask: Mask = None,
        step: jax.typing.ArrayLike = 0,
    ) -> None:
        """Makes the plan of ``step``, in which the leaves of ``mask`` are trained.

        Raises:
          TypeError: for a trained leaf that has no perturbation, such as integers that
            are no `QTensor`, and for a mask of other things than bools.
          ValueError: for a mask of another structure than the params, and for a
            trained leaf of more values than there are random words for.
        """
        self.treedef: Any
        paths, self.treedef = jax.tree_util.tree_flatten_with_path(
            params, is_leaf=is_qtensor
        )
        self.paths = [path for path, _ in paths]
        self.leaves = [leaf for _, leaf in paths]
        self.names = [jax.tree_util.keystr(path) for path in self.paths]
        self.trained = trained_leaves(mask, params)
        self._check_leaves()
        self.policy, self.step = policy, step
        count = jnp.asarray(step)
        self.epsilon = policy.epsilon_at(count)
        unit = getattr(policy.epsilon, "unit", None)
        sparsity = None
        if policy.low_bit:
            sparsity = policy.low_bit.at(count, policy.num_perturbations)
        self.arithmetic: dict[str, Arithmetic] = {
            name: arithmetic_of(leaf, policy.perturbation, self.epsilon, unit, sparsity)
            for name, leaf in self._trained_leaves()
        }
        self._check_sizes()

    def guided(self, guidance: Guidance) -> Plan:
        """The same plan with z drawn around directions."""
        plan = copy.copy(self)
        # A leaf has its own direction beside it and no need of all the others.
        shared = guidance._replace(directions={})
        plan.arithmetic = {
            name: dataclasses.replace(  # type: ignore[call-arg]
                arithmetic, guided=(shared, guidance.directions[name])
            )
            if arithmetic.can_be_guided
            else arithmetic
            for name, arithmetic in self.arithmetic.items()
        }
        return plan

    @property
    def guidable(self) -> list[str]:
        """Names of the leaves that a guide is about."""
        return [name for name, one in self.arithmetic.items() if one.can_be_guided]

    @property
    def guided_mask(self) -> Any:
        """The params' tree of bools that is True at the leaves of `guidable`."""
        guidable = set(self.guidable)
        return self.treedef.unflatten([name in guidable for name in self.names])

    # ------------------------------------------------------------------ z, and sides

    def keys(self, key: jax.Array) -> LeafKeys:
        """The keys of z: [m, leaves] for the key of a run."""
        return _keys(
            key,
            self.step,
            names=tuple(self.arithmetic),
            count=self.policy.num_perturbations,
        )

    def leaf_keys(self, z_key: jax.Array) -> LeafKeys:
        """The keys [leaves] of one z, from `perturbations.sample_key`."""
        return perturbations.leaf_keys(z_key, list(self.arithmetic))

    def sides(self, keys: LeafKeys, sign: jax.Array) -> list[jax.Array | Side]:
        """The trained leaves on one side of the weights, ``w + sign * εz``.

        Small leaves are perturbed together and returned as arrays. They come first,
        like the vectors that make up z of low rank: they are no burden to the memory.
        All others are returned as a `Side`, to be perturbed where they are used.
        """
        return sides(list(self.arithmetic.values()), keys, sign)

    def perturbed(self, z_key: jax.Array, sign: int | jax.Array = 1) -> Any:
        """The whole tree ``w + sign * εz``, a second copy of the trained leaves."""
        keys = self.leaf_keys(z_key)

        def leaf_fn(leaf: Any, name: str) -> Any:
            one = self.arithmetic[name]
            z = one.sample(keys[name], stored(leaf))
            return with_stored(leaf, one.perturbed(stored(leaf), z, sign))

        return self.map_trained(leaf_fn, lambda leaf: leaf)

    # -------------------------------------------------------------- from z to gradient

    def gradient(
        self, keys: LeafKeys, coefficients: jax.Array, signs: jax.Array
    ) -> Any:
        """``1/m Σᵢ cᵢ zᵢ`` as a pytree like the params; zeros for untrained leaves.

        Args:
          keys: from `keys`.
          coefficients: [m] c.
          signs: [m] int32, the coefficients of leaves that move by signs.
        """
        arithmetic = list(self.arithmetic.values())
        found = iter(_gradients(arithmetic, keys, coefficients, signs))
        return self.map_trained(
            lambda leaf, name: as_gradient(leaf, next(found)),
            lambda leaf: jax.tree.map(jnp.zeros_like, leaf),
        )

    # ---------------------------------------------------------------- tree in, tree out

    def map_trained(
        self, trained: Callable[[Any, str], Any], untrained: Callable[[Any], Any]
    ) -> Any:
        """A tree of ``trained(leaf, name)`` and ``untrained(leaf)``."""
        return self.treedef.unflatten(
            [
                trained(leaf, name) if on else untrained(leaf)
                for leaf, name, on in zip(
                    self.leaves, self.names, self.trained, strict=True
                )
            ]
        )

    def with_stored(
        self, values: Sequence[jax.Array], scales: Sequence[jax.Array]
    ) -> Any:
        """The params with other stored values and scales of the trained leaves.

        Args:
          values: of each trained leaf, in order.
          scales: of each trained leaf that is a `QTensor`, in order.
        """
        value, scale = iter(values), iter(scales)

        def leaf_fn(leaf: Any, name: str) -> Any:
            del name
            if is_qtensor(leaf):
                return dataclasses.replace(leaf, qvalue=next(value), scale=next(scale))
            return next(value)

        return self.map_trained(leaf_fn, lambda leaf: leaf)

    # ------------------------------------------------------------------------- reports

    def frozen_fraction(self) -> jax.Array:
        """Share of the trained weights that ε cannot move, a float32 in [0, 1].

        On a grid those whose ε rounds to zero steps; of floats those to which even
        the largest εz is too little to be added.
        """
        return _frozen_fraction(list(self.arithmetic.values()))

    def check_values(self) -> None:
        """Raises a ValueError for a `QTensor` that is no tensor on a grid.

        It looks at every one, trained or not, for a loss reads them all. It is for the
        start of a run: updates stay on the grid. Traced leaves have no numbers to look
        at.
        """
        for path, leaf in zip(self.paths, self.leaves, strict=True):
            if is_qtensor(leaf):
                check_values(leaf, path_str(path))

    def check_epsilon(self) -> None:
        """Raises if ε is too small for a trained leaf: it would never move.

        On a grid that is an ε of at most half a weight step, in any channel; of floats
        one that changes no weight of any leaf. Traced values cannot be looked at here:
        then the check runs with the computation, and raises from there.
        """
        steps, scales, floats = {}, {}, {}
        for path, name in zip(self.paths, self.names, strict=True):
            one = self.arithmetic.get(name)
            if one is None or not math.prod(one.shape):
                continue
            in_steps = one.epsilon_in_steps()
            if in_steps is None:
                floats[path_str(path)] = one
            else:
                steps[path_str(path)], scales[path_str(path)] = in_steps, one.leaf.scale
        # Where leaves on a grid move, floats that do not are no error.
        frozen = _all_frozen([] if steps else list(floats.values()))
        check = functools.partial(
            _check_frozen,
            self.policy.perturbation,
            str(self.policy.epsilon),
            tuple(floats),
        )
        arrays = [*steps.values(), *scales.values(), frozen]
        if all(map(is_concrete, arrays)):
            check(*jax.tree.map(numbers, (steps, scales, frozen)))
        else:
            jax.debug.callback(check, steps, scales, frozen)

    def _check_sizes(self) -> None:
        for path, name in zip(self.paths, self.names, strict=True):
            one = self.arithmetic.get(name)
            if one is None:
                continue
            try:
                one.source.check_shape(one.shape)
            except ValueError as error:
                raise ValueError(f"leaf {path_str(path)!r}: {error}") from None

    def _trained_leaves(self) -> list[tuple[str, Any]]:
        triples = zip(self.names, self.leaves, self.trained, strict=True)
        return [(name, leaf) for name, leaf, on in triples if on]

    def _check_leaves(self) -> None:
        for path, leaf, on in zip(self.paths, self.leaves, self.trained, strict=True):
            dtype = jnp.result_type(leaf)
            advice = _advice(dtype)
            if on and advice:
                raise TypeError(
                    f"leaf {path_str(path)!r} has dtype {dtype} and cannot be "
                    f"perturbed. {advice}"
                )


def _advice(dtype: Any) -> str:
    """What to do about a trained leaf of a dtype; empty if it can be perturbed."""
    mask = "exclude it with mask="
    if jnp.issubdtype(dtype, jnp.floating):
        if jnp.finfo(dtype).bits >= 16:
            return ""
        return (
            "Convert it to bfloat16, put it on a grid with fgrad.quantize (of 8 bits "
            f"it is as small), or {mask}."
        )
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return (
            "Make two float leaves of its real and its imaginary part and join them in "
            f"the loss with jax.lax.complex, or {mask}."
        )
    if jnp.issubdtype(dtype, jnp.signedinteger):
        return (
            "If its integers are weights, wrap them with their step, "
            "fgrad.QTensor(qvalue, scale, bits); if they are a counter or an index, "
            f"{mask}."
        )
    return f"It holds no weights: {mask}."


# --------------------------------------------------------------- what needs no names
#
# Functions of the arithmetic of the trained leaves, in flat order, which is arrays.


def sides(
    arithmetic: Sequence[Arithmetic], keys: LeafKeys, sign: jax.Array
) -> list[jax.Array | Side]:
    """The trained leaves on one side of the weights; see `Plan.sides`."""
    names = keys.names

    def keys_of(positions: Sequence[int]) -> jax.Array:
        return keys.many([names[i] for i in positions])

    factors = factors_together(arithmetic, keys_of)
    small = [i for i, one in enumerate(arithmetic) if one.is_small]
    z = samples_together(arithmetic, small, keys_of, factors)
    return [
        one.perturbed(stored(one.leaf), z[i], sign)
        if i in z
        else Side(
            name,
            one,
            functools.partial(keys.delayed, name),
            sign,
            factors.get(i),
        )
        for i, (name, one) in enumerate(zip(names, arithmetic, strict=True))
    ]


@compiled_once.compiled("names", "count")
def _keys(
    key: jax.Array, step: jax.typing.ArrayLike, *, names: tuple[str, ...], count: int
) -> LeafKeys:
    """The keys of z: [count, leaves] for the key of a run."""
    z_keys = jax.vmap(lambda i: perturbations.sample_key(key, step, i))(
        jnp.arange(count)
    )
    keys: LeafKeys = jax.vmap(lambda k: perturbations.leaf_keys(k, names))(z_keys)
    return keys


@compiled_once.compiled()
def _frozen_fraction(arithmetic: Sequence[Arithmetic]) -> jax.Array:
    """Share of the weights that ε cannot move."""
    total = sum(float(math.prod(one.shape)) for one in arithmetic)
    return frozen_weights(arithmetic) / max(total, 1)


@compiled_once.compiled()
def _all_frozen(arithmetic: Sequence[Arithmetic]) -> jax.Array:
    """Whether ε cannot move any of the weights that are looked at."""
    return all_frozen(arithmetic)


@compiled_once.compiled()
def _gradients(
    arithmetic: Sequence[Arithmetic],
    keys: LeafKeys,
    coefficients: jax.Array,
    signs: jax.Array,
) -> list[jax.Array]:
    """``1/m Σᵢ cᵢ zᵢ`` of each trained leaf; see `Plan.gradient`."""
    named = dict(zip(keys.names, arithmetic, strict=True))
    totals = _weighted_sums(named, keys, coefficients, signs)
    by_signs = bool(jnp.issubdtype(coefficients.dtype, jnp.integer))
    return [
        one.gradient(totals[name], len(coefficients), by_signs)
        for name, one in named.items()
    ]


def _weighted_sums(
    arithmetic: Mapping[str, Arithmetic],
    keys: LeafKeys,
    coefficients: jax.Array,
    signs: jax.Array,
) -> dict[str, jax.Array]:
    """``Σᵢ cᵢ z_qᵢ`` of each trained leaf by its name."""
    totals: dict[str, jax.Array] = {}
    latest: jax.Array | None = None
    for by_signs, c in ((False, coefficients), (True, signs)):
        group = {
            name: one
            for name, one in arithmetic.items()
            if one.moves_by_signs == by_signs
        }
        if not group:
            continue
        # Otherwise the losses become coefficients again in the program of every leaf.
        c = execution_order.stored(c)
        latest = c if latest is None else latest
        small = {name: one for name, one in group.items() if one.is_small}
        totals |= _sums_together(small, keys, c)
        for name in [name for name in group if name not in small]:
            # One leaf after the other. All at once would be in memory at once.
            delayed = keys.delayed(name, latest)
            total = group[name].weighted_sum(delayed, c)
            latest = total if total.size else latest
            totals[name] = total
    return totals


def _sums_together(
    arithmetic: Mapping[str, Arithmetic], keys: LeafKeys, coefficients: jax.Array
) -> dict[str, jax.Array]:
    """``Σᵢ cᵢ z_qᵢ`` of many small leaves, each with its keys [m]."""
    if not arithmetic:
        return {}
    chosen = list(arithmetic.values())
    normalizes = any(one.normalizes for one in chosen)
    if normalizes:  # directions of such leaves are no integers
        coefficients = coefficients.astype(jnp.float32)
    sizes = [math.prod(one.shape) for one in chosen]
    starts = np.cumsum(sizes) - sizes
    sources = {one.source for one in chosen}
    if len(sources) == 1 and all(one.samples_are_z for one in chosen):
        # As they are packed: to take them apart and together is a program for each.
        (source,) = sources
        starts, length = source.packing(sizes)

        def sample(keys: jax.Array) -> jax.Array:
            return source.packed(keys, sizes)
    else:
        length = sum(sizes)

        def samples_of(keys: jax.Array) -> list[jax.Array]:
            stacked, names = LeafKeys(keys, tuple(arithmetic)), list(arithmetic)

            def keys_of(positions: Sequence[int]) -> jax.Array:
                return stacked.many([names[i] for i in positions])

            factors = factors_together(chosen, keys_of)
            every = range(len(chosen))
            samples = samples_together(chosen, every, keys_of, factors)
            return [samples[i] for i in every]

        def sample(keys: jax.Array) -> jax.Array:
            return _directions(chosen, samples_of(keys))

    together = keys.many(list(arithmetic))
    total = perturbations.accumulate(sample, together, coefficients, (length,))
    totals = perturbations.pieces(total, starts, sizes)
    squares = totals
    if normalizes:

        def squared(keys: jax.Array) -> jax.Array:
            samples = samples_of(keys)
            z = jnp.concatenate([x.astype(jnp.float32).reshape(-1) for x in samples])
            return jnp.square(jnp.stack([_directions(chosen, samples), z]))

        ones = jnp.ones(len(coefficients), jnp.float32)
        rows = perturbations.accumulate(squared, together, ones, (2, length))
        pairs = zip(
            *(perturbations.pieces(x, starts, sizes) for x in rows), strict=True
        )
        squares = [jnp.stack(pair) for pair in pairs]
    return {
        name: one.normalized(part, square).reshape(one.shape)
        for (name, one), part, square in zip(
            arithmetic.items(), totals, squares, strict=True
        )
    }


def _directions(
    chosen: Sequence[Arithmetic], samples: Sequence[jax.Array]
) -> jax.Array:
    """The directions of some leaves in a row, of what was sampled for each."""
    pairs = zip(chosen, samples, strict=True)
    return jnp.concatenate([one.direction(z).reshape(-1) for one, z in pairs])


def _check_frozen(
    perturbation: perturbations.Perturbation,
    epsilon: str,
    floats: Sequence[str],
    steps: Mapping[str, Any],
    scales: Mapping[str, Any],
    frozen: Any,
) -> None:
    """Raises for a leaf that ε cannot move.

    Args:
      perturbation: where z comes from.
      epsilon: ε as it was given, for messages.
      floats: names of the leaves of floats.
      steps: ε in weight steps, of each leaf on a grid.
      scales: the weight steps of these leaves.
      frozen: whether there are no others, and ε cannot move any of their weights.
    """
    if bool(frozen):
        raise ValueError(
            f"epsilon={epsilon} changes no weight of {', '.join(map(repr, floats))}: "
            "added to the weights it is rounded away, so nothing would ever move. Use "
            "a larger epsilon, fgrad.relative_epsilon or a wider dtype."
        )
    low_rank = isinstance(perturbation, perturbations.LowRank)
    unit = perturbation.step if low_rank else 1.0
    for name, scale in scales.items():
        in_steps = np.asarray(steps[name])
        if round(float(np.min(in_steps))) == 0:
            worst = np.argmin(np.broadcast_to(in_steps, np.shape(scale)))
            largest = float(np.ravel(scale)[worst]) / unit
            epsilon = float(np.min(in_steps)) * largest
            raise ValueError(
                f"epsilon={epsilon:.3g} is at most half a weight step of "
                f"leaf {name!r} (step {largest:.3g}"
                + (f" for {perturbation.name}" if low_rank else "")
                + "), so it rounds to zero on the grid and the leaf would never "
                f"move. Use an epsilon above {largest / 2:.3g}, more bits, "
                "channel_axis=-1, or mask the leaf; fgrad.on_grid trains weights "
                "of few bits without epsilon."
            )


# ------------------------------------------------------------------------------ masks


def trained_leaves(mask: Mask, params: Any) -> tuple[bool, ...]:
    """Which leaves a mask trains, in flat order; a `QTensor` counts as one leaf.

    Args:
      mask: None for all; a pytree of bools that has the structure of the params or is
        a prefix of it; or a function from params to such a pytree.
      params: pytree of float arrays and `QTensor`.

    Raises:
      TypeError: for a mask of other things than bools.
      ValueError: for a mask of another structure.

    Example:
      >>> trained_leaves({"a": True, "b": False}, {"a": {"w": 1.0, "c": 2.0}, "b": 3.0})
      (True, True, False)
    """
    if not jax.tree.leaves(params):  # optax.tree.map_params inits with a placeholder
        mask = None
    _checks.arrays(params, is_qtensor)
    if callable(mask) and not _is_tree_of_bools(mask):
        _checks.function("mask", mask, "params")
        mask = mask(params)
        if mask is None:
            raise TypeError(
                "mask must hold Python bools, and the function returned None: it has "
                "no return."
            )
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
    trained = jax.tree.leaves(full)
    for value in trained:
        if not isinstance(value, bool | np.bool_):
            raise TypeError(
                "mask must hold Python bools, since it decides at trace time which "
                f"leaves exist for the estimator; got {value!r}."
            )
    return tuple(map(bool, trained))


def _is_tree_of_bools(mask: Any) -> bool:
    """Whether a mask that can be called is a tree all the same, as Equinox modules."""
    leaves = jax.tree.leaves(mask)
    return all(isinstance(x, bool | np.bool_) for x in leaves) and bool(leaves)


def map_leaves(fn: Callable[..., Any], mask: Mask, params: Any, *others: Any) -> Any:
    """Maps ``fn(leaf, trained, *others)`` over params; a `QTensor` is one leaf.

    Args:
      fn: gets the leaf, whether the mask trains it, and what the other trees have in
        its place.
      mask: as in `trained_leaves`.
      params: pytree of float arrays and `QTensor`.
      *others: pytrees with the structure of the params down to its leaves.
    """
    treedef: Any
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_qtensor)
    columns = [treedef.flatten_up_to(tree) for tree in others]
    trained = trained_leaves(mask, params)
    return treedef.unflatten(
        [fn(*row) for row in zip(leaves, trained, *columns, strict=True)]
    )
