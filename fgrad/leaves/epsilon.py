"""Epsilon, the length of a perturbation: one for all leaves, or one for each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fgrad import _checks
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
    check("relative_epsilon", value)
    _checks.positive("the floor of relative_epsilon", floor)

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
    check("step_epsilon", value)

    def unit(leaf: Any) -> jax.Array:
        if not is_qtensor(leaf):
            raise TypeError(
                "step_epsilon is in steps of a weight grid, and a leaf of dtype "
                f"{jnp.result_type(leaf)} has none. Quantize it with fgrad.quantize, "
                "exclude it with mask=, or use fgrad.relative_epsilon."
            )
        scale: jax.Array = leaf.scale
        return scale

    return LeafEpsilon(f"step_epsilon({value})", value, unit)


def value_of(epsilon: Epsilon) -> Schedule:
    """The number or schedule of an epsilon, in units of its leaves."""
    return epsilon.value if isinstance(epsilon, LeafEpsilon) else epsilon


def check(name: str, value: Any) -> None:
    """Raises unless the value is a positive finite number or a schedule of such.

    A traced number is taken as it is: its value is not known yet. A schedule may be
    zero, and is looked at every few steps.
    """
    if callable(value):
        _values(name, value, np.unique(np.geomspace(1, 2**20, 64).astype(int)) - 1)
        return
    _checks.positive(name, value, or_else=" or a schedule of it")


def peak_of(name: str, schedule: Callable[[jax.Array], jax.Array]) -> float | jax.Array:
    """The largest value of a schedule, as far as 2**24 steps.

    Every one of the first 2048 steps is looked at, then 64 in each octave, and at last
    the steps around the largest value that was found. A schedule of traced numbers has
    a traced peak, which is not checked.

    Args:
      name: what the schedule is of, for messages.
      schedule: from a step, int32, to a number.

    Raises:
      ValueError: if a value is NaN, infinite or negative, or none is positive.

    Example:
      >>> import optax
      >>> warm_up = optax.warmup_cosine_decay_schedule(0.0, 0.5, 3000, 10000)
      >>> peak_of("learning_rate", warm_up)
      0.5
    """
    early = np.arange(2048)
    late = np.unique(np.geomspace(2048, 2**24, 13 * 64).astype(int))
    steps = np.concatenate([early, late[1:]])
    values = _values(name, schedule, steps)
    if not is_concrete(values):  # the schedule is made inside a jitted function
        return jnp.max(values)
    for _ in range(2):
        best = int(np.argmax(values))
        low, high = steps[max(best - 1, 0)], steps[min(best + 1, len(steps) - 1)]
        steps = np.unique(np.linspace(low, high, 512).astype(int))
        values = _values(name, schedule, steps)
    if not values.max() > 0:
        raise ValueError(f"{name} is a schedule that is never positive.")
    return float(values.max())


def at(name: str, value: Schedule, count: jax.Array) -> jax.Array:
    """A number or a schedule at a step, as a float32 scalar.

    Raises:
      TypeError: if it is not a number.
    """
    now = value(count) if callable(value) else value
    if callable(value):
        _checks.number(
            f"{name}, a schedule, at a step", now, "a number", lambda x: True
        )
    number: jax.Array = jnp.asarray(now, jnp.float32)
    return number


def _values(name: str, schedule: Any, steps: np.ndarray) -> Any:
    """The values of a schedule at some steps; traced if the schedule is.

    Raises:
      TypeError: for a schedule that is not called with a step or gives no numbers.
      ValueError: for NaN, an infinite or a negative value.
    """
    _checks.function(name, schedule, "step")
    with jax.ensure_compile_time_eval():
        values = jax.vmap(functools.partial(at, name, schedule))(
            jnp.asarray(steps, jnp.int32)
        )
        if not is_concrete(values):
            return values
        values = np.asarray(values)
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        at_step = int(np.argmax(wrong))
        raise ValueError(
            f"{name} is a schedule that gives {values[at_step]} at step "
            f"{steps[at_step]}; it must be finite and not negative."
        )
    return values
