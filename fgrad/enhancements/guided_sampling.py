"""Momentum-guided sampling: z is drawn around the direction of the last step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fgrad import _checks
from fgrad._trees import is_concrete
from fgrad.fixed_point import is_qtensor, stored
from fgrad.leaves import Guidance, map_leaves
from fgrad.leaves.epsilon import Schedule
from fgrad.leaves.guidance import GUIDED_STEP


@dataclasses.dataclass(frozen=True)
class MomentumGuide:
    """The ``guide`` that `momentum_guided_sampling` makes.

    Attributes:
      alpha: α, or a schedule of it.
      beta: β, or a schedule of it.
    """

    alpha: Schedule
    beta: Schedule

    def init(self, params: Any, mask: Any) -> Any:
        """Directions of zeros: int8, one for each guided leaf, None for the others."""
        return map_leaves(
            lambda leaf, guided: (
                jnp.zeros_like(stored(leaf), jnp.int8) if guided else None
            ),
            mask,
            params,
        )

    def at(self, state: Any, count: jax.Array, names: Sequence[str]) -> Guidance:
        """The directions of a step, and the shares of noise and direction in its z."""
        alpha, beta = (
            jnp.asarray(x(count) if callable(x) else x, jnp.float32)
            for x in (self.alpha, self.beta)
        )
        # Before the first step there is no direction to be drawn to.
        pull = jnp.where(count > 0, 1 - beta, 0)
        noise = jnp.sqrt(beta**2 * alpha + (1 - beta) ** 2 * (1 - alpha))
        # β = 1 and α = 0 ask for neither noise nor direction, which would be z = 0.
        noise = jnp.where(noise + pull > 0, noise, 1)
        length = jnp.sqrt(noise**2 + pull**2)
        directions = dict(zip(names, jax.tree.leaves(state), strict=True))
        return Guidance(directions, noise / length, pull / length)

    def advance(self, state: Any, gradient: Any, names: Sequence[str]) -> Any:
        """The next directions: the gradient, scaled to unit mean square in each leaf.

        A leaf whose gradient is zero keeps its last direction.
        """
        leaves = jax.tree_util.tree_leaves_with_path(gradient, is_leaf=is_qtensor)
        values = {jax.tree_util.keystr(path): stored(leaf) for path, leaf in leaves}

        def direction(last: jax.Array, name: str) -> jax.Array:
            g = values[name].astype(jnp.float32)
            rms = jnp.sqrt(jnp.mean(jnp.square(g)))
            steps = jnp.round(g / jnp.where(rms > 0, rms, 1) / GUIDED_STEP)
            new = jnp.clip(steps, -127, 127).astype(jnp.int8)
            return jnp.where(rms > 0, new, last)

        directions, treedef = jax.tree.flatten(state)
        return jax.tree.unflatten(treedef, map(direction, directions, names))


def momentum_guided_sampling(
    alpha: Schedule = 0.9, beta: Schedule = 0.9
) -> MomentumGuide:
    r"""Draws z around the direction of the last step, for ``guide=``.

    .. math::
      z_1 \sim N(0, α), \quad z_2 \sim N(z_t, 1 - α), \quad
      z = β z_1 + (1 - β) z_2

    z_t is the aggregated direction ``Σᵢ cᵢ zᵢ`` of the last step, scaled to unit mean
    square in each leaf. The mixture z is scaled back to unit variance. With β = 1 there
    is no guidance. The direction takes one byte for each trained weight, and z is mixed
    in integers of 32 bits.

    Args:
      alpha: α, the variance of the undirected noise, 0 to 1, or a schedule of it.
      beta: β, the share of the undirected noise, 0 to 1, or a schedule of it.

    Returns:
      The ``guide`` of ``fixed_point_forward_grad``. Leaves of few bits that move by
      ``fgrad.on_grid`` are not guided.

    Raises:
      ValueError: if α or β is out of range.

    Example:
      >>> import optax
      >>> import fgrad
      >>> tx = optax.chain(
      ...     fgrad.fixed_point_forward_grad(
      ...         jax.random.key(0), guide=momentum_guided_sampling()
      ...     ),
      ...     optax.sgd(0.1),
      ... )
      >>> state = tx.init({"w": jnp.ones(3)})
      >>> state[0].guide["w"].dtype
      dtype('int8')

    Reference:
      Section 3.4 of Feng et al. 2024.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if callable(value):
            _checks.function(name, value, "step")
            continue
        _checks.fraction(name, value)
        if name == "beta" and is_concrete(value) and value == 0:
            raise ValueError("beta=0 draws no fresh noise; use for example 0.9.")
    return MomentumGuide(alpha, beta)
