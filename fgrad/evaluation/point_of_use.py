"""Runs a JAX function with each parameter perturbed where it is first used.

Perturbing all parameters before the call makes a second copy of the model. Here the
function is traced to a jaxpr once, and the jaxpr is interpreted: a parameter stays as
it is until an equation combines it with data. There it is perturbed, by a z whose key
depends on the latest activation, so that no compiler can do it sooner, and the
perturbed copy is free again right after.

Calls (jit, remat, custom_jvp, custom_vjp), scan, while and cond are followed. Other
equations with a jaxpr inside (shard_map, custom_vmap, ...) get perturbed parameters.
What happens to parameters alone, such as a cast or a dequantization, waits with them,
and so does what a parameter is only placed into: the frozen weights of a sparse leaf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from fgrad.evaluation import factored_products
from fgrad.evaluation.factored_products import Factored
from fgrad.leaves.arithmetic import Side
from fgrad.tracing import execution_order, primitives

# Multiply-adds per weight from which a loop perturbs its weights in every iteration
# rather than keep a perturbed copy: then z costs little beside the product.
LOOP_WORK = 256
# Uses up to which a parameter is perturbed anew at each. Beyond, the first use's copy
# is kept: an unrolled recurrence would spend its time on z.
MAX_REPEATS = 2


class Event(NamedTuple):
    """Where a parameter was perturbed.

    Attributes:
      leaf: name of the leaf.
      way: "at use", "low rank" or "before".
      primitive: the equation that used it, or that could not be followed.
    """

    leaf: str
    way: str
    primitive: str


@dataclasses.dataclass
class Pending:
    """A parameter, or one block of it in a scan, that is not perturbed yet.

    Attributes:
      side: how the leaf is perturbed.
      array: the stored values, unperturbed.
      block: index of the block; None for all of the leaf.
      keep: whether the copy that is perturbed first serves further uses.
      kept: that copy.
    """

    side: Side
    array: jax.Array
    block: Any = None
    keep: bool = False
    kept: _Known | None = None


def trace(function: Callable[..., Any], *arguments: Any) -> core.ClosedJaxpr:
    """The jaxpr of a function of pytrees of arrays, for `run`."""
    return jax.make_jaxpr(function)(*arguments)


def run(
    program: core.ClosedJaxpr,
    values: Sequence[Pending | jax.Array],
    seed: jax.Array,
    events: list[Event] | None = None,
    *,
    together: bool = False,
) -> list[jax.Array]:
    """The function's outputs with its pending arguments perturbed.

    Args:
      program: from `trace`.
      values: its arguments in flat order.
      seed: any scalar that differs between evaluations, such as the sign. Until there
        is an activation, keys depend on it, so that a loop over evaluations cannot
        make the first z before it starts.
      events: if given, receives an `Event` for each use.
      together: whether this is traced for several z at once, which share the products
        with a weight that they perturb in a subspace of low rank.

    Returns:
      What the traced function returns, in flat order.
    """
    interpreter = _Interpreter(seed, [] if events is None else events, together)
    inputs: list[_Value] = [
        x if isinstance(x, Pending) else _constant(x) for x in values
    ]
    inputs = _with_keep(program.jaxpr, inputs)
    outputs = interpreter.run(program.jaxpr, program.consts, inputs)
    return [interpreter.force(out, "return").array for out in outputs]


def _with_keep(jaxpr: core.Jaxpr, values: Sequence[_Value]) -> list[_Value]:
    """The values as inputs of a jaxpr, in whose scope perturbed copies may be kept."""
    return [
        dataclasses.replace(x, keep=uses > MAX_REPEATS, kept=None)
        if isinstance(x, Pending)
        else x
        for x, uses in zip(values, _uses(jaxpr), strict=True)
    ]


class _Known(NamedTuple):
    """An array.

    Attributes:
      array: the value.
      constant: made of literals and unperturbed parameters only: no reason to perturb.
      active: depends on a perturbed parameter, so that a z can wait for it.
    """

    array: jax.Array
    constant: bool = False
    active: bool = False


@dataclasses.dataclass
class _Deferred:
    """An equation on parameters alone that waits for the data it is combined with.

    Attributes:
      equation: the equation.
      inputs: its operands.
      placed: an array that is no parameter is part of it: frozen weights, or data.
      outputs: its outputs, once they have been needed.
    """

    equation: core.JaxprEqn
    inputs: list[_Value]
    placed: bool = False
    outputs: list[_Known] | None = None


class _Output(NamedTuple):
    """One of the outputs of a `_Deferred` equation."""

    source: _Deferred
    position: int


_Value = _Known | Pending | _Output


def _constant(array: Any) -> _Known:
    return _Known(array, constant=True)


class _Interpreter:
    """One evaluation. ``latest`` is the activation that the next z waits for."""

    def __init__(self, seed: jax.Array, events: list[Event], together: bool) -> None:
        self.latest: jax.Array = seed
        self.events = events
        self.together = together

    def run(
        self, jaxpr: core.Jaxpr, consts: Sequence[Any], values: Sequence[_Value]
    ) -> list[_Value]:
        known = [_Known(c, constant=jnp.size(c) == 1) for c in consts]
        names: dict[core.Var, _Value] = {}
        names.update(zip(jaxpr.constvars, known, strict=True))
        names.update(zip(jaxpr.invars, values, strict=True))

        def read(variable: Any) -> _Value:
            if isinstance(variable, core.Literal):
                return _constant(variable.val)
            return names[variable]

        for equation in jaxpr.eqns:
            outputs = self.equation(equation, [read(v) for v in equation.invars])
            names.update(zip(equation.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def equation(
        self, equation: core.JaxprEqn, inputs: list[_Value]
    ) -> Sequence[_Value]:
        name = equation.primitive.name
        if _places_a_parameter(equation, inputs):
            return [_Output(_Deferred(equation, inputs, placed=True), 0)]
        if all(isinstance(x, _Known) for x in inputs):
            return self.bind(equation, inputs)
        called = primitives.called_jaxpr(equation)
        if called is not None:
            return self.run(*called, inputs)
        follow = {"scan": self.scan, "while": self.while_loop, "cond": self.cond}
        if name in follow:
            return follow[name](equation, inputs)
        placed = any(map(_is_placed, inputs))
        if placed and sum(not isinstance(x, _Known) for x in inputs) > 1:
            # It may be data that a parameter was placed into: what combines it with
            # other parameters is no work to put off.
            inputs = [self.force(x, name) if _is_placed(x) else x for x in inputs]
            return self.equation(equation, inputs)
        if not equation.effects and all(
            not isinstance(x, _Known) or x.constant for x in inputs
        ):
            source = _Deferred(equation, inputs, placed)
            return [_Output(source, i) for i in range(len(equation.outvars))]
        return self.product(equation, inputs) or self.bind(equation, inputs)

    def bind(self, equation: core.JaxprEqn, inputs: list[_Value]) -> list[_Known]:
        """Computes an equation, its parameters perturbed."""
        facts = primitives.facts(equation)
        if facts.product:
            # An integer activation is stored for its product. Waiting for it, rather
            # than for an earlier product, lets go of the latter.
            self.wait_for(_integer_activations(inputs))
        known = [self.force(x, equation.primitive.name) for x in inputs]
        outputs = primitives.bind(equation, [x.array for x in known])
        active = any(x.active for x in known)
        # Waiting for anything elementwise would keep it out of the loop that XLA makes
        # of it and its neighbours.
        if active and facts.awaited:
            self.wait_for(outputs)
        constant = not equation.effects and all(x.constant for x in known)
        return [_Known(x, constant, active) for x in outputs]

    def wait_for(self, arrays: Sequence[jax.Array]) -> list[_Known]:
        """Makes the next z wait for the first array that can be waited for."""
        self.latest = next(filter(_can_be_awaited, arrays), self.latest)
        return [_Known(x, active=True) for x in arrays]

    def not_before_latest(self, known: _Known) -> _Known:
        """An array that a parameter is placed into, to be copied no sooner.

        What is placed may be a small leaf, which is perturbed at the start, and waits
        for nothing.
        """
        array = known.array
        if _can_be_awaited(array):
            array = execution_order.delayed(array, self.latest)
        return _Known(array, active=True)

    def force(self, value: _Value, primitive: str, way: str = "at use") -> _Known:
        """Perturbs what is pending, for the equation ``primitive``."""
        if isinstance(value, _Known):
            return value
        if isinstance(value, _Output):
            source = value.source
            if source.outputs is None:
                inputs = [self.force(x, primitive, way) for x in source.inputs]
                if primitives.facts(source.equation).places is not None:
                    inputs[0] = self.not_before_latest(inputs[0])
                source.outputs = self.bind(source.equation, list(inputs))
            return source.outputs[value.position]
        if value.kept is not None:
            return value.kept
        self.events.append(Event(value.side.name, way, primitive))
        array = value.side.dense(value.array, value.block, self.latest)
        known = _Known(array, active=True)
        if value.keep:
            value.kept = known
        return known

    def product(
        self, equation: core.JaxprEqn, inputs: list[_Value]
    ) -> list[_Known] | None:
        """A product with a weight of low rank, as base product plus correction."""
        product = factored_products.PRODUCTS.get(equation.primitive.name)
        if product is None or isinstance(inputs[0], _Known) == isinstance(
            inputs[1], _Known
        ):
            return None
        operands: list[Any] = [
            x.array if isinstance(x, _Known) else self.factored(x) for x in inputs
        ]
        if any(x is None for x in operands):
            return None
        with primitives.settings(equation):
            output = product(*operands, equation=equation)
        if output is None:
            return None
        for value in inputs:
            self.events.extend(
                Event(leaf, "low rank", equation.primitive.name)
                for leaf in _leaves(value)
            )
        return self.wait_for([output])

    def factored(self, value: _Value) -> Factored | None:
        """A pending weight as its base and factors, through casts and the like."""
        if isinstance(value, Pending):
            if value.kept is not None:
                return None
            # No need to wait: the base product waits for its activation anyway.
            parts = value.side.factored(value.array, value.block)
            return None if parts is None else Factored(*parts)
        if isinstance(value, _Output):
            equation = value.source.equation
            view = factored_products.VIEWS.get(equation.primitive.name)
            if view is None:
                return None
            operands: list[Any] = [
                x.array if isinstance(x, _Known) else self.factored(x)
                for x in value.source.inputs
            ]
            if any(x is None for x in operands):
                return None
            return view(*operands, equation=equation)
        return None

    # ------------------------------------------------------------- control flow

    def enter(self, value: _Value, inside: bool, primitive: str) -> _Value:
        """What a loop or a branch gets: known values, or a weight to perturb inside."""
        if isinstance(value, Pending) and value.kept is None and inside:
            return value
        return self.force(value, primitive, way="before")

    def enter_loop(
        self, values: Sequence[_Value], jaxpr: core.Jaxpr, primitive: str
    ) -> list[_Value]:
        """The first inputs of the jaxpr of a loop, those that it does not change.

        Evaluations that run together would multiply by a perturbed weight each. Their
        products with the unperturbed weight are one.
        """
        entered = []
        for i, (value, work) in enumerate(zip(values, _work(jaxpr), strict=False)):
            inside = work >= LOOP_WORK or (
                self.together
                and isinstance(value, Pending)
                and _only_in_dots(jaxpr, i)
                and self.factored(value) is not None
            )
            entered.append(self.enter(value, inside, primitive))
        return entered

    def body(
        self, closed: core.ClosedJaxpr, values: Sequence[_Value], primitive: str
    ) -> list[jax.Array]:
        """Runs the jaxpr of a loop or branch, whose values belong to that scope."""
        outer = self.latest
        inner = _with_keep(closed.jaxpr, values)
        self.wait_for([x.array for x in inner if isinstance(x, _Known) and x.active])
        outputs = self.run(closed.jaxpr, closed.consts, inner)
        arrays = [self.force(x, primitive).array for x in outputs]
        self.latest = outer
        return arrays

    def scan(self, equation: core.JaxprEqn, inputs: list[_Value]) -> list[_Known]:
        params = equation.params
        closed, length = params["jaxpr"], params["length"]
        carry_at, num_carry = primitives.scan_sizes(params)
        xs_at = carry_at + num_carry
        shared = self.enter_loop(inputs[:carry_at], closed.jaxpr, "scan")
        carry = [self.force(x, "scan", "before").array for x in inputs[carry_at:xs_at]]
        # A block of a vector is a scalar, too little to have an axis of its own.
        sliced = [
            self.enter(x, isinstance(x, Pending) and x.array.ndim > 1, "scan")
            for x in inputs[xs_at:]
        ]

        def step(carry: Any, xs: Any) -> Any:
            index, *slices = xs
            values = [*shared, *(_Known(c, active=True) for c in carry)]
            for value, array in zip(sliced, slices, strict=True):
                if isinstance(value, Pending):
                    block = index + (0 if value.block is None else value.block * length)
                    values.append(Pending(value.side, array, block))
                else:
                    assert isinstance(value, _Known)
                    values.append(_Known(array, active=value.active))
            outputs = self.body(closed, values, "scan")
            return outputs[: len(carry)], outputs[len(carry) :]

        with primitives.settings(equation):
            index = jnp.arange(length, dtype=jnp.uint32)
            carry, stacked = lax.scan(
                step,
                carry,
                (index, *(x.array for x in sliced)),  # type: ignore[union-attr]
                length,
                reverse=params["reverse"],
                unroll=params["unroll"],
            )
        return self.wait_for([*carry, *stacked])

    def while_loop(self, equation: core.JaxprEqn, inputs: list[_Value]) -> list[_Known]:
        params = equation.params
        body_at = params["cond_nconsts"]
        carry_at = body_at + params["body_nconsts"]
        test, body = params["cond_jaxpr"], params["body_jaxpr"]
        tested = [self.force(x, "while", "before") for x in inputs[:body_at]]
        shared = self.enter_loop(inputs[body_at:carry_at], body.jaxpr, "while")
        carry = [self.force(x, "while", "before").array for x in inputs[carry_at:]]

        def run(closed: Any, consts: Sequence[_Value], carry: Any) -> list[jax.Array]:
            values = [*consts, *(_Known(c, active=True) for c in carry)]
            return self.body(closed, values, "while")

        with primitives.settings(equation):
            carry = lax.while_loop(
                lambda carry: run(test, tested, carry)[0],
                lambda carry: run(body, shared, carry),
                carry,
            )
        return self.wait_for(carry)

    def cond(self, equation: core.JaxprEqn, inputs: list[_Value]) -> list[_Known]:
        index = self.force(inputs[0], "cond").array
        operands = [self.enter(x, True, "cond") for x in inputs[1:]]

        def branch(closed: Any) -> Callable[[], list[jax.Array]]:
            return lambda: self.body(closed, operands, "cond")

        with primitives.settings(equation):
            branches = [branch(closed) for closed in equation.params["branches"]]
            outputs = lax.switch(index, branches)
        return self.wait_for(outputs)


def _integer_activations(values: Sequence[_Value]) -> list[jax.Array]:
    return [
        x.array
        for x in values
        if isinstance(x, _Known)
        and x.active
        and jnp.issubdtype(x.array.dtype, jnp.integer)
    ]


def _can_be_awaited(array: jax.Array) -> bool:
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    return array.size > 0 and any(jnp.issubdtype(array.dtype, k) for k in kinds)


def _places_a_parameter(equation: core.JaxprEqn, inputs: list[_Value]) -> bool:
    """Whether an equation places a parameter into an array that no z has entered."""
    position = primitives.facts(equation).places
    if position is None:
        return False
    into, placed = inputs[0], inputs[position]
    return (
        isinstance(into, _Known)
        and not into.constant
        and not any(isinstance(x, _Known) and x.active for x in inputs)
        and (not isinstance(placed, _Known) or placed.constant)
    )


def _is_placed(value: _Value) -> bool:
    return isinstance(value, _Output) and value.source.placed


def _leaves(value: _Value) -> list[str]:
    if isinstance(value, Pending):
        return [value.side.name]
    if isinstance(value, _Output):
        return [leaf for x in value.source.inputs for leaf in _leaves(x)]
    return []


def _add_up(
    jaxpr: core.Jaxpr, count: Callable[[core.JaxprEqn, core.Var], float]
) -> list[float]:
    """For each input of a jaxpr the sum of ``count`` over the equations that use it."""
    totals: dict[Any, float] = dict.fromkeys(jaxpr.invars, 0)
    for equation in jaxpr.eqns:
        used = [v for v in equation.invars if not isinstance(v, core.Literal)]
        called = primitives.called_jaxpr(equation)
        if called is not None:
            counts = _add_up(called[0], count)
            for variable, n in zip(equation.invars, counts, strict=True):
                if not isinstance(variable, core.Literal) and variable in totals:
                    totals[variable] += n
            continue
        for variable in used:
            if variable in totals:
                totals[variable] += count(equation, variable)
    return [totals[v] for v in jaxpr.invars]


def _only_in_dots(jaxpr: core.Jaxpr, position: int) -> bool:
    """Whether an input of a jaxpr does nothing but multiply, in matrix products."""
    followed = {jaxpr.invars[position]}
    for equation in jaxpr.eqns:
        uses = [
            i
            for i, x in enumerate(equation.invars)
            if not isinstance(x, core.Literal) and x in followed
        ]
        if not uses:
            continue
        called = primitives.called_jaxpr(equation)
        if called is not None:
            if not all(_only_in_dots(called[0], i) for i in uses):
                return False
        elif _is_view(equation) and len(uses) == 1:
            followed.update(equation.outvars)
        elif equation.primitive.name not in factored_products.DOTS or len(uses) > 1:
            return False
    return followed.isdisjoint(
        x for x in jaxpr.outvars if not isinstance(x, core.Literal)
    )


def _is_view(equation: core.JaxprEqn) -> bool:
    """Whether a weight that is factored may stay it through an equation."""
    sizes = [x.aval.size for x in equation.invars]  # type: ignore[attr-defined]
    scalar = len(sizes) == 1 or min(sizes) == 1
    return equation.primitive.name in factored_products.VIEWS and scalar


def _uses(jaxpr: core.Jaxpr) -> list[float]:
    """How many equations use each input."""
    return _add_up(jaxpr, lambda equation, variable: 1)


def _work(jaxpr: core.Jaxpr) -> list[float]:
    """Multiply-adds per element of each input, in the products that it enters."""

    def count(equation: core.JaxprEqn, variable: Any) -> float:
        if equation.primitive.name == "scan":
            inner = _work(equation.params["jaxpr"].jaxpr)
            length: int = equation.params["length"]
            return inner[equation.invars.index(variable)] * length
        if not primitives.facts(equation).product:
            return 0
        size: int = variable.aval.size
        return primitives.multiply_adds([equation]) / max(1, size)

    return _add_up(jaxpr, count)
