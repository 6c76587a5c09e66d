"""Finds where a loss reads the stored integers of a `QTensor` as if they were values.

A `QTensor` is a pytree node, so that it passes through jit, scan and remat. What walks
over the leaves of the parameters inside a loss, such as the usual L2 penalty, therefore
meets the integers and the scale. Read as numbers they give a wrong loss in silence.

The loss is traced to a jaxpr, and each value in it gets a unit, as in physics. The
integers of a leaf and its scale have opposite units, and their product has none: that
is the value. Reshaping, slicing and the like keep a unit. A matrix product passes it on
and the scale takes it away later. Everything else needs values without a unit, and
raises a TypeError otherwise. Programs that cannot be looked into (exported ones,
kernels and foreign functions) take anything, unchecked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend import core, source_info_util

from fgrad._trees import path_str
from fgrad.fixed_point.qtensor import READ_ON_PURPOSE, is_qtensor
from fgrad.tracing import primitives

T = TypeVar("T")

# Parts of a unit: stored integers, the result of a product with them, a scale.
_INTEGERS, _PRODUCT, _SCALE = "integers", "product of integers", "scale"

# A unit says for each group of leaves which part of it a value is. A group has one
# leaf, or more after their integers were stacked. Values have the empty unit.
Unit = Mapping[frozenset[str], str]
_VALUE: Unit = {}

# Primitives whose outputs have the unit that all operands share.
_PASS_ON = {
    *("all_gather", "broadcast_in_dim", "concatenate", "copy", "copy_p"),
    *("device_put", "dynamic_slice", "dynamic_update_slice", "expand_dims", "gather"),
    *("mesh_cast", "optimization_barrier", "pad", "pbroadcast", "ppermute", "pvary"),
    *("reduce_precision", "reshape", "reshard", "rev", "scatter", "select_n"),
    *("sharding_constraint", "slice", "split", "squeeze", "stack", "stop_gradient"),
    *("tile", "transpose", "unstack"),
}
# The operands of some of them that hold numbers; the others are places.
_NUMBERS = {"gather": 1, "dynamic_slice": 1, "dynamic_update_slice": 2}
# Of these each output is like the operand in its place.
_ONE_BY_ONE = frozenset({"optimization_barrier", "device_put", "pvary"})
# Primitives that do more than to call a jaxpr, by the parameter that holds it. Its
# arguments and results are those of the equation, in their order.
_CALLED = {
    "custom_vmap_call": "call",
    "custom_partitioning": "call",
    "shard_map": "jaxpr",
}
# Programs that cannot be looked into. They get what they were made for, so whoever
# calls one with integers is taken at their word.
_OPAQUE = frozenset(
    {
        *("call_exported", "ffi_call", "io_callback", "pallas_call", "pure_callback"),
        *("triton_kernel_call", "tpu_custom_call"),
    }
)


def checked(function: Callable[..., T]) -> Callable[..., T]:
    """A function of parameters that raises where it reads integers as values.

    Args:
      function: ``function(params, *args)``, of a pytree that may have `QTensor` leaves,
        with arrays as its result. It is called once, and traced.

    Returns:
      A function that computes the same, by the same equations.

    Example:
      >>> from fgrad import quantize
      >>> params = quantize({"w": jnp.ones(3)})
      >>> penalty = lambda params: sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
      >>> checked(penalty)(params)
      Traceback (most recent call last):
      ...
      TypeError: the loss reads the stored integers of leaf 'w' as if they were ...
    """

    @functools.wraps(function, updated=())
    def of_params(params: Any, *args: Any) -> T:
        treedef: Any
        with_paths, treedef = jax.tree_util.tree_flatten_with_path(params, is_qtensor)
        leaves = [leaf for _, leaf in with_paths]
        names = [path_str(path) for path, leaf in with_paths if is_qtensor(leaf)]
        if not names:
            return function(params, *args)

        def of_quantized(quantized: Sequence[Any]) -> T:
            parts = iter(quantized)
            all_leaves = [next(parts) if is_qtensor(x) else x for x in leaves]
            return function(treedef.unflatten(all_leaves), *args)

        quantized = [leaf for leaf in leaves if is_qtensor(leaf)]
        closed, shapes = jax.make_jaxpr(of_quantized, return_shape=True)(quantized)
        units: list[Unit] = []
        for name in names:
            leaf = frozenset({name})
            units += [{leaf: _INTEGERS}, {leaf: _SCALE}]
        for unit in _outputs(closed.jaxpr, units, within=None):
            if unit:
                raise TypeError(_message(unit, "returns", None))
        # Checked: a check of a function that calls this one need not look inside.
        with jax.named_scope(READ_ON_PURPOSE):
            outputs = core.jaxpr_as_fun(closed)(*jax.tree.leaves(quantized))
        result: T = jax.tree.unflatten(jax.tree.structure(shapes), outputs)
        return result

    return of_params


def library_arithmetic() -> Any:
    """A context in which equations may read integers: they are this library's own."""
    return jax.named_scope(READ_ON_PURPOSE)


def _outputs(
    jaxpr: core.Jaxpr, inputs: Sequence[Unit], within: core.JaxprEqn | None
) -> list[Unit]:
    """The units of a jaxpr's outputs.

    Args:
      jaxpr: the jaxpr.
      inputs: units of its arguments.
      within: the equation that calls it, whose place in the source is a better one to
        name: functions of JAX are traced once, for whoever calls them first.
    """
    units: dict[Any, Unit] = dict.fromkeys(jaxpr.constvars, _VALUE)
    units.update(zip(jaxpr.invars, inputs, strict=True))

    def unit_of(x: Any) -> Unit:
        return _VALUE if isinstance(x, core.Literal) else units[x]

    for equation in jaxpr.eqns:
        operands = [unit_of(x) for x in equation.invars]
        outputs: Sequence[Unit] = [_VALUE] * len(equation.outvars)
        if any(operands) and not _is_on_purpose(equation):
            outputs = _of_equation(equation, operands, within)
        units.update(zip(equation.outvars, outputs, strict=True))
    return [unit_of(x) for x in jaxpr.outvars]


def _is_on_purpose(equation: core.JaxprEqn) -> bool:
    return READ_ON_PURPOSE in str(equation.source_info.name_stack)


def _of_equation(
    equation: core.JaxprEqn, operands: list[Unit], within: core.JaxprEqn | None
) -> Sequence[Unit]:
    """The units of an equation's outputs; raises if it needs values."""
    name = equation.primitive.name
    place = within or equation
    called = primitives.called_jaxpr(equation)
    if called is None and name in _CALLED:
        within_it = equation.params[_CALLED[name]]
        called = getattr(within_it, "jaxpr", within_it), ()
    if called is not None:
        inner = place if _is_of_jax(called[0]) else None
        return _outputs(called[0], operands, inner)
    if name in _OPAQUE:
        return [_VALUE] * len(equation.outvars)
    follow = {"scan": _scan, "while": _while, "cond": _cond}.get(name)
    if follow is not None:
        return follow(equation, operands, place)
    if name in _ONE_BY_ONE:
        return operands
    unit: Unit | None = None
    if any(operands[_NUMBERS.get(name, len(operands)) :]):
        pass  # places that are computed from integers
    elif name in _PASS_ON:
        unit = _joined(operands)
    elif name == "convert_element_type":
        unit = operands[0] if _keeps_numbers(equation) else None
    elif name == "mul":
        unit = _product(*operands)
    elif primitives.facts(equation).product:
        unit = _product(*map(_in_product, operands))
    if unit is None:
        raise TypeError(_message(_any(operands), name, place))
    return [unit] * len(equation.outvars)


# ------------------------------------------------------------------------------ units


def _any(units: Sequence[Unit]) -> Unit:
    """The first unit that is one, integers before scales."""
    given = [unit for unit in units if unit]
    return next((u for u in given if _SCALE not in u.values()), given[0])


def _joined(units: Sequence[Unit]) -> Unit | None:
    """The unit of values put side by side; None if they do not go together."""
    joined: Unit = _VALUE
    for unit in units:
        if not joined or not unit or unit == joined:
            joined = joined or unit
        elif len(unit) == len(joined) == 1 and set(unit.values()) == set(
            joined.values()
        ):
            (part,) = unit.values()
            joined = {frozenset().union(*unit, *joined): part}
        else:
            return None
    return joined


def _product(x: Unit, y: Unit) -> Unit | None:
    """The unit of a product; None if it is one of numbers that are no values."""
    found = {**x, **y}
    for leaves in x.keys() & y.keys():
        parts = {x[leaves], y[leaves]}
        if len(parts) == 1 or _SCALE not in parts:
            return None
        del found[leaves]
    # Integers that only a scale may multiply: what multiplies all leaves of a tree by
    # a number would reach the scale as well, and the value twice.
    return None if _INTEGERS in found.values() else found


def _in_product(unit: Unit) -> Unit:
    """The unit of an operand of a matrix product."""
    return {
        leaves: _PRODUCT if part == _INTEGERS else part for leaves, part in unit.items()
    }


def _keeps_numbers(equation: core.JaxprEqn) -> bool:
    """Whether a conversion is to floats, or to integers that are as wide."""
    source: Any = equation.invars[0].aval
    target = equation.params["new_dtype"]
    if jnp.issubdtype(target, jnp.floating):
        return True
    return bool(
        jnp.issubdtype(target, jnp.signedinteger)
        and jnp.issubdtype(source.dtype, jnp.signedinteger)
        and jnp.iinfo(target).bits >= jnp.iinfo(source.dtype).bits
    )


# ----------------------------------------------------------------------- control flow


def _loop(
    body: core.ClosedJaxpr,
    consts: Sequence[Unit],
    carry: Sequence[Unit],
    xs: Sequence[Unit],
    place: core.JaxprEqn,
) -> list[Unit]:
    """The units of what a loop carries and of what it stacks, once they settle."""
    carry = list(carry)
    while True:
        outputs = _outputs(body.jaxpr, [*consts, *carry, *xs], None)
        after = [
            _together(pair, place)
            for pair in zip(carry, outputs[: len(carry)], strict=True)
        ]
        if after == carry:
            return [*after, *outputs[len(carry) :]]
        carry = after


def _scan(
    equation: core.JaxprEqn, operands: list[Unit], place: core.JaxprEqn
) -> list[Unit]:
    at, count = primitives.scan_sizes(equation.params)
    return _loop(
        equation.params["jaxpr"],
        operands[:at],
        operands[at : at + count],
        operands[at + count :],
        place,
    )


def _while(
    equation: core.JaxprEqn, operands: list[Unit], place: core.JaxprEqn
) -> list[Unit]:
    body_at = equation.params["cond_nconsts"]
    carry_at = body_at + equation.params["body_nconsts"]
    carry = _loop(
        equation.params["body_jaxpr"],
        operands[body_at:carry_at],
        operands[carry_at:],
        [],
        place,
    )
    test = equation.params["cond_jaxpr"].jaxpr
    for unit in _outputs(test, [*operands[:body_at], *carry], None):
        if unit:
            raise TypeError(_message(unit, "while", place))
    return carry


def _cond(
    equation: core.JaxprEqn, operands: list[Unit], place: core.JaxprEqn
) -> list[Unit]:
    index, *inputs = operands
    if index:
        raise TypeError(_message(index, "cond", place))
    branches = [
        _outputs(branch.jaxpr, inputs, None) for branch in equation.params["branches"]
    ]
    return [_together(outputs, place) for outputs in zip(*branches, strict=True)]


def _together(units: Sequence[Unit], place: core.JaxprEqn) -> Unit:
    unit = _joined(units)
    if unit is None:
        raise TypeError(_message(_any(units), place.primitive.name, place))
    return unit


# --------------------------------------------------------------------------- messages


def _is_of_jax(jaxpr: core.Jaxpr) -> bool:
    """Whether a jaxpr was traced from a function of JAX, such as ``jnp.clip``."""
    source = jaxpr.debug_info.func_src_info if jaxpr.debug_info is not None else None
    return source is None or "/jax/_src/" in source.replace("\\", "/")


def _message(unit: Unit, primitive: str, equation: core.JaxprEqn | None) -> str:
    leaves, part = next(iter(unit.items()))
    what = "scale" if part == _SCALE else "stored integers"
    plural = "it were the value" if part == _SCALE else "they were its values"
    how = "as its result" if equation is None else f"in the operation {primitive!r}"
    where = ""
    if equation is not None:
        where = f", at {source_info_util.summarize(equation.source_info)}"
    named = " and ".join(map(repr, sorted(leaves)))
    leaf = "leaf" if len(leaves) == 1 else "leaves"
    return (
        f"the loss reads the {what} of {leaf} {named} as if {plural}: {how}{where}. "
        "What walks over the leaves of params meets the parts of a QTensor; give it "
        "fgrad.dequantize(params), or map over whole tensors with jax.tree.map(..., "
        "is_leaf=fgrad.fixed_point.is_qtensor). To read the integers on purpose use "
        "fgrad.fixed_point.integers_of and scale_of."
    )
