"""Pairs of 32-bit words against Python integers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgrad.fixed_point import words
from fgrad.fixed_point.words import integer_root, square_root, sum_of_squares

WORD = 2**32 - 1
EDGES = sorted({0, 1, 2, 3, *(2**k + d for k in range(1, 65) for d in (-1, 0, 1))})
EDGES_32 = [x for x in EDGES if x <= WORD]


def pair(values):
    """The words of Python integers below 2**64."""
    high = jnp.array([x >> 32 for x in values], jnp.uint32)
    return high, jnp.array([x & WORD for x in values], jnp.uint32)


def joined(high, low):
    """The Python integers of two arrays of words."""
    assert (high.dtype, low.dtype) == (jnp.uint32, jnp.uint32)
    return [(h << 32) + x for h, x in zip(high.tolist(), low.tolist(), strict=True)]


@pytest.mark.parametrize("by", [1, 3, 2**16 - 1, 2**16 + 1, 2**31, WORD])
def test_multiply_is_the_product_of_big_integers(by):
    rng = np.random.default_rng(0)
    values = EDGES_32 + rng.integers(0, 2**32, 1000).tolist()
    high, low = words.multiply(jnp.array(values, jnp.uint32), jnp.uint32(by))
    assert joined(high, low) == [x * by for x in values]


@pytest.mark.parametrize("shift", [0, 1, 15, 31, 32, 33, 47, 62, 63])
def test_shifts_are_those_of_big_integers(shift):
    rng = np.random.default_rng(1)
    values = [x for x in EDGES if x < 2**64]
    values += rng.integers(0, 2**64, 500, dtype=np.uint64).tolist()
    count = jnp.full(len(values), shift, jnp.uint32)
    right = words.shift_right(*pair(values), count)
    assert joined(*right) == [x >> shift for x in values]
    left = words.shift_left(*pair(values), count)
    assert joined(*left) == [(x << shift) % 2**64 for x in values]


def test_a_low_mask_has_as_many_bits_as_it_is_asked_for():
    counts = jnp.arange(63, dtype=jnp.uint32)
    assert joined(*words.low_mask(counts)) == [2**k - 1 for k in range(63)]


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**64 - 1))
def test_integer_root_is_pythons(x):
    high, low = jnp.uint32(x >> 32), jnp.uint32(x & 0xFFFFFFFF)
    assert int(jax.jit(integer_root)(high, low)) == math.isqrt(x)


def test_square_root_at_the_edges():
    edges = {0, 1, 2, 3, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**62, 2**64 - 1}
    edges |= {n**2 + d for n in (7, 2**16, 46341, 2**31 + 5) for d in (-1, 0, 1)}
    values = sorted(edges)
    high = jnp.array([v >> 32 for v in values], jnp.uint32)
    low = jnp.array([v & 0xFFFFFFFF for v in values], jnp.uint32)
    assert integer_root(high, low).tolist() == [math.isqrt(v) for v in values]
    # One rounding to float32, and 2**-31 of the root of the shifted integer.
    np.testing.assert_allclose(
        square_root(high, low), np.sqrt(np.array(values, float)), rtol=2.0**-23
    )


@pytest.mark.parametrize("axes", [(0, 1), (0,), (1,)])
def test_sum_of_squares_is_that_of_big_integers(axes):
    rng = np.random.default_rng(1)
    q = rng.integers(-32768, 32768, (3, 70_000)).astype(np.int16)
    q[0] = 32767  # sums to 2**46
    high, low = jax.jit(sum_of_squares, static_argnums=1)(q, axes)
    total = np.sum(q.astype(object) ** 2, axis=axes)
    got = np.asarray(high).astype(object) * 2**32 + np.asarray(low).astype(object)
    assert np.all(got == total)
    floats = sum_of_squares(q[:, :5].astype(np.float32), axes)
    integers = sum_of_squares(q[:, :5], axes)
    jax.tree.map(np.testing.assert_array_equal, floats, integers)
