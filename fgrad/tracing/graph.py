"""A traced function as one flat list of equations.

Calls (jit, remat, custom_jvp, custom_vjp) are written out, and what no output needs is
left out. Control flow stays as it is, one equation each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

from fgrad.tracing import primitives


@dataclasses.dataclass(frozen=True, eq=False)
class Literal:
    """A scalar that is written into an equation."""

    value: Any


Operand = int | Literal


@dataclasses.dataclass(frozen=True)
class Node:
    """An equation.

    Attributes:
      equation: what it computes.
      inputs: its operands, numbers of values or literals.
      outputs: numbers of the values that it makes.
    """

    equation: core.JaxprEqn
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return self.equation.primitive.name

    @property
    def facts(self) -> primitives.Facts:
        """What is known of the primitive."""
        return primitives.facts(self.equation)

    @property
    def values(self) -> tuple[int, ...]:
        """Those of its operands that are no literals."""
        return tuple(x for x in self.inputs if isinstance(x, int))

    def evaluate(self, arrays: Sequence[Any]) -> Sequence[Any]:
        """The outputs for these operands."""
        return primitives.bind(self.equation, arrays)


@dataclasses.dataclass
class Graph:
    """Equations in the order of their computation, on numbered values.

    Attributes:
      nodes: the equations.
      inputs: numbers of the arguments, in flat order.
      outputs: the results, in flat order.
      constants: arrays that the function closed over, by number.
      avals: shape and dtype of each value, by number.
    """

    nodes: list[Node]
    inputs: list[int]
    outputs: list[Operand]
    constants: dict[int, Any]
    avals: list[Any]

    def uses(self) -> dict[int, int]:
        """How often each value is an operand or a result."""
        counts: dict[int, int] = {}
        for operand in (
            *(x for node in self.nodes for x in node.inputs),
            *self.outputs,
        ):
            if isinstance(operand, int):
                counts[operand] = counts.get(operand, 0) + 1
        return counts

    def depending(self, values: Iterable[int]) -> set[int]:
        """The values, and all that are computed from them."""
        found = set(values)
        for node in self.nodes:
            if not found.isdisjoint(x for x in node.inputs if isinstance(x, int)):
                found.update(node.outputs)
        return found

    def needed(self, outputs: Iterable[Operand]) -> list[Node]:
        """The equations that some values are computed by."""
        needed, nodes = set(outputs), []
        for node in reversed(self.nodes):
            if not needed.isdisjoint(node.outputs):
                needed.update(x for x in node.inputs if isinstance(x, int))
                nodes.append(node)
        return nodes[::-1]

    def of_outputs(self, outputs: Sequence[Operand]) -> Graph:
        """The graph of some results alone: what these, and effects, need."""
        effects = [x for n in self.nodes if n.equation.effects for x in n.inputs]
        live = {id(node) for node in self.needed([*outputs, *effects])}
        nodes = [n for n in self.nodes if id(n) in live or n.equation.effects]
        return dataclasses.replace(self, nodes=nodes, outputs=list(outputs))


def trace(function: Callable[..., Any], *arguments: Any) -> Graph:
    """The graph of a function of pytrees of arrays.

    Args:
      function: any JAX function.
      *arguments: its arguments, pytrees of arrays.

    Returns:
      A `Graph` on the leaves of the arguments and of the result.

    Example:
      >>> import jax.numpy as jnp
      >>> graph = trace(lambda x: jax.nn.relu(x @ x), jnp.ones((2, 2)))
      >>> [node.name for node in graph.nodes]
      ['dot_general', 'max']
    """
    return of(jax.make_jaxpr(function)(*arguments))


def of(closed: core.ClosedJaxpr) -> Graph:
    """The graph of a function that was traced to a jaxpr."""
    graph = Graph([], [], [], {}, [])

    def number(aval: Any) -> int:
        graph.avals.append(aval)
        return len(graph.avals) - 1

    def inline(
        jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Operand]
    ) -> list[Operand]:
        names: dict[core.Var, Operand] = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable, array in zip(jaxpr.constvars, consts, strict=True):
            names[variable] = value = number(variable.aval)
            graph.constants[value] = array

        def read(x: Any) -> Operand:
            return Literal(x.val) if isinstance(x, core.Literal) else names[x]

        for equation in jaxpr.eqns:
            operands = [read(x) for x in equation.invars]
            outputs: Sequence[Operand]
            called = primitives.called_jaxpr(equation)
            if called is not None:
                outputs = inline(*called, operands)
            else:
                numbers = tuple(number(v.aval) for v in equation.outvars)
                outputs = numbers
                graph.nodes.append(Node(equation, tuple(operands), numbers))
            names.update(zip(equation.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    graph.inputs = [number(v.aval) for v in closed.jaxpr.invars]
    return graph.of_outputs(inline(closed.jaxpr, closed.consts, graph.inputs))


def evaluate(nodes: Iterable[Node], values: Mapping[int, Any]) -> dict[int, Any]:
    """Computes equations.

    Args:
      nodes: in order.
      values: the arrays that they start from, by number.

    Returns:
      The arrays and those computed, by number.
    """
    known = dict(values)
    for node in nodes:
        known.update(
            zip(node.outputs, node.evaluate(operands(node, known)), strict=True)
        )
    return known


class Evaluation:
    """Values of a program, computed when they are asked for.

    Attributes:
      values: those known so far, by number. What is put in the place of one is what all
        that is computed later reads.

    Example:
      >>> import jax.numpy as jnp
      >>> program = trace(lambda x: jnp.exp(2 * x), jnp.zeros(2))
      >>> evaluation = Evaluation(program, {program.inputs[0]: jnp.zeros(2)})
      >>> evaluation.find(program.outputs)
      >>> evaluation.values[program.outputs[0]]
      Array([1., 1.], dtype=float32)
    """

    def __init__(self, program: Graph, values: Mapping[int, Any]) -> None:
        self._program = program
        self.values = dict(values)

    def find(self, numbers: Iterable[int]) -> None:
        """Computes some values, and all that they are computed from, if not known."""
        wanted, nodes = set(numbers) - self.values.keys(), []
        for node in reversed(self._program.nodes):
            if not wanted.isdisjoint(node.outputs):
                wanted.update(v for v in node.values if v not in self.values)
                nodes.append(node)
        for node in reversed(nodes):
            results = node.evaluate(operands(node, self.values))
            for number, result in zip(node.outputs, results, strict=True):
                self.values.setdefault(number, result)


def operands(node: Node, values: Mapping[int, Any]) -> list[Any]:
    """The arrays that a node computes from."""
    return [x.value if isinstance(x, Literal) else values[x] for x in node.inputs]
