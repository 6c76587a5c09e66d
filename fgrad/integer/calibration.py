"""What values a float program takes on data: the least and the largest of each.

Of what enters a product, which has 8 bits, a calibration may choose a bound below the
largest magnitude: a few outliers saturate, and all else has a finer grid.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from fgrad.tracing import graph as tracing
from fgrad.tracing.graph import Graph, Node
from fgrad.tracing.primitives import scan_sizes

PRODUCTS = ("dot_general", "conv_general_dilated")


@dataclasses.dataclass(frozen=True)
class Observed:
    """The extremes of the float values of a graph.

    Attributes:
      values: (least, largest) by the number of the value.
      bounds: of what enters products, the largest magnitude to be represented, if a
        calibration chose one.
      bodies: of the bodies of scans, over all their iterations, by the number of the
        first value that the scan makes.
    """

    values: Mapping[int, tuple[float, float]]
    bounds: Mapping[int, float]
    bodies: Mapping[int, Observed]


# The bound of the activations that enter a product, from their finite values.
Bound = Callable[[jax.Array], jax.Array]


def observe(
    graph: Graph, arguments: Sequence[Any], bound: Bound | None = None
) -> Observed:
    """Runs a graph on data and keeps the extremes of what it computes.

    Args:
      graph: of a float function.
      arguments: arrays for its inputs.
      bound: the largest magnitude to be represented of what enters a product; that of
        all values by default.

    Returns:
      The extremes of the finite values.
    """
    run = functools.partial(_run, graph, bound=bound)
    found = jax.jit(run)(list(arguments))[1]
    return _named(jax.device_get(found))


@functools.lru_cache(maxsize=256)
def body_of(node: Node) -> Graph:
    """The body of a scan as a graph on its constants, carry and slices."""
    closed = node.equation.params["jaxpr"]
    avals = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in closed.in_avals]
    return tracing.trace(core.jaxpr_as_fun(closed), *avals)


def scan_over(
    node: Node,
    body: Callable[..., tuple[list[Any], Any]],
    arrays: Sequence[Any],
    carry: Sequence[Any] | None = None,
) -> tuple[list[Any], Any]:
    """``lax.scan`` with the settings of an equation and another body.

    Args:
      node: a scan.
      body: ``body(constants, carry, slices) -> (carry, outputs)``.
      arrays: its operands.
      carry: to start from, in the place of the operands'.

    Returns:
      The last carry and the stacked outputs.
    """
    constants, carried = scan_sizes(node.equation.params)
    start = arrays[constants : constants + carried] if carry is None else carry
    return lax.scan(
        lambda state, slices: body(list(arrays[:constants]), list(state), slices),
        list(start),
        list(arrays[constants + carried :]),
        length=node.equation.params["length"],
        reverse=node.equation.params["reverse"],
    )


def _run(
    graph: Graph, arguments: Sequence[Any], bound: Bound | None
) -> tuple[list[Any], Any]:
    """The outputs, and extremes and bounds as nested dicts of arrays."""
    known: dict[int, Any] = {
        **graph.constants,
        **dict(zip(graph.inputs, arguments, strict=True)),
    }
    bodies = {}
    for node in graph.nodes:
        arrays = tracing.operands(node, known)
        outputs: Sequence[Any]
        if node.name == "scan":
            outputs, bodies[node.outputs[0]] = _run_scan(node, arrays, bound)
        else:
            outputs = node.evaluate(arrays)
        known.update(zip(node.outputs, outputs, strict=True))
    extremes = {
        number: _finite_extremes(x)
        for number, x in known.items()
        if jnp.issubdtype(jnp.result_type(x), jnp.floating) and jnp.size(x)
    }
    results = [
        x.value if isinstance(x, tracing.Literal) else known[x] for x in graph.outputs
    ]
    bounds = {}
    if bound is not None:
        multiplied = {
            x
            for node in graph.nodes
            if node.name in PRODUCTS
            for x in node.inputs
            if isinstance(x, int) and x in extremes
        }
        bounds = {number: bound(_finite(known[number])) for number in multiplied}
    return results, (extremes, bounds, bodies)


def _finite_extremes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = _finite(x)
    return jnp.min(x), jnp.max(x)


def _finite(x: jax.Array) -> jax.Array:
    """Masks put infinities beside what counts."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _run_scan(
    node: Node, arrays: Sequence[Any], bound: Bound | None
) -> tuple[list[Any], Any]:
    graph = body_of(node)
    _, carried = scan_sizes(node.equation.params)

    def body(constants: list[Any], carry: list[Any], slices: Any) -> Any:
        outputs, found = _run(graph, [*constants, *carry, *slices], bound)
        return outputs[:carried], (outputs[carried:], found)

    carry, (stacked, found) = scan_over(node, body, arrays)
    return [*carry, *stacked], _over_iterations(found)


def _over_iterations(found: Any) -> Any:
    extremes, bounds, bodies = found
    return (
        {n: (jnp.min(a), jnp.max(b)) for n, (a, b) in extremes.items()},
        {n: jnp.max(a) for n, a in bounds.items()},
        {n: _over_iterations(inner) for n, inner in bodies.items()},
    )


def _named(found: Any) -> Observed:
    extremes, bounds, bodies = found
    values = {n: (float(a), float(b)) for n, (a, b) in extremes.items()}
    chosen = {n: float(a) for n, a in bounds.items()}
    return Observed(values, chosen, {n: _named(inner) for n, inner in bodies.items()})
