"""What else the field has for forward passes, to compare with; nothing of it paid.

`one_sided` evaluates m points and one base, where a pair takes two for each direction.
`Cone` draws directions within a cone around the momentum of the estimates.
`configs/rivals.py` has the figures.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import fgrad
from fgrad import fixed_point, leaves, transform

_GRID = 2.0**-5  # of a guided direction, in int8
_MOMENTUM = 0.95  # of the average that a cone is around


def one_sided(
    key: jax.Array, num_perturbations: int, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    r"""The gradient of one-sided differences, divided by the losses' deviation.

    .. math:: ĝ = \frac{1}{m} \sum_i \frac{L(w + εz_i) - L(w)}{σ} z_i,
      \quad σ² = \mathrm{var}_i L(w + εz_i)

    Both sides are evaluated here and one is thrown away, so that its seconds are no
    measure: the method itself needs m + 1 passes, as which it is counted.

    Args:
      key: of the perturbations.
      num_perturbations: m.
      **settings: others of `fgrad.fixed_point_forward_grad`.

    Reference:
      FZOO, arXiv 2506.09034.
    """
    link = fgrad.fixed_point_forward_grad(
        key,
        num_perturbations=num_perturbations,
        estimator=over_deviation,
        **settings,
    )
    drawn = {name: settings[name] for name in ("epsilon", "perturbation")}

    def update(
        updates: Any,
        state: transform.ForwardGradState,
        params: Any = None,
        *,
        value_fn: Any,
        **kwargs: Any,
    ) -> tuple[Any, transform.ForwardGradState]:
        sides = fgrad.pair_losses(
            value_fn,
            params,
            state.key,
            state.count,
            num_perturbations=num_perturbations,
            kwargs=kwargs,
            **drawn,
        )
        base = jnp.broadcast_to(value_fn(params, **kwargs), sides[0].shape)
        losses = jnp.stack([sides[0], base])
        return link.update(updates, state, params, losses=losses)

    return optax.GradientTransformationExtraArgs(link.init, update)


def over_deviation(
    loss_plus: jax.Array, loss_minus: jax.Array, epsilon: Any
) -> jax.Array:
    """Differences over the standard deviation of the losses on the first side.

    Example:
      >>> over_deviation(jnp.array([1.0, 3.0]), jnp.array([2.0, 2.0]), 1e-3)
      Array([-1.,  1.], dtype=float32)
    """
    del epsilon
    deviation = jnp.std(loss_plus)
    some = deviation > 0
    differences = loss_plus - loss_minus
    return jnp.where(some, differences / jnp.where(some, deviation, 1), 0)


@dataclasses.dataclass(frozen=True)
class Cone:
    """A ``guide``: z at an angle θ to the momentum of the estimates.

    ``z = cos(θ) m̂ + sin(θ) n``, where m̂ is the momentum scaled to unit mean square in
    each leaf, and n fresh noise.

    Attributes:
      angle: θ in radians.

    Reference:
      ConMeZO, arXiv 2511.02757.
    """

    angle: float

    def init(self, params: Any, mask: Any) -> Any:
        """A momentum of zeros for each guided leaf, None for the others."""
        return leaves.map_leaves(
            lambda leaf, guided: (
                jnp.zeros(jnp.shape(leaf), jnp.float32) if guided else None
            ),
            mask,
            params,
        )

    def at(self, state: Any, count: jax.Array, names: Sequence[str]) -> leaves.Guidance:
        """The directions of a step, and the shares of noise and direction in its z."""
        pull = jnp.where(count > 0, jnp.cos(self.angle), 0.0)
        directions: Mapping[str, jax.Array] = {
            name: _unit(momentum)
            for name, momentum in zip(names, jax.tree.leaves(state), strict=True)
        }
        return leaves.Guidance(directions, jnp.sqrt(1 - pull**2), pull)

    def advance(self, state: Any, gradient: Any, names: Sequence[str]) -> Any:
        """The momentum after a step with an estimate."""
        found = jax.tree_util.tree_leaves_with_path(
            gradient, is_leaf=fixed_point.is_qtensor
        )
        values = {
            jax.tree_util.keystr(path): jnp.asarray(fixed_point.stored(leaf))
            for path, leaf in found
        }
        momenta, treedef = jax.tree.flatten(state)
        return jax.tree.unflatten(
            treedef,
            [
                _MOMENTUM * momentum + (1 - _MOMENTUM) * values[name]
                for momentum, name in zip(momenta, names, strict=True)
            ],
        )


def _unit(momentum: jax.Array) -> jax.Array:
    """int8 of unit mean square on the grid of guided directions."""
    rms = jnp.sqrt(jnp.mean(jnp.square(momentum)))
    steps = jnp.round(momentum / jnp.where(rms > 0, rms, 1) / _GRID)
    return jnp.clip(steps, -127, 127).astype(jnp.int8)


def muon(learning_rate: Any) -> optax.GradientTransformation:
    """Steps of orthogonal matrices: all singular values of a kernel's update alike.

    A convolution is the matrix [height · width · in, out]. With z of low rank this is
    what ZO-Muon does in its subspace.

    Args:
      learning_rate: or a schedule.

    Reference:
      arXiv 2602.17155; optax has the optimizer.
    """

    def shapes(params: Any) -> Any:
        return jax.tree.map(
            lambda leaf: (
                optax.contrib.MuonDimensionNumbers(
                    tuple(range(leaf.ndim - 1)), (leaf.ndim - 1,)
                )
                if leaf.ndim > 1
                else None
            ),
            params,
        )

    return optax.contrib.muon(learning_rate, muon_weight_dimension_numbers=shapes)
