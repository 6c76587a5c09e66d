"""From a float function to a program on integers."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fgrad import _checks, fixed_point
from fgrad.fixed_point import QTensor, is_qtensor
from fgrad.integer import calibration as calibrations
from fgrad.integer import primitives
from fgrad.integer.primitives import Grids
from fgrad.integer.ranges import MIDDLE, ConversionError, Fixed, rescale
from fgrad.integer.stored import stored
from fgrad.tracing import graph as tracing
from fgrad.tracing.graph import Graph, Node
from fgrad.tracing.primitives import scan_sizes


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A function on integers; made by `convert`.

    Attributes:
      function: the float function, ``function(params, *args)``.
      params: the parameters, `QTensor` leaves in the place of float ones.
      examples: the calibration arguments, as shapes and types.
      grids: where the values of the traced function lie.
      equations: names of the primitives of the traced function.
      input_scales: scale of each argument's leaves, None for integers.
    """

    function: Callable[..., Any]
    params: Any
    examples: tuple[Any, ...]
    grids: Grids
    equations: tuple[str, ...]
    input_scales: tuple[Any, ...]

    def encode(self, *args: Any) -> Any:
        """Arguments as the program takes them: floats become int8.

        Args:
          *args: those of the float function, without params.

        Returns:
          A tuple of arguments, or the only one.
        """
        leaves, structure = jax.tree.flatten(args)
        limit = fixed_point.max_qvalue(self.grids.bits)
        coded = [
            jnp.asarray(x)
            if scale is None
            else jnp.clip(jnp.round(jnp.asarray(x) / scale), -limit, limit).astype(
                jnp.int8
            )
            for x, scale in zip(leaves, self.input_scales, strict=True)
        ]
        encoded = jax.tree.unflatten(structure, coded)
        return encoded[0] if len(encoded) == 1 else encoded

    @property
    def examples_encoded(self) -> tuple[Any, ...]:
        """Shapes and types of the encoded calibration arguments."""
        leaves, structure = jax.tree.flatten(self.examples)
        coded = [
            x if scale is None else jax.ShapeDtypeStruct(x.shape, jnp.int8)
            for x, scale in zip(leaves, self.input_scales, strict=True)
        ]
        arguments: tuple[Any, ...] = jax.tree.unflatten(structure, coded)
        return arguments

    def __call__(self, params: Any, *encoded: Any) -> Any:
        """The integers of the results.

        Args:
          params: ``program.params``, the same with other integers, or integer arrays
            in the place of its `QTensor` leaves.
          *encoded: from `encode`; any leading batch that the function allows.

        Returns:
          The function's result, integers in the place of floats; `decode` knows what
          they stand for.
        """
        return jax.tree.map(_array, self.values(params, *encoded), is_leaf=_is_fixed)

    def decode(self, params: Any, *encoded: Any) -> Any:
        """The results as floats, ``scale * q``."""
        return self._decode(params, *encoded)

    @functools.cached_property
    def _decode(self) -> Callable[..., Any]:
        def decoded(params: Any, *encoded: Any) -> Any:
            return jax.tree.map(
                lambda x: x.q * jnp.float32(x.scale) if _is_fixed(x) else x,
                self.values(params, *encoded),
                is_leaf=_is_fixed,
            )

        return jax.jit(decoded)

    def values(self, params: Any, *encoded: Any) -> Any:
        """The results as `Fixed`, with their scales and bounds."""
        graph, structure = self.traced(encoded)
        results = run(graph, self.grids, self._operands(graph, params, encoded))
        return jax.tree.unflatten(structure, results)

    def values_and_factors(
        self, params: Any, *encoded: Any, product: Callable[[Graph], Node]
    ) -> tuple[Any, tuple[Fixed, Fixed]]:
        """`values`, and what one of the products multiplies.

        Args:
          params: as `values` takes them.
          *encoded: as `values` takes them.
          product: finds that product among the equations.
        """
        graph, structure = self.traced(encoded)
        operands = self._operands(graph, params, encoded)
        seen: list[Fixed] = []
        results = run(graph, self.grids, operands, product(graph), seen)
        return jax.tree.unflatten(structure, results), (seen[0], seen[1])

    def _operands(self, graph: Graph, params: Any, encoded: Any) -> list[Any]:
        """The inputs of the graph as the rules take them."""
        weights = integers(params)
        leaves = jax.tree.leaves(encoded)
        if tuple(node.name for node in graph.nodes) != self.equations:
            raise ConversionError(
                "the function computes something else for arguments of these shapes "
                "than for those of the calibration; calibrate with arguments that "
                "differ from them in their batch only."
            )
        own = jax.tree.leaves(self.params, is_leaf=is_qtensor)
        operands: list[Any] = [
            _parameter(q, leaf) if is_qtensor(leaf) else q
            for q, leaf in zip(jax.tree.leaves(weights), own, strict=True)
        ]
        limit = fixed_point.max_qvalue(self.grids.bits)
        operands += [
            jnp.asarray(x)
            if scale is None
            else Fixed(jnp.asarray(x), scale, -limit, limit)
            for x, scale in zip(leaves, self.input_scales, strict=True)
        ]
        return operands

    def traced(self, encoded: Sequence[Any]) -> tuple[Graph, Any]:
        """The graph for arguments of these shapes, and the result's structure."""
        leaves, structure = jax.tree.flatten(tuple(encoded))
        kinds = jax.tree.leaves(self.examples)
        shapes = [
            jax.ShapeDtypeStruct(jnp.shape(x), kind.dtype)
            for x, kind in zip(leaves, kinds, strict=True)
        ]
        params = jax.eval_shape(fixed_point.dequantize, self.params)
        return _trace(self.function, params, jax.tree.unflatten(structure, shapes))


def convert(
    fn: Callable[..., Any],
    params: Any,
    *calibration_args: Any,
    bits: tuple[int, int] = (16, 8),
    channel_axis: int | None = None,
    calibration: fixed_point.Calibration = fixed_point.abs_max,
    headroom: float = 1.5,
) -> Program:
    r"""Turns a float function into a program that computes with integers only.

    The function is traced, run on the calibration data, and rewritten equation by
    equation. Every value becomes ``scale * q`` with a scale that is fixed here:

    .. math:: y = \sum_k x_k w_k \quad→\quad
      y_q = \lfloor \tfrac{Δ_x Δ_w}{Δ_y} \sum_k x_{q,k} w_{q,k} \rceil
      ≈ \lfloor \tfrac{m}{2^s} \sum_k x_{q,k} w_{q,k} \rceil

    Activations have ``bits[1]`` bits where they enter a product and 16 in between.
    That no operation leaves int32 is proven here, from the widths alone.

    Args:
      fn: ``fn(params, *args)``, of any library; its float operations are those of one
        example or of a batch.
      params: pytree of float arrays or of `QTensor`, whose scales are kept, one for the
        tensor or one for each channel.
      *calibration_args: arguments that are typical of those to come; floats among them
        become int8, integers stay.
      bits: width of the weights, 2 to 16, and of the activations, 2 to 8.
      channel_axis: None for one scale per tensor; an axis (-1: the output channels of
        Flax) for one scale per channel, as `fgrad.quantize` has it. With 8-bit weights
        it matters.
      calibration: which magnitude the 8 bits of an activation end at: that of
        ``fgrad.fixed_point.abs_max``, ``percentile(q)`` or ``mse_optimal()``, which
        lets outliers saturate.
      headroom: how far weights and activations may grow beyond what is seen here.

    Returns:
      A `Program`: ``program.params``, ``program.encode(*args)``,
      ``program(qparams, *encoded)``.

    Raises:
      ConversionError: for an operation without an integer rule, with its source line
        and what to do; for a sum that int32 does not hold.
      ValueError: for bits out of range.

    Example:
      >>> fn = lambda params, x: jax.nn.relu(x @ params["w"])
      >>> x = jnp.array([[0.5, -1.0]])
      >>> program = convert(fn, {"w": jnp.array([[1.0], [-0.5]])}, x)
      >>> program(program.params, program.encode(x)).dtype
      dtype('int16')
      >>> program.decode(program.params, program.encode(x)).round(2)
      Array([[1.]], dtype=float32)

    Reference:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference", CVPR 2018.
    """
    weight_bits, activation_bits = _checked_bits(bits)
    _checks.at_least("headroom", headroom, 1)
    _checks.function("fn", fn, "params", *["argument"] * len(calibration_args))
    _checks.function("calibration", calibration, "x", "axes", "bits")
    _checks.arrays(params, fixed_point.is_qtensor)
    args = jax.tree.map(jnp.asarray, calibration_args)
    qparams = fixed_point.quantize(
        params, weight_bits, channel_axis=channel_axis, headroom=headroom
    )
    values = fixed_point.dequantize(qparams)
    graph, _ = _trace(fn, values, args)
    leaves = jax.tree.leaves(args)
    bound = None
    if calibration is not fixed_point.abs_max:
        bound = functools.partial(_bound, calibration, activation_bits)
    observed = calibrations.observe(graph, [*jax.tree.leaves(values), *leaves], bound)
    grids = Grids(observed, activation_bits, headroom)
    scales = tuple(
        primitives.scale_for(float(jnp.max(jnp.abs(x))), activation_bits)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else None
        for x in leaves
    )
    examples = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    names = tuple(node.name for node in graph.nodes)
    program = Program(fn, qparams, examples, grids, names, scales)
    # Every rule and every proof, before the first run.
    jax.eval_shape(program, qparams, *program.examples_encoded)
    return program


def _bound(calibration: fixed_point.Calibration, bits: int, x: jax.Array) -> jax.Array:
    """The largest magnitude of an activation that its grid has."""
    bound: jax.Array = calibration(x, tuple(range(x.ndim)), bits).reshape(())
    return bound


def _checked_bits(bits: Any) -> tuple[int, int]:
    """The widths of weights and activations."""
    if not isinstance(bits, tuple | list) or len(bits) != 2:
        raise TypeError(
            "bits must be two numbers, (16, 8) for weights of 16 bits and activations "
            f"of 8, got {bits!r}."
        )
    weights, activations = bits
    fixed_point.max_qvalue(weights)
    products = ", since they enter int8 products"
    return int(weights), _checks.integer(
        "the second of bits, that of activations,", activations, 2, 8, products
    )


def integers(params: Any) -> Any:
    """The integer arrays of parameters, without their scales."""
    return jax.tree.map(
        lambda x: fixed_point.integers_of(x) if is_qtensor(x) else x,
        params,
        is_leaf=is_qtensor,
    )


def run(
    graph: Graph,
    grids: Grids,
    operands: Sequence[Any],
    product: Node | None = None,
    seen: list[Fixed] | None = None,
) -> list[Any]:
    """The results of a graph on integers.

    Args:
      graph: of the float function.
      grids: where its values lie.
      operands: for its inputs, as the rules take them.
      product: a product whose two factors are of interest.
      seen: a list that gets these factors.
    """
    known: dict[int, Any] = {
        number: _constant(x) for number, x in graph.constants.items()
    }
    known.update(zip(graph.inputs, operands, strict=True))

    def read(x: Any) -> Any:
        return _constant(x.value) if isinstance(x, tracing.Literal) else known[x]

    read_by = (x for node in graph.nodes for x in node.inputs if isinstance(x, int))
    uses = collections.Counter(read_by)
    for node in graph.nodes:
        values = [read(x) for x in node.inputs]
        results: Sequence[Any]
        if node is product and seen is not None:
            seen += primitives.factors(grids, node, *values)
            results = [primitives.linear(grids, node, *seen)]
        else:
            results = _evaluate(grids, node, values)
        for number, x in zip(node.outputs, results, strict=True):
            known[number] = _computed_once(x) if uses[number] > 1 else x
    return [primitives.with_one_scale(read(x)) for x in graph.outputs]


def _computed_once(x: Any) -> Any:
    """A value that several equations read; weights are stored as they are."""
    if not _is_fixed(x) or x.weight:
        return x
    return x.replace(q=stored(x.q))


def _evaluate(grids: Grids, node: Node, operands: Sequence[Any]) -> Sequence[Any]:
    if all(isinstance(x, np.ndarray) for x in operands):
        with jax.ensure_compile_time_eval():
            return [np.asarray(x) for x in node.evaluate(operands)]
    if node.name == "scan":
        with jax.named_scope(_layer(node)):
            return _scan(grids, node, operands)
    avals: list[Any] = [v.aval for v in node.equation.outvars]
    real = any(_is_fixed(x) or primitives.is_constant(x) for x in operands)
    if not real and not any(jnp.issubdtype(x.dtype, jnp.floating) for x in avals):
        return node.evaluate(operands)
    if node.name not in primitives.RULES:
        raise primitives.unsupported(node)
    try:
        with jax.named_scope(_layer(node)):
            if node.name not in primitives.OF_CHANNELS:
                operands = [primitives.with_one_scale(x) for x in operands]
            results = primitives.RULES[node.name](grids, node, *operands)
    except ConversionError as error:
        if "has no integer rule" in str(error):
            raise
        raise ConversionError(
            f"{node.name} ({primitives.source_of(node.equation)}): {error}"
        ) from error
    return results if isinstance(results, list) else [results]


def _scan(grids: Grids, node: Node, operands: Sequence[Any]) -> list[Any]:
    """A loop over time: what is carried has one grid for all iterations."""
    graph, inside = calibrations.body_of(node), grids.inside(node)
    constants, carried = scan_sizes(node.equation.params)
    operands = [
        primitives.as_fixed(x) if primitives.is_constant(x) else x for x in operands
    ]
    operands[constants:] = map(primitives.with_one_scale, operands[constants:])
    carry = [
        _carried(inside, x, graph.inputs[constants + i], graph.outputs[i])
        for i, x in enumerate(operands[constants : constants + carried])
    ]
    fixed_operands = [*operands[:constants], *carry, *operands[constants + carried :]]
    outputs: list[Any] = []

    def body(_: Any, state: list[Any], slices: list[Any]) -> tuple[list[Any], Any]:
        arrays = [*fixed_operands[:constants]]
        arrays += map(_like, state, carry)
        arrays += map(_like, slices, fixed_operands[constants + carried :])
        results = run(graph, inside, arrays)
        after = [
            rescale(primitives.as_fixed(x), to.scale, MIDDLE).q.astype(to.q.dtype)
            if _is_fixed(to)
            else _array(x)
            for x, to in zip(results, carry, strict=False)
        ]
        outputs[:] = [
            primitives.as_fixed(x) if primitives.is_constant(x) else x
            for x in results[carried:]
        ]
        return after, [_array(x) for x in outputs]

    last, stacked = calibrations.scan_over(
        node, body, [_array(x) for x in fixed_operands]
    )
    return [*map(_like, last, carry), *map(_like, stacked, outputs)]


def _carried(inside: Grids, x: Any, before: int, after: Any) -> Any:
    if not _is_fixed(x):
        return x
    bound = inside.magnitude(before)
    if isinstance(after, int) and after in inside.observed.values:
        bound = max(bound, inside.magnitude(after))
    x = rescale(x, primitives.scale_for(bound, MIDDLE), MIDDLE)
    return Fixed(x.q.astype(jnp.int16), x.scale, -32767, 32767)


def _like(array: Any, x: Any) -> Any:
    """An array with the scale and bounds of another value."""
    return x.replace(q=array, weight=False) if _is_fixed(x) else array


def _parameter(q: Any, leaf: QTensor) -> Fixed:
    limit, scales = leaf.max_qvalue, np.asarray(leaf.scale, np.float64)
    scale = float(np.max(scales))
    channels = scales / scale if scales.size > 1 else None
    q = jnp.asarray(q).astype(fixed_point.storage_dtype(leaf.bits))
    return Fixed(q, scale, -limit, limit, weight=True, channels=channels)


@functools.cache
def _cached(function: Any, structure: Any, shapes: Any) -> tuple[Graph, Any]:
    params, args = jax.tree.unflatten(
        structure, [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    )
    result = jax.eval_shape(function, params, *args)
    graph = tracing.trace(function, params, *args)
    return graph, jax.tree.structure(result)


def _trace(function: Any, params: Any, args: Sequence[Any]) -> tuple[Graph, Any]:
    leaves, structure = jax.tree.flatten((params, tuple(args)))
    shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
    return _cached(function, structure, shapes)


def _layer(node: Node) -> str:
    """Where in the model an equation is, for the readers of what is made of it."""
    stack = str(node.equation.source_info.name_stack)
    return f"{stack}/{node.name}" if stack else node.name


def _constant(x: Any) -> Any:
    return np.asarray(x)


def _is_fixed(x: Any) -> bool:
    return isinstance(x, Fixed)


def _array(x: Any) -> Any:
    return x.q if _is_fixed(x) else x
