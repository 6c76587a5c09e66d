"""What a step of joint pairs finds at one activation, in parts of the batch if asked.

A part is a block of examples. All that is taken from an activation is a sum over
examples: the gradients of the weights, and what the mean Jacobian learns. In parts,
little more than the activation itself is in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fgrad.activity import layer_gradients, mean_jacobians
from fgrad.activity.joint_sites import JointSite
from fgrad.activity.site_gradients import per_example, wide
from fgrad.tracing import derivatives, execution_order
from fgrad.tracing.graph import Graph, Node

Correction = float | Literal["auto"]


class Sums(NamedTuple):
    """Sums over examples at one activation.

    Attributes:
      gradients: of the leaves by their path, in units of what each leaf stores.
      errors: the same of s r, what the pairs say beyond the prediction. None without a
        correction, one for a constant one, two for "auto": of the examples of even and
        of odd number.
      evidence: Σ s δᵀ r, the mean over positions; the shape of the mean Jacobian.
      squares: the sum of the squared activation, of which s is the rms.
      open: how many units have a nonlinearity that is not flat.
    """

    gradients: dict[str, jax.Array]
    errors: tuple[dict[str, jax.Array], ...]
    evidence: jax.Array
    squares: jax.Array
    open: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A block of examples at one activation.

    Attributes:
      program: the losses, traced for so many examples.
      sites: in that trace.
      site: one of them.
      values: what `nodes_of` read, by number.
      signal: δ [examples, outputs].
      at_target: the gradient of each example's loss by the site's target, where
        feedback is not learned; for "stream" by the activation itself.
      unexplained: x [K, examples], see `fgrad.activity.joint_step`.
      jacobian: the mean Jacobian.
      even: [examples], 1 for those of even number in the whole batch, 0 for others.
      examples: how many there are in the whole batch.
      shared: gradients inside blocks that were found for another site of these
        examples, by their target and the number of the activation.
    """

    program: Graph
    sites: Sequence[JointSite]
    site: JointSite
    values: Mapping[int, Any]
    signal: jax.Array
    at_target: jax.Array
    unexplained: jax.Array
    jacobian: jax.Array
    even: jax.Array
    examples: int
    shared: dict[int, dict[int, jax.Array]]

    def sums(
        self,
        directions: Callable[[jax.Array], jax.Array],
        asked: jax.Array,
        correction: Correction,
    ) -> Sums:
        """The sums over these examples.

        Args:
          directions: ``directions(k)`` is u_k at the activation.
          asked: whether this step perturbs.
          correction: the weight of r in the gradient, or "auto".
        """
        gradients = self._of_leaves(self._predicted())
        if self.site.feedback != "learned":
            nothing = jnp.zeros(self.jacobian.shape), jnp.zeros(()), jnp.zeros(())
            return Sums(gradients, (), *nothing)

        def lessons() -> Sums:
            residual = self._residual(directions)
            errors = tuple(map(self._of_leaves, self._split(residual, correction)))
            evidence = mean_jacobians.evidence(self.jacobian, self.signal, residual)
            open_units = jnp.sum(self._slope() != 0, dtype=jnp.float32)
            return Sums({}, errors, evidence, self._squares(), open_units)

        nothing = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lessons)
        )
        found: Sums = jax.lax.cond(asked, lessons, lambda: nothing)
        return Sums(gradients, *found[1:])

    def told(self, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the prediction says of a direction, and the squares of the activation.

        Args:
          u: direction at the activation.

        Returns:
          The predicted derivative of each example's loss along u where the gate is
          open, [examples]; and the sum over all squares.
        """
        gated = jnp.where(self._slope() != 0, self._predicted(), 0) * u
        return jnp.sum(gated, tuple(range(1, gated.ndim))), self._squares()

    def _slope(self) -> jax.Array:
        return self.site.slope(self.values)

    def _squares(self) -> jax.Array:
        value = self.values[self.site.activation]
        return jnp.sum(jnp.square(value.astype(wide(value))))

    def _predicted(self) -> jax.Array:
        """The predicted gradient of each example's loss by the activation."""
        site = self.site
        if site.feedback == "learned":
            shape = self.program.avals[site.activation].shape
            return mean_jacobians.predicted(self.jacobian, self.signal, shape)
        if site.feedback == "stream":
            return self.at_target
        # Those with the same target in one go: their ways back have much in common.
        found = self.shared.get(site.target)
        if found is None:
            inside = [s.activation for s in self.sites if s.target == site.target]
            gradients = transposed(
                self.program, inside, site.target, self._late(inside), self.at_target
            )
            found = dict(zip(inside, gradients, strict=True))
            self.shared[site.target] = found
        return found[site.activation]

    def _late(self, starts: Sequence[int]) -> Mapping[int, Any]:
        """The values, in a part of the batch with weights that are read late.

        Products are transposed by copies of their weights. Those of all layers would be
        made in advance, and all at once.
        """
        if len(self.signal) == self.examples:
            return self.values
        values, data = dict(self.values), self.program.depending(starts)
        for node in derivatives.between(self.program, starts, self.site.target):
            weights = [v for v in node.values if v not in data]
            for number in weights if node.facts.product else []:
                array = values[number]
                values[number] = execution_order.delayed(array, self.at_target)
        return values

    def _of_leaves(self, gradient: jax.Array) -> dict[str, jax.Array]:
        """The leaves' gradients by the mean loss, from each example's own gradient."""
        dy = gradient * self._slope() / self.examples
        values = dict(self.values)
        return {
            path: layer_gradients.gradient(self.program, layer, values, dy)
            for path, layer in self.site.layers.items()
        }

    def _residual(self, directions: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """S r, the mean over the directions."""
        value = self.values[self.site.activation]
        is_open = self._slope() != 0
        count = len(self.unexplained)

        def add(total: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            u = jnp.where(is_open, directions(index).astype(total.dtype), 0)
            return total + per_example(self.unexplained[index], u) * u, None

        total = jnp.zeros(value.shape, wide(value))
        if count == 1:  # no loop, so that nothing of it has to be stored
            total, _ = add(total, jnp.int32(0))
        else:
            total, _ = jax.lax.scan(add, total, jnp.arange(count))
        return total / count

    def _split(self, residual: jax.Array, correction: Correction) -> list[jax.Array]:
        """What a correction needs of r: nothing, all, or two kinds of examples."""
        if correction == 0:
            return []
        if correction != "auto":
            return [residual]
        halves = (self.even, 1 - self.even)
        return [residual * per_example(half, residual) for half in halves]


def nodes_of(program: Graph, site: JointSite) -> list[Node]:
    """The equations whose operands and results the gradient at a site reads.

    Args:
      program: the losses.
      site: one of its activations.
    """
    nodes = [node for layer in site.layers.values() for node in layer.nodes]
    nodes += [] if site.nonlinearity is None else site.nonlinearity.nodes
    if site.target >= 0:
        nodes += derivatives.between(program, [site.activation], site.target)
    return nodes


def transposed(
    program: Graph,
    starts: Sequence[int],
    end: int,
    values: Mapping[int, Any],
    gradient: jax.Array,
) -> list[jax.Array]:
    """See `derivatives.transposed`; what has no closed form is told with a way out."""
    try:
        return derivatives.transposed(program, starts, end, values, gradient)
    except ValueError as error:
        raise ValueError(
            f"the way back from an activation of shape {program.avals[end].shape} to "
            f"those of {[program.avals[x].shape for x in starts]} is not known: "
            f"{error}. Leave out transposed_head and residual."
        ) from None
