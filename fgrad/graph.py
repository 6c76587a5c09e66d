"""A traced function as one flat list of equations.

Calls (jit, remat, custom_jvp, custom_vjp) are written out, and what no output needs is
left out. Control flow stays as it is, one equation each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core

# Equations that only call a jaxpr, by the name of the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}

# Products of an activation (operand 0) and a weight (operand 1).
PRODUCTS = (
    "dot_general",
    "conv_general_dilated",
    "integer_dot_general",
    "integer_conv",
)


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

    def evaluate(self, arrays: Sequence[Any]) -> Sequence[Any]:
        """The outputs for these operands."""
        primitive = self.equation.primitive
        parameters = primitive.get_bind_params(self.equation.params)
        # The settings under which it was traced, such as matmul precision.
        with self.equation.ctx.manager:
            outputs = primitive.bind(*arrays, **parameters)
        return outputs if primitive.multiple_results else [outputs]


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
    closed = jax.make_jaxpr(function)(*arguments)
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
            name = equation.primitive.name
            if name in CALLS and CALLS[name] in equation.params:
                called = equation.params[CALLS[name]]
                outputs = inline(  # remat has an open jaxpr
                    getattr(called, "jaxpr", called),
                    getattr(called, "consts", ()),
                    operands,
                )
            else:
                numbers = tuple(number(v.aval) for v in equation.outvars)
                outputs = numbers
                graph.nodes.append(Node(equation, tuple(operands), numbers))
            names.update(zip(equation.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    graph.inputs = [number(v.aval) for v in closed.jaxpr.invars]
    graph.outputs = inline(closed.jaxpr, closed.consts, graph.inputs)
    effects = (x for n in graph.nodes if n.equation.effects for x in n.inputs)
    live = {id(node) for node in graph.needed([*graph.outputs, *effects])}
    graph.nodes = [n for n in graph.nodes if id(n) in live or n.equation.effects]
    return graph


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


def operands(node: Node, values: Mapping[int, Any]) -> list[Any]:
    """The arrays that a node computes from."""
    return [x.value if isinstance(x, Literal) else values[x] for x in node.inputs]


def scan_sizes(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried.

    Those come first, in this order; what is scanned over follows.

    Args:
      params: of its equation.
    """
    if "ft_in" in params:  # JAX 0.12
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def multiply_adds(nodes: Iterable[Node]) -> float:
    """Multiply-adds of all products, those of loops and branches included."""
    return sum(_multiply_adds(node.equation) for node in nodes)


def _multiply_adds(equation: core.JaxprEqn) -> float:
    if equation.primitive.name in PRODUCTS:
        weight: Any = equation.invars[1].aval
        numbers = equation.params["dimension_numbers"]
        if isinstance(numbers, lax.ConvDimensionNumbers):
            outputs = weight.shape[numbers.rhs_spec[0]]
        else:
            contracted = (weight.shape[axis] for axis in numbers[0][1])
            outputs = weight.size // max(1, math.prod(contracted))
        out: Any = equation.outvars[0].aval
        return out.size * (weight.size / max(1, outputs))
    if equation.primitive.name == "cond":
        branches = equation.params["branches"]
        return max(sum(map(_multiply_adds, branch.jaxpr.eqns)) for branch in branches)
    inner = (
        getattr(parameter, "jaxpr", parameter) for parameter in equation.params.values()
    )
    once = sum(
        sum(map(_multiply_adds, jaxpr.eqns))
        for jaxpr in inner
        if isinstance(jaxpr, core.Jaxpr)
    )
    return once * equation.params.get("length", 1)
