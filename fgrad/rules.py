"""How a leaf is perturbed: its type decides the arithmetic.

A float leaf is perturbed in floating point, a `QTensor` leaf by the integer equation
(6), one of few bits by whole grid steps (`fgrad.low_bit`), and with a perturbation of
low rank by a whole number of steps for each of its factors. Each of these is a `Rule`;
a `Policy` gives every leaf its rule.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fgrad import fixed_point, low_bit, perturbations
from fgrad.fixed_point import is_qtensor
from fgrad.low_bit import OnGrid


@dataclasses.dataclass(frozen=True)
class LeafEpsilon:
    """An epsilon for each leaf; see `relative_epsilon` and `step_epsilon`.

    Attributes:
      name: as it was constructed, for messages.
      value: ε in ``unit``, or an optax schedule of it.
      unit: ``unit(leaf)``, float32 scalar or of the shape of the leaf's scale.
    """

    name: str
    value: float | jax.Array | Callable[[jax.Array], jax.Array]
    unit: Callable[[Any], jax.Array]


Epsilon = float | jax.Array | Callable[[jax.Array], jax.Array] | LeafEpsilon


def relative_epsilon(
    value: float | jax.Array | Callable[[jax.Array], jax.Array], *, floor: float = 1e-3
) -> LeafEpsilon:
    r"""An epsilon relative to the size of each leaf's weights.

    .. math:: ε_l = ε \max(rms(w_l), floor)

    The layers of a pre-trained network differ 100-fold in scale; one ε for all is too
    small for some of them or too large for others.

    Args:
      value: ε, without unit, or an optax schedule of it.
      floor: the least root mean square, in units of the weights, so that a bias or a
        head of zeros is perturbed as well.

    Returns:
      A `LeafEpsilon`, for the ``epsilon`` of ``fixed_point_forward_grad``.

    Raises:
      ValueError: if a value is not positive.

    Example:
      >>> epsilon = relative_epsilon(0.01)
      >>> float(epsilon.unit(jnp.array([3.0, -4.0])) ** 2)
      12.5
    """
    _check_positive("relative_epsilon", value)
    _check_positive("the floor of relative_epsilon", floor)

    def unit(leaf: Any) -> jax.Array:
        values = leaf.qvalue if is_qtensor(leaf) else leaf
        squares = jnp.square(jnp.asarray(values, jnp.float32))
        if is_qtensor(leaf):
            squares *= jnp.square(leaf.scale)
        return jnp.maximum(jnp.sqrt(jnp.mean(squares)), floor)

    return LeafEpsilon(f"relative_epsilon({value})", value, unit)


def step_epsilon(
    value: float | jax.Array | Callable[[jax.Array], jax.Array],
) -> LeafEpsilon:
    r"""An epsilon in steps of each leaf's weight grid.

    .. math:: ε_l = ε Δ_{w,l}, \quad ε_q = \lfloor ε \rceil

    Args:
      value: ε in weight steps, above 1/2, or an optax schedule of it.

    Returns:
      A `LeafEpsilon`, for trees of `QTensor` leaves: a float has no step.

    Raises:
      ValueError: if the value is not positive.

    Example:
      >>> q = fixed_point.quantize(jnp.array([1.0]), bits=8, headroom=1.0)
      >>> round(127 * float(step_epsilon(4).unit(q)))
      1
    """
    _check_positive("step_epsilon", value)

    def unit(leaf: Any) -> jax.Array:
        if not is_qtensor(leaf):
            raise TypeError(
                "step_epsilon is in steps of a weight grid, and a leaf of dtype "
                f"{jnp.result_type(leaf)} has none. Quantize it with fgrad.quantize, "
                "exclude it with mask=, or use fgrad.relative_epsilon."
            )
        return leaf.scale

    return LeafEpsilon(f"step_epsilon({value})", value, unit)


class Guidance(NamedTuple):
    """A direction that z is drawn around: ``z = noise * n + pull * d``.

    Attributes:
      directions: int8 d_q of each trained leaf, by ``keystr`` of its path, in steps of
        `GUIDED_STEP`.
      noise: float32 scalar, the share of fresh noise n.
      pull: float32 scalar, the share of d.
    """

    directions: Mapping[str, jax.Array]
    noise: jax.Array
    pull: jax.Array

    def mix(self, n: jax.Array, d: jax.Array, step: float) -> jax.Array:
        """z_q of noise n_q on a grid of ``step`` and d_q, in integers of 32 bits."""
        unit = 2**10
        noise = jnp.round(unit * step / GUIDED_STEP * self.noise).astype(jnp.int32)
        pull = jnp.round(unit * self.pull).astype(jnp.int32)
        total = noise * n.astype(jnp.int32) + pull * d.astype(jnp.int32)
        return jnp.clip((total + unit // 2) >> 10, -127, 127).astype(jnp.int8)


# Δ_z of guided perturbations, whatever that of their noise.
GUIDED_STEP = 2.0**-5


@dataclasses.dataclass(frozen=True)
class Policy:
    """How the leaves of a tree are perturbed in one step.

    Attributes:
      perturbation: where z comes from.
      epsilon: ε in units of the weights, or in those of ``unit``; may be traced.
      unit: that of a `LeafEpsilon`, or None.
      density: for the leaves of few bits, or None to treat them as any other.
      guidance: a direction to draw z around, or None. Leaves of few bits take none.
    """

    perturbation: perturbations.Perturbation
    epsilon: jax.typing.ArrayLike
    unit: Callable[[Any], jax.Array] | None = None
    density: low_bit.Density | None = None
    guidance: Guidance | None = None

    def rule(self, leaf: Any, name: str = "") -> Rule:
        """The rule of a leaf; ``name`` is the ``keystr`` of its path."""
        density = self.density
        if is_qtensor(leaf) and density and leaf.bits < density.options.below:
            return GridRule(leaf, low_bit.WORDS, density)
        unit = jnp.float32(1) if self.unit is None else self.unit(leaf)
        epsilon = jnp.asarray(self.epsilon * unit)
        if isinstance(self.perturbation, perturbations.LowRank):
            return LowRankRule(leaf, self.perturbation, epsilon, unit)
        guided = None
        if self.guidance is not None and name:
            guided = (self.guidance, self.guidance.directions[name])
        kind = FixedPointRule if is_qtensor(leaf) else FloatRule
        return kind(leaf, self.perturbation, epsilon, unit, guided)


def policy_at(
    step: jax.typing.ArrayLike,
    epsilon: Epsilon,
    perturbation: perturbations.Perturbation | None = None,
    low_bit: OnGrid | None = None,
    *,
    num_perturbations: int = 1,
    guidance: Guidance | None = None,
) -> Policy:
    """The policy of a step, from the options of ``fixed_point_forward_grad``."""
    value, unit = epsilon, None
    if isinstance(epsilon, LeafEpsilon):
        value, unit = epsilon.value, epsilon.unit
    count = jnp.asarray(step)
    return Policy(
        perturbations.normal() if perturbation is None else perturbation,
        jnp.asarray(value(count) if callable(value) else value, jnp.float32),
        unit,
        None if low_bit is None else low_bit.at(count, num_perturbations),
        guidance,
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one leaf is perturbed; the base of all kinds.

    A block is a part of a leaf, ``leaf[i]`` or ``leaf[i, j]``, as in
    `perturbations.Perturbation.sample`; it may be traced.

    Attributes:
      leaf: float array or `QTensor`.
      source: where the random integers come from.
    """

    leaf: Any
    source: perturbations.Perturbation

    def z_of(self, raw: jax.Array, block: Any = None) -> jax.Array:
        """z_q of what ``source`` sampled for the leaf or a block of it."""
        return raw

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf."""
        return jnp.shape(self.leaf)

    def is_small(self) -> bool:
        """Whether the leaf is sampled and perturbed with all other small ones."""
        return self.source.is_small(self.shape)

    def sample(
        self, key: jax.Array, shape: tuple[int, ...], block: Any = None
    ) -> jax.Array:
        """z_q of the leaf or a block of that shape."""
        return self.z_of(self.source.sample(key, shape, block), block)

    def weighted_sum(self, keys: jax.Array, coefficients: jax.Array) -> jax.Array:
        """``Σᵢ cᵢ z_qᵢ`` of the leaf, one z at a time."""
        return perturbations.accumulate(
            lambda key: self.sample(key, self.shape), keys, coefficients, self.shape
        )

    def perturbed(
        self, array: jax.Array, z: jax.Array, sign: int | jax.Array, block: Any = None
    ) -> jax.Array:
        """The values of the leaf, or of a block, on one side of it."""
        raise NotImplementedError

    def gradient(self, total: jax.Array, count: int) -> jax.Array:
        """``Σᵢ cᵢ zᵢ / m`` of m = ``count``, float32, in loss per unit of weight."""
        raise NotImplementedError

    def moves(self) -> jax.Array:
        """float32 share of the weights that ε can move."""
        return jnp.float32(1)

    def of_block(self, values: jax.Array, array: jax.Array, block: Any) -> jax.Array:
        """Values in the shape of the leaf's scale, for a block like ``array``."""
        if block is None or values.ndim == 0:
            return values
        stacked = self.leaf.ndim - array.ndim
        values = jnp.broadcast_to(
            values, self.leaf.shape[:stacked] + values.shape[stacked:]
        )
        return values.reshape(-1, *values.shape[stacked:])[block]


@dataclasses.dataclass(frozen=True)
class FloatRule(Rule):
    """``w ± εz`` in floating point.

    Attributes:
      epsilon: ε of the leaf in units of the weights.
      unit: ε of the leaf for a unit of the ε that the estimator is told.
      guided: a `Guidance` and the leaf's direction, or None.
    """

    epsilon: jax.Array
    unit: jax.Array
    guided: tuple[Guidance, jax.Array] | None = None

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
        """The values of the leaf, or of a block, on one side of it."""
        amplitude = jnp.float32(self.step) * self.epsilon * sign
        return (array + amplitude * z.astype(jnp.float32)).astype(array.dtype)

    def gradient(self, total: jax.Array, count: int) -> jax.Array:
        """``Σᵢ cᵢ zᵢ / m`` of m = ``count``, float32, in loss per unit of weight."""
        gradient = total.astype(jnp.float32) * (self.step / count)
        # An integer coefficient is a sign, which knows of no unit.
        return gradient if _is_integer(total) else gradient / self.unit


@dataclasses.dataclass(frozen=True)
class FixedPointRule(FloatRule):
    """``w_q ± ε_q z_q`` by equation (6)."""

    def perturbed(
        self, array: jax.Array, z: jax.Array, sign: int | jax.Array, block: Any = None
    ) -> jax.Array:
        """The values of the leaf, or of a block, on one side of it."""
        epsilon_q = self.of_block(self.steps(), array, block)
        return fixed_point.perturb_qvalue(
            array, z, sign * epsilon_q, self.step, self.leaf.bits
        )

    def steps(self) -> jax.Array:
        """``ε_q = ⌊ε/Δ_w⌉`` as int32, saturating, in the shape of the scale."""
        return _whole_steps(self.epsilon / self.leaf.scale)

    def moves(self) -> jax.Array:
        """float32 share of the weights that ε can move."""
        return jnp.mean(self.steps() > 0, dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class LowRankRule(FloatRule):
    """``base ± amplitude z_q``, with z of low rank.

    On a grid the amplitude is a whole number of steps, and the base keeps as far from
    the ends as z reaches: no sum is rounded or clipped, so it can be taken apart.
    """

    source: perturbations.LowRank

    def weighted_sum(self, keys: jax.Array, coefficients: jax.Array) -> jax.Array:
        """``Σᵢ cᵢ z_qᵢ`` of the leaf, as one product."""
        return self.source.weighted_sum(keys, coefficients, self.shape)

    def terms(
        self, array: jax.Array, sign: int | jax.Array, block: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """Base and amplitude."""
        if not is_qtensor(self.leaf):
            amplitude = jnp.float32(self.source.step) * self.epsilon * sign
            return array, jnp.asarray(amplitude, jnp.float32)
        limit, rank = fixed_point.max_qvalue(self.leaf.bits), self.source.rank
        steps = self.of_block(self.steps(), array, block)
        steps = jnp.minimum(steps, limit // rank)
        room = (limit - steps * rank).astype(array.dtype)
        return jnp.clip(array, -room, room), sign * steps

    def steps(self) -> jax.Array:
        """``⌊ε Δ_z/Δ_w⌉`` as int32: what a unit of z_q moves."""
        return _whole_steps(self.epsilon * self.source.step / self.leaf.scale)

    def perturbed(
        self, array: jax.Array, z: jax.Array, sign: int | jax.Array, block: Any = None
    ) -> jax.Array:
        """The values of the leaf, or of a block, on one side of it."""
        base, amplitude = self.terms(array, sign, block)
        return (base + amplitude * z).astype(array.dtype)

    def moves(self) -> jax.Array:
        """float32 share of the weights that ε can move."""
        if not is_qtensor(self.leaf):
            return jnp.float32(1)
        return jnp.mean(self.steps() > 0, dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class GridRule(Rule):
    """``clip(w_q ± κ z)`` with sparse integers z; see `low_bit`."""

    density: low_bit.Density

    def z_of(self, raw: jax.Array, block: Any = None) -> jax.Array:
        """Sparse steps out of random words."""
        return self.density.sample(raw, self.of_block(self.leaf.scale, raw, block))

    def perturbed(
        self, array: jax.Array, z: jax.Array, sign: int | jax.Array, block: Any = None
    ) -> jax.Array:
        """The values of the leaf, or of a block, on one side of it."""
        widening = sign * self.density.probe(self.leaf.bits)
        limit = fixed_point.max_qvalue(self.leaf.bits)
        return low_bit.perturb_qvalue(array, z, widening, limit)

    def gradient(self, total: jax.Array, count: int) -> jax.Array:
        """The gradient of which SGD makes ``Σᵢ cᵢ zᵢ`` grid steps."""
        rms = self.density.rms
        inverse = jnp.where(rms > 0, 1 / jnp.where(rms > 0, rms, 1), 0)
        return total.astype(jnp.float32) * (self.leaf.scale * inverse / count)


# ------------------------------------------------------------------ many leaves

Name = TypeVar("Name", bound=Hashable)


def factors_together(
    rules: Mapping[Name, Rule], keys: Mapping[Name, jax.Array]
) -> dict[Name, tuple[jax.Array, jax.Array]]:
    """The u and v of all leaves whose z is of low rank; see `LowRank.factors`."""
    chosen = [i for i, rule in rules.items() if isinstance(rule, LowRankRule)]
    if not chosen:
        return {}
    source: Any = rules[chosen[0]].source
    shapes = [rules[i].shape for i in chosen]
    pairs = source.factors_together(jnp.stack([keys[i] for i in chosen]), shapes)
    return dict(zip(chosen, pairs, strict=True))


def samples_together(
    rules: Mapping[Name, Rule],
    keys: Mapping[Name, jax.Array],
    factors: Mapping[Name, tuple[jax.Array, jax.Array]],
) -> dict[Name, jax.Array]:
    """z_q of many leaves, made in one loop for each source."""
    samples = {
        i: perturbations.product(*factors[i]).reshape(rule.shape)
        for i, rule in rules.items()
        if i in factors
    }
    left = {i: rule for i, rule in rules.items() if i not in factors}
    for source in dict.fromkeys(rule.source for rule in left.values()):
        chosen = [i for i, rule in left.items() if rule.source == source]
        shapes = [rules[i].shape for i in chosen]
        raw = source.sample_together(jnp.stack([keys[i] for i in chosen]), shapes)
        for i, words in zip(chosen, raw, strict=True):
            samples[i] = rules[i].z_of(words)
    return samples


def weighted_sums_together(
    rules: Mapping[Name, Rule],
    keys: Mapping[Name, jax.Array],
    coefficients: jax.Array,
) -> dict[Name, jax.Array]:
    """``Σᵢ cᵢ z_qᵢ`` of many small leaves, each with its keys [m]."""
    if not rules:
        return {}
    shapes = {i: rule.shape for i, rule in rules.items()}

    def sample(keys: jax.Array) -> jax.Array:
        key_of = dict(zip(rules, keys, strict=True))
        samples = samples_together(rules, key_of, factors_together(rules, key_of))
        flat = [samples[i].reshape(-1).astype(coefficients.dtype) for i in rules]
        return jnp.concatenate(flat)

    sizes = [math.prod(shape) for shape in shapes.values()]
    ends = dict(zip(rules, np.cumsum(sizes), strict=True))
    together = jnp.stack([keys[i] for i in rules], axis=1)
    total = perturbations.accumulate(sample, together, coefficients, (sum(sizes),))
    return {
        i: total[ends[i] - math.prod(shape) : ends[i]].reshape(shape)
        for i, shape in shapes.items()
    }


def factors_of_block(
    u: jax.Array, v: jax.Array, shape: tuple[int, ...], block: Any
) -> tuple[jax.Array, jax.Array]:
    """The factors for one block of a leaf, of one axis or more: blocks share v."""
    if block is None:
        return u, v
    rank = len(u)
    u = u.reshape(rank, -1, *shape[:-1], 1)[:, block]
    return u, v.reshape(rank, *[1] * (len(shape) - 1), shape[-1])


def product_of_block(
    u: jax.Array, v: jax.Array, shape: tuple[int, ...], block: Any
) -> jax.Array:
    """The z_q of a leaf, or of one block of it, from the factors of the leaf."""
    if block is not None and not shape:
        return perturbations.product(u, v).reshape(-1)[block]
    u, v = factors_of_block(u, v, shape, block)
    return perturbations.product(u, v).reshape(shape)


def _whole_steps(steps: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(steps), 0, 2**30).astype(jnp.int32)


def _is_integer(array: jax.Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.integer))


def _check_positive(name: str, value: Any) -> None:
    if not callable(value) and fixed_point.is_concrete(value) and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}.")
