"""Bytes that a network and a way to train it need on a device with planned buffers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from fgrad import _checks, fixed_point
from fgrad.fixed_point import is_qtensor
from fgrad.tracing import graph, primitives
from fgrad.tracing.graph import Graph, Node

Method = Literal["inference", "forward", "backward"]
_METHODS = ("inference", "forward", "backward")

_LOOPS = {"cond", "scan", "while"}


class DeviceBudget(NamedTuple):
    """Bytes by what they hold.

    Attributes:
      weights: the parameters.
      activations: the most bytes of activations that are needed at one time. For
        backpropagation, all that is stored for the backward pass counts, and the
        gradients at one layer.
      gradients: gradients of the weights that train.
      state: state of the optimizer.
      layer: shape of the activation that is made when most bytes are needed.
    """

    weights: int
    activations: int
    gradients: int
    state: int
    layer: tuple[int, ...]

    @property
    def scratch(self) -> int:
        """Activations and gradients: what is needed beside the model."""
        return self.activations + self.gradients

    @property
    def total(self) -> int:
        """Everything."""
        return self.weights + self.scratch + self.state

    def fits(self, *sizes: int) -> dict[int, bool]:
        """Whether everything fits into memories of these bytes.

        Example:
          >>> DeviceBudget(200_000, 50_000, 0, 0, ()).fits(256 * 1024, 10**6)
          {262144: True, 1000000: True}
        """
        return {size: self.total <= size for size in sizes}

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self._asdict(), "scratch": self.scratch, "total": self.total}


def device_budget(
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    method: Method = "forward",
    trains: Callable[[str], bool] = lambda name: True,
    bits: tuple[int, int] = (16, 16),
    gradient_bits: int | None = None,
    density: float = 1.0,
    whole_gradient: bool = True,
    slots: int = 0,
) -> DeviceBudget:
    r"""Counts what a device needs that plans its buffers itself, such as an NPU.

    The traced network is run buffer by buffer: an activation lives from the equation
    that makes it to the last one that reads it; an elementwise equation writes over an
    operand that nobody reads any more; a reshape or transpose is a view; an elementwise
    value that one other elementwise equation or reduction reads is never stored. With
    live sets :math:`A_t`,

    .. math::
        \text{forward: } \max_t |A_t|, \qquad \text{backward: } \max \Big(
        \max_t \Big|A_t \cup \bigcup_{s<t} S_s\Big|, \;
        \Big|\bigcup_t S_t\Big| + \max_t (|y_t| + |x_t|) \Big),

    where :math:`S_t` is what the derivative of equation t needs if a weight that trains
    is before it (the input of a product whose weight trains, both operands of a product
    of activations, the input or the output of a nonlinearity), :math:`x_t` and
    :math:`y_t` its input and output. Weights are perturbed while they are read. A
    loop's iteration counts once, and what it stores for the backward pass as often as
    it runs.

    Args:
      apply_fn: ``apply_fn(params, *inputs)``, any JAX function.
      params: pytree of arrays, of shapes, or of `QTensor`, whose bits then count.
      *inputs: arrays or shapes, with the batch that the device will see.
      method: "inference", "forward" or "backward".
      trains: whether a leaf trains, by its name ("Block_0/Dense_0/kernel").
      bits: of weights and of activations.
      gradient_bits: of gradients; by default the activations' for "forward" (the
        paper's 16w8a has gradients of 8 bits), the weights' for "backward".
      density: share of the weights that train, as in sparse updates. Where they are is
        not counted: it comes from a key, or from the weights.
      whole_gradient: whether the gradient of all leaves lies at one time; otherwise
        that of the largest, each leaf being updated before the next.
      slots: values that the optimizer keeps per trained weight, such as 2 for Adam;
        with the gradients' bits or 16, whichever is more.

    Returns:
      A `DeviceBudget` in bytes.

    Raises:
      ValueError: for an unknown method, bits or a density out of range, or if no leaf
        trains.

    Example:
      >>> def mlp(params, x):
      ...     return jax.nn.relu(x @ params["hidden"]) @ params["head"]
      >>> params = {"hidden": jnp.ones((64, 128)), "head": jnp.ones((128, 10))}
      >>> forward = device_budget(mlp, params, jnp.ones((1, 64)), bits=(16, 8))
      >>> forward.weights, forward.activations, forward.gradients
      (18944, 192, 9472)
      >>> device_budget(mlp, params, jnp.ones((1, 64)), method="inference").activations
      384

    Reference:
      Feng et al., "Stepping Forward on the Last Mile", NeurIPS 2024, appendix B.
    """
    _check(method, bits, gradient_bits, density)
    _checks.function("trains", trains, "name")
    slots = _checks.integer("slots", slots, 0, 64)
    names, leaves = _leaves(params)
    training = method != "inference"
    chosen = [training and trains(name) for name in names]
    if training and not any(chosen):
        raise ValueError(
            f"no leaf trains: trains() refused all of {names}; choose some, or "
            'method="inference".'
        )
    plain = jax.tree.map(_value, params, is_leaf=is_qtensor)
    program = graph.trace(apply_fn, plain, *inputs)
    weights, data = program.inputs[: len(names)], program.inputs[len(names) :]
    flows = _Flows(
        program,
        set(data),
        {number for number, train in zip(weights, chosen, strict=True) if train},
        bits[1],
    )
    peak, layer = flows.peak(for_backward=method == "backward")
    if method == "backward":
        peak = max(peak, flows.stored() + flows.widest())
    gradient = gradient_bits or bits[method != "backward"]
    trained = [
        math.ceil(density * leaf.size)
        for leaf, train in zip(leaves, chosen, strict=True)
        if train
    ]
    held = (sum(trained) if whole_gradient else max(trained)) if training else 0
    return DeviceBudget(
        weights=sum(_bytes(leaf.size, _leaf_bits(leaf, bits[0])) for leaf in leaves),
        activations=peak,
        gradients=_bytes(held, gradient),
        state=_bytes(slots * sum(trained), max(16, gradient)),
        layer=layer,
    )


def _leaf_bits(leaf: Any, default: int) -> int:
    """Bits of a leaf's weights: a `QTensor`'s own, or those given."""
    return leaf.bits if is_qtensor(leaf) else default


def _check(
    method: str, bits: tuple[int, int], gradient_bits: int | None, density: float
) -> None:
    _checks.choice("method", method, _METHODS)
    if not isinstance(bits, tuple | list) or len(bits) != 2:
        raise TypeError(
            f"bits must be two numbers, of weights and of activations, got {bits!r}."
        )
    for value in bits:
        _checks.integer("each of bits", value, 1, 64)
    if gradient_bits is not None:
        _checks.integer("gradient_bits", gradient_bits, 1, 64)
    _checks.number("density", density, "in (0, 1]", lambda x: 0 < x <= 1)


def _leaves(params: Any) -> tuple[list[str], list[Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    return [fixed_point.path_str(path) for path, _ in flat], [leaf for _, leaf in flat]


def _value(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape of a leaf; of a `QTensor`, that of its value."""
    dtype = leaf.scale.dtype if is_qtensor(leaf) else jnp.result_type(leaf)
    return jax.ShapeDtypeStruct(jnp.shape(leaf), dtype)


def _bytes(size: int, bits: int) -> int:
    return math.ceil(size * bits / 8)


@dataclasses.dataclass(frozen=True)
class _Event:
    """An equation that makes buffers.

    Attributes:
      node: the equation.
      reads: the buffers that it reads, fused equations before it included.
      writes: those that it makes.
      inside: bytes that a loop or a branch needs while it runs.
      stored: bytes that it stores for the backward pass, beside its operands.
    """

    node: Node
    reads: frozenset[int]
    writes: tuple[int, ...]
    inside: int = 0
    stored: int = 0

    @property
    def in_place(self) -> bool:
        """Whether it may write over what it reads."""
        return self.node.facts.elementwise


class _Body(NamedTuple):
    """What a loop or a branch runs.

    Attributes:
      jaxpr: the equations.
      operands: the outer values that its inputs come from.
      carry: which inputs come from the iteration before.
      times: how often it runs.
    """

    jaxpr: core.ClosedJaxpr
    operands: Sequence[Any]
    carry: slice
    times: int = 1


def _bodies(node: Node) -> list[_Body]:
    given = node.equation.params
    if node.name == "scan":
        first, num_carry = primitives.scan_sizes(given)
        carry = slice(first, first + num_carry)
        return [_Body(given["jaxpr"], node.inputs, carry, given["length"])]
    if node.name == "while":
        operands = node.inputs[given["cond_nconsts"] :]
        carry = slice(given["body_nconsts"], None)
        return [_Body(given["body_jaxpr"], operands, carry)]
    if node.name == "cond":
        return [_Body(b, node.inputs[1:], slice(0, 0)) for b in given["branches"]]
    return []


def _reached(program: Graph, trained: set[int]) -> set[int]:
    """The weights that train, and all values that they have an effect on."""
    reached = set(trained)
    for node in program.nodes:
        if node.name != "stop_gradient" and not reached.isdisjoint(
            x for x in node.inputs if isinstance(x, int)
        ):
            reached.update(node.outputs)
    return reached


def _inside(program: Graph, body: _Body, chosen: set[int]) -> set[int]:
    """The inputs of a body that come from chosen values.

    If there are any, the values that the body carries are counted among them.
    """
    pairs = zip(program.inputs, body.operands, strict=True)
    found = {inside for inside, outside in pairs if outside in chosen}
    return found | set(program.inputs[body.carry]) if found else found


class _Flows:
    """Where the activations of a traced function lie, and for how long."""

    def __init__(
        self, program: Graph, data: set[int], trained: set[int], bits: int
    ) -> None:
        self._program, self._data, self._bits = program, set(data), bits
        self._depends = program.depending(data)
        self._trained = _reached(program, trained)
        # The buffers that the bytes of a value lie in.
        self._buffers: dict[int, frozenset[int]] = {v: frozenset((v,)) for v in data}
        readers: dict[int, list[Node]] = {}
        for node in program.nodes:
            for value in node.inputs:
                if isinstance(value, int):
                    readers.setdefault(value, []).append(node)
        kept = {value for value in program.outputs if isinstance(value, int)}
        self._events: list[_Event] = []
        for node in program.nodes:
            writes = tuple(v for v in node.outputs if v in self._depends)
            if not writes:
                continue  # made of weights alone
            reads = self._lie(node.inputs)
            (first, *_) = node.outputs
            after = readers.get(first, [])
            fused = (
                node.facts.elementwise
                and first not in kept
                and len(after) == 1
                and (after[0].facts.elementwise or after[0].facts.reduction)
            )
            if fused or node.facts.view:
                self._buffers[first] = reads
                continue
            self._buffers.update({v: frozenset((v,)) for v in writes})
            inside, stored = self._loop(node)
            self._events.append(_Event(node, reads, writes, inside, stored))

    def peak(self, for_backward: bool = False) -> tuple[int, tuple[int, ...]]:
        """The most bytes that are needed at one time, and the shape made then.

        Args:
          for_backward: whether what the backward pass reads is kept.
        """
        last: dict[int, int] = {}
        for step, event in enumerate(self._events):
            last.update(dict.fromkeys(event.reads, step))
            for value in event.writes:
                last.setdefault(value, step)
        kept = self._needed() if for_backward else set()
        for value in self._lie(self._program.outputs) | kept:
            last[value] = len(self._events)
        lying = set(self._data)
        most, shape = self._size(lying), ()
        for step, event in enumerate(self._events):
            inside = max(event.inside, event.stored if for_backward else 0)
            now = self._size(lying | set(event.writes)) + inside
            dying = {v for v in lying | set(event.writes) if last.get(v, -1) <= step}
            if event.in_place:
                (made,) = event.writes
                over = {v for v in dying & event.reads if self._of(v) >= self._of(made)}
                now -= self._of(made) if over else 0
            if now > most:
                most, shape = now, self._program.avals[event.writes[0]].shape
            lying = (lying | set(event.writes)) - dying
        return most, shape

    def stored(self) -> int:
        """Bytes that the backward pass needs of the forward pass."""
        return self._size(self._needed()) + sum(event.stored for event in self._events)

    def _needed(self) -> set[int]:
        """The buffers that the backward pass reads."""
        needed: set[int] = set()
        for node in self._program.nodes:
            if not self._trained.isdisjoint(node.outputs):
                needed |= self._lie(self._needs(node))
        return needed

    def widest(self) -> int:
        """The largest sum of an equation's result and its largest operand, in bytes."""

        def both(event: _Event) -> int:
            operands = () if event.in_place else event.reads
            return self._size(event.writes) + max(map(self._of, operands), default=0)

        trained = (e for e in self._events if not self._trained.isdisjoint(e.writes))
        return max(map(both, trained), default=0)

    def _needs(self, node: Node) -> Iterable[Any]:
        """The values that an equation's derivative reads."""
        derivative = "nothing" if node.facts.linear else node.facts.derivative
        if derivative == "nothing" or node.name in _LOOPS:
            return ()
        if derivative == "operands":
            return node.inputs
        if derivative == "result":
            return node.outputs
        if node.name == "select_n":
            return node.inputs[:1]
        first, second = (*node.inputs, None)[:2]
        if node.name == "div":
            return (second, *(node.outputs if second in self._trained else ()))
        if node.name == "mul" or node.facts.product:
            pairs = ((first, second), (second, first))
            return [x for x, other in pairs if other in self._trained]
        return node.inputs

    def _loop(self, node: Node) -> tuple[int, int]:
        """Bytes inside a loop or branches: the peak, and what backward needs."""
        peak = stored = 0
        for body in _bodies(node):
            avals = body.jaxpr.in_avals
            shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals]
            program = graph.trace(core.jaxpr_as_fun(body.jaxpr), *shapes)
            data = _inside(program, body, self._depends)
            trained = _inside(program, body, self._trained)
            flows = _Flows(program, data, trained, self._bits)
            peak = max(peak, flows.peak()[0])
            stored = max(stored, body.times * flows.stored())
        return peak, stored

    def _lie(self, values: Iterable[Any]) -> frozenset[int]:
        """The buffers of some values. Weights have none here."""
        known = (self._buffers.get(v) for v in values if isinstance(v, int))
        return frozenset().union(*(found for found in known if found))

    def _of(self, value: int) -> int:
        return _bytes(self._program.avals[value].size, self._bits)

    def _size(self, values: Iterable[int]) -> int:
        return sum(map(self._of, values))
