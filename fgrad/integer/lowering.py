"""A jaxpr of integers as operations, and which of their results need memory.

What is computed elementwise is written into the loop that reads it. A value is stored
only if it is read more than once or in another order: most of a network is then one
loop for each product, from its operands to the integers that the next product reads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from fgrad.integer.primitives import REMEDIES, source_of
from fgrad.integer.ranges import ConversionError
from fgrad.tracing import primitives
from fgrad.tracing.primitives import scan_sizes

# Functions of `arithmetic` that stay one operation.
SCALAR_FUNCTIONS = (
    *("multiply_shift", "multiply_shift_wide"),
    *("exp2_negative", "exp2_short", "log2"),
)
PRODUCT_FUNCTIONS = ("exact_dot", "coarse_dot")
ROW_FUNCTIONS = {"max_of_rows": "reduce_max"}
DOTS = ("dot_general", "exact_dot", "coarse_dot")
CONVOLUTIONS = ("conv_general_dilated", "plain_conv", "exact_conv", "coarse_conv")

_NAMED = frozenset({*SCALAR_FUNCTIONS, *PRODUCT_FUNCTIONS, *ROW_FUNCTIONS})

POINTWISE = frozenset(
    {
        *SCALAR_FUNCTIONS,
        *("add", "sub", "mul", "div", "rem", "max", "min", "and", "or", "xor", "not"),
        *("eq", "ne", "lt", "le", "gt", "ge", "sign", "neg", "abs", "clamp"),
        *("shift_left", "shift_right_arithmetic", "shift_right_logical", "select_n"),
        *("convert_element_type", "population_count", "clz"),
    }
)
REDUCTIONS = frozenset(
    {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or"}
)
POSITIONS = frozenset({"argmax", "argmin"})
WINDOWS = frozenset({"reduce_window_max", "reduce_window_min", "reduce_window_sum"})
# Of these every element is one element of the operand.
VIEWS = frozenset({"broadcast_in_dim", "transpose", "slice", "rev", "tile"})
RESHAPES = frozenset({"reshape", "squeeze", "expand_dims"})
CUMULATIVE = frozenset({"cumsum", "cummax", "cummin"})
# These write their result in parts.
WRITERS = frozenset(
    {
        *CUMULATIVE,
        *("concatenate", "pad", "threefry2x32", "split", "stack", "scan"),
        "dynamic_update_slice",
    }
)
# So cheap that what reads them may make them again, in the place of memory.
CHEAP = frozenset({*POINTWISE, *VIEWS, *RESHAPES, "iota", "threefry2x32"})
HEAVY = frozenset({*REDUCTIONS, *POSITIONS, *WINDOWS, *DOTS, *CONVOLUTIONS})
KNOWN = frozenset(
    {
        *(*POINTWISE, *HEAVY, *VIEWS, *RESHAPES, *WRITERS),
        *("iota", "gather", "dynamic_slice"),
    }
)


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the program.

    Attributes:
      shape: its shape.
      dtype: its NumPy type.
      literal: its value, if it is a scalar known now.
      constant: its values, if they are an array known now.
      maker: the operation that computes it, if one does.
      lazy: whether a loop makes the part that it reads in each round.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    literal: int | None = None
    constant: np.ndarray | None = None
    maker: Operation | None = dataclasses.field(default=None, repr=False)
    lazy: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(eq=False)
class Operation:
    """An equation.

    Attributes:
      name: of the primitive, or of a function of `arithmetic`.
      params: of the equation; of a product those of its first part.
      inputs: its operands.
      outputs: its results.
      layer: where in the model it is.
      body: of a scan.
    """

    name: str
    params: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    layer: str
    body: Block | None = None


@dataclasses.dataclass(eq=False)
class Block:
    """Operations in order.

    Attributes:
      inputs: its arguments.
      operations: in order.
      outputs: its results.
    """

    inputs: list[Value]
    operations: list[Operation]
    outputs: list[Value]


def lower(function: Callable[..., Any], *arguments: Any) -> Block:
    """The operations of a function of integer arrays, flat arguments and results.

    Raises:
      ConversionError: for a float type, or an operation that C is not written for.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    inputs = [_value(v.aval) for v in closed.jaxpr.invars]
    return _block(closed.jaxpr, closed.consts, inputs)


def _block(
    jaxpr: core.Jaxpr, constants: Sequence[Any], inputs: Sequence[Value]
) -> Block:
    operations: list[Operation] = []
    outputs = _inline(jaxpr, constants, inputs, operations, "")
    for operation in operations:
        if operation.name == "scan":
            _make_slices_lazy(operation)
    live: set[Value] = set(outputs)
    kept = []
    for operation in reversed(operations):
        if not live.isdisjoint(operation.outputs):
            live.update(operation.inputs)
            kept.append(operation)
    return Block(list(inputs), kept[::-1], outputs)


def _make_slices_lazy(scan: Operation) -> None:
    """Gives a loop its own copy of cheap computations that it reads one by one.

    The keys of all evaluations of a step are an example: in each round the loop makes
    those of one evaluation, so that there is no memory for all of them.
    """
    constants, carried = scan.params["sizes"]
    copies: dict[Operation, Operation] = {}
    assert scan.body is not None
    for place in range(constants + carried, len(scan.inputs)):
        value = scan.inputs[place]
        if scan.body.inputs[place].size == 1 and _is_remade(value):
            scan.inputs[place] = _copied(value, copies)


def _is_remade(value: Value) -> bool:
    """Whether a computed value is made of arguments by cheap operations alone."""
    pending, seen = [value], set()
    while pending:
        maker = pending.pop().maker
        if maker is None or maker in seen:
            continue
        if maker.name not in CHEAP:
            return False
        seen.add(maker)
        pending += maker.inputs
    return value.maker is not None


def _copied(value: Value, copies: dict[Operation, Operation]) -> Value:
    """A lazy copy of a value, and of all that it is made of."""
    maker = value.maker
    if maker is None:
        return value
    if maker not in copies:
        outputs = [dataclasses.replace(x, lazy=True) for x in maker.outputs]
        inputs = [_copied(x, copies) for x in maker.inputs]
        copies[maker] = dataclasses.replace(maker, inputs=inputs, outputs=outputs)
        for output in outputs:
            output.maker = copies[maker]
    return copies[maker].outputs[maker.outputs.index(value)]


def _inline(
    jaxpr: core.Jaxpr,
    constants: Sequence[Any],
    inputs: Sequence[Value],
    operations: list[Operation],
    layer: str,
    source: str = "",
) -> list[Value]:
    names: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    for variable, array in zip(jaxpr.constvars, constants, strict=True):
        names[variable] = _constant(np.asarray(array))

    def read(x: Any) -> Value:
        if isinstance(x, core.Literal):
            aval: Any = x.aval
            return _constant(np.asarray(x.val, aval.dtype))
        return names[x]

    for equation in jaxpr.eqns:
        operands = [read(x) for x in equation.invars]
        stack = "/".join(filter(None, (layer, str(equation.source_info.name_stack))))
        called = primitives.called_jaxpr(equation)
        name = equation.params.get("name", "") if called else equation.primitive.name
        if called and name not in _NAMED:
            caller = _source(equation, source)
            outputs = _inline(*called, operands, operations, stack, caller)
        elif name in ("optimization_barrier", "stored"):
            outputs = operands
        elif not called and (known := _known(equation, operands)) is not None:
            outputs = [known]
        else:
            outputs = [_value(v.aval) for v in equation.outvars]
            where = f"{_source(equation, source)}; layer {stack or 'not named'}"
            operation = _operation(name, equation, operands, outputs, stack, where)
            for output in outputs:
                output.maker = operation
            operations.append(operation)
        names.update(zip(equation.outvars, outputs, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _known(equation: core.JaxprEqn, operands: Sequence[Value]) -> Value | None:
    """The result of an equation that needs no computation at run time."""
    name = equation.primitive.name
    same = name == "convert_element_type" and (
        operands[0].dtype == equation.params["new_dtype"]
    )
    if same or name in ("copy", "copy_p", "stop_gradient"):
        return operands[0]
    arrays = [_array_of(x) for x in operands]
    if not operands or any(x is None for x in arrays) or name == "scan":
        return None
    avals: list[Any] = [v.aval for v in equation.outvars]
    # No table takes more flash than what it is made of.
    if len(avals) != 1 or (avals[0].shape and _larger(_value(avals[0]), operands)):
        return None
    with jax.ensure_compile_time_eval():
        return _constant(np.asarray(primitives.bind(equation, arrays)[0]))


def _larger(value: Value, operands: Sequence[Value]) -> bool:
    """Whether a value has more bytes than each of its operands."""
    sizes = [x.size * x.dtype.itemsize for x in operands]
    return value.size * value.dtype.itemsize > max(sizes)


def _array_of(x: Value) -> np.ndarray | None:
    """What a value is, if it is known now."""
    return x.constant if x.literal is None else np.asarray(x.literal, x.dtype)


def _operation(
    name: str,
    equation: core.JaxprEqn,
    operands: list[Value],
    outputs: list[Value],
    layer: str,
    where: str,
) -> Operation:
    params = dict(equation.params)
    if name in PRODUCT_FUNCTIONS:
        inner = params["jaxpr"].jaxpr.eqns
        product = next(e for e in inner if e.primitive.name == "dot_general")
        params = dict(product.params)
    if name in ROW_FUNCTIONS:
        name = ROW_FUNCTIONS[name]
        params["axes"] = (len(operands[0].shape) - 1,)
    if name in CONVOLUTIONS:
        params = dict(params.get("options", params))
    body = None
    if name == "scan":
        closed = params["jaxpr"]
        inputs = [_value(v.aval) for v in closed.jaxpr.invars]
        body = _block(closed.jaxpr, closed.consts, inputs)
        params["sizes"] = scan_sizes(params)
    if name not in KNOWN:
        remedy = REMEDIES.get(name, "an operation that C has no loop for")
        raise ConversionError(
            f"C is not written for the operation {name!r} ({where}): it is {remedy}. "
            "Change the model or the loss, or hand it over by fgrad.integer.export."
        )
    if params.get("batch_group_count", 1) != 1:
        raise ConversionError(
            f"C is not written for {name!r} with a batch_group_count of "
            f"{params['batch_group_count']} ({where}): use feature_group_count, or "
            "hand it over by fgrad.integer.export."
        )
    return Operation(name, params, operands, outputs, layer, body)


def _source(equation: core.JaxprEqn, caller: str) -> str:
    """Where the user's code computes an equation, or calls what computes it."""
    found = source_of(equation)
    return found if ":" in found or not caller else caller


def _value(aval: Any) -> Value:
    dtype = np.dtype(aval.dtype)
    if dtype.kind not in "iub" or dtype.itemsize > 4:
        raise ConversionError(
            f"the program has a value of type {dtype}; C is written for integers of up "
            "to 32 bits. Give the weights and the batch that `init` and `encode` make."
        )
    return Value(tuple(aval.shape), dtype)


def _constant(array: np.ndarray) -> Value:
    if array.ndim == 0:
        return Value((), array.dtype, literal=int(array))
    return Value(array.shape, array.dtype, constant=array)


# ------------------------------------------------------------------ what is stored


class Storage:
    """Which results of a block have memory; others are computed where they are read.

    Attributes:
      rows: for each product with a computed weight, that weight: one output channel of
        it is made at a time.
    """

    def __init__(self, block: Block):
        """Decides, from the last operation to the first."""
        self._uses: dict[Value, list[tuple[Operation, int]]] = {}
        self._stored: set[Value] = set(block.outputs)
        self._groups: dict[Value, Hashable] = {}
        self._with_row: set[Hashable] = set()
        self.rows: dict[Operation, Value] = {}
        for operation in block.operations:
            for position, x in enumerate(operation.inputs):
                self._uses.setdefault(x, []).append((operation, position))
        for operation in reversed(block.operations):
            for output in operation.outputs:
                self._decide(operation, output)
            self._find_row(operation)

    def is_stored(self, value: Value) -> bool:
        """Whether a computed value has memory of its own."""
        return value in self._stored

    def order(
        self, block: Block, overwritten: Mapping[Value, Value]
    ) -> list[Operation]:
        """Operations that write memory, so that little of it is in use at a time.

        What is cheap and made of arguments alone waits until something reads it. What
        takes the place of an argument waits for all that reads the argument.

        Args:
          block: of this storage.
          overwritten: the argument whose memory a result takes, by the result.
        """
        writing = [
            operation
            for operation in block.operations
            if operation.name in WRITERS or operation.outputs[0] in self._stored
        ]
        reads: dict[Operation, set[Value]] = {}
        late: set[Operation | None] = {None}
        for operation in writing:
            names, reads[operation] = self._reads(operation)
            makers = {x.maker for x in reads[operation]}
            stays = reads[operation].isdisjoint(overwritten.values())
            if names <= CHEAP and makers <= late and stays:
                late.add(operation)
        found: dict[Operation, None] = {}  # in order

        def add(operation: Operation) -> None:
            for value in sorted(reads[operation], key=lambda x: writing_place[x.maker]):
                maker = value.maker
                if maker is not None and maker in late and maker not in found:
                    add(maker)
            found[operation] = None

        writing_place: dict[Operation | None, int] = {None: -1}
        writing_place.update({x: i for i, x in enumerate(writing)})
        late -= {x for x in writing if not overwritten.keys().isdisjoint(x.outputs)}
        waiting = [x for x in writing if x not in late]
        while waiting:
            operation = self._next(waiting, reads, overwritten)
            waiting.remove(operation)
            add(operation)
        for operation in writing:
            if operation not in found:
                add(operation)
        return list(found)

    def _next(
        self,
        waiting: Sequence[Operation],
        reads: Mapping[Operation, set[Value]],
        overwritten: Mapping[Value, Value],
    ) -> Operation:
        """The first operation that may come now."""
        made = {x for operation in waiting for x in operation.outputs}
        possible = [x for x in waiting if made.isdisjoint(reads[x])]
        for operation in possible:
            taken = {overwritten[x] for x in operation.outputs if x in overwritten}
            others = (x for x in waiting if x is not operation)
            if all(taken.isdisjoint(reads[x]) for x in others):
                return operation
        return possible[0]

    def _reads(self, operation: Operation) -> tuple[set[str], set[Value]]:
        """Names of what one loop computes, and what it reads that has memory."""
        names, found = {operation.name}, set()
        pending, seen = list(operation.inputs), set()
        while pending:
            x = pending.pop()
            if x in seen:
                continue
            seen.add(x)
            if x.maker is None or x in self._stored:
                found.add(x)
            else:
                names.add(x.maker.name)
                pending += x.maker.inputs
        return names, found

    def _decide(self, operation: Operation, value: Value) -> None:
        if operation.name in WRITERS:
            self._stored.add(value)
        if value not in self._stored and not _is_cheap(value):
            groups = {self._group_of_use(value, *use) for use in self._uses[value]}
            if len(groups) == 1 and None not in groups:
                self._groups[value] = groups.pop()
                return
            self._stored.add(value)
        self._groups[value] = value

    def _group_of_use(
        self, value: Value, operation: Operation, position: int
    ) -> Hashable | None:
        """The loop that reads a value once, or None where it is read more often."""
        out = operation.outputs[0]
        if operation.name in POINTWISE:
            return self._groups[out] if value.shape == out.shape else None
        if operation.name in RESHAPES:
            group = self._groups[out]
            is_row = isinstance(group, tuple) and group[0] == "row"
            return ("view", operation, group) if is_row else None
        if operation.name in VIEWS:
            once = out.size <= value.size
            return ("view", operation, self._groups[out]) if once else None
        if operation.name == "gather":
            return ("view", operation, self._groups[out]) if position == 1 else None
        if operation.name == "dynamic_slice":
            return ("view", operation, self._groups[out]) if position == 0 else None
        if operation.name in (*REDUCTIONS, *POSITIONS):
            return ("reduce", operation)
        if self.rows.get(operation) is value and position == 1:
            return ("row", operation)
        return None

    def _find_row(self, operation: Operation) -> None:
        """Lets a product make its weight row by row, if the weight is computed."""
        if operation.name not in (*DOTS, *CONVOLUTIONS):
            return
        weight = operation.inputs[1]
        group = self._groups[operation.outputs[0]]
        plain = isinstance(group, Value) and group.shape == operation.outputs[0].shape
        batched = False
        if operation.name in DOTS:
            (_, contracted), (_, batch) = operation.params["dimension_numbers"]
            batched = len(weight.shape) - len(contracted) != 1 or bool(batch)
        if weight.maker is None or not plain or batched or group in self._with_row:
            return
        if len(self._uses[weight]) == 1 and weight.maker.name not in WRITERS:
            self.rows[operation] = weight
            self._with_row.add(group)


def _is_cheap(value: Value) -> bool:
    """Whether to compute a value again wherever it is read."""
    maker = value.maker
    if maker is None or maker.name == "iota":
        return True
    if maker.name in ("broadcast_in_dim", *RESHAPES) and maker.inputs[0].size == 1:
        return maker.inputs[0].maker is None
    return False
