"""A deep equilibrium network: one layer, repeated until nothing changes.

Its output is the fixed point z = f(z, x), wherever a solver starts. Forward gradients
evaluate the solver and need nothing else of it. Backpropagation needs a second solve,
or an approximation of one.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# cell(params, z, x) gives the next z.
Cell = Callable[[Any, jax.Array, jax.Array], jax.Array]


def solved(
    step: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    *,
    tolerance: float,
    max_steps: int,
) -> tuple[jax.Array, jax.Array]:
    """Repeats a step until no value changes by more than a tolerance.

    An example that has not converged when the steps are used up is NaN. So is then its
    loss, and an estimator of `fgrad` leaves the pair out and counts it in its state's
    ``nonfinite_pairs``, or stops the program with ``on_nonfinite="raise"``: a loss
    from somewhere on the way would be a slope of the solver, not of the network.

    Args:
      step: from z [examples, width] to the next.
      start: the first z.
      tolerance: far below what a perturbation changes, or the solver's noise is taken
        for a slope.
      max_steps: of the solver.

    Returns:
      z [examples, width], and how many steps were taken, an int32 scalar.
    """

    def unfinished(carry: Any) -> jax.Array:
        _, change, count = carry
        return (count < max_steps) & jnp.any(change > tolerance)

    def again(carry: Any) -> Any:
        z, _, count = carry
        new = step(z)
        return new, jnp.max(jnp.abs(new - z), axis=-1), count + 1

    far = jnp.full(start.shape[:1], jnp.inf, start.dtype)
    z, change, count = jax.lax.while_loop(unfinished, again, (start, far, jnp.int32(0)))
    # A comparison with NaN is false, so that z which is not a number stays none.
    return jnp.where((change <= tolerance)[:, None], z, jnp.nan), count


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5))
def equilibrium(
    cell: Cell,
    params: Any,
    x: jax.Array,
    start: jax.Array,
    tolerance: float,
    max_steps: int,
) -> jax.Array:
    """The fixed point of a cell, whose derivative is that of the implicit function.

    Args:
      cell: from z and an input to the next z.
      params: of the cell.
      x: input [examples, ...].
      start: the first z, [examples, width]; it does not matter.
      tolerance: as in `solved`.
      max_steps: as in `solved`; for the solve of the backward pass as well.
    """
    return solved(
        lambda z: cell(params, z, x), start, tolerance=tolerance, max_steps=max_steps
    )[0]


def _forward(
    cell: Cell, params: Any, x: jax.Array, start: jax.Array, *limits: Any
) -> tuple[jax.Array, Any]:
    z = equilibrium(cell, params, x, start, *limits)
    return z, (params, x, z)


def _backward(
    cell: Cell, tolerance: float, max_steps: int, kept: Any, cotangent: jax.Array
) -> Any:
    """dL/dw = uᵀ ∂f/∂w with u = dL/dz + uᵀ ∂f/∂z, by the same repetition."""
    params, x, z = kept
    _, of_z = jax.vjp(lambda z: cell(params, z, x), z)
    _, of_rest = jax.vjp(lambda params, x: cell(params, z, x), params, x)
    # Gradients are as small as losses are: the tolerance is of their largest.
    largest = jnp.maximum(jnp.max(jnp.abs(cotangent)), 1e-30)
    u, _ = solved(
        lambda u: cotangent / largest + of_z(u)[0],
        cotangent / largest,
        tolerance=tolerance,
        max_steps=max_steps,
    )
    return (*of_rest(largest * u), jnp.zeros_like(z))


equilibrium.defvjp(_forward, _backward)


def phantom(
    cell: Cell, params: Any, x: jax.Array, z: jax.Array, steps: int, damping: float
) -> jax.Array:
    """A fixed point with the phantom gradient: that of a few damped steps at it.

    Args:
      cell: from z and an input to the next z.
      params: of the cell.
      x: input.
      z: the fixed point; nothing is derived through it.
      steps: that backpropagation unrolls.
      damping: share of a step that is taken.

    Reference:
      Geng et al., "On training implicit models", NeurIPS 2021 (arXiv 2111.05177).
    """
    z = jax.lax.stop_gradient(z)
    for _ in range(steps):
        z = damping * cell(params, z, x) + (1 - damping) * z
    return z


class Equilibrium(nn.Module):
    """z = tanh(W z + U x + b) and a linear head.

    Attributes:
      num_classes: number of logits.
      width: of z.
      contraction: the largest share of a difference that a repetition may keep. W is
        scaled down to it by a bound of its norm, so that the solver converges whatever
        training or a perturbation does. None for no bound.
      tolerance: of the solver.
      max_steps: of the solver.
      phantom_steps: steps that backpropagation unrolls at the fixed point; 0 for the
        derivative of the implicit function. Forward gradients do not care.
    """

    num_classes: int = 10
    width: int = 64
    contraction: float | None = 0.9
    tolerance: float = 1e-5
    max_steps: int = 150
    phantom_steps: int = 0

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits [batch, classes] of float images [batch, ...]."""
        x = images.reshape(len(images), -1)
        # Of spectral radius near one half, where the solver converges fast.
        small = nn.initializers.variance_scaling(0.25, "fan_in", "normal")
        lecun = nn.initializers.lecun_normal()
        params = {
            "state": self.param("state", small, (self.width, self.width)),
            "input": self.param("input", lecun, (x.shape[-1], self.width)),
            "bias": self.param("bias", nn.initializers.zeros, (self.width,)),
        }
        params = self.bounded(params)
        start = jnp.zeros((len(x), self.width), x.dtype)
        z = equilibrium(_cell, params, x, start, self.tolerance, self.max_steps)
        if self.phantom_steps:
            z = phantom(_cell, params, x, z, self.phantom_steps, damping=0.5)
        return nn.Dense(self.num_classes, name="head")(z)

    def bounded(self, params: Any) -> dict[str, Any]:
        """The parameters of the layer, with W as it is used."""
        if self.contraction is None:
            return dict(params)
        size = jnp.abs(params["state"])
        # The product of these norms bounds the square of the spectral norm.
        bound = jnp.sqrt(size.sum(axis=0).max() * size.sum(axis=1).max())
        scale = self.contraction / jnp.maximum(bound, self.contraction)
        return {**params, "state": scale * params["state"]}


def solver_steps(model: Equilibrium, params: Any, images: jax.Array) -> jax.Array:
    """How many repetitions the solver takes for a batch, an int32 scalar."""
    x = images.reshape(len(images), -1)
    start = jnp.zeros((len(x), model.width), x.dtype)
    bounded = model.bounded(params)
    _, count = solved(
        lambda z: _cell(bounded, z, x),
        start,
        tolerance=model.tolerance,
        max_steps=model.max_steps,
    )
    return count


def _cell(params: Any, z: jax.Array, x: jax.Array) -> jax.Array:
    """One repetition of the layer."""
    return jnp.tanh(z @ params["state"] + x @ params["input"] + params["bias"])
