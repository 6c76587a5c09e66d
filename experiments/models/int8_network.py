"""Runs an already quantized network from a TFLite file, in integers and bit for bit.

What TFLite's reference kernels compute: int8 activations with a zero point, int8
kernels with a scale for each output, sums in int32, and a rounding multiplication by
32-bit factors. The kernels are `fgrad.QTensor` leaves, so that forward gradients train
the integers as they are. A streaming network keeps its past in variables; here they go
in and out of a call, as a state.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import fgrad
from experiments.data import tflite
from experiments.data.tflite import Graph, Operation, Tensor
from fgrad.fixed_point import integers_of, words

State = dict[str, jax.Array]

_PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_NONE, _RELU, _RELU6 = 0, 1, 3  # fused activations, by their numbers in the schema


@dataclasses.dataclass(frozen=True, eq=False)
class Int8Network:
    """A network of a TFLite file as a function of its kernels.

    Attributes:
      graphs: what the file says.
      params: its kernels as `fgrad.QTensor`, by the names "0_conv_2d", "1_...".
    """

    graphs: tuple[Graph, ...]
    params: dict[str, fgrad.QTensor]

    @property
    def inputs(self) -> list[Tensor]:
        """What the network takes."""
        return [self.graphs[0].tensors[i] for i in self.graphs[0].inputs]

    def initial_state(self) -> State:
        """The variables before the first call, as the file sets them."""
        state: State = {}
        for operation in self.graphs[0].operations:
            if operation.name == "CALL_ONCE":
                graph = self.graphs[operation.options["subgraph"]]
                _, state = _Run(graph, {}, state).result()
        return state

    def __call__(
        self, params: Mapping[str, Any], state: State, *inputs: jax.Array
    ) -> tuple[list[jax.Array], State]:
        """Runs the network once.

        Args:
          params: kernels, as `params`.
          state: variables.
          *inputs: int8, of the shapes of `inputs`.

        Returns:
          All tensors that operations computed, by the order in which they did, and the
          variables for the next call. The last tensor is the output.
        """
        run = _Run(self.graphs[0], params, state)
        run.values.update(zip(self.graphs[0].inputs, inputs, strict=True))
        return run.result()

    def tensor(self, position: int) -> Tensor:
        """What the file says of the tensor at a position of the list of a call."""
        return self.graphs[0].tensors[self.numbers[position]]

    @property
    def numbers(self) -> list[int]:
        """Numbers of the tensors in the list of a call."""
        silent = ("VAR_HANDLE", "CALL_ONCE", "ASSIGN_VARIABLE")
        return [
            number
            for operation in self.graphs[0].operations
            if operation.name not in silent
            for number in operation.outputs
        ]


def load(path: str | os.PathLike[str]) -> Int8Network:
    """Reads a network whose products have int8 operands.

    Args:
      path: a ``.tflite`` file.

    Raises:
      ValueError: as `experiments.data.tflite.load`; for a product of other types, a
        kernel with a zero point, and options that are not followed here.
    """
    return of_graphs(tflite.load(path))


def of_graphs(graphs: tuple[Graph, ...]) -> Int8Network:
    """A network of what `experiments.data.tflite` read."""
    if not graphs:
        raise ValueError("the TFLite file has no graph.")
    params = {}
    for name, operation in _products(graphs[0]):
        x, kernel, bias, out = _operands(graphs[0], operation)
        _check_product(name, operation, x, kernel, bias, out)
        shape = [1] * len(kernel.shape)
        if kernel.scale.size > 1:
            shape[kernel.axis] = kernel.scale.size
        scale = jnp.asarray(kernel.scale.reshape(shape))
        # -128 lies outside a symmetric grid; TFLite's converter does not use it.
        params[name] = fgrad.QTensor(jnp.asarray(kernel.data, jnp.int8), scale, 8)
    return Int8Network(graphs, params)


def _products(graph: Graph) -> list[tuple[str, Operation]]:
    found = [op for op in graph.operations if op.name in _PRODUCTS]
    return [(f"{i}_{op.name.lower()}", op) for i, op in enumerate(found)]


def _operands(
    graph: Graph, operation: Operation
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    if len(operation.inputs) not in (2, 3) or len(operation.outputs) != 1:
        raise ValueError(f"{operation.name} has the operands {operation.inputs}.")
    x, kernel = (graph.tensors[i] for i in operation.inputs[:2])
    has_bias = len(operation.inputs) == 3 and operation.inputs[2] >= 0
    bias = graph.tensors[operation.inputs[2]] if has_bias else None
    return x, kernel, bias, graph.tensors[operation.outputs[0]]


def _check_product(
    name: str,
    operation: Operation,
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    types = [tensor.dtype for tensor in (x, kernel, out)]
    if any(dtype != np.int8 for dtype in types) or kernel.data is None:
        raise ValueError(f"{name} has operands of {types}; int8 is read here.")
    if np.any(kernel.zero_point) or not kernel.scale.size:
        raise ValueError(f"the kernel of {name} must have scales and no zero point.")
    if np.any(kernel.data == -128):
        raise ValueError(f"the kernel of {name} holds -128, beyond a symmetric grid.")
    if bias is not None and (bias.dtype != np.int32 or bias.data is None):
        raise ValueError(f"the bias of {name} must be int32, got {bias.dtype}.")
    if x.scale.size != 1 or out.scale.size != 1:
        raise ValueError(f"the activations of {name} must have one scale each.")
    options = operation.options
    if options["activation"] not in (_NONE, _RELU, _RELU6):
        raise ValueError(f"{name} has the activation {options['activation']}.")
    if options.get("weights_format"):
        raise ValueError(f"the kernel of {name} is shuffled.")
    if operation.name == "DEPTHWISE_CONV_2D" and kernel.shape[3] != x.shape[3]:
        raise ValueError(f"{name} has several outputs for each channel.")


# ----------------------------------------------------------------------------- running


class _Run:
    """One run of a graph."""

    def __init__(self, graph: Graph, params: Mapping[str, Any], state: State) -> None:
        self.graph, self.params, self.state = graph, params, dict(state)
        self.values: dict[int, jax.Array] = {}
        self.variables: dict[int, str] = {}
        self.names = {id(op): name for name, op in _products(graph)}
        self.computed: list[jax.Array] = []

    def result(self) -> tuple[list[jax.Array], State]:
        for operation in self.graph.operations:
            self.operation(operation)
        return self.computed, self.state

    def operation(self, operation: Operation) -> None:
        name, inputs, outputs = operation.name, operation.inputs, operation.outputs
        if name == "VAR_HANDLE":
            self.variables[outputs[0]] = operation.options["variable"]
        elif name == "ASSIGN_VARIABLE":
            self.state[self.variables[inputs[0]]] = self.value(inputs[1])
        elif name != "CALL_ONCE":
            if name == "READ_VARIABLE":
                found: Any = self.state[self.variables[inputs[0]]]
            elif name in _PRODUCTS:
                found = self.product(operation)
            else:
                found = _OTHERS[name](self, operation)
            found = found if isinstance(found, list) else [found]
            self.values.update(zip(outputs, found, strict=True))
            self.computed += found

    def value(self, number: int) -> jax.Array:
        if number in self.values:
            return self.values[number]
        return jnp.asarray(self.constant(number))

    def constant(self, number: int) -> np.ndarray:
        """The numbers of a tensor that must be in the file."""
        data = self.graph.tensors[number].data
        if data is None:
            raise ValueError(f"tensor {self.graph.tensors[number].name!r} is missing.")
        return data

    def product(self, operation: Operation) -> jax.Array:
        x, kernel, bias, out = _operands(self.graph, operation)
        image = self.value(operation.inputs[0])
        q = integers_of(self.params[self.names[id(operation)]])
        zero = jnp.int32(x.zero_point[0])
        if operation.name == "FULLY_CONNECTED":
            sums = lax.dot_general(
                image.reshape(-1, q.shape[1]),
                q,
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.int32,
            )
            sums -= zero * jnp.sum(q, 1, dtype=jnp.int32)
        else:
            sums = _convolved(image, q, operation, x.zero_point[0])
        if bias is not None:
            sums += jnp.asarray(bias.data)
        factors = _factors(x, kernel, out, operation.name)
        y = _times(sums, *factors) + jnp.int32(out.zero_point[0])
        low, high = _range(operation.options["activation"], out)
        # The file is for one example at a time, and a call may have more.
        return jnp.clip(y, low, high).astype(jnp.int8).reshape(len(y), *out.shape[1:])


def _convolved(
    image: jax.Array, q: jax.Array, operation: Operation, zero: int
) -> jax.Array:
    """``Σ (x - zero) q`` of a convolution, in int32."""
    options = operation.options
    depthwise = operation.name == "DEPTHWISE_CONV_2D"
    strides = options["stride_h"], options["stride_w"]
    dilation = options["dilation_h"], options["dilation_w"]
    window = q.shape[1:3]
    if options["padding"] == 0:  # SAME, with the integers that stand for 0
        reach = [(n - 1) * d + 1 for n, d in zip(window, dilation, strict=True)]
        pads = lax.padtype_to_pads(image.shape[1:3], reach, strides, "SAME")
        image = jnp.pad(image, [(0, 0), *pads, (0, 0)], constant_values=zero)
    layout = ("NHWC", "IHWO" if depthwise else "OHWI", "NHWC")
    sums = lax.conv_general_dilated(
        image,
        q,
        strides,
        "VALID",
        rhs_dilation=dilation,
        dimension_numbers=layout,
        feature_group_count=image.shape[3] if depthwise else 1,
        preferred_element_type=jnp.int32,
    )
    axes = (0, 1, 2) if depthwise else (1, 2, 3)
    return sums - jnp.int32(zero) * jnp.sum(q, axes, dtype=jnp.int32)


def _factors(
    x: Tensor, kernel: Tensor, out: Tensor, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """The factor of each output as ``multiplier * 2**(shift - 31)``."""
    given, wanted = np.float64(x.scale[0]), np.float64(out.scale[0])
    real = given * kernel.scale.astype(np.float64) / wanted
    if name == "FULLY_CONNECTED" and kernel.scale.size == 1:
        real = np.float64(x.scale[0] * kernel.scale) / wanted  # rounded to float32
    mantissa, shift = np.frexp(real)
    multiplier = np.floor(mantissa * 2.0**31 + 0.5).astype(np.int64)
    full = multiplier == 2**31
    multiplier, shift = np.where(full, 2**30, multiplier), shift + full
    tiny = shift < -31
    return np.where(tiny, 0, multiplier).astype(np.int32), np.where(tiny, 0, shift)


def _times(sums: jax.Array, multiplier: np.ndarray, shift: np.ndarray) -> jax.Array:
    """``sums * multiplier * 2**(shift - 31)``, rounded twice as TFLite does."""
    left = jnp.asarray(np.maximum(shift, 0), jnp.int32)
    right = jnp.asarray(np.maximum(-shift, 0), jnp.int32)
    sums = sums << left
    negative = sums < 0
    high, low = words.multiply(
        jnp.abs(sums).astype(jnp.uint32), jnp.asarray(multiplier, jnp.uint32)
    )
    # Half of 2**31 is added, less one below zero: there a half is rounded up.
    nudge = jnp.where(negative, jnp.uint32(2**30 - 1), jnp.uint32(2**30))
    total = low + nudge
    high += (total < low).astype(jnp.uint32)
    magnitude = ((high << 1) | (total >> 31)).astype(jnp.int32)
    doubled = jnp.where(negative, -magnitude, magnitude)
    mask = (jnp.int32(1) << right) - 1
    threshold = (mask >> 1) + (doubled < 0).astype(jnp.int32)
    rounded: jax.Array = (doubled >> right) + ((doubled & mask) > threshold)
    return rounded


def _range(activation: int, out: Tensor) -> tuple[int, int]:
    """The integers that an activation may take."""
    zero, scale = int(out.zero_point[0]), float(out.scale[0])
    low, high = -128, 127
    if activation in (_RELU, _RELU6):
        low = max(low, zero)
    if activation == _RELU6:
        high = min(high, zero + math.floor(6 / scale + 0.5))
    return low, high


def _concatenation(run: _Run, operation: Operation) -> jax.Array:
    tensors = [run.graph.tensors[i] for i in (*operation.inputs, *operation.outputs)]
    grids = {(*t.scale.tolist(), *t.zero_point.tolist()) for t in tensors}
    if len(grids) != 1 or operation.options["activation"]:
        raise ValueError("tensors on different grids cannot be put together here.")
    parts = [run.value(i) for i in operation.inputs]
    return jnp.concatenate(parts, operation.options["axis"])


def _reshape(run: _Run, operation: Operation) -> jax.Array:
    x = run.value(operation.inputs[0])
    shape = run.graph.tensors[operation.outputs[0]].shape
    return x.reshape(len(x), *shape[1:]) if shape[:1] == (1,) else x.reshape(shape)


def _strided_slice(run: _Run, operation: Operation) -> jax.Array:
    options = dict(operation.options)
    begin_mask, end_mask = options.pop("begin_mask"), options.pop("end_mask")
    if any(options.values()):
        raise ValueError(f"STRIDED_SLICE has the options {options}.")
    begin, end, strides = (run.constant(i).tolist() for i in operation.inputs[1:])
    places = tuple(
        slice(
            None if begin_mask >> axis & 1 else b,
            None if end_mask >> axis & 1 else e,
            s,
        )
        for axis, (b, e, s) in enumerate(zip(begin, end, strides, strict=True))
    )
    return run.value(operation.inputs[0])[places]


def _split(run: _Run, operation: Operation) -> list[jax.Array]:
    x, sizes, axis = operation.inputs
    ends = np.cumsum(run.constant(sizes))[:-1].tolist()
    return list(jnp.split(run.value(x), ends, int(run.constant(axis))))


def _logistic(run: _Run, operation: Operation) -> jax.Array:
    """A table of the 256 values."""
    x = run.graph.tensors[operation.inputs[0]]
    out = run.graph.tensors[operation.outputs[0]]
    q = np.arange(-128, 128) - np.float32(x.zero_point[0])
    value = 1 / (1 + np.exp(-(x.scale[0] * q.astype(np.float32))))
    table = np.rint(value / out.scale[0]) + out.zero_point[0]
    table = np.clip(table, -128, 127).astype(np.int8)
    return jnp.asarray(table)[run.value(operation.inputs[0]).astype(jnp.int32) + 128]


def _quantize(run: _Run, operation: Operation) -> jax.Array:
    """From int8 to uint8 on the same grid."""
    x = run.graph.tensors[operation.inputs[0]]
    out = run.graph.tensors[operation.outputs[0]]
    offset = int(out.zero_point[0] - x.zero_point[0])
    if out.dtype != np.uint8 or out.scale[0] != x.scale[0] or offset != 128:
        raise ValueError("QUANTIZE is read from int8 to uint8 on one grid.")
    value = run.value(operation.inputs[0]).astype(jnp.int32)
    return (value + offset).astype(jnp.uint8)


_OTHERS: dict[str, Callable[[_Run, Operation], Any]] = {
    "CONCATENATION": _concatenation,
    "LOGISTIC": _logistic,
    "QUANTIZE": _quantize,
    "RESHAPE": _reshape,
    "SPLIT_V": _split,
    "STRIDED_SLICE": _strided_slice,
}
