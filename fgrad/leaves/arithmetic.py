"""The arithmetic of one leaf: how it is perturbed, and what its gradient is.

The type of a leaf decides. A float leaf is perturbed in floating point, a `QTensor` by
the integer equation (6), a `QTensor` of few bits by whole grid steps
(`fgrad.leaves.low_bit`); with a perturbation of low rank the same sums are written so
that they can be taken apart. Each of these is an `Arithmetic`. `Side` binds one to a
key and a sign: a leaf at ``w + εz`` or ``w - εz``, made where it is needed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fgrad import perturbations
from fgrad.fixed_point import is_qtensor, max_qvalue, perturb_qvalue, stored
from fgrad.leaves import low_bit
from fgrad.leaves.guidance import GUIDED_STEP, Guidance
from fgrad.tracing import execution_order

Factors = tuple[jax.Array, jax.Array]

Kind = TypeVar("Kind", bound="Arithmetic")

# Weights that are looked at to tell how many are frozen: of a leaf of floats, or less
# where there are many leaves; of all leaves together; and of each leaf at least.
_COUNTED, _COUNTED_TOGETHER, _COUNTED_AT_LEAST = 4096, 32768, 256


def _with_arrays(*names: str) -> Callable[[type[Kind]], type[Kind]]:
    """Makes a class a pytree of these attributes. Its source is no array."""
    return functools.partial(
        jax.tree_util.register_dataclass, data_fields=names, meta_fields=("source",)
    )


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How one leaf is perturbed; the base of all kinds, each a pytree of arrays.

    A block is a part of a leaf, ``leaf[i]`` or ``leaf[i, j]``, as in
    `perturbations.Perturbation.sample`; its index may be traced.

    Attributes:
      leaf: float array or `QTensor`.
      source: where the random integers come from.
    """

    leaf: Any
    source: perturbations.Perturbation

    # Whether z is made by factors u and v, of `LowRank`.
    is_factored: ClassVar[bool] = False
    # Whether losses move the leaf by their sign, whatever the estimator.
    moves_by_signs: ClassVar[bool] = False
    # Whether z may be drawn around a direction.
    can_be_guided: ClassVar[bool] = False
    # Whether `normalized` reads the squares of directions.
    normalizes: ClassVar[bool] = False

    def z_of(self, raw: jax.Array, block: Any = None) -> jax.Array:
        """z_q of what ``source`` sampled for the leaf or a block of it."""
        return raw

    @property
    def samples_are_z(self) -> bool:
        """Whether `z_of` returns samples as they are."""
        return False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf."""
        return jnp.shape(self.leaf)

    @property
    def is_small(self) -> bool:
        """Whether the leaf is sampled and perturbed with all other small ones."""
        return self.source.is_small(self.shape)

    def sample(self, key: jax.Array, like: Any, block: Any = None) -> jax.Array:
        """z_q of the leaf or a block of it.

        Args:
          key: of the leaf.
          like: its values, or those of the block.
          block: index of the block, or None.
        """

        def raw(key: jax.Array, block: Any) -> jax.Array:
            return self.source.sample(key, jnp.shape(like), block)

        return self.z_of(execution_order.laid_out(raw, like, key, block), block)

    def weighted_sum(self, keys: jax.Array, coefficients: jax.Array) -> jax.Array:
        """``Σᵢ cᵢ z_qᵢ`` of the leaf, one z at a time."""
        return perturbations.accumulate(
            lambda key: self.sample(key, stored(self.leaf)),
            keys,
            coefficients,
            self.shape,
            stored(self.leaf),
        )

    def direction(self, z: jax.Array) -> jax.Array:
        """The way that the evaluations of z_q took the leaf, in units of z_q."""
        return z

    def normalized(self, total: jax.Array, squares: jax.Array) -> jax.Array:
        """A sum of directions, corrected for their length.

        Args:
          total: ``Σᵢ cᵢ dᵢ`` of the directions d, in the order of the leaf.
          squares: ``Σᵢ dᵢ²`` and ``Σᵢ z_qᵢ²``, [2, size].
        """
        del squares
        return total

    def perturbed(
        self, array: jax.Array, z: jax.Array, sign: int | jax.Array, block: Any = None
    ) -> jax.Array:
        """The stored values of the leaf, or of a block, on one side of it."""
        raise NotImplementedError

    def terms(
        self, array: jax.Array, sign: int | jax.Array, block: Any = None
    ) -> tuple[jax.Array, jax.Array] | None:
        """Base and amplitude a of ``base + a Σᵣ uᵣ vᵣ``; None if z has no factors."""
        return None

    def gradient(self, total: jax.Array, count: int, by_signs: bool) -> jax.Array:
        """``Σᵢ cᵢ zᵢ / m`` as float32, in loss per unit of weight.

        Args:
          total: from `weighted_sum`.
          count: m.
          by_signs: whether the coefficients were signs, which know of no unit.
        """
        raise NotImplementedError

    def epsilon_in_steps(self) -> jax.Array | None:
        """What a unit of z, or of z_q, moves in weight steps, before it is rounded.

        None where nothing is rounded: for floats, and on the grid of few bits.
        """
        return None

    def looked_at(self, about: int) -> tuple[jax.Array, jax.Array]:
        """What `is_frozen` takes: of a large leaf, about so many weights; and ε."""
        del about
        return jnp.zeros(()), jnp.zeros(())

    def is_frozen(self, values: jax.Array, epsilon: jax.Array) -> jax.Array:
        """For each of the values that were looked at whether ε cannot move it."""
        del epsilon
        return jnp.zeros(values.shape, bool)

    def of_block(self, values: jax.Array, array: jax.Array, block: Any) -> jax.Array:
        """Values in the shape of the leaf's scale, for a block like ``array``."""
        if block is None or values.ndim == 0:
            return values
        stacked = self.leaf.ndim - array.ndim
        values = jnp.broadcast_to(
            values, self.leaf.shape[:stacked] + values.shape[stacked:]
        )
        return values.reshape(-1, *values.shape[stacked:])[block]


@_with_arrays("leaf", "epsilon", "unit", "guided")
@dataclasses.dataclass(frozen=True)
class FloatArithmetic(Arithmetic):
    """``w ± εz`` in floating point.

    Attributes:
      epsilon: ε of the leaf in units of the weights.
      unit: ε of the leaf for a unit of the ε that the estimator is told.
      guided: a `Guidance` and the leaf's direction, or None.
    """

    epsilon: jax.Array
    unit: jax.Array
    guided: tuple[Guidance, jax.Array] | None = None

    can_be_guided: ClassVar[bool] = True

    @property
    def samples_are_z(self) -> bool:
        """Whether `z_of` returns samples as they are."""
        return self.guided is None

    @property
    def step(self) -> float:
        """Δ_z, the value of a unit of z_q."""
        return self.source.step if self.guided is None else GUIDED_STEP

    def z_of(self, raw: jax.Array, block: Any = None) -> jax.Array:
        """z_q of what ``source`` sampled for the leaf or a block of it."""
        if self.guided is None:
            return raw
        guidance, direction = self.guided
        if block is not None:
            direction = direction.reshape(-1, *raw.shape)[block]
        return guidance.mix(raw, direction, self.source.step)

    def perturbed(
        self, array: jax.Array, z: jax.Array, sign: int | jax.Array, block: Any = None
    ) -> jax.Array:
        """The stored values of the leaf, or of a block, on one side of it."""
        amplitude = jnp.float32(self.step) * self.epsilon * sign
        moved: jax.Array = array + amplitude * z.astype(jnp.float32)
        return moved.astype(array.dtype)

    def gradient(self, total: jax.Array, count: int, by_signs: bool) -> jax.Array:
        """``Σᵢ cᵢ zᵢ / m`` as float32; see `Arithmetic.gradient`."""
        gradient = total.astype(jnp.float32) * (self.step / count)
        return gradient if by_signs else gradient / self.unit

    def looked_at(self, about: int) -> tuple[jax.Array, jax.Array]:
        """Weights at even distances, and ε."""
        return _evenly_spaced(jnp.asarray(self.leaf), about), self.epsilon

    def is_frozen(self, values: jax.Array, epsilon: jax.Array) -> jax.Array:
        """Whether even the largest z cannot move a weight."""
        reach = self.source.largest * epsilon
        up, down = ((values + x).astype(values.dtype) for x in (reach, -reach))
        return (up == values) & (down == values)


@_with_arrays("leaf", "epsilon", "unit", "guided")
@dataclasses.dataclass(frozen=True)
class NarrowFloatArithmetic(FloatArithmetic):
    r"""``w ± εz`` in a floating point so coarse that εz is rounded: bfloat16, float16.

    What the losses say is about the perturbation that was left after rounding,

    .. math:: d = \frac{(w + εz) - (w - εz)}{2ε}

    so that d takes the place of z in the gradient, ``Σᵢ cᵢ dᵢ / (m E[d²])``. With as
    few values as a bias has, ``mean(d²)`` would say little of the expectation, mostly
    by the length of z, which is known to be 1 on average. So the expectation is
    estimated by ``mean(d²) / mean(z²)``, and is exactly 1 where nothing is rounded.
    """

    normalizes: ClassVar[bool] = True

    @property
    def samples_are_z(self) -> bool:
        """Whether `z_of` returns samples as they are, and z is the direction."""
        return False

    def perturbed(
        self, array: jax.Array, z: jax.Array, sign: int | jax.Array, block: Any = None
    ) -> jax.Array:
        """The stored values of the leaf, or of a block, on one side of it."""
        amplitude = jnp.float32(self.step) * self.epsilon * sign
        moved = array + amplitude * z.astype(jnp.float32)
        # XLA removes two conversions in a row, as to bfloat16 and back in the loss. The
        # perturbation of the loss would then not be the one that `direction` sees.
        kind = jnp.finfo(array.dtype)
        rounded = jax.lax.reduce_precision(moved, kind.nexp, kind.nmant)
        return rounded.astype(array.dtype)

    def direction(self, z: jax.Array) -> jax.Array:
        """The perturbation d in units of z_q."""
        array = jnp.asarray(self.leaf)
        up, down = (
            self.perturbed(array, z, sign).astype(jnp.float32) for sign in (1, -1)
        )
        return (up - down) / (2 * self.step * self.epsilon)

    def normalized(self, total: jax.Array, squares: jax.Array) -> jax.Array:
        """A sum of directions over their mean square, in units of z."""
        of_d, of_z = jnp.sum(squares, axis=1)
        length = of_d / jnp.where(of_z > 0, of_z, 1)
        return jnp.where(length > 0, total / jnp.where(length > 0, length, 1), 0)

    def weighted_sum(self, keys: jax.Array, coefficients: jax.Array) -> jax.Array:
        """``Σᵢ cᵢ dᵢ / E[d²]``, one z at a time."""
        zero = execution_order.dependent_zero(jax.random.key_data(keys))
        like = stored(self.leaf)
        zeros = execution_order.filled(self.shape, zero.astype(jnp.float32), like)

        def add(index: Any, sums: tuple[jax.Array, jax.Array]) -> Any:
            total, squares = sums
            z = self.sample(keys[index], like)
            d = self.direction(z)
            both = [jnp.mean(jnp.square(x.astype(jnp.float32))) for x in (d, z)]
            return total + coefficients[index] * d, squares + jnp.stack(both)

        nothing = jnp.full(2, zero.astype(jnp.float32))
        total, squares = jax.lax.fori_loop(0, len(coefficients), add, (zeros, nothing))
        return self.normalized(total, squares[:, None])


@_with_arrays("leaf", "epsilon", "unit", "guided")
@dataclasses.dataclass(frozen=True)
class FixedPointArithmetic(FloatArithmetic):
    r"""``w_q ± ε_q z_q`` by equation (6), with ``ε_q = ⌊ε/Δ_w⌉``.

    The losses are those at a distance of :math:`\tilde ε = Δ_w ε_q`, and the gradient
    that is estimated from them is divided by it instead of ε. Weights for which ε_q is
    zero were not perturbed, and have a gradient of zero.
    """

    def perturbed(
        self, array: jax.Array, z: jax.Array, sign: int | jax.Array, block: Any = None
    ) -> jax.Array:
        """The stored values of the leaf, or of a block, on one side of it."""
        epsilon_q = sign * self.of_block(self.whole_steps(), array, block)
        return perturb_qvalue(array, z, epsilon_q, self.step, self.leaf.bits)

    def epsilon_in_steps(self) -> jax.Array:
        """What a unit of z moves in weight steps, in the shape of the scale."""
        steps: jax.Array = self.epsilon / self.leaf.scale
        return steps

    def whole_steps(self) -> jax.Array:
        """ε_q as int32, in the shape of the scale."""
        return _whole_steps(self.epsilon_in_steps())

    def gradient(self, total: jax.Array, count: int, by_signs: bool) -> jax.Array:
        """``Σᵢ cᵢ zᵢ / m`` as float32; see `Arithmetic.gradient`."""
        return super().gradient(total, count, by_signs) * _nominal_over_realised(self)

    def looked_at(self, about: int) -> tuple[jax.Array, jax.Array]:
        """The weight steps, and ε in weight steps."""
        del about
        return self.leaf.scale, self.epsilon_in_steps()

    def is_frozen(self, values: jax.Array, epsilon: jax.Array) -> jax.Array:
        """Whether the ε of a weight is no whole step."""
        del values
        return _whole_steps(epsilon) == 0


@_with_arrays("leaf", "epsilon", "unit", "guided")
@dataclasses.dataclass(frozen=True)
class LowRankArithmetic(FloatArithmetic):
    """``w ± ε Σᵣ uᵣ vᵣ`` in floating point, as base plus amplitude times factors."""

    source: perturbations.LowRank

    is_factored: ClassVar[bool] = True
    can_be_guided: ClassVar[bool] = False

    @property
    def samples_are_z(self) -> bool:
        """Whether `z_of` returns samples as they are."""
        return False

    def weighted_sum(self, keys: jax.Array, coefficients: jax.Array) -> jax.Array:
        """``Σᵢ cᵢ z_qᵢ`` of the leaf, as one product."""

        def total(keys: jax.Array, coefficients: jax.Array) -> jax.Array:
            return self.source.weighted_sum(keys, coefficients, self.shape)

        return execution_order.laid_out(total, stored(self.leaf), keys, coefficients)

    def terms(
        self, array: jax.Array, sign: int | jax.Array, block: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """Base and amplitude."""
        amplitude = jnp.float32(self.source.step) * self.epsilon * sign
        return array, jnp.asarray(amplitude, jnp.float32)

    def perturbed(
        self, array: jax.Array, z: jax.Array, sign: int | jax.Array, block: Any = None
    ) -> jax.Array:
        """The stored values of the leaf, or of a block, on one side of it."""
        base, amplitude = self.terms(array, sign, block)
        return (base + amplitude * z).astype(array.dtype)


@_with_arrays("leaf", "epsilon", "unit", "guided")
@dataclasses.dataclass(frozen=True)
class FixedPointLowRankArithmetic(LowRankArithmetic):
    """``w_q ± ⌊ε Δ_z/Δ_w⌉ Σᵣ uᵣ vᵣ``, in whole grid steps.

    The base keeps as far from the ends of the grid as z reaches. So no sum is rounded
    or clipped, and a product with it can be taken apart exactly.
    """

    def terms(
        self, array: jax.Array, sign: int | jax.Array, block: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """Base and amplitude."""
        limit, rank = max_qvalue(self.leaf.bits), self.source.rank
        steps = self.of_block(self.whole_steps(), array, block)
        room = (limit - steps * rank).astype(array.dtype)
        return jnp.clip(array, -room, room), sign * steps

    def epsilon_in_steps(self) -> jax.Array:
        """What a unit of z_q moves in weight steps, in the shape of the scale."""
        steps: jax.Array = self.epsilon * self.source.step / self.leaf.scale
        return steps

    def whole_steps(self) -> jax.Array:
        """Steps that a unit of z_q moves, int32, in the shape of the scale."""
        most = max_qvalue(self.leaf.bits) // self.source.rank
        return jnp.minimum(_whole_steps(self.epsilon_in_steps()), most)

    def gradient(self, total: jax.Array, count: int, by_signs: bool) -> jax.Array:
        """``Σᵢ cᵢ zᵢ / m`` as float32; see `Arithmetic.gradient`."""
        return super().gradient(total, count, by_signs) * _nominal_over_realised(self)

    def looked_at(self, about: int) -> tuple[jax.Array, jax.Array]:
        """The weight steps, and ε in weight steps."""
        del about
        return self.leaf.scale, self.epsilon_in_steps()

    def is_frozen(self, values: jax.Array, epsilon: jax.Array) -> jax.Array:
        """Whether the ε of a weight is no whole step."""
        del values
        return _whole_steps(epsilon) == 0


@_with_arrays("leaf", "sparsity")
@dataclasses.dataclass(frozen=True)
class GridArithmetic(Arithmetic):
    """``clip(w_q ± κ z)`` with sparse integers z; see `fgrad.leaves.low_bit`.

    Attributes:
      sparsity: the density of z in this step.
    """

    sparsity: low_bit.Sparsity

    moves_by_signs: ClassVar[bool] = True

    def z_of(self, raw: jax.Array, block: Any = None) -> jax.Array:
        """Sparse steps out of random words."""
        return self.sparsity.sample(raw, self.of_block(self.leaf.scale, raw, block))

    def perturbed(
        self, array: jax.Array, z: jax.Array, sign: int | jax.Array, block: Any = None
    ) -> jax.Array:
        """The stored values of the leaf, or of a block, on one side of it."""
        widening = sign * self.sparsity.probe(self.leaf.bits)
        return low_bit.probe_qvalue(array, z, widening, max_qvalue(self.leaf.bits))

    def gradient(self, total: jax.Array, count: int, by_signs: bool) -> jax.Array:
        """The gradient of which SGD makes ``Σᵢ cᵢ zᵢ`` grid steps."""
        del by_signs
        rms = self.sparsity.rms
        inverse = jnp.where(rms > 0, 1 / jnp.where(rms > 0, rms, 1), 0)
        step: jax.Array = self.leaf.scale * inverse / count
        return total.astype(jnp.float32) * step


def arithmetic_of(
    leaf: Any,
    perturbation: perturbations.Perturbation,
    epsilon: jax.typing.ArrayLike,
    unit: Callable[[Any], jax.Array] | None = None,
    sparsity: low_bit.Sparsity | None = None,
) -> Arithmetic:
    """The arithmetic of a leaf in one step; its type and the options decide.

    Args:
      leaf: float array or `QTensor`.
      perturbation: where z comes from.
      epsilon: ε in units of the weights, or in those of ``unit``; may be traced.
      unit: of a `LeafEpsilon`, or None.
      sparsity: for `QTensor` leaves of few bits, or None to treat them as any other.
    """
    if is_qtensor(leaf) and sparsity and leaf.bits < sparsity.below:
        return GridArithmetic(leaf, low_bit.WORDS, sparsity)
    one = jnp.float32(1) if unit is None else unit(leaf)
    scaled = jnp.asarray(epsilon if unit is None else epsilon * one, jnp.float32)
    if isinstance(perturbation, perturbations.LowRank):
        low_rank = (
            FixedPointLowRankArithmetic if is_qtensor(leaf) else LowRankArithmetic
        )
        return low_rank(leaf, perturbation, scaled, one)
    if is_qtensor(leaf):
        return FixedPointArithmetic(leaf, perturbation, scaled, one)
    narrow = jnp.finfo(jnp.result_type(leaf)).bits < 32
    dense = NarrowFloatArithmetic if narrow else FloatArithmetic
    return dense(leaf, perturbation, scaled, one)


class Side(NamedTuple):
    """A leaf on one side of the weights, ``w + sign * εz``, made where it is needed.

    Attributes:
      name: of the leaf.
      arithmetic: of the leaf.
      key_after: ``key_after(array)`` is the key of z, not before ``array`` is there.
      sign: 1 or -1, int32.
      factors: the u and v of a z of low rank, or None.
    """

    name: str
    arithmetic: Arithmetic
    key_after: Callable[[jax.Array], jax.Array]
    sign: jax.Array
    factors: Factors | None

    def dense(self, array: jax.Array, block: Any, after: jax.Array) -> jax.Array:
        """The perturbed array.

        Args:
          array: the stored values of the leaf, or of one block of it.
          block: index of the block, or None.
          after: an activation; nothing is done before it has been computed.
        """
        if self.factors is not None:
            u, v = self.factors
            u = execution_order.delayed(u, after)

            def product(u: jax.Array, v: jax.Array, block: Any) -> jax.Array:
                return _product_of_block(u, v, array.shape, block)

            z = execution_order.laid_out(product, array, u, v, block)
        else:
            z = self.arithmetic.sample(self.key_after(after), array, block)
        if is_qtensor(self.arithmetic.leaf):
            # Otherwise the 32-bit products of equation (6) that no z enters are made
            # for all leaves ahead of the loop over evaluations.
            array = execution_order.delayed(array, after)
        return self.arithmetic.perturbed(array, z, self.sign, block)

    def factored(
        self, array: jax.Array, block: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array] | None:
        """Base, u, v and amplitude of the perturbed array; None without factors."""
        terms = self.arithmetic.terms(array, self.sign, block)
        if self.factors is None or terms is None or array.ndim == 0:
            return None
        base, amplitude = terms
        u, v = _factors_of_block(*self.factors, array.shape, block)
        return base, u, v, amplitude


# --------------------------------------------------------------------- many leaves


def frozen_weights(arithmetic: Sequence[Arithmetic]) -> jax.Array:
    """How many weights ε cannot move, a float32."""
    frozen: jax.Array = jnp.float32(0)
    for flags, weights in _looked_at(arithmetic):
        frozen += jnp.sum(jnp.where(flags, weights, 0))
    return frozen


def all_frozen(arithmetic: Sequence[Arithmetic]) -> jax.Array:
    """Whether ε cannot move any of the weights that are looked at, a bool."""
    every = [jnp.all(flags) for flags, _ in _looked_at(arithmetic)]
    return jnp.all(jnp.stack(every)) if every else jnp.bool_(False)


def _looked_at(
    arithmetic: Sequence[Arithmetic],
) -> Iterator[tuple[jax.Array, np.ndarray | float]]:
    """Of some weights whether ε cannot move them, and for how many each of them stands.

    All leaves of one kind are looked at together, since programs for each leaf take
    their time to compile.
    """
    groups: dict[Any, list[Arithmetic]] = {}
    for one in arithmetic:
        kind = (type(one), one.source, jnp.result_type(one.leaf))
        groups.setdefault(kind, []).append(one)
    for group in groups.values():
        about = min(_COUNTED, max(_COUNTED_AT_LEAST, _COUNTED_TOGETHER // len(group)))
        parts, epsilons, weights = [], [], []
        for one in group:
            size = math.prod(one.shape)
            part, epsilon = one.looked_at(about)
            if execution_order.is_spread(part):
                flags = one.is_frozen(part, epsilon)
                yield flags, float(size) / max(flags.size, 1)
                continue
            parts.append(part.reshape(-1))
            epsilons.append(jnp.broadcast_to(epsilon, part.shape).reshape(-1))
            weights.append(np.full(part.size, size / max(part.size, 1), np.float32))
        if parts:
            flags = group[0].is_frozen(
                jnp.concatenate(parts), jnp.concatenate(epsilons)
            )
            yield flags, np.concatenate(weights)


def factors_together(
    arithmetic: Sequence[Arithmetic], keys: Callable[[Sequence[int]], jax.Array]
) -> dict[int, Factors]:
    """The u and v of all leaves whose z is of low rank, by position."""
    chosen = [i for i, one in enumerate(arithmetic) if one.is_factored]
    if not chosen:
        return {}
    source: Any = arithmetic[chosen[0]].source
    shapes = [arithmetic[i].shape for i in chosen]
    pairs = source.factors_together(keys(chosen), shapes)
    return dict(zip(chosen, pairs, strict=True))


def samples_together(
    arithmetic: Sequence[Arithmetic],
    chosen: Sequence[int],
    keys: Callable[[Sequence[int]], jax.Array],
    factors: dict[int, Factors],
) -> dict[int, jax.Array]:
    """z_q of the chosen leaves, by position, made in one loop for each source.

    Args:
      arithmetic: of all leaves.
      chosen: positions of the leaves that are sampled.
      keys: ``keys(positions)`` are the keys of some leaves.
      factors: of the leaves whose z is of low rank, by position.
    """
    samples = {
        i: perturbations.product(*factors[i]).reshape(arithmetic[i].shape)
        for i in chosen
        if i in factors
    }
    left = [i for i in chosen if i not in factors]
    for source in dict.fromkeys(arithmetic[i].source for i in left):
        group = [i for i in left if arithmetic[i].source == source]
        shapes = [arithmetic[i].shape for i in group]
        raw = source.sample_together(keys(group), shapes)
        for i, words in zip(group, raw, strict=True):
            samples[i] = arithmetic[i].z_of(words)
    return samples


def _factors_of_block(
    u: jax.Array, v: jax.Array, shape: tuple[int, ...], block: Any
) -> Factors:
    """The factors for one block of a leaf, of one axis or more: blocks share v."""
    if block is None:
        return u, v
    rank = len(u)
    u = u.reshape(rank, -1, *shape[:-1], 1)[:, block]
    return u, v.reshape(rank, *[1] * (len(shape) - 1), shape[-1])


def _product_of_block(
    u: jax.Array, v: jax.Array, shape: tuple[int, ...], block: Any
) -> jax.Array:
    """The z_q of a leaf, or of one block of it, from the factors of the leaf."""
    if block is not None and not shape:
        return perturbations.product(u, v).reshape(-1)[block]
    u, v = _factors_of_block(u, v, shape, block)
    return perturbations.product(u, v).reshape(shape)


def _evenly_spaced(array: jax.Array, about: int) -> jax.Array:
    """About so many values of an array, or all of a smaller or sharded one."""
    left = array.size // about
    if left < 2 or execution_order.is_spread(array):
        return array
    strides = []
    for length in reversed(array.shape):
        strides.append(max(1, min(length, left)))
        left //= strides[-1]
    return jax.lax.slice(array, [0] * array.ndim, array.shape, strides[::-1])


def _nominal_over_realised(
    one: FixedPointArithmetic | FixedPointLowRankArithmetic,
) -> jax.Array:
    """ε over what is left of it in whole steps; 0 where nothing is left."""
    whole = one.whole_steps().astype(jnp.float32)
    ratio = one.epsilon_in_steps() / jnp.where(whole > 0, whole, 1)
    return jnp.where(whole > 0, ratio, 0)


def _whole_steps(steps: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(steps), 0, 2**30).astype(jnp.int32)
