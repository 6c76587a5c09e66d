"""Networks in TFLite files as plain descriptions, without running anything of them.

A TFLite file is a flatbuffer: tables that say by offsets where their fields lie. Every
offset and length is checked against the file, so that a damaged or malicious one is
refused with a ValueError. Only what a quantized network needs is read: operations with
their options, and tensors with their integers, scales and zero points.
"""

from __future__ import annotations

import os
import pathlib
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_IDENTIFIER = b"TFL3"
_MOST_AXES = 8

# Types of tensors that hold numbers, by their number in TFLite's schema; a tensor of
# another type, such as the handle of a variable, has no dtype here.
_DTYPES = {0: "f4", 1: "f2", 2: "i4", 3: "u1", 4: "i8", 6: "?", 7: "i2", 9: "i1"}

# The operations that are read, by their number in the schema, each with its options:
# the name of a field, its place in the table, its kind and its default.
_Options = tuple[tuple[str, int, str, Any], ...]
_CONVOLUTION: _Options = (
    ("padding", 0, "b", 0),
    ("stride_w", 1, "i", 0),
    ("stride_h", 2, "i", 0),
)
_OPERATIONS: dict[int, tuple[str, _Options]] = {
    2: ("CONCATENATION", (("axis", 0, "i", 0), ("activation", 1, "b", 0))),
    3: (
        "CONV_2D",
        (
            *_CONVOLUTION,
            ("activation", 3, "b", 0),
            ("dilation_w", 4, "i", 1),
            ("dilation_h", 5, "i", 1),
        ),
    ),
    4: (
        "DEPTHWISE_CONV_2D",
        (
            *_CONVOLUTION,
            ("depth_multiplier", 3, "i", 0),
            ("activation", 4, "b", 0),
            ("dilation_w", 5, "i", 1),
            ("dilation_h", 6, "i", 1),
        ),
    ),
    9: (
        "FULLY_CONNECTED",
        (("activation", 0, "b", 0), ("weights_format", 1, "b", 0)),
    ),
    14: ("LOGISTIC", ()),
    22: ("RESHAPE", ()),
    45: (
        "STRIDED_SLICE",
        (
            ("begin_mask", 0, "i", 0),
            ("end_mask", 1, "i", 0),
            ("ellipsis_mask", 2, "i", 0),
            ("new_axis_mask", 3, "i", 0),
            ("shrink_axis_mask", 4, "i", 0),
            ("offset", 5, "?", False),
        ),
    ),
    102: ("SPLIT_V", (("num_splits", 0, "i", 0),)),
    114: ("QUANTIZE", ()),
    129: ("CALL_ONCE", (("subgraph", 0, "i", 0),)),
    142: ("VAR_HANDLE", (("variable", 1, "string", ""),)),
    143: ("READ_VARIABLE", ()),
    144: ("ASSIGN_VARIABLE", ()),
}


class Tensor(NamedTuple):
    """A tensor of a network.

    Attributes:
      name: what the file calls it.
      shape: as the file says it.
      dtype: of its numbers; None for what holds none.
      data: its numbers, if they are in the file.
      scale: float32 steps of its grid, one or one for each entry of an axis; or empty.
      zero_point: the integers that stand for 0, as many as there are scales.
      axis: the axis that the scales belong to.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype | None
    data: np.ndarray | None
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int


class Operation(NamedTuple):
    """An operation: its name in TFLite, tensors by their numbers, and options."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: dict[str, Any]


class Graph(NamedTuple):
    """A sequence of operations on tensors."""

    tensors: tuple[Tensor, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    operations: tuple[Operation, ...]


def load(path: str | os.PathLike[str]) -> tuple[Graph, ...]:
    """Reads a network.

    Args:
      path: a ``.tflite`` file.

    Returns:
      Its graphs. The first one is the network; one more may set its variables.

    Raises:
      ValueError: if the file is damaged, or has an operation that is not read here,
        which is named.
    """
    return parse(pathlib.Path(path).read_bytes())


def parse(content: bytes) -> tuple[Graph, ...]:
    """Reads a network from the content of a file; see `load`.

    Example:
      >>> parse(b"no network")
      Traceback (most recent call last):
      ...
      ValueError: this is no TFLite file: it does not have the mark TFL3.
    """
    if content[4:8] != _IDENTIFIER:
        raise ValueError("this is no TFLite file: it does not have the mark TFL3.")
    try:
        model = _Table(content, _number(content, 0, "I"))
        operations = [_operation_code(code) for code in model.tables(1)]
        buffers = [buffer.bytes(0) for buffer in model.tables(4)]
        return tuple(
            _graph(graph, operations, buffers, content) for graph in model.tables(2)
        )
    except struct.error as error:
        raise ValueError("the TFLite file is damaged: an offset leaves it.") from error


def _operation_code(code: _Table) -> int:
    """The number of an operation; those above 127 do not fit where it once stood."""
    return max(code.scalar(0, "b", 0), code.scalar(3, "i", 0))


def _graph(
    table: _Table, codes: Sequence[int], buffers: Sequence[bytes], content: bytes
) -> Graph:
    tensors = tuple(_tensor(tensor, buffers) for tensor in table.tables(0))

    def known(numbers: np.ndarray, optional: bool = False) -> tuple[int, ...]:
        least = -1 if optional else 0  # an operation's input that is left out
        if any(not least <= number < len(tensors) for number in numbers):
            raise ValueError(f"there are {len(tensors)} tensors, got {numbers}.")
        return tuple(map(int, numbers))

    operations = []
    for operator in table.tables(3):
        index = operator.scalar(0, "I", 0)
        if index >= len(codes):
            raise ValueError(
                f"there are {len(codes)} codes of operations, got {index}."
            )
        if codes[index] not in _OPERATIONS:
            raise ValueError(
                f"the operation {codes[index]} of TFLite's schema is not read here; "
                f"these are: {[name for name, _ in _OPERATIONS.values()]}."
            )
        name, fields = _OPERATIONS[codes[index]]
        given = operator.table(4)
        options = {
            field: default if given is None else given.field(place, kind, default)
            for field, place, kind, default in fields
        }
        inputs = known(operator.numbers(1, "i4"), optional=True)
        outputs = known(operator.numbers(2, "i4"))
        operations.append(Operation(name, inputs, outputs, options))
    inputs, outputs = (known(table.numbers(place, "i4")) for place in (1, 2))
    return Graph(tensors, inputs, outputs, tuple(operations))


def _tensor(table: _Table, buffers: Sequence[bytes]) -> Tensor:
    name, shape = table.string(3), tuple(map(int, table.numbers(0, "i4")))
    if len(shape) > _MOST_AXES or any(n < 0 for n in shape):
        raise ValueError(f"tensor {name!r} has the shape {shape}.")
    kind = _DTYPES.get(table.scalar(1, "b", 0))
    dtype = None if kind is None else np.dtype(kind).newbyteorder("<")
    index = table.scalar(2, "I", 0)
    if index >= len(buffers):
        raise ValueError(f"tensor {name!r} lies in buffer {index}, which there is not.")
    data = None
    if buffers[index] and dtype is not None:
        size = dtype.itemsize
        for n in shape:
            size *= n
        if len(buffers[index]) != size:
            raise ValueError(
                f"tensor {name!r} of shape {shape} has {len(buffers[index])} bytes in "
                f"the place of {size}."
            )
        data = np.frombuffer(buffers[index], dtype).reshape(shape)
    return Tensor(name, shape, dtype, data, *_grid(table, name, shape))


def _grid(
    table: _Table, name: str, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Scales, zero points and their axis."""
    given = table.table(4)
    if given is None:
        return np.zeros(0, np.float32), np.zeros(0, np.int64), 0
    scale, zero_point = given.numbers(2, "f4"), given.numbers(3, "i8")
    axis = given.scalar(6, "i", 0)
    if not zero_point.size:
        zero_point = np.zeros(scale.size, np.int64)
    along = shape[axis] if 0 <= axis < len(shape) else 1
    if scale.size not in (0, 1, along) or zero_point.size != scale.size:
        raise ValueError(
            f"tensor {name!r} of shape {shape} has {scale.size} scales and "
            f"{zero_point.size} zero points along axis {axis}."
        )
    if not np.all(np.isfinite(scale) & (scale > 0)):
        raise ValueError(f"a scale of tensor {name!r} is not positive and finite.")
    return scale, zero_point, axis


def _number(content: bytes, at: int, kind: str) -> Any:
    if at < 0:
        raise ValueError("the TFLite file is damaged: an offset leaves it.")
    (number,) = struct.unpack_from(f"<{kind}", content, at)
    return number


class _Table:
    """A table of a flatbuffer: fields by their numbers, any of which may be missing."""

    def __init__(self, content: bytes, at: int) -> None:
        self.content, self.at = content, at
        self.fields = at - _number(content, at, "i")
        self.size = _number(content, self.fields, "H")

    def place(self, field: int) -> int | None:
        """Where a field lies, or None."""
        entry = 4 + 2 * field
        if entry + 2 > self.size:
            return None
        offset = _number(self.content, self.fields + entry, "H")
        return self.at + offset if offset else None

    def scalar(self, field: int, kind: str, default: Any) -> Any:
        """A number."""
        at = self.place(field)
        return default if at is None else _number(self.content, at, kind)

    def field(self, field: int, kind: str, default: Any) -> Any:
        """A number or a text."""
        is_text = kind == "string"
        return self.string(field) if is_text else self.scalar(field, kind, default)

    def table(self, field: int) -> _Table | None:
        """A table inside this one, or None."""
        at = self.place(field)
        if at is None:
            return None
        return _Table(self.content, at + _number(self.content, at, "I"))

    def bytes(self, field: int, width: int = 1) -> bytes:
        """The content of a list of elements that have so many bytes each."""
        at = self.place(field)
        if at is None:
            return b""
        start = at + _number(self.content, at, "I")
        end = start + 4 + width * _number(self.content, start, "I")
        if end > len(self.content):
            raise ValueError("the TFLite file is damaged: a list leaves it.")
        return self.content[start + 4 : end]

    def numbers(self, field: int, dtype: str) -> np.ndarray:
        """A list of numbers."""
        kind = np.dtype(f"<{dtype}")
        return np.frombuffer(self.bytes(field, kind.itemsize), kind)

    def string(self, field: int) -> str:
        """A text."""
        return self.bytes(field).decode("utf-8", "replace")

    def tables(self, field: int) -> list[_Table]:
        """A list of tables."""
        at = self.place(field)
        if at is None:
            return []
        start = at + _number(self.content, at, "I") + 4
        offsets = self.numbers(field, "u4")
        places = range(start, start + 4 * len(offsets), 4)
        return [
            _Table(self.content, place + int(offset))
            for place, offset in zip(places, offsets, strict=True)
        ]
