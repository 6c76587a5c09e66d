"""Guidance: directions that z is drawn around, instead of around zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

# Δ_z of every guided perturbation, whatever the Δ_z of the noise that it is mixed of.
GUIDED_STEP = 2.0**-5


class Guidance(NamedTuple):
    """The guidance of one step: ``z = noise * n + pull * d``.

    Attributes:
      directions: int8 d_q of each guided leaf, by its name, in steps of `GUIDED_STEP`.
      noise: float32 scalar, the share of fresh noise n.
      pull: float32 scalar, the share of the direction d.
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


@runtime_checkable
class Guide(Protocol):
    """Keeps directions from step to step, for ``guide=``.

    `fgrad.enhancements.momentum_guided_sampling` is one.
    """

    def init(self, params: Any, mask: Any) -> Any:
        """The state at first, for params and a pytree that is True at guided leaves."""

    def at(self, state: Any, count: jax.Array, names: Sequence[str]) -> Guidance:
        """The guidance of step ``count``; ``names`` are those of the guided leaves."""

    def advance(self, state: Any, gradient: Any, names: Sequence[str]) -> Any:
        """The state after a step whose gradient was this."""
