"""Scans over layers, written out: one copy of the body for each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from fgrad.tracing import graph, primitives
from fgrad.tracing.graph import Node, Operand


def over_layers(program: core.ClosedJaxpr, weights: int) -> core.ClosedJaxpr:
    """The same program, in which no ``scan`` goes over weights.

    A scan over time, whose slices are data, stays as it is.

    Args:
      program: a traced function.
      weights: how many of its arguments, the first ones, are weights.

    Returns:
      A program of the same arguments and results. Of a stacked weight it reads one row
      after the other.

    Example:
      >>> def deep(w, x):  # [layers, 3, 3]
      ...     return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
      >>> program = jax.make_jaxpr(deep)(jnp.ones((2, 3, 3)), jnp.ones(3))
      >>> [node.name for node in graph.of(over_layers(program, 1)).nodes]
      ['slice', 'squeeze', 'dot_general', 'tanh',
       'slice', 'squeeze', 'dot_general', 'tanh']
    """
    whole = graph.of(program)
    of_data = whole.depending(whole.inputs[weights:])
    stacked = whole.depending(whole.inputs[:weights]) - of_data
    chosen = {id(node) for node in whole.nodes if _is_over(node, stacked)}
    if not chosen:
        return program
    makers = {v: node for node in whole.nodes for v in node.outputs if v in stacked}

    def function(*arrays: Any) -> list[Any]:
        known = {**whole.constants, **dict(zip(whole.inputs, arrays, strict=True))}
        for node in whole.nodes:
            if id(node) in chosen:
                results = _in_turn(node, known, makers)
            else:
                results = list(node.evaluate(graph.operands(node, known)))
            known.update(zip(node.outputs, results, strict=True))
        return [known[x] if isinstance(x, int) else x.value for x in whole.outputs]

    avals = [whole.avals[number] for number in whole.inputs]
    arguments = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    found: core.ClosedJaxpr = jax.make_jaxpr(function)(*arguments)
    return found


def _is_over(node: Node, stacked: set[int]) -> bool:
    """Whether an equation is a scan over some of these values."""
    if node.name != "scan" or not node.equation.params["length"]:
        return False
    before = sum(primitives.scan_sizes(node.equation.params))
    return any(x in stacked for x in node.inputs[before:])


def _in_turn(
    node: Node, known: Mapping[int, Any], makers: Mapping[int, Node]
) -> list[Any]:
    """The results of a scan, by one call of its body after the other."""
    params = node.equation.params
    consts, carried = primitives.scan_sizes(params)
    body: Callable[..., list[Any]] = core.jaxpr_as_fun(params["jaxpr"])
    operands = graph.operands(node, known)
    fixed, carry = operands[:consts], operands[consts : consts + carried]
    rows = range(params["length"])
    results: dict[int, list[Any]] = {}
    for row in reversed(rows) if params["reverse"] else rows:
        slices = [_row(x, row, known, makers) for x in node.inputs[consts + carried :]]
        found = body(*fixed, *carry, *slices)
        carry, results[row] = found[:carried], found[carried:]
    stacked = zip(*(results[row] for row in rows), strict=True)
    return [*carry, *(jnp.stack(values) for values in stacked)]


def _row(
    operand: Operand, row: int, known: Mapping[int, Any], makers: Mapping[int, Node]
) -> Any:
    """A row of a value.

    If the value is made of weights one by one, as a `QTensor` is dequantized, it is
    made of a row of these: then the layer of the row is found.
    """
    array = known[operand] if isinstance(operand, int) else operand.value
    maker = makers.get(operand) if isinstance(operand, int) else None
    if maker is not None and maker.facts.elementwise:
        parts = [
            _row(x, row, known, makers)
            if isinstance(x, int) and jnp.shape(known[x]) == jnp.shape(array)
            else part
            for x, part in zip(maker.inputs, graph.operands(maker, known), strict=True)
        ]
        if all(jnp.shape(part) in ((), jnp.shape(array)[1:]) for part in parts):
            return maker.evaluate(parts)[0]
    return lax.index_in_dim(array, row, keepdims=False)
