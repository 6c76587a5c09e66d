"""Products of integers with sums in int32, proven to fit."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fgrad.integer import arithmetic
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
      would not fit.

    Raises:
      ConversionError: if there are so many terms that int32 cannot hold the sums.
    """
    params = node.equation.params
    if node.name == "conv_general_dilated":
        contracted = params["dimension_numbers"].rhs_spec[1:]
        terms = math.prod(rhs.q.shape[axis] for axis in contracted)
        return _sums(lhs, rhs, terms, _Convolution(params))
    return dot(lhs, rhs, _tuples(params["dimension_numbers"]))


def dot(lhs: Fixed, rhs: Fixed, numbers: Any) -> Fixed:
    """`product` for the dimension numbers of ``jax.lax.dot_general``, as tuples."""
    terms = math.prod(lhs.q.shape[axis] for axis in numbers[0][0])
    if lhs.q.dtype != jnp.int8:
        (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = numbers
        swapped = (rhs_contract, lhs_contract), (rhs_batch, lhs_batch)
        sums = _sums(rhs, lhs, terms, _Dot(swapped))
        batch = len(lhs_batch)
        split = batch + rhs.q.ndim - len(rhs_contract) - batch
        order = [*range(batch), *range(split, sums.q.ndim), *range(batch, split)]
        return sums.replace(q=jnp.transpose(sums.q, order))
    return _sums(lhs, rhs, terms, _Dot(numbers))


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

    NAMES = (
        "window_strides",
        "padding",
        "lhs_dilation",
        "rhs_dilation",
        "dimension_numbers",
        "feature_group_count",
        "batch_group_count",
    )

    def __init__(self, params: Any):
        self.options = tuple((name, params[name]) for name in self.NAMES)

    def plain(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            lhs, rhs, **dict(self.options), preferred_element_type=jnp.int32
        )

    def exact(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        sums: jax.Array = arithmetic.exact_conv(lhs, rhs, options=self.options)
        return sums

    def coarse(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        sums: jax.Array = arithmetic.coarse_conv(lhs, rhs, options=self.options)
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
