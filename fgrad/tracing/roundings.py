r"""Roundings to a grid in a traced function.

A value is put on a grid by a division, two limits and a rounding, in one order or the
other, :math:`clip(⌊x / s⌉)` or :math:`⌊clip(x / s)⌉`. The division belongs to the
rounding, not to what made x, and derivatives take the rounding for the identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fgrad.tracing.graph import Graph, Literal, Node, Operand

_SCALINGS = frozenset({"mul", "div"})
_LIMITS = frozenset({"max", "min", "clamp"})
# What leaves a number as it is, wherever it stands.
_SAME = frozenset(
    {
        *("convert_element_type", "broadcast_in_dim", "reshape", "squeeze"),
        *("expand_dims", "copy", "copy_p", "stop_gradient", "optimization_barrier"),
    }
)
# What a value passes on its way along skip connections, beside roundings.
_SKIPS = frozenset({"add", "add_any", "convert_element_type", "copy", "copy_p"})

# How often a value has been multiplied by something, by what that is: the number of a
# value, or a constant.
_Powers = Mapping[int | float, int]


def begins(program: Graph, node: Node) -> bool:
    """Whether an equation divides a value by the step of a grid, to round it.

    Args:
      program: the traced function.
      node: one of its equations.

    Example:
      >>> import jax.numpy as jnp
      >>> from fgrad.tracing import graph
      >>> def on_grid(x, s):
      ...     return jnp.clip(jnp.round(2 * x / s), -127, 127)
      >>> program = graph.trace(on_grid, jnp.ones(3), 0.1)
      >>> [node.name for node in program.nodes if begins(program, node)]
      ['div']
    """
    if node.name not in _SCALINGS:
        return False
    nodes = program.nodes[::-1]
    _, before = _with_limits(nodes, [(n.outputs, n.values) for n in nodes])
    return node.outputs[0] in before


def limits(nodes: Iterable[Node]) -> set[int]:
    """The values that come out of the limits of roundings.

    A limit of zero is none, but a ReLU.

    Args:
      nodes: equations in order, with those that the limits come from.
    """
    forth = list(nodes)
    back = forth[::-1]
    behind, _ = _with_limits(forth, [(n.values, n.outputs) for n in forth])
    before, _ = _with_limits(back, [(n.outputs, n.values) for n in back])
    return behind | before


def along_skips(program: Graph, start: int) -> set[int]:
    """The values that skip connections lead to from one, roundings on the way included.

    Behind a rounding a value is itself again when it has been multiplied by the step
    that it was divided by.

    Args:
      program: the traced function.
      start: number of the value.

    Example:
      >>> import jax.numpy as jnp
      >>> from fgrad.tracing import graph
      >>> def block(x, s, w):
      ...     rounded = jnp.round(x / s) * s
      ...     return rounded + jnp.tanh(rounded * w)
      >>> program = graph.trace(block, jnp.ones(3), 0.1, 2.0)
      >>> program.outputs[0] in along_skips(program, program.inputs[0])
      True
    """
    makers = {value: node for node in program.nodes for value in node.outputs}
    bounded = limits(program.nodes)
    reached: dict[int, _Powers] = {start: {}}
    for node in program.nodes:
        known = [reached[x] for x in node.values if x in reached]
        if not known:
            continue
        if node.name in _SCALINGS:
            powers = _scaled(makers, node, reached)
        elif node.name in _SKIPS | {"round"} or not bounded.isdisjoint(node.outputs):
            powers = min(known, key=len)
        else:
            continue
        if powers is not None:
            reached[node.outputs[0]] = powers
    return {value for value, powers in reached.items() if not powers}


def _with_limits(
    nodes: Sequence[Node], ends: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> tuple[set[int], set[int]]:
    """Follows roundings through their limits, forth or back.

    Args:
      nodes: equations in the order to follow.
      ends: for each the values that it is reached by, and those that it leads to.

    Returns:
      The values that come out of limits, and all that roundings lead to.
    """
    makers = {value: node for node in nodes for value in node.outputs}
    limited, found = set[int](), set[int]()
    for node, (here, there) in zip(nodes, ends, strict=True):
        if node.name == "round":
            found.update(there)
        elif not found.isdisjoint(here) and _is_limit(makers, node):
            found.update(there)
            limited.update(node.outputs)
    return limited, found


def _is_limit(makers: Mapping[int, Node], node: Node) -> bool:
    """Whether an equation limits a value by constants other than zero."""
    if node.name not in _LIMITS:
        return False
    constants = [_constant(makers, x) for x in node.inputs]
    known = [x for x in constants if x is not None]
    return len(known) == len(constants) - 1 and all(known)


def _constant(makers: Mapping[int, Node], operand: Operand) -> float | None:
    """The constant that an operand is, or None."""
    origin = _origin(makers, operand)
    return float(origin.value) if isinstance(origin, Literal) else None


def _origin(makers: Mapping[int, Node], operand: Operand) -> Operand:
    """What an operand is a copy of, in another place, shape or dtype."""
    while isinstance(operand, int) and operand in makers:
        node = makers[operand]
        if node.name not in _SAME:
            break
        operand = node.inputs[0]
    return operand


def _scaled(
    makers: Mapping[int, Node], node: Node, reached: Mapping[int, _Powers]
) -> _Powers | None:
    """The powers behind a product with, or a division by, what is not reached."""
    first, second = node.inputs
    power = 1
    if node.name == "div":
        power = -1
    elif second in reached:
        first, second = second, first
    if not isinstance(first, int) or first not in reached or second in reached:
        return None
    scale = _origin(makers, second)
    maker = makers.get(scale) if isinstance(scale, int) else None
    if maker and maker.name == "div" and _constant(makers, maker.inputs[0]) == 1:
        scale, power = _origin(makers, maker.inputs[1]), -power
    name = scale if isinstance(scale, int) else float(scale.value)
    powers = dict(reached[first])
    powers[name] = powers.get(name, 0) + power
    return {x: p for x, p in powers.items() if p}
