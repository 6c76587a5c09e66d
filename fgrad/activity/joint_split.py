"""A batch taken in parts: what is computed again for each part, and from what.

The gradients at some activations need few values of a whole evaluation: what the layers
read. All else is computed again for one part of the examples after the other, so that
only a part of it is ever in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from fgrad.activity.example_losses import ExampleLosses
from fgrad.activity.joint_sites import JointSite
from fgrad.tracing import graph
from fgrad.tracing.graph import Graph, Node


class Region(NamedTuple):
    """Equations that are computed for a part of the examples.

    Attributes:
      nodes: in the trace of a part, in order.
      sources: numbers of the values that they start from.
    """

    nodes: tuple[Node, ...]
    sources: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The losses of a part of the examples, whose trace has the values of the whole.

    Attributes:
      losses: traced for one part.
      sites: in this trace.
      count: how many parts there are; with one the part is the whole.
      whole: the trace of all examples.
    """

    losses: ExampleLosses
    sites: Sequence[JointSite]
    count: int
    whole: Graph

    def fits(self, nodes: Iterable[Node]) -> bool:
        """Whether each value is a part of the whole one, or the same in both.

        Args:
          nodes: equations, in the trace of a part, that parts are to go through. They
            must not move values from one example to another.
        """
        own, whole = self.losses.program, self.whole
        names = [[node.name for node in p.nodes] for p in (own, whole)]
        same = names[0] == names[1] and len(own.avals) == len(whole.avals)
        return (
            same
            and all(
                a.shape == b.shape or self._is_part(a.shape, b.shape)
                for a, b in zip(own.avals, whole.avals, strict=True)
            )
            and not any(self._mixes(node) for node in nodes)
        )

    def region(self, nodes: Iterable[Node], wanted: Iterable[int]) -> Region:
        """What is computed again for a part, so that these equations can be read.

        Values that the equations start from are computed again as well, if less of the
        whole is needed then: a normalisation where the residual stream before it is
        there anyway, and the many shifted copies of an image that a depthwise
        convolution adds up.

        Args:
          nodes: equations of a part whose operands and results are read.
          wanted: numbers of other values that are read.
        """
        data = self._data
        own = {
            v: node
            for node in nodes
            for v in node.outputs
            if v in data or not self._same(v)
        }
        read = {v for node in nodes for v in (*node.values, *node.outputs)}
        sources = read.union(wanted) - set(own)
        while (less := self._less(sources, set(own))) is not None:
            sources, more = less
            own |= {v: node for node in more for v in node.outputs}
        inside = {id(node) for node in own.values()}
        ordered = [node for node in self.losses.program.nodes if id(node) in inside]
        return Region(tuple(ordered), tuple(sorted(sources)))

    def _less(
        self, sources: set[int], own: set[int]
    ) -> tuple[set[int], list[Node]] | None:
        """Sources that hold least, and the equations from them to the given ones.

        Args:
          sources: numbers of values of the whole.
          own: of values that are computed for a part anyway.

        Returns:
          What one value, as a source in the place of others, makes of them; None if no
          value saves anything.
        """
        made = [s for s in sources if s in self._data and s in self._makers]
        best, saved = None, 0
        for origin in sorted(self._origins(made) | sources & self._data, reverse=True):
            known = sources | own | {origin}
            found = {s: self._light(s, known - {s}) for s in made if s != origin}
            left_out = {s for s, nodes in found.items() if nodes}
            added = 0 if origin in sources | own else self._bytes(origin)
            less = sum(map(self._bytes, left_out)) - added
            if less > saved:
                nodes = [node for s in left_out for node in found[s]]
                fixed = {v for node in nodes for v in node.values} - self._data
                here = own.union(v for node in nodes for v in node.outputs)
                best = (sources | {origin} | fixed) - left_out - here, nodes
                saved = less
        return best

    def _origins(self, numbers: Iterable[int]) -> set[int]:
        """The values of the batch that some are made of without products."""
        wanted, found = list(numbers), set[int]()
        while wanted:
            node = self._makers.get(wanted.pop())
            if node is not None and self._is_light(node):
                new = self._data.intersection(node.values) - found
                found |= new
                wanted += new
        return found

    def values(
        self, region: Region, whole: Mapping[int, Any], index: Any
    ) -> dict[int, Any]:
        """The values of a region in one part of the examples.

        Args:
          region: from `region`.
          whole: the values that it starts from, of all examples.
          index: of the part.
        """
        return graph.evaluate(
            region.nodes,
            {
                number: whole[number]
                if self._same(number)
                else self.block(whole[number], index, 0)
                for number in region.sources
            },
        )

    def block(self, array: jax.Array, index: Any, axis: int) -> jax.Array:
        """One of the parts of an array along an axis."""
        if self.count == 1:
            return array
        size = array.shape[axis] // self.count
        return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis)

    def _light(self, number: int, known: set[int]) -> list[Node]:
        """Equations without products that a value is made by from known ones.

        Args:
          number: of the value.
          known: what they may start from, beside what does not depend on the batch.

        Returns:
          The equations; none if they start from any other value.
        """
        wanted, found = [number], dict[int, Node]()
        while wanted:
            node = self._makers.get(wanted.pop())
            if node is None or not self._is_light(node):
                return []
            if id(node) not in found:
                found[id(node)] = node
                wanted += [v for v in node.values if v in self._data - known]
        return list(found.values())

    def _is_light(self, node: Node) -> bool:
        """Whether an equation has no product, and leaves examples apart."""
        return id(node) in self._light_nodes

    @functools.cached_property
    def _light_nodes(self) -> set[int]:
        """The equations that have no product and leave examples apart, by their id."""
        facts = [(node, node.facts) for node in self.losses.program.nodes]
        return {
            id(node)
            for node, known in facts
            if (known.elementwise or known.view or known.reduction)
            or node.name in ("pad", "concatenate")
            if not (self._mixes(node) or any(map(self._same, node.outputs)))
        }

    @functools.cached_property
    def _data(self) -> set[int]:
        """The values that depend on the batch."""
        return self.losses.program.depending(self.losses.batch)

    @functools.cached_property
    def _makers(self) -> dict[int, Node]:
        """The equations by the values that they make."""
        return {v: node for node in self.losses.program.nodes for v in node.outputs}

    def _bytes(self, number: int) -> int:
        """The size of a value of all examples."""
        aval = self.whole.avals[number]
        extended = jax.dtypes.extended
        is_number = not jnp.issubdtype(aval.dtype, extended)
        return int(math.prod(aval.shape)) * (aval.dtype.itemsize if is_number else 1)

    def _same(self, number: int) -> bool:
        """Whether a value has the same shape in a part as in the whole."""
        own, whole = self.losses.program.avals[number], self.whole.avals[number]
        return bool(own.shape == whole.shape) and self.count > 1

    def _is_part(self, part: tuple[int, ...], whole: tuple[int, ...]) -> bool:
        return len(part) == len(whole) and ((self.count * part[0], *part[1:]) == whole)

    def _mixes(self, node: Node) -> bool:
        """Whether an equation moves values from one example to another."""
        avals = self.losses.program.avals
        shapes = [avals[x].shape if isinstance(x, int) else () for x in node.inputs]
        return any(
            isinstance(x, int)
            and shapes[place]
            and not self._same(x)
            and _moves(node.equation, place, shapes)
            for place, x in enumerate(node.inputs)
        )


def _moves(
    equation: core.JaxprEqn, place: int, shapes: Sequence[tuple[int, ...]]
) -> bool:
    """Whether an equation moves or combines values along an operand's first axis."""
    params, name = equation.params, equation.primitive.name
    length = shapes[place][0]
    axes = {params.get("axis"), params.get("dimension"), *params.get("axes", ())}
    if name == "rev":
        axes.update(params["dimensions"])
    if name == "dot_general":
        axes.update(params["dimension_numbers"][0][place])
    if name == "dynamic_update_slice" and place == 0:
        return shapes[1][0] != length
    untouched = {
        "slice_sizes": length,
        "window_dimensions": 1,
        "start_indices": 0,
        "limit_indices": length,
        "padding_config": (0, 0, 0),
    }
    moved = any(
        params[option][0] != value
        for option, value in untouched.items()
        if place == 0 and params.get(option)
    )
    return 0 in axes or moved
