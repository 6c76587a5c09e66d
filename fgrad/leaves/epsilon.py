"""Epsilon, the length of a perturbation: one for all leaves, or one for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fgrad._trees import is_concrete
from fgrad.fixed_point import is_qtensor

Schedule = float | jax.Array | Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class LeafEpsilon:
    """An epsilon for each leaf; see `relative_epsilon` and `step_epsilon`.

    Attributes:
      name: how it was constructed, for messages.
      value: ε in units of ``unit``, or an optax schedule of it.
      unit: ``unit(leaf)`` is a float32 scalar, or an array of the shape of the leaf's
        scale.
    """

    name: str
    value: Schedule
    unit: Callable[[Any], jax.Array]


Epsilon = Schedule | LeafEpsilon


def relative_epsilon(value: Schedule, *, floor: float = 1e-3) -> LeafEpsilon:
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
    check_positive("relative_epsilon", value)
    check_positive("the floor of relative_epsilon", floor)

    def unit(leaf: Any) -> jax.Array:
        values = leaf.qvalue if is_qtensor(leaf) else leaf
        squares = jnp.square(jnp.asarray(values, jnp.float32))
        if is_qtensor(leaf):
            squares *= jnp.square(leaf.scale)
        return jnp.maximum(jnp.sqrt(jnp.mean(squares)), floor)

    return LeafEpsilon(f"relative_epsilon({value})", value, unit)


def step_epsilon(value: Schedule) -> LeafEpsilon:
    r"""An epsilon in steps of each leaf's weight grid.

    .. math:: ε_l = ε Δ_{w,l}, \quad ε_q = \lfloor ε \rceil

    Args:
      value: ε in weight steps, above 1/2, or an optax schedule of it.

    Returns:
      A `LeafEpsilon`, for trees of `QTensor` leaves: a float has no step.

    Raises:
      ValueError: if the value is not positive.

    Example:
      >>> from fgrad import fixed_point
      >>> q = fixed_point.quantize(jnp.array([1.0]), bits=8, headroom=1.0)
      >>> round(127 * float(step_epsilon(4).unit(q)))
      1
    """
    check_positive("step_epsilon", value)

    def unit(leaf: Any) -> jax.Array:
        if not is_qtensor(leaf):
            raise TypeError(
                "step_epsilon is in steps of a weight grid, and a leaf of dtype "
                f"{jnp.result_type(leaf)} has none. Quantize it with fgrad.quantize, "
                "exclude it with mask=, or use fgrad.relative_epsilon."
            )
        return leaf.scale

    return LeafEpsilon(f"step_epsilon({value})", value, unit)


def value_of(epsilon: Epsilon) -> Schedule:
    """The number or schedule of an epsilon, in units of its leaves."""
    return epsilon.value if isinstance(epsilon, LeafEpsilon) else epsilon


def check_positive(name: str, value: Any) -> None:
    """Raises for a number that is known now and not positive."""
    if not callable(value) and is_concrete(value) and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}.")
