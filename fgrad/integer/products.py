"""Products of integers with sums in int32, proven to fit."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fgrad.integer import arithmetic, convolutions
from fgrad.integer.ranges import INT32, Fixed, prove
from fgrad.tracing.graph import Node


def product(node: Node, lhs: Fixed, rhs: Fixed) -> Fixed:
    """The sums of a dot or convolution, in int32.

    Args:
      node: the equation on floats.
      lhs: of up to 8 bits; in a dot it may be the weight, of up to 16.
      rhs: of up to 16 bits; of up to 8 if the other has more.

    Returns:
      A `Fixed` on the grid of the product, or on one 256 times coarser where its sums
      would not fit; with a scale for each output channel if an operand has them.

    Raises:
      ConversionError: if there are so many terms that int32 cannot hold the sums.
    """
    params = node.equation.params
    if node.name == "conv_general_dilated":
        contracted = params["dimension_numbers"].rhs_spec[1:]
        terms = math.prod(rhs.q.shape[axis] for axis in contracted)
        sums = _sums(lhs, rhs, terms, _Convolution(params))
        return sums.replace(channels=_channels_of_convolution(params, rhs))
    return dot(lhs, rhs, _tuples(params["dimension_numbers"]))


def sums_over_channels(node: Node, place: int, x: Fixed) -> bool:
    """Whether a product sums over values whose scales differ.

    Args:
      node: the product.
      place: 0 for its left operand, 1 for its right one.
      x: that operand.
    """
    if x.channels is None:
        return False
    numbers = node.equation.params["dimension_numbers"]
    if node.name == "conv_general_dilated":
        kept = [numbers.rhs_spec[0]] if place == 1 else []
    else:
        kept = [a for a in range(x.q.ndim) if a not in numbers[0][place]]
    return any(n > 1 and a not in kept for a, n in enumerate(x.channels.shape))


def _channels_of_convolution(params: Any, rhs: Fixed) -> np.ndarray | None:
    """The scales of a kernel's output channels, for the images that it makes."""
    if rhs.channels is None:
        return None
    shape = [1] * rhs.channels.ndim
    shape[params["dimension_numbers"].out_spec[1]] = rhs.channels.size
    return rhs.channels.reshape(shape)


def _channels_of_dot(lhs: Fixed, rhs: Fixed, numbers: Any) -> np.ndarray | None:
    """The scales of a weight's channels, for the result of a dot."""
    for place, (x, other) in enumerate(((lhs, rhs), (rhs, lhs))):
        if x.channels is None:
            continue
        contracted, batch = numbers[0][place], numbers[1][place]
        free = [a for a in range(x.q.ndim) if a not in (*contracted, *batch)]
        channels = np.transpose(x.channels, [*batch, *free, *contracted])
        shared = channels.shape[: len(batch)]
        own = channels.shape[len(batch) : len(batch) + len(free)]
        others = [1] * (other.q.ndim - len(contracted) - len(batch))
        order = [*own, *others] if place == 0 else [*others, *own]
        return channels.reshape(*shared, *order)
    return None


def dot(lhs: Fixed, rhs: Fixed, numbers: Any) -> Fixed:
    """`product` for the dimension numbers of ``jax.lax.dot_general``, as tuples."""
    terms = math.prod(lhs.q.shape[axis] for axis in numbers[0][0])
    channels = _channels_of_dot(lhs, rhs, numbers)
    if lhs.q.dtype != jnp.int8:
        (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = numbers
        swapped = (rhs_contract, lhs_contract), (rhs_batch, lhs_batch)
        sums = _sums(rhs, lhs, terms, _Dot(swapped))
        batch = len(lhs_batch)
        split = batch + rhs.q.ndim - len(rhs_contract) - batch
        order = [*range(batch), *range(split, sums.q.ndim), *range(batch, split)]
        return sums.replace(q=jnp.transpose(sums.q, order), channels=channels)
    return _sums(lhs, rhs, terms, _Dot(numbers)).replace(channels=channels)


class _Dot:
    """A dot as plain, exact and coarse products."""

    def __init__(self, numbers: Any):
        self.numbers = numbers

    def plain(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return lax.dot_general(lhs, rhs, self.numbers, preferred_element_type=jnp.int32)

    def exact(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        sums: jax.Array = arithmetic.exact_dot(lhs, rhs, dimension_numbers=self.numbers)
        return sums

    def coarse(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        sums: jax.Array = arithmetic.coarse_dot(
            lhs, rhs, dimension_numbers=self.numbers
        )
        return sums


class _Convolution:
    """A convolution as plain, exact and coarse products."""

    def __init__(self, params: Any):
        self.options = tuple((name, params[name]) for name in convolutions.OPTIONS)

    def plain(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return self._bound(convolutions.plain_conv_p, lhs, rhs)

    def exact(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return self._bound(convolutions.exact_conv_p, lhs, rhs)

    def coarse(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return self._bound(convolutions.coarse_conv_p, lhs, rhs)

    def _bound(self, primitive: Any, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        sums: jax.Array = primitive.bind(lhs, rhs, options=self.options)
        return sums


def _sums(lhs: Fixed, rhs: Fixed, terms: int, operation: _Dot | _Convolution) -> Fixed:
    corners = [a * b for a in (lhs.low, lhs.high) for b in (rhs.low, rhs.high)]
    # Padding leaves terms out, so that zero terms count as well.
    low, high = terms * min(0, *corners), terms * max(0, *corners)
    scale = lhs.scale * rhs.scale
    if rhs.q.dtype == jnp.int8:
        prove(low, high, f"a product of {terms} terms")
        return Fixed(operation.plain(lhs.q, rhs.q), scale, low, high)
    if max(-low, high) <= INT32:
        return Fixed(operation.exact(lhs.q, rhs.q), scale, low, high)
    # Of the limbs, |w >> 8| <= 128 and w & 255 <= 255.
    largest = terms * lhs.magnitude * 255 + 128
    prove(-largest, largest, f"a product of {terms} terms")
    low, high = low // 256 - 1, high // 256 + 1
    return Fixed(operation.coarse(lhs.q, rhs.q), scale * 256, low, high)


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list | tuple) else int(x)
