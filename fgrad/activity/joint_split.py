"""A batch taken in parts: the trace of a part has the values of the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fgrad.activity import joint_parts
from fgrad.activity.example_losses import ExampleLosses
from fgrad.activity.joint_sites import JointSite
from fgrad.tracing import graph


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The losses of a part of the examples, whose trace has the values of the whole.

    Attributes:
      losses: traced for one part.
      sites: in this trace.
      count: how many parts there are.
      whole: the trace of all examples.
    """

    losses: ExampleLosses
    sites: Sequence[JointSite]
    count: int
    whole: graph.Graph

    @property
    def fits(self) -> bool:
        """Whether each value is a part of the whole one, or the same in both."""
        own, whole = self.losses.program, self.whole
        names = [[node.name for node in p.nodes] for p in (own, whole)]
        same = names[0] == names[1] and len(own.avals) == len(whole.avals)
        return same and all(
            a.shape == b.shape or self._is_part(a.shape, b.shape)
            for a, b in zip(own.avals, whole.avals, strict=True)
        )

    def _is_part(self, part: tuple[int, ...], whole: tuple[int, ...]) -> bool:
        return len(part) == len(whole) and ((self.count * part[0], *part[1:]) == whole)

    def part(
        self,
        sites: Sequence[JointSite],
        logits: int,
        values: Mapping[int, Any],
        index: Any,
    ) -> dict[int, Any]:
        """The values that the gradients at sites read, of a part of the examples.

        What acts on each value by itself, such as the addition of a bias, is computed
        again, so that the whole of it need not be there; inside a block of a residual
        stream everything is.

        Args:
          sites: some of those in the trace of a part.
          logits: number of the head's output.
          values: those known of all examples.
          index: of the part.
        """
        program = self.losses.program
        nodes = [
            node
            for site in sites
            for node in joint_parts.nodes_of(program, site, self.sites, logits)
        ]
        makers = {value: node for node in nodes for value in node.outputs}
        inside = any(site.feedback == "branch" for site in sites)
        found: dict[int, Any] = {}

        def find(number: int) -> None:
            if number in found or number not in values:
                return
            node = makers.get(number)
            if node is not None and (
                inside or node.facts.elementwise or node.facts.view
            ):
                for operand in node.values:
                    find(operand)
                if all(operand in found for operand in node.values):
                    results = node.evaluate(graph.operands(node, found))
                    found.update(zip(node.outputs, results, strict=True))
                    return
            whole = values[number]
            same = jnp.shape(whole) == program.avals[number].shape
            found[number] = whole if same else self.block(whole, index, 0)

        for node in nodes:
            for number in (*node.values, *node.outputs):
                find(number)
        for site in sites:
            find(site.output)
            find(site.activation)
        return found

    def block(self, array: jax.Array, index: Any, axis: int) -> jax.Array:
        """One of the parts of an array along an axis."""
        size = array.shape[axis] // self.count
        return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis)
