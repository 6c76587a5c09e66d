r"""The exact gradient of a linear head, in integers and without a perturbation.

.. math::
  e_{bc} = softmax(z_b)_c - [c = y_b], \quad
  \frac{∂L}{∂W} = \frac1B \sum_b x_b e_b^T, \quad
  \frac{∂L}{∂b} = \frac1B \sum_b e_b

The features x are the int8 that the head's own product reads, and the sum over a batch
is one more product of int8 and int16 with its sum in int32. A step costs one forward
pass. It is not backpropagation: nothing but the last layer's own input is kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fgrad import fixed_point
from fgrad.fixed_point import QTensor, is_qtensor
from fgrad.integer import products, ranges
from fgrad.integer.addresses import Address, Words, address_of, counter_hash
from fgrad.integer.convert import Program
from fgrad.integer.ranges import ConversionError, Fixed
from fgrad.tracing.graph import Graph, Node, Operand

# Fractional bits of the change of a weight that has fewer than 16 bits.
_FRACTION_BITS = 8
_SHARE_BITS = 15
# What may lie between the head's product and the result, beside the bias.
_PASS_ON = frozenset({"convert_element_type", "copy", "copy_p", "stop_gradient"})
_VIEWS = _PASS_ON | {"broadcast_in_dim", "reshape", "expand_dims", "squeeze"}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the head.

    Attributes:
      index: its place among the leaves of the parameters.
      bits: width of its grid.
      scale: units of the value per grid step, one or one for each channel.
      address: of the random numbers that round its changes, below 16 bits.
    """

    index: int
    bits: int
    scale: np.ndarray
    address: Address

    def updated(self, q: jax.Array, change: Fixed, share: Any, key: Words) -> jax.Array:
        """The weights after a change.

        Args:
          q: integers of the leaf.
          change: what to take away, in units of the weights.
          share: of the change, in units of 2**-15; None for all of it.
          key: of this step.
        """
        fraction = 0 if self.bits == 16 else _FRACTION_BITS
        steps = _multiplied(change, self.scale / 2**fraction, share)
        if fraction:  # rounded up as often as its fraction says
            hashed = counter_hash(self.address.key(key), self.address.indices(key[0]))
            mask = jnp.uint32(2**fraction - 1)
            steps = (steps + (hashed & mask).astype(jnp.int32)) >> fraction
        limit = fixed_point.max_qvalue(self.bits)
        return jnp.clip(q.astype(jnp.int32) - steps, -limit, limit).astype(q.dtype)


@dataclasses.dataclass(frozen=True)
class ExactHead:
    """The last layer of a program, and how it learns.

    Attributes:
      name: what the user calls it.
      kernel: its kernel, of two axes.
      bias: its bias, if it has one.
      learning_rate: η, in units of the weights, for the mean loss of a batch.
    """

    name: str
    kernel: Leaf
    bias: Leaf | None
    learning_rate: float

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """Kernel and bias."""
        return (self.kernel,) if self.bias is None else (self.kernel, self.bias)

    def product(self, graph: Graph) -> Node:
        """The head's product in a trace of the program.

        Raises:
          ConversionError: if the leaves are not those of a last linear layer.
        """
        node = _only_use(graph, graph.inputs[self.kernel.index], self.name)
        ranks = [len(graph.avals[x].shape) for x in node.inputs if isinstance(x, int)]
        if node.name != "dot_general" or ranks != [2, 2] or not _is_matmul(node):
            raise _not_a_head(
                self.name,
                f"its kernel goes into {node.name!r}; it takes a product of features "
                "[batch, features] and a kernel",
            )
        value, bias = node.outputs[0], self.bias is None
        while value != graph.outputs[0] or len(graph.outputs) != 1:
            user = _only_use(graph, value, self.name)
            others = [x for x in user.inputs if x != value]
            if user.name in ("add", "add_any") and self._is_bias(graph, others):
                bias = True
            elif user.name not in _PASS_ON:
                raise _not_a_head(self.name, f"its result goes into {user.name!r}")
            value = user.outputs[0]
        if not bias:
            raise _not_a_head(self.name, "its bias is not added to its product")
        return node

    def evaluated(
        self, program: Program, weights: Any, encoded: Sequence[Any]
    ) -> tuple[Fixed, tuple[Fixed, Fixed], Any]:
        """The logits, what the head's product multiplies, and its dimension numbers."""
        logits, factors = program.values_and_factors(
            weights, *encoded, product=self.product
        )
        node = self.product(program.traced(tuple(encoded))[0])
        (value,) = jax.tree.leaves(logits, is_leaf=lambda x: isinstance(x, Fixed))
        return value, factors, node.equation.params["dimension_numbers"]

    def changes(
        self, factors: tuple[Fixed, Fixed], numbers: Any, error: Fixed
    ) -> list[tuple[Leaf, Fixed]]:
        """For each leaf what a step takes away, η times the gradient of the mean loss.

        Args:
          factors: what the head's product multiplies.
          numbers: its dimension numbers.
          error: gradient of the sum of the losses at the logits [batch, classes].
        """
        at = 1 if factors[1].weight else 0  # the kernel among the factors
        features = factors[1 - at]
        (contracted,) = numbers[0][1 - at]
        sums = products.dot(features, error, (((1 - contracted,), (0,)), ((), ())))
        if tuple(numbers[0][at]) == (1,):  # a kernel [classes, features]
            sums = sums.replace(q=jnp.transpose(sums.q))
        batch = error.q.shape[0]
        rate = self.learning_rate / batch
        found = [(self.kernel, sums.replace(scale=sums.scale * rate))]
        if self.bias is not None:
            low, high = batch * error.low, batch * error.high
            ranges.prove(low, high, f"a sum over {batch} examples")
            total = jnp.sum(error.wide, axis=0)
            found.append((self.bias, Fixed(total, error.scale * rate, low, high)))
        return found

    def _is_bias(self, graph: Graph, operands: list[Operand]) -> bool:
        """Whether the other operand of an addition is the bias in some shape."""
        if self.bias is None or len(operands) != 1:
            return False
        (x,) = operands
        makers = {y: node for node in graph.nodes for y in node.outputs}
        while isinstance(x, int) and x in makers and makers[x].name in _VIEWS:
            x = makers[x].inputs[0]
        return x == graph.inputs[self.bias.index]


def find(program: Program, names: str | Sequence[str], rate: float) -> ExactHead:
    """The last linear layer of a program.

    Args:
      program: whose results are logits [batch, classes].
      names: path of the layer, or of its kernel and bias.
      rate: the learning rate.

    Raises:
      ConversionError: if there is no such layer, or it is not the last.
    """
    paths = (names,) if isinstance(names, str) else tuple(names)
    title = ", ".join(paths)
    with_paths = jax.tree_util.tree_flatten_with_path(
        program.params, is_leaf=is_qtensor
    )[0]
    found: dict[int, Leaf] = {}
    for i, (path, leaf) in enumerate(with_paths):
        name = fixed_point.path_str(path)
        if any(name == p or name.startswith(f"{p}/") for p in paths):
            if not is_qtensor(leaf) or leaf.ndim in found or leaf.ndim not in (1, 2):
                raise _not_a_head(
                    title, f"it has a leaf {name!r} of shape {leaf.shape}"
                )
            found[leaf.ndim] = _leaf(i, path, leaf)
    if 2 not in found:
        known = ", ".join(fixed_point.path_str(path) for path, _ in with_paths)
        raise _not_a_head(title, f"it has no kernel; the parameters are {known}")
    head = ExactHead(title, found[2], found.get(1), rate)
    head.product(program.traced(program.examples_encoded)[0])
    return head


def _leaf(index: int, path: Any, leaf: QTensor) -> Leaf:
    scale = np.asarray(leaf.scale, np.float64)
    if scale.size == 1:
        scale = scale.reshape(())
    return Leaf(index, leaf.bits, scale, address_of(path, leaf))


def _multiplied(change: Fixed, unit: np.ndarray, share: Any) -> jax.Array:
    """A change in whole multiples of a unit, perhaps a share of it."""
    if unit.ndim:
        multipliers, shifts = ranges.ratios_of(change.scale / unit)
        _check_change(np.max(change.magnitude * multipliers / 2.0**shifts))
        return ranges.multiply_channels(
            change.wide, multipliers, shifts, change.magnitude, share
        )
    multiplier, shift = ranges.ratio_of(float(change.scale / unit))
    if share is not None:  # with all its digits, for they will be fewer
        digits = max(0, _SHARE_BITS - multiplier.bit_length())
        multiplier, shift = multiplier << digits, shift + digits
    _check_change(change.magnitude * multiplier / 2**shift if shift <= 46 else 0.0)
    factor = multiplier if share is None else (multiplier * share) >> _SHARE_BITS
    return ranges.multiply(change.wide, factor, shift, change.magnitude, multiplier)


def _check_change(largest: float) -> None:
    """Raises unless the largest change of a weight is one, and fits."""
    if largest < 0.5:
        raise ConversionError(
            "the learning rate never moves a weight of the exact head, whatever its "
            "gradient: raise it."
        )
    bound = math.ceil(largest)
    ranges.prove(-bound, bound, "the change of a weight at this learning rate")


def _is_matmul(node: Node) -> bool:
    """Whether a product of two matrices sums over one axis of each."""
    (contracted, _), _ = node.equation.params["dimension_numbers"]
    return len(contracted) == 1


def _only_use(graph: Graph, value: int, name: str) -> Node:
    """The equation that reads a value, which no other may."""
    users = [node for node in graph.nodes if value in node.inputs]
    if len(users) != 1 or value in graph.outputs:
        raise _not_a_head(name, "what it is or makes is read in several places")
    return users[0]


def _not_a_head(name: str, why: str) -> ConversionError:
    return ConversionError(
        f"exact_head={name!r} is not the last linear layer of the program: {why}. Name "
        "the layer whose product, plus bias, is what the program returns, or train by "
        "perturbations alone."
    )
