"""Gradients of a layer's weights from the gradient at its output.

A layer's output y is linear in its weights: ``y = x · W`` for a product of any kind.
Given dL/dy, the gradient of the weights needs the layer's own input and nothing that
lies before or behind the layer,

    dL/dW = xᵀ · dL/dy,

which is the product transposed. The gradient of an integer layer is computed in
integers: its input is int8 already, and dL/dy is put on a grid of 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fgrad import fixed_point
from fgrad.fixed_point import products, windows
from fgrad.fixed_point.windows import Window
from fgrad.tracing import graph, roundings
from fgrad.tracing.graph import Graph, Node


class Layer(NamedTuple):
    """A leaf of the parameters and the layer that it is a weight of.

    Attributes:
      leaf: number of the leaf's values in the graph.
      output: number of the layer's output.
      nodes: the equations between them.
    """

    leaf: int
    output: int
    nodes: tuple[Node, ...]

    @property
    def path(self) -> tuple[str, ...]:
        """The primitives on the way."""
        return tuple(dict.fromkeys(node.name for node in self.nodes))


def layer_of(program: Graph, leaf: int, data: set[int], examples: int) -> Layer:
    """Finds the layer that a leaf belongs to, and its output.

    From the leaf on, equations are followed while they are linear. The first activation
    through which all of the leaf's effect passes is the layer's product. Equations that
    still belong to the layer, such as the addition of a bias or a residual, are
    followed as well; the output is the layer's pre-activation.

    Args:
      program: the traced loss.
      leaf: number of the leaf's values.
      data: numbers of the values that depend on data.
      examples: length of the leading axis of activations.

    Returns:
      A `Layer`.

    Raises:
      ValueError: if there is no such activation; the text says what was in the way.
    """
    left = program.uses()  # how many uses of each value have not been followed yet
    if not left.get(leaf):
        raise ValueError("the loss does not use it")
    reached, nodes = {leaf}, []
    found: Layer | None = None
    obstacle = ""
    for node in program.nodes:
        inputs = [i for i, x in enumerate(node.inputs) if x in reached]
        if not inputs:
            continue
        if found is not None and not (
            _belongs(program, node, found.output, left, data, examples)
        ):
            break
        if not _is_linear(program, node, inputs):
            obstacle = (
                f"{node.name!r} uses it, is not linear in it or not followed, and"
            )
            break
        nodes.append(node)
        reached.update(node.outputs)
        for x in (node.inputs[i] for i in inputs):
            if isinstance(x, int):
                left[x] -= 1
        open_ends = [value for value in reached if left.get(value)]
        if len(open_ends) == 1 and _is_activation(
            program, open_ends[0], data, examples
        ):
            found = Layer(leaf, open_ends[0], tuple(nodes))
    if found is None:
        raise ValueError(
            f"{obstacle} no activation with {examples} examples on its first axis "
            "holds all of its effect. Either it is used several times, or its layer "
            "cannot be followed, or the data is no argument of value_fn (pass it by "
            "name through update, not in a closure)".strip()
        )
    return found


def rows(program: Graph, leaf: int) -> list[int]:
    """The rows of a leaf that holds the weights of several layers, one in each row.

    Args:
      program: the traced loss.
      leaf: number of the leaf's values.

    Returns:
      The numbers of its rows in order; none unless all that the loss does with the leaf
      is to read every row once.
    """
    readers = [node for node in program.nodes if leaf in node.inputs]
    shape = program.avals[leaf].shape
    found: dict[int, int] = {}
    for node in readers:
        params, (row,) = node.equation.params, node.outputs
        after = [x for x in program.nodes if row in x.inputs]
        one_row = (1, *shape[1:])
        if node.name != "slice" or program.avals[row].shape != one_row:
            return []
        if len(after) != 1 or program.avals[after[0].outputs[0]].shape != shape[1:]:
            return []
        found[params["start_indices"][0]] = after[0].outputs[0]
    every = len(readers) == len(found) == shape[0] if shape else False
    return [found[row] for row in range(shape[0])] if every else []


def _is_activation(program: Graph, value: int, data: set[int], examples: int) -> bool:
    """Whether a value is a float array [examples, ...] that depends on data."""
    aval = program.avals[value]
    return (
        value in data
        and jnp.issubdtype(aval.dtype, jnp.floating)
        and aval.ndim > 0
        and aval.shape[0] == examples
    )


def _is_linear(program: Graph, node: Node, inputs: Sequence[int]) -> bool:
    """Whether a node is linear in these of its operands, and can be transposed.

    Integers may be moved about on their way into a product. What computes with them
    has to make floats.
    """
    one_of_two = len(inputs) == 1 and inputs[0] in node.facts.linear_in
    computes = one_of_two and node.name not in ("dynamic_slice", "gather")
    to_floats = all(
        jnp.issubdtype(program.avals[value].dtype, jnp.floating)
        for value in node.outputs
    )
    return (node.facts.linear or one_of_two) and (
        to_floats or not (computes or node.name == "convert_element_type")
    )


def _belongs(
    program: Graph,
    node: Node,
    output: int,
    left: dict[int, int],
    data: set[int],
    examples: int,
) -> bool:
    """Whether an equation after the product still belongs to the layer.

    A gate, which scales by data of each example, does not; the step of a grid that is
    found anew for each batch does. The division that a rounding begins with belongs to
    the layer that reads what is rounded.
    """
    others = [x for x in node.inputs if x != output and isinstance(x, int)]
    of_examples = [x for x in others if program.avals[x].shape[:1] == (examples,)]
    gated = node.name in ("mul", "div") and not data.isdisjoint(of_examples)
    return (
        node.facts.ends_layer
        and left[output] == 1
        and not gated
        and program.avals[node.outputs[0]].size == program.avals[output].size
        and not roundings.begins(program, node)
    )


def gradient(
    program: Graph, layer: Layer, values: dict[int, Any], dy: jax.Array
) -> jax.Array:
    """dL/dW from dL/dy: the layer, a linear function of its weights, transposed.

    Args:
      program: the traced loss.
      layer: from `layer_of`.
      values: the values of an evaluation, by number.
      dy: gradient at the layer's output, in its shape.

    Returns:
      The gradient of the leaf's values in their shape; float32 if they are integers.
    """
    aval = program.avals[layer.leaf]
    is_float = jnp.issubdtype(aval.dtype, jnp.floating)
    dtype = aval.dtype if is_float else jnp.dtype(jnp.float32)

    def linear(weight: jax.Array) -> Any:
        local: dict[int, Any] = {layer.leaf: weight}
        for node in layer.nodes:
            local.update(
                zip(node.outputs, _linear_part(node, local, values), strict=True)
            )
        return local[layer.output]

    transpose = jax.linear_transpose(linear, jax.ShapeDtypeStruct(aval.shape, dtype))
    result: jax.Array
    (result,) = transpose(dy.astype(program.avals[layer.output].dtype))
    return result


def with_gradients(params: Any, others: Any, gradients: Mapping[str, jax.Array]) -> Any:
    """The gradients of some leaves, and those of the other leaves as they are.

    Args:
      params: pytree of float arrays and `QTensor`.
      others: gradients of the other leaves, in the structure of ``params``.
      gradients: by path, per unit of what each leaf stores.
    """

    def leaf_fn(path: tuple[Any, ...], leaf: Any, other: Any) -> Any:
        value = gradients.get(fixed_point.path_str(path))
        if value is None:
            return other
        # Per unit of the weight's value, not per grid step.
        is_qtensor = fixed_point.is_qtensor(leaf)
        value = value / leaf.scale if is_qtensor else value
        return fixed_point.as_gradient(leaf, value)

    return jax.tree_util.tree_map_with_path(
        leaf_fn, params, others, is_leaf=fixed_point.is_qtensor
    )


def _linear_part(
    node: Node, local: dict[int, Any], values: dict[int, Any]
) -> Sequence[Any]:
    """A node's outputs as a linear function of the values that depend on the weights.

    Args:
      node: an equation of the layer.
      local: the values that depend on the layer's weights, by number.
      values: all values of an evaluation, by number.
    """
    arrays = graph.operands(node, {**values, **local})
    inputs = [i for i, x in enumerate(node.inputs) if x in local]
    if node.name in ("add", "add_any", "sub") and len(inputs) == 1:
        # The other operand is a constant, which has no part in a linear function.
        part = arrays[inputs[0]]
        part = -part if node.name == "sub" and inputs[0] == 1 else part
        out: Any = node.equation.outvars[0].aval
        return [jnp.broadcast_to(part, out.shape)]
    if node.name == "convert_element_type":
        dtype = node.equation.params["new_dtype"]
        # Integer weights are floats here, and stay floats.
        floats = jnp.issubdtype(dtype, jnp.floating)
        return [arrays[0].astype(dtype) if floats else arrays[0]]
    if node.name in _INTEGER_GRADIENTS:
        return [_integer_product(node, *arrays)]
    return node.evaluate(arrays)


def _integer_product(node: Node, x: jax.Array, weight: jax.Array) -> Any:
    """An integer product as a linear function of its weight, to be transposed only."""
    gradient_of = _INTEGER_GRADIENTS[node.name]
    parameters = node.equation.params
    out: Any = node.equation.outvars[0].aval

    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.zeros(out.shape, jnp.float32)  # never run

    def transposed(x: jax.Array, dy: jax.Array) -> jax.Array:
        return gradient_of(x, dy, weight.shape, **parameters)

    return jax.custom_derivatives.linear_call(product, transposed, x, weight)


def integer_dot_gradient(
    x: jax.Array,
    dy: jax.Array,
    shape: Sequence[int],
    *,
    dimension_numbers: Any,
    bits: int = 8,
) -> jax.Array:
    r"""The gradient of the weight of an integer ``dot_general``, in integers.

    .. math:: dW = Δ \; x_q^T \lfloor dy / Δ \rceil, \quad Δ = \max|dy| / 127

    Args:
      x: int8 activations.
      dy: float32 gradient at the product's output.
      shape: of the weight.
      dimension_numbers: of the product.
      bits: of the weight; not used.

    Returns:
      float32, the shape of the weight; the sums are exact in int32.

    Raises:
      ValueError: for sums of more than 2**17 terms, which could overflow.

    Example:
      >>> x = jnp.array([[1, -2]], jnp.int8)
      >>> numbers = (((1,), (0,)), ((), ()))
      >>> integer_dot_gradient(
      ...     x, jnp.array([[127.0]]), (2, 1), dimension_numbers=numbers
      ... )
      Array([[ 127.],
             [-254.]], dtype=float32)
    """
    del bits
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    lhs_free = [a for a in range(x.ndim) if a not in (*lhs_contract, *lhs_batch)]
    rhs_free = [a for a in range(len(shape)) if a not in (*rhs_contract, *rhs_batch)]
    _check_terms(math.prod(x.shape[a] for a in lhs_free))
    dy_q = _to_8_bits(dy)
    batch = len(lhs_batch)
    sums = lax.dot_general(
        x,
        dy_q.qvalue,
        (
            (lhs_free, list(range(batch, batch + len(lhs_free)))),
            (lhs_batch, list(range(batch))),
        ),
        preferred_element_type=jnp.int32,
    )
    # [*batch, *contracted axes in the order of x, *free axes of the weight]
    contracted = [rhs_contract[lhs_contract.index(a)] for a in sorted(lhs_contract)]
    order = np.argsort([*rhs_batch, *contracted, *rhs_free])
    gradient: jax.Array = sums.transpose(order).astype(jnp.float32) * dy_q.scale
    return gradient


def integer_conv_gradient(
    x: jax.Array,
    dy: jax.Array,
    shape: Sequence[int],
    *,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
    bits: int = 8,
) -> jax.Array:
    """The gradient of the kernel of an integer convolution, in integers.

    It is one product for each tap of the kernel, of what the tap sees and dy.

    Args:
      x: int8 activations.
      dy: float32 gradient at the convolution's output.
      shape: of the kernel.
      window_strides: of the convolution, like all that follow.
      padding: pairs.
      lhs_dilation: of the input.
      rhs_dilation: of the kernel.
      dimension_numbers: layout.
      feature_group_count: number of groups; depthwise if all channels are their own.
      bits: of the kernel; not used.

    Returns:
      float32, the shape of the kernel; the sums are exact in int32.

    Raises:
      ValueError: for sums of more than 2**17 terms, which could overflow.
    """
    del bits
    numbers, groups = dimension_numbers, feature_group_count
    out_feature, in_feature, *spatial = numbers.rhs_spec
    size = [shape[axis] for axis in spatial]
    window = Window(size, window_strides, padding, rhs_dilation, lhs_dilation)
    image = window.padded(windows.features_last(x, numbers.lhs_spec))
    dy_q = _to_8_bits(dy)
    out = windows.features_last(dy_q.qvalue, numbers.out_spec)
    _check_terms(math.prod(out.shape[:-1]))
    out = _by_group(out, groups)
    taps = jnp.stack(
        [
            _tap_gradient(_by_group(window.seen_by(tap, image), groups), out)
            for tap in window.taps()
        ]
    )
    sums = taps.reshape(*size, *taps.shape[1:])
    order = np.argsort([*spatial, in_feature, out_feature])
    gradient: jax.Array = sums.transpose(order).astype(jnp.float32) * dy_q.scale
    return gradient


def _by_group(array: jax.Array, groups: int) -> jax.Array:
    """[N, *image, features] as [N * image, groups, features of a group]."""
    return array.reshape(-1, groups, array.shape[-1] // groups)


def _tap_gradient(seen: jax.Array, out: jax.Array) -> jax.Array:
    """The gradient of one tap of a kernel: [inputs of a group, outputs]."""
    if seen.shape[-1] == 1:  # depthwise: no product, but a sum for each channel
        wide = seen.astype(jnp.int32) * out.astype(jnp.int32)
        return wide.sum(0).reshape(1, -1)
    sums = lax.dot_general(
        seen, out, (((0,), (0,)), ((1,), (1,))), preferred_element_type=jnp.int32
    )
    return sums.transpose(1, 0, 2).reshape(seen.shape[-1], -1)


_INTEGER_GRADIENTS: dict[str, Callable[..., jax.Array]] = {
    "integer_dot_general": integer_dot_gradient,
    "integer_conv": integer_conv_gradient,
}


def _to_8_bits(dy: jax.Array) -> fixed_point.QTensor:
    """A gradient on the 8-bit grid that its largest value spans."""
    dy = dy.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(dy), initial=0), 1e-30) / 127
    return fixed_point.quantize_to_scale(dy, scale, 8)


def _check_terms(terms: int) -> None:
    if terms > products.MAX_TERMS:
        raise ValueError(
            f"the gradient of an integer layer sums {terms} examples and positions, "
            f"which could overflow its int32 accumulator; the bound is "
            f"{products.MAX_TERMS}. Take a smaller batch."
        )
