"""Operations as C99: one loop for each stored value, the rest as expressions in it.

Only ``<stdint.h>`` is used: no heap, no floating point, no 64-bit arithmetic, no
recursion, no library function.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fgrad.integer import lowering
from fgrad.integer.arena import Lifetime
from fgrad.integer.lowering import Block, Operation, Storage, Value
from fgrad.integer.ranges import ConversionError

Index = Sequence[str]

_TYPES = {
    "bool": "uint8_t",
    **{f"{sign}int{n}": f"{sign}int{n}_t" for sign in ("", "u") for n in (8, 16, 32)},
}
_BINARY = {
    **{"add": "+", "sub": "-", "mul": "*", "div": "/", "rem": "%"},
    **{"and": "&", "or": "|", "xor": "^"},
    **{"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="},
}
_HELPERS = {
    "multiply_shift": "fgrad_multiply_shift",
    "multiply_shift_wide": "fgrad_multiply_shift_wide",
    "exp2_negative": "fgrad_exp2_negative",
    "exp2_short": "fgrad_exp2_short",
    "log2": "fgrad_log2",
}
_PER_LINE = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Buffer:
    """Memory of a stored value.

    Attributes:
      name: a C expression of pointer type.
      lifetime: its place in the arena; None if it is an argument or a constant.
    """

    name: str
    lifetime: Lifetime | None = None


class Scope:
    """Lines of C, and the values that they have computed so far."""

    def __init__(self, parent: Scope | None = None, deeper: int = 1):
        """A scope inside another one, whose values it knows."""
        self.lines: list[str] = parent.lines if parent else []
        self._depth: int = parent._depth + deeper if parent else 1
        self._known: dict[Any, str] = dict(parent._known) if parent else {}

    def add(self, line: str) -> None:
        """Writes a line."""
        self.lines.append("  " * self._depth + line)

    @contextlib.contextmanager
    def loops(self, *ranges: tuple[str, int]) -> Iterator[Scope]:
        """Nested loops over (variable, count); those of one round are left out."""
        inner = self
        ranges = tuple(r for r in ranges if r[1] != 1)
        for name, count in ranges:
            inner.add(f"for (int32_t {name} = 0; {name} < {count}; ++{name}) {{")
            inner = Scope(inner)
        yield Scope(inner, deeper=0)
        for depth in range(len(ranges) - 1, -1, -1):
            self.lines.append("  " * (self._depth + depth) + "}")

    @contextlib.contextmanager
    def unless(self, tests: Sequence[str]) -> Iterator[Scope]:
        """A block that is skipped if one of some tests holds."""
        if not tests:
            yield self
            return
        self.add(f"if (!({' || '.join(tests)})) {{")
        yield Scope(self)
        self.add("}")

    def remembered(self, key: Any) -> str | None:
        """The name of a value computed before."""
        return self._known.get(key)

    def remember(self, key: Any, name: str) -> str:
        """Keeps the name of a value for this scope and those inside."""
        self._known[key] = name
        return name


class Writer:
    """Writes functions that share constants and an arena.

    Attributes:
      constants: C names and values of tables.
      lifetimes: of all temporary buffers, by their C name and type.
      helpers: names of the helper functions in use.
    """

    def __init__(self) -> None:
        """Nothing is written yet."""
        self.constants: dict[str, np.ndarray] = {}
        self.lifetimes: dict[str, tuple[str, Lifetime]] = {}
        self.helpers: set[str] = set()
        self._numbers = itertools.count()
        self._time = 0

    def function(
        self, block: Block, inputs: Sequence[str], outputs: Sequence[str]
    ) -> list[str]:
        """The lines of a function's body.

        Args:
          block: what it computes.
          inputs: C expressions of pointers to its arguments.
          outputs: of pointers to its results; an output may be the memory of an input
            whose elements nothing reads after they are overwritten.
        """
        scope = Scope()
        function = _Function(self, block, scope)
        function.run(dict(zip(block.inputs, map(Buffer, inputs), strict=True)), outputs)
        return scope.lines

    def fresh(self, prefix: str) -> str:
        """A name that is not in use."""
        return f"{prefix}{next(self._numbers)}"

    def tick(self) -> int:
        """The next moment."""
        self._time += 1
        return self._time

    def constant(self, array: np.ndarray) -> Buffer:
        """A table in flash; equal ones are kept once."""
        for name, known in self.constants.items():
            same = known.dtype == array.dtype and known.shape == array.shape
            if same and np.array_equal(known, array):
                return Buffer(name)
        name = self.fresh("table")
        self.constants[name] = array
        return Buffer(name)

    def temporary(self, dtype: np.dtype[Any], size: int, prefix: str = "v") -> Buffer:
        """Memory in the arena from now on."""
        name = self.fresh(prefix)
        lifetime = Lifetime(dtype.itemsize * max(size, 1), self._time, self._time)
        self.lifetimes[name] = (c_type(dtype), lifetime)
        return Buffer(name, lifetime)

    def touch(self, buffer: Buffer) -> None:
        """Notes that a buffer is in use now."""
        if buffer.lifetime is not None:
            buffer.lifetime.last = max(buffer.lifetime.last, self._time)


def c_type(dtype: np.dtype[Any]) -> str:
    """The name of an integer type in C."""
    return _TYPES[str(dtype)]


class _Function:
    """Writes a block, and those of the scans inside."""

    def __init__(self, writer: Writer, block: Block, scope: Scope):
        self.writer = writer
        self.block = block
        self.scope = scope
        self.storage = Storage(block)
        self.buffers: dict[Value, Buffer] = {}
        self.rows: dict[Operation, str] = {}
        self._writing = "", ""
        self._overwritten: set[str] = set()

    def run(
        self, buffers: dict[Value, Buffer], outputs: Sequence[str] | None = None
    ) -> None:
        """Writes all operations.

        Args:
          buffers: of the inputs, and of whatever else has memory already.
          outputs: C expressions of the memory of the results; their own by default.
        """
        self.buffers = dict(buffers)
        places: dict[Value, str] = {}
        copies = []
        for value, name in zip(self.block.outputs, outputs or (), strict=False):
            computed = value.maker is not None and value not in self.buffers
            # Small results wait, for something may read what they overwrite.
            if computed and value not in places and value.size > 64:
                places[value] = name
            else:
                copies.append((value, name))
        arguments = {buffer.name: value for value, buffer in buffers.items()}
        overwritten = {
            value: arguments[name]
            for value, name in places.items()
            if name in arguments
        }
        for operation in self.storage.order(self.block, overwritten):
            self._operation(operation, places)
        self.writer.tick()
        for value, name in copies:
            self._copy(value, name)

    def element(self, value: Value, index: Index, scope: Scope) -> str:
        """A C expression of one element of a value."""
        if value.literal is not None:
            return literal(value.literal, value.dtype)
        if value.constant is not None and value not in self.buffers:
            self.buffers[value] = self.writer.constant(value.constant)
        if value in self.buffers:
            buffer = self.buffers[value]
            self.writer.touch(buffer)
            at = linear(index, value.shape)
            moved = buffer.name == self._writing[0] and at != self._writing[1]
            if value.maker is None and (moved or buffer.name in self._overwritten):
                raise ConversionError(
                    f"{buffer.name} is read after a result has taken its place."
                )
            if buffer.name.startswith("(&") and at == "0":  # a field that is no array
                return buffer.name[2:-1]
            return f"{buffer.name}[{at}]"
        key = value, tuple(index)
        known = scope.remembered(key)
        if known is not None:
            return known
        expression = self._expression(value, index, scope)
        if expression.isidentifier() or expression.isdigit():
            return scope.remember(key, expression)
        name = self.writer.fresh("t")
        scope.add(f"const {c_type(value.dtype)} {name} = {expression};")
        return scope.remember(key, name)

    # ------------------------------------------------------------------ operations

    def _operation(self, operation: Operation, places: dict[Value, str]) -> None:
        if operation.name in lowering.WRITERS:
            self.writer.tick()
            self._comment(operation, operation.outputs)
            name = operation.name
            kind = "cumulative" if name in lowering.CUMULATIVE else name
            getattr(self, f"_write_{kind}")(operation, places)
            return
        (value,) = operation.outputs
        alias = operation.name in lowering.RESHAPES and value not in places
        if alias and operation.inputs[0] in self.buffers:
            self.buffers[value] = self.buffers[operation.inputs[0]]
            return
        self.writer.tick()
        self._comment(operation, [value])
        target = self._memory(value, places)
        self._writing = target.name, linear(_index(value.shape), value.shape)
        self._loop(value, target)
        if value in places:
            self._overwritten.add(target.name)
        self.buffers[value] = target

    def _memory(self, value: Value, places: dict[Value, str]) -> Buffer:
        if value in places:
            return Buffer(places[value])
        return self.writer.temporary(value.dtype, value.size)

    def _comment(self, operation: Operation, values: Sequence[Value]) -> None:
        shapes = ", ".join(f"{v.dtype}{list(v.shape)}" for v in values)
        layer = _readable(operation.layer)
        self.scope.add(f"/* {shapes}: {layer or operation.name} */")

    def _loop(self, value: Value, target: Buffer) -> None:
        """One loop over the elements of a stored value."""
        index = _index(value.shape)
        ranges = list(zip(index, value.shape, strict=True))
        owner = self._row_owner(value)
        if owner is None:
            with self.scope.loops(*ranges) as inner:
                result = self._result(value, index, inner)
                inner.add(f"{target.name}[{linear(index, value.shape)}] = {result};")
            return
        channel = _channel_axis(owner, value)
        weight = self.storage.rows[owner]
        row = self.writer.temporary(weight.dtype, _row_size(owner), "row")
        self.rows[owner] = row.name
        with self.scope.loops(ranges[channel]) as outer:
            self._fill(owner, weight, row.name, index[channel], outer)
            rest = [r for axis, r in enumerate(ranges) if axis != channel]
            with outer.loops(*rest) as inner:
                result = self._result(value, index, inner)
                inner.add(f"{target.name}[{linear(index, value.shape)}] = {result};")

    def _result(self, value: Value, index: Index, scope: Scope) -> str:
        """The element of a stored value that its loop computes."""
        return f"({c_type(value.dtype)})({self._expression(value, index, scope)})"

    def _row_owner(self, value: Value) -> Operation | None:
        """The product that makes its weight in rows inside the loop of a value."""
        pending, seen = [value], set()
        while pending:
            x = pending.pop()
            if x.maker is None or x in seen:
                continue
            seen.add(x)
            if x.maker in self.storage.rows:
                return x.maker
            if x.maker.name in lowering.POINTWISE:
                pending += [
                    y
                    for y in x.maker.inputs
                    if y.maker and not self.storage.is_stored(y)
                ]
        return None

    def _fill(
        self, owner: Operation, weight: Value, row: str, channel: str, scope: Scope
    ) -> None:
        """Computes the part of a weight that makes one output channel."""
        place, *rest = _weight_axes(owner)
        names = {a: "0" if weight.shape[a] == 1 else f"k{a}" for a in rest}
        ranges = [(names[axis], weight.shape[axis]) for axis in rest]
        index = [names.get(axis, channel) for axis in range(len(weight.shape))]
        index[place] = channel
        shape = [weight.shape[axis] for axis in rest]
        with scope.loops(*ranges) as inner:
            result = self.element(weight, index, inner)
            at = linear([names[axis] for axis in rest], shape)
            inner.add(f"{row}[{at}] = ({c_type(weight.dtype)}){result};")

    def _copy(self, value: Value, name: str, offset: str = "") -> None:
        """Writes a value to given memory."""
        if value in self.buffers and self.buffers[value].name == name:
            return
        index = _index(value.shape)
        ranges = zip(index, value.shape, strict=True)
        with self.scope.loops(*ranges) as inner:
            at = offset + linear(index, value.shape)
            source = self.element(value, index, inner)
            if source != f"{name}[{at}]":
                inner.add(f"{name}[{at}] = {source};")

    def _counter(self, count: int) -> str:
        """A variable for a loop; one of a single round needs none."""
        return "0" if count == 1 else self.writer.fresh("k")

    # ----------------------------------------------------------------- expressions

    def _expression(self, value: Value, index: Index, scope: Scope) -> str:
        """How to compute one element of a value that is not stored."""
        operation = value.maker
        assert operation is not None
        name = operation.name
        if name in lowering.POINTWISE:
            operands = [
                self.element(x, _broadcast(index, x.shape), scope)
                for x in operation.inputs
            ]
            return self._pointwise(operation, operands)
        if name in lowering.REDUCTIONS:
            return self._reduction(operation, index, scope)
        if name in lowering.POSITIONS:
            return self._position(operation, index, scope)
        if name in lowering.WINDOWS:
            return self._window(operation, index, scope)
        if name in lowering.DOTS:
            return self._dot(operation, index, scope)
        if name in lowering.CONVOLUTIONS:
            return self._convolution(operation, index, scope)
        if name == "iota":
            axis = operation.params["dimension"]
            return f"({c_type(value.dtype)}){index[axis]}"
        if name == "gather":
            return self._gather(operation, index, scope)
        if name == "threefry2x32":
            return self._threefry(operation, value, index, scope)
        if name == "dynamic_slice":
            source, *starts = operation.inputs
            begin = self._starts(starts, source.shape, value.shape, scope)
            place = [_shifted(b, i) for b, i in zip(begin, index, strict=True)]
            return self.element(source, place, scope)
        operand = operation.inputs[0]
        return self.element(operand, _viewed(operation, index), scope)

    def _pointwise(self, operation: Operation, x: Sequence[str]) -> str:
        name, out = operation.name, operation.outputs[0]
        if name in _HELPERS:
            self.helpers.add(name)
            return f"{_HELPERS[name]}({', '.join(x)})"
        if name in _BINARY:
            return f"{x[0]} {_BINARY[name]} {x[1]}"
        if name == "convert_element_type":
            test = out.dtype == bool and operation.inputs[0].dtype != bool
            return f"{x[0]} != 0" if test else f"({c_type(out.dtype)}){x[0]}"
        if name == "not":
            return f"!{x[0]}" if out.dtype == bool else f"~{x[0]}"
        if name in ("population_count", "clz"):
            self.helpers.add(name)
            return f"fgrad_{name}((uint32_t){x[0]})"
        if name == "select_n":
            if len(x) == 2:
                return x[1]
            return f"{x[0]} ? {x[2]} : {x[1]}"
        patterns = {
            "max": "{0} > {1} ? {0} : {1}",
            "min": "{0} < {1} ? {0} : {1}",
            "neg": "-{0}",
            "abs": "{0} < 0 ? -{0} : {0}",
            "sign": "({0} > 0) - ({0} < 0)",
            "clamp": "{1} < {0} ? {0} : ({1} > {2} ? {2} : {1})",
            "shift_left": "(int32_t)((uint32_t){0} << {1})",
            "shift_right_arithmetic": "{0} >> {1}",
            "shift_right_logical": "(uint32_t){0} >> {1}",
        }
        if name == "shift_left" and out.dtype.kind == "u":
            return f"{x[0]} << {x[1]}"
        return patterns[name].format(*x)

    @property
    def helpers(self) -> set[str]:
        """Helper functions in use."""
        return self.writer.helpers

    def _reduction(self, operation: Operation, index: Index, scope: Scope) -> str:
        (operand,), out = operation.inputs, operation.outputs[0]
        axes = operation.params["axes"]
        names = {a: self._counter(operand.shape[a]) for a in axes}
        total = self.writer.fresh("sum")
        scope.add(
            f"{c_type(out.dtype)} {total} = {_initial(operation.name, out.dtype)};"
        )
        kept = iter(index)
        place = [
            names[a] if a in names else next(kept) for a in range(len(operand.shape))
        ]
        with scope.loops(*((names[a], operand.shape[a]) for a in axes)) as inner:
            x = self.element(operand, place, inner)
            inner.add(_accumulate(operation.name, total, x))
        return total

    def _position(self, operation: Operation, index: Index, scope: Scope) -> str:
        (operand,), out = operation.inputs, operation.outputs[0]
        (axis,) = operation.params["axes"]
        best, at = (self.writer.fresh(p) for p in ("best", "at"))
        k = self._counter(operand.shape[axis])
        first = [*index[:axis], "0", *index[axis:]]
        start = self.element(operand, first, scope)
        scope.add(f"{c_type(operand.dtype)} {best} = {start};")
        scope.add(f"{c_type(out.dtype)} {at} = 0;")
        sign = ">" if operation.name == "argmax" else "<"
        with scope.loops((k, operand.shape[axis])) as inner:
            x = self.element(operand, [*index[:axis], k, *index[axis:]], inner)
            inner.add(f"if ({x} {sign} {best}) {{ {best} = {x}; {at} = {k}; }}")
        return at

    def _window(self, operation: Operation, index: Index, scope: Scope) -> str:
        (operand,), out, params = (
            operation.inputs,
            operation.outputs[0],
            operation.params,
        )
        name = operation.name.replace("_window", "")
        total = self.writer.fresh("sum")
        scope.add(f"{c_type(out.dtype)} {total} = {_initial(name, out.dtype)};")
        windows = params["window_dimensions"]
        names = [self._counter(n) for n in windows]
        with scope.loops(*zip(names, windows, strict=True)) as inner:
            place, tests = [], []
            for axis, (i, k) in enumerate(zip(index, names, strict=True)):
                position, test = _position_in_window(
                    i,
                    k,
                    params["window_strides"][axis],
                    params["window_dilation"][axis],
                    params["padding"][axis],
                    operand.shape[axis],
                    params["base_dilation"][axis],
                )
                place.append(position)
                tests += test
            with inner.unless(tests) as inside:
                x = self.element(operand, place, inside)
                inside.add(_accumulate(name, total, x))
        return total

    def _gather(self, operation: Operation, index: Index, scope: Scope) -> str:
        operand, indices = operation.inputs
        params = operation.params
        numbers = params["dimension_numbers"]
        offsets = iter(index[a] for a in numbers.offset_dims)
        batch = [x for a, x in enumerate(index) if a not in numbers.offset_dims]
        hidden = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        place = [
            "0" if a in hidden else next(offsets) for a in range(len(operand.shape))
        ]
        safe = "PROMISE" in str(params["mode"])
        for column, axis in enumerate(numbers.start_index_map):
            start = f"(int32_t){self.element(indices, [*batch, str(column)], scope)}"
            last = operand.shape[axis] - params["slice_sizes"][axis]
            if not safe:
                begin = self.writer.fresh("at")
                scope.add(f"const int32_t {begin} = {start};")
                start = f"({begin} < 0 ? 0 : ({begin} > {last} ? {last} : {begin}))"
            place[axis] = start if place[axis] == "0" else f"{start} + {place[axis]}"
        pairs = zip(
            numbers.operand_batching_dims,
            numbers.start_indices_batching_dims,
            strict=True,
        )
        for axis, source in pairs:
            place[axis] = batch[source]
        return self.element(operand, place, scope)

    def _dot(self, operation: Operation, index: Index, scope: Scope) -> str:
        lhs, rhs = operation.inputs
        (contract_l, contract_r), (batch_l, batch_r) = operation.params[
            "dimension_numbers"
        ]
        left: dict[int, str] = {}
        right: dict[int, str] = {}
        rest = iter(index)
        for a, b in zip(batch_l, batch_r, strict=True):
            left[a] = right[b] = next(rest)
        for a in range(len(lhs.shape)):
            if a not in contract_l and a not in batch_l:
                left[a] = next(rest)
        for b in range(len(rhs.shape)):
            if b not in contract_r and b not in batch_r:
                right[b] = next(rest)
        names = [self._counter(rhs.shape[b]) for b in contract_r]
        for name, a, b in zip(names, contract_l, contract_r, strict=True):
            left[a] = right[b] = name
        totals = self._start(operation, scope)
        ranges = [(n, rhs.shape[b]) for n, b in zip(names, contract_r, strict=True)]
        with scope.loops(*ranges) as inner:
            x = self.element(lhs, [left[a] for a in range(len(lhs.shape))], inner)
            if operation in self.rows:
                order = _weight_axes(operation)[1:]
                at = linear([right[b] for b in order], [rhs.shape[b] for b in order])
                w = f"{self.rows[operation]}[{at}]"
            else:
                w = self.element(rhs, [right[b] for b in range(len(rhs.shape))], inner)
            self._multiply_add(operation, totals, x, w, inner)
        return self._finish(operation, totals)

    def _convolution(self, operation: Operation, index: Index, scope: Scope) -> str:
        lhs, rhs = operation.inputs
        params = operation.params
        numbers = params["dimension_numbers"]
        (batch, feature, *space), (out, into, *taps), out_spec = (
            numbers.lhs_spec,
            numbers.rhs_spec,
            numbers.out_spec,
        )
        channel = index[out_spec[1]]
        names = {a: self._counter(rhs.shape[a]) for a in (*taps, into)}
        left: dict[int, str] = {batch: index[out_spec[0]]}
        tests: list[str] = []
        totals = self._start(operation, scope)
        ranges = [(names[axis], rhs.shape[axis]) for axis in taps]
        with scope.loops(*ranges) as window:
            for n, (axis, tap) in enumerate(zip(space, taps, strict=True)):
                left[axis], test = _position_in_window(
                    index[out_spec[2 + n]],
                    names[tap],
                    params["window_strides"][n],
                    params["rhs_dilation"][n],
                    params["padding"][n],
                    lhs.shape[axis],
                    params["lhs_dilation"][n],
                )
                tests += test
            with (
                window.unless(tests) as inside,
                inside.loops((names[into], rhs.shape[into])) as inner,
            ):
                left[feature] = names[into]
                if params["feature_group_count"] > 1:
                    share = rhs.shape[out] // params["feature_group_count"]
                    left[feature] = (
                        f"{channel} / {share} * {rhs.shape[into]} + {names[into]}"
                    )
                x = self.element(lhs, [left[a] for a in range(len(lhs.shape))], inner)
                if operation in self.rows:
                    order = _weight_axes(operation)[1:]
                    at = linear(
                        [names[a] for a in order], [rhs.shape[a] for a in order]
                    )
                    w = f"{self.rows[operation]}[{at}]"
                else:
                    places = {**names, out: channel}
                    w = self.element(
                        rhs, [places[a] for a in range(len(rhs.shape))], inner
                    )
                self._multiply_add(operation, totals, x, w, inner)
        return self._finish(operation, totals)

    def _start(self, operation: Operation, scope: Scope) -> list[str]:
        count = 2 if operation.name.startswith("coarse") else 1
        totals = [self.writer.fresh("sum") for _ in range(count)]
        for total in totals:
            scope.add(f"int32_t {total} = 0;")
        return totals

    def _multiply_add(
        self, operation: Operation, totals: Sequence[str], x: str, w: str, scope: Scope
    ) -> None:
        if len(totals) == 1:
            scope.add(f"{totals[0]} += (int32_t){x} * {w};")
            return
        scope.add(f"{totals[0]} += (int32_t){x} * ({w} >> 8);")
        scope.add(f"{totals[1]} += (int32_t){x} * ({w} & 255);")

    def _finish(self, operation: Operation, totals: Sequence[str]) -> str:
        if len(totals) == 1:
            return totals[0]
        return f"{totals[0]} + (({totals[1]} + 128) >> 8)"

    # --------------------------------------------------------------------- writers

    def _write_concatenate(
        self, operation: Operation, places: dict[Value, str]
    ) -> None:
        (value,) = operation.outputs
        target, axis = self._memory(value, places), operation.params["dimension"]
        offset = 0
        for part in operation.inputs:
            index = _index(part.shape)
            with self.scope.loops(*zip(index, part.shape, strict=True)) as inner:
                place = list(index)
                place[axis] = _plus(index[axis], part.shape[axis], offset)
                at = linear(place, value.shape)
                inner.add(f"{target.name}[{at}] = {self.element(part, index, inner)};")
            offset += part.shape[axis]
        self.buffers[value] = target

    def _write_stack(self, operation: Operation, places: dict[Value, str]) -> None:
        (value,) = operation.outputs
        target, axis = self._memory(value, places), operation.params["axis"]
        for number, part in enumerate(operation.inputs):
            index = _index(part.shape)
            with self.scope.loops(*zip(index, part.shape, strict=True)) as inner:
                place = [*index[:axis], str(number), *index[axis:]]
                at = linear(place, value.shape)
                inner.add(f"{target.name}[{at}] = {self.element(part, index, inner)};")
        self.buffers[value] = target

    def _write_split(self, operation: Operation, places: dict[Value, str]) -> None:
        (operand,), axis = operation.inputs, operation.params["axis"]
        offset = 0
        for value in operation.outputs:
            target = self._memory(value, places)
            index = _index(value.shape)
            with self.scope.loops(*zip(index, value.shape, strict=True)) as inner:
                place = list(index)
                place[axis] = _plus(index[axis], value.shape[axis], offset)
                x = self.element(operand, place, inner)
                inner.add(f"{target.name}[{linear(index, value.shape)}] = {x};")
            offset += value.shape[axis]
            self.buffers[value] = target

    def _write_pad(self, operation: Operation, places: dict[Value, str]) -> None:
        (value,), (operand, padding) = operation.outputs, operation.inputs
        target = self._memory(value, places)
        index = _index(value.shape)
        with self.scope.loops(*zip(index, value.shape, strict=True)) as inner:
            x = self.element(padding, [], inner)
            inner.add(f"{target.name}[{linear(index, value.shape)}] = {x};")
        config = operation.params["padding_config"]
        place, tests = [], []
        for i, n, size, (low, high, gap) in zip(
            index, operand.shape, value.shape, config, strict=True
        ):
            place.append(_plus(_times(i, n, gap + 1), n, low))
            if low < 0 or high < 0:  # it cuts off
                tests.append(f"(uint32_t)({place[-1]}) >= {size}u")
        ranges = list(zip(index, operand.shape, strict=True))
        with self.scope.loops(*ranges) as inner, inner.unless(tests) as inside:
            x = self.element(operand, index, inside)
            inside.add(f"{target.name}[{linear(place, value.shape)}] = {x};")
        self.buffers[value] = target

    def _write_cumulative(self, operation: Operation, places: dict[Value, str]) -> None:
        (value,), (operand,) = operation.outputs, operation.inputs
        target, axis = self._memory(value, places), operation.params["axis"]
        name = operation.name.replace("cum", "reduce_")
        index, count = _index(value.shape), value.shape[axis]
        ranges = list(zip(index, value.shape, strict=True))
        others = [r for a, r in enumerate(ranges) if a != axis]
        total, k = self.writer.fresh("sum"), self._counter(count)
        with self.scope.loops(*others) as outer:
            kind = c_type(value.dtype)
            outer.add(f"{kind} {total} = {_initial(name, value.dtype)};")
            with outer.loops((k, count)) as inner:
                at = f"{count - 1} - {k}" if operation.params["reverse"] else k
                place = [*index[:axis], at, *index[axis + 1 :]]
                x = self.element(operand, place, inner)
                inner.add(_accumulate(name, total, x))
                inner.add(f"{target.name}[{linear(place, value.shape)}] = {total};")
        self.buffers[value] = target

    def _write_dynamic_update_slice(
        self, operation: Operation, places: dict[Value, str]
    ) -> None:
        (value,), (operand, update, *starts) = operation.outputs, operation.inputs
        target = self._memory(value, places)
        self._copy(operand, target.name)
        index = _index(update.shape)
        begin = self._starts(starts, value.shape, update.shape, self.scope)
        with self.scope.loops(*zip(index, update.shape, strict=True)) as inner:
            place = [_shifted(b, i) for b, i in zip(begin, index, strict=True)]
            x = self.element(update, index, inner)
            inner.add(f"{target.name}[{linear(place, value.shape)}] = {x};")
        self.buffers[value] = target

    def _starts(
        self,
        starts: Sequence[Value],
        shape: Sequence[int],
        part: Sequence[int],
        scope: Scope,
    ) -> list[str]:
        """Where a part of an array begins, moved inside as JAX does."""
        found = []
        for start, size, extent in zip(starts, shape, part, strict=True):
            if size == extent:
                found.append("0")
                continue
            begin = self.writer.fresh("at")
            x = self.element(start, [], scope)
            scope.add(f"int32_t {begin} = (int32_t){x};")
            scope.add(f"if ({begin} > {size - extent}) {begin} = {size - extent};")
            scope.add(f"if ({begin} < 0) {begin} = 0;")
            found.append(begin)
        return found

    def _write_threefry2x32(
        self, operation: Operation, places: dict[Value, str]
    ) -> None:
        self.helpers.add("threefry2x32")
        targets = [self._memory(value, places) for value in operation.outputs]
        shape = operation.outputs[0].shape
        index = _index(shape)
        with self.scope.loops(*zip(index, shape, strict=True)) as inner:
            x = [
                self.element(v, _broadcast(index, v.shape), inner)
                for v in operation.inputs
            ]
            at = linear(index, shape)
            pointers = ", ".join(f"&{target.name}[{at}]" for target in targets)
            inner.add(f"fgrad_threefry2x32({', '.join(x)}, {pointers});")
        for value, target in zip(operation.outputs, targets, strict=True):
            self.buffers[value] = target

    def _threefry(
        self, operation: Operation, value: Value, index: Index, scope: Scope
    ) -> str:
        """A word of the cipher; the other one is remembered."""
        self.helpers.add("threefry2x32")
        names = [self.writer.fresh("t") for _ in operation.outputs]
        x = [
            self.element(v, _broadcast(index, v.shape), scope) for v in operation.inputs
        ]
        scope.add(f"uint32_t {', '.join(names)};")
        pointers = ", ".join(f"&{name}" for name in names)
        scope.add(f"fgrad_threefry2x32({', '.join(x)}, {pointers});")
        for output, name in zip(operation.outputs, names, strict=True):
            scope.remember((output, tuple(index)), name)
        return names[operation.outputs.index(value)]

    def _write_scan(self, operation: Operation, places: dict[Value, str]) -> None:
        constants, carried = operation.params["sizes"]
        body = operation.body
        assert body is not None
        carry: list[Buffer] = []
        for value, start in zip(
            operation.outputs, operation.inputs[constants:], strict=False
        ):
            if len(carry) == carried:
                break
            memory = self.writer.temporary(value.dtype, value.size, "carry")
            self._copy(start, memory.name)
            carry.append(memory)
        results = [self._memory(v, places) for v in operation.outputs[carried:]]
        for x in operation.inputs:
            known = x.lazy or x.literal is not None or x.constant is not None
            if not known and x not in self.buffers:
                raise ConversionError("a scan reads a value that is not stored.")
        began = self.writer.tick()
        step = self.writer.fresh("step")
        length = operation.params["length"]
        round_ = f"({length - 1} - {step})" if operation.params["reverse"] else step
        self.scope.add(f"for (int32_t {step} = 0; {step} < {length}; ++{step}) {{")
        inner = _Function(self.writer, body, Scope(self.scope))
        known = self._scan_inputs(operation, body, carry, round_)
        known.update(self._lazy_inputs(operation, body, round_, inner.scope))
        inner.run(known)
        self.writer.tick()
        finals = []
        for value in body.outputs[:carried]:  # all before any is overwritten
            copy = self.writer.temporary(value.dtype, value.size, "next")
            inner._copy(value, copy.name)
            finals.append(copy)
        self.writer.tick()
        for value, source, memory in zip(body.outputs, finals, carry, strict=False):
            inner.buffers[value] = source
            inner._copy(value, memory.name)
            self.writer.touch(source)
        for value, memory in zip(body.outputs[carried:], results, strict=True):
            offset = f"{round_} * {value.size} + " if value.size > 1 else f"{round_} + "
            inner._copy(value, memory.name, offset)
        self.scope.add("}")
        self._keep_since(began, [*carry, *results])
        for value, memory in zip(operation.outputs, [*carry, *results], strict=True):
            self.buffers[value] = memory

    def _scan_inputs(
        self, operation: Operation, body: Block, carry: Sequence[Buffer], round_: str
    ) -> dict[Value, Buffer]:
        constants, carried = operation.params["sizes"]
        known: dict[Value, Buffer] = {}
        for place, inside in enumerate(body.inputs):
            outside = operation.inputs[place]
            if outside.lazy:
                continue
            if constants <= place < constants + carried:
                known[inside] = carry[place - constants]
                continue
            if outside.literal is not None:
                constant = np.array([outside.literal], outside.dtype)
                known[inside] = self.writer.constant(constant)
                continue
            if outside.constant is not None:
                self.buffers[outside] = self.writer.constant(outside.constant)
            buffer = self.buffers[outside]
            self.writer.touch(buffer)
            if place >= constants:
                place_ = f"{round_} * {inside.size}" if inside.size > 1 else round_
                name = f"({buffer.name} + {place_})"
                buffer = Buffer(name, buffer.lifetime)
            known[inside] = buffer
        return known

    def _lazy_inputs(
        self, operation: Operation, body: Block, round_: str, scope: Scope
    ) -> dict[Value, Buffer]:
        """What a round makes at its beginning."""
        used = {x for one in body.operations for x in one.inputs} | {*body.outputs}
        found = {}
        for inside, outside in zip(body.inputs, operation.inputs, strict=True):
            if outside.lazy and inside in used:
                index = [round_, *["0"] * (len(outside.shape) - 1)]
                found[inside] = Buffer(f"(&{self.element(outside, index, scope)})")
        return found

    def _keep_since(self, began: int, buffers: Sequence[Buffer]) -> None:
        """What a loop reads and did not make lives to its end."""
        end = self.writer.tick()
        for buffer in buffers:
            self.writer.touch(buffer)
        for _, lifetime in self.writer.lifetimes.values():
            if lifetime.first < began <= lifetime.last:
                lifetime.last = end


# ---------------------------------------------------------------------- fragments


def literal(value: int, dtype: np.dtype[Any]) -> str:
    """An integer constant of C."""
    if dtype.kind == "u":
        return f"{value}u"
    if value == -(2**31):
        return "(-2147483647 - 1)"
    return f"({value})" if value < 0 else str(value)


def linear(index: Index, shape: Sequence[int]) -> str:
    """The place of an element in row-major order."""
    terms: list[str] = []
    stride = 1
    for i, size in reversed(list(zip(index, shape, strict=True))):
        if size != 1 and i != "0":
            simple = i.isidentifier() or i.isdigit()
            i = i if simple else f"({i})"
            terms.append(i if stride == 1 else f"{i} * {stride}")
        stride *= size
    return " + ".join(reversed(terms)) or "0"


def array(name: str, values: np.ndarray, qualifiers: str = "static const ") -> str:
    """A table in C."""
    flat = [literal(int(v), values.dtype).strip("()") for v in values.reshape(-1)]
    if values.dtype == np.int32:
        flat = [literal(int(v), values.dtype) for v in values.reshape(-1)]
    rows = [", ".join(flat[i : i + _PER_LINE]) for i in range(0, len(flat), _PER_LINE)]
    body = ",\n  ".join(rows)
    return f"{qualifiers}{c_type(values.dtype)} {name}[{len(flat)}] = {{\n  {body}\n}};"


def _index(shape: Sequence[int]) -> list[str]:
    """The variables of the loops over an array."""
    return ["0" if n == 1 else f"i{axis}" for axis, n in enumerate(shape)]


def _broadcast(index: Index, shape: Sequence[int]) -> list[str]:
    """The index into an operand whose axes of size 1 stand for any."""
    return [
        "0" if n == 1 else i
        for i, n in zip(index[len(index) - len(shape) :], shape, strict=True)
    ]


def _viewed(operation: Operation, index: Index) -> list[str]:
    """Where an element of a view is in the operand."""
    params, shape = operation.params, operation.inputs[0].shape
    name = operation.name
    if name == "broadcast_in_dim":
        axes = params["broadcast_dimensions"]
        return ["0" if n == 1 else index[a] for a, n in zip(axes, shape, strict=True)]
    if name == "transpose":
        order = params["permutation"]
        return [index[order.index(a)] for a in range(len(shape))]
    if name == "slice":
        strides = params["strides"] or (1,) * len(shape)
        kept = operation.outputs[0].shape
        return [
            _plus(_times(i, n, step), n, start)
            for i, n, start, step in zip(
                index, kept, params["start_indices"], strides, strict=True
            )
        ]
    if name == "rev":
        return [
            f"{n - 1} - {i}" if a in params["dimensions"] else i
            for a, (i, n) in enumerate(zip(index, shape, strict=True))
        ]
    if name == "tile":
        return [f"({i}) % {n}" for i, n in zip(index, shape, strict=True)]
    return _reshaped(linear(index, operation.outputs[0].shape), shape)


def _reshaped(place: str, shape: Sequence[int]) -> list[str]:
    """The index of the element at a place in row-major order."""
    index: list[str] = []
    stride = math.prod(shape)
    outermost = True
    for size in shape:
        stride //= max(size, 1)
        if size == 1:
            index.append("0")
            continue
        i = f"({place})" if stride == 1 else f"({place}) / {stride}"
        index.append(i if outermost else f"({i}) % {size}")
        outermost = False
    return index


def _position_in_window(
    i: str,
    k: str,
    stride: int,
    dilation: int,
    padding: tuple[int, int],
    size: int,
    gap: int,
) -> tuple[str, list[str]]:
    """Where a tap of a window reads, and tests of which one holds if it reads nothing.

    Args:
      i: place of the window.
      k: number of the tap.
      stride: from one window to the next.
      dilation: from one tap to the next.
      padding: before and after the array.
      size: of the array.
      gap: from one element of the array to the next, where it is spread out.
    """
    terms = [] if i == "0" else [i if stride == 1 else f"{i} * {stride}"]
    if k != "0":
        terms.append(k if dilation == 1 else f"{k} * {dilation}")
    position = " + ".join(terms) or "0"
    if padding[0]:
        position = f"{position} - {padding[0]}"
    extent = (size - 1) * gap + 1
    tests = [f"(uint32_t)({position}) >= {extent}u"] if any(padding) else []
    if gap > 1 and position != "0":
        return f"({position}) / {gap}", [*tests, f"({position}) % {gap} != 0"]
    return position, tests


def _plus(i: str, size: int, offset: int) -> str:
    if size == 1:
        return str(offset)
    return f"{i} + {offset}" if offset else i


def _shifted(begin: str, i: str) -> str:
    """An index from a place that is known at run time."""
    return begin if i == "0" else i if begin == "0" else f"{begin} + {i}"


def _times(i: str, size: int, factor: int) -> str:
    return i if factor == 1 or size == 1 else f"{i} * {factor}"


def _initial(name: str, dtype: np.dtype[Any]) -> str:
    if name in ("reduce_sum", "reduce_or"):
        return "0"
    if name == "reduce_and":
        return "1"
    ends = np.iinfo(np.uint8 if dtype.kind == "b" else dtype)
    return literal(int(ends.min if name == "reduce_max" else ends.max), dtype)


def _accumulate(name: str, total: str, x: str) -> str:
    if name == "reduce_sum":
        return f"{total} += {x};"
    if name in ("reduce_and", "reduce_or"):
        return f"{total} = {total} {'&' if name == 'reduce_and' else '|'} {x};"
    return f"if ({x} {'>' if name == 'reduce_max' else '<'} {total}) {total} = {x};"


def _weight_axes(operation: Operation) -> tuple[int, ...]:
    """The axis of a weight's output channels, then the others in order."""
    weight = operation.inputs[1]
    if operation.name in lowering.DOTS:
        (_, contracted), _ = operation.params["dimension_numbers"]
        free = [a for a in range(len(weight.shape)) if a not in contracted]
        if len(free) != 1:
            raise ConversionError("a weight has several axes of outputs; reshape it.")
        return (*free, *sorted(contracted))
    out, into, *taps = operation.params["dimension_numbers"].rhs_spec
    return (out, *taps, into)


def _row_size(operation: Operation) -> int:
    weight = operation.inputs[1]
    return math.prod(weight.shape[a] for a in _weight_axes(operation)[1:])


def _channel_axis(operation: Operation, value: Value) -> int:
    """The axis of a product's result that its weight's output channels make."""
    if operation.name in lowering.DOTS:
        return len(value.shape) - 1
    return int(operation.params["dimension_numbers"].out_spec[1])


def _readable(layer: str) -> str:
    return layer.replace("*/", "* /")
