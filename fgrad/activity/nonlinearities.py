"""Finds the nonlinearity behind a layer: a function of each value by itself.

A unit whose nonlinearity is flat, such as a ReLU below zero, has no part in the loss.
To perturb it would only add noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fgrad.tracing import derivatives, roundings
from fgrad.tracing.graph import Graph, Literal, Node


class Nonlinearity(NamedTuple):
    """An elementwise function that is applied to a layer's output.

    Attributes:
      nodes: its equations.
      start: number of the layer's output.
      end: number of the function's value.
    """

    nodes: tuple[Node, ...]
    start: int
    end: int

    @property
    def path(self) -> tuple[str, ...]:
        """The primitives that it is made of."""
        return tuple(dict.fromkeys(node.name for node in self.nodes))

    def slope(self, values: Mapping[int, Any]) -> jax.Array:
        """Its derivative at each value, in closed form.

        Args:
          values: of an evaluation, by number.
        """
        return derivatives.slope(self.nodes, self.start, self.end, values)


def behind(program: Graph, output: int) -> Nonlinearity | None:
    """The nonlinearity that directly follows a layer.

    Equations are followed while they act on each value by itself and read nothing but
    the layer's output and constants. Of the values that hold all of the output's effect
    and are no straight line of it, as ReLU, GELU, SiLU and tanh are, it ends at the
    last.

    Args:
      program: the traced loss.
      output: number of the layer's output.

    Returns:
      A `Nonlinearity`; None if what follows is something else, such as a
      normalisation, a residual connection, a pooling, a function with a parameter of
      its own, the limits of a rounding, or one of a primitive that
      ``fgrad.tracing.derivatives`` does not list.
    """
    left = program.uses()
    varying = program.depending(program.inputs)
    shape = program.avals[output].shape
    limits = roundings.limits(program.nodes)
    reached, nodes, curved = {output}, list[Node](), False
    found: Nonlinearity | None = None
    for node in program.nodes:
        if reached.isdisjoint(x for x in node.inputs if isinstance(x, int)):
            continue
        known = all(
            isinstance(x, Literal) or x in reached or x not in varying
            for x in node.inputs
        )
        of_rounding = not limits.isdisjoint(node.outputs)
        if of_rounding or not (known and _acts_alone(program, node, shape)):
            break
        nodes.append(node)
        curved = curved or derivatives.is_curved(node, reached)
        reached.update(node.outputs)
        for x in node.inputs:
            if isinstance(x, int) and x in reached:
                left[x] -= 1
        ends = [value for value in reached if left.get(value)]
        if len(ends) == 1 and curved:
            found = Nonlinearity(tuple(nodes), output, ends[0])
    return found


def _acts_alone(program: Graph, node: Node, shape: tuple[int, ...]) -> bool:
    """Whether an equation acts on each value by itself and its derivative is known."""
    outs = [program.avals[value] for value in node.outputs]
    return (
        len(outs) == 1
        and outs[0].shape == shape
        and derivatives.has_slope(node)
        # Conditions choose between functions; a float that is rounded has no slope.
        and (not derivatives.is_flat(node) or outs[0].dtype == jnp.bool_)
    )
