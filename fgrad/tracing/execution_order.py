"""Order of execution, by dependencies that no compiler removes.

XLA runs what it can as early as it can, and drops ``lax.optimization_barrier`` before
it schedules on a CPU. What is to wait for something has to depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fgrad._trees import is_concrete


def dependent_zero(array: jax.Array) -> jax.Array:
    """A uint32 zero that depends on an array.

    A square is 0 or 1 modulo 4, so its second bit is never set. Unlike ``x != x`` or
    ``0 * x`` this holds for integers, infinities and NaN as well.

    Args:
      array: of a real dtype, with one element or more.

    Returns:
      uint32 scalar.

    Example:
      >>> dependent_zero(jnp.array([jnp.nan, 1.0]))
      Array(0, dtype=uint32)
    """
    first = array
    if array.ndim and is_spread(array):
        # On a mesh with explicit axes a sharded axis can be summed up, but not sliced.
        first = jnp.max(array)
    elif array.ndim:
        corner = lax.slice(array, [0] * array.ndim, [1] * array.ndim)
        first = lax.squeeze(corner, range(array.ndim))
    if jnp.issubdtype(first.dtype, jnp.floating):
        first = lax.bitcast_convert_type(first.astype(jnp.float32), jnp.uint32)
    word = first.astype(jnp.uint32)
    return word * word & 2


def entered(tree: Any) -> Any:
    """The arrays of a tree, as arrays of the ``shard_map`` that a trace is inside of.

    On a mesh of explicit axes an array from outside has another type, and only
    primitives know what to make of it.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def inside(array: Any) -> Any:
        outer = mesh.manual_axes and jax.typeof(array).sharding.mesh != mesh
        return lax.optimization_barrier(array) if outer else array

    return jax.tree.map(inside, tree)


def is_spread(array: jax.Array) -> bool:
    """Whether an array is spread over a mesh, along explicit axes."""
    return any(getattr(jax.typeof(array).sharding, "spec", ()))


def laid_out(make: Callable[..., jax.Array], like: Any, *args: Any) -> jax.Array:
    """An array, made in the parts that the devices have of another one.

    On a mesh of explicit axes the type of a new array says that every device has it
    whole, and so it is made.

    Args:
      make: ``make(*args)`` is the array.
      like: an array of its shape, or None.
      *args: arrays; ``make`` reads no others.
    """
    if like is None or not is_spread(like):
        return make(*args)
    sharding = jax.typeof(like).sharding
    made: jax.Array = jax.sharding.auto_axes(make, out_sharding=sharding)(*args)
    return made


def filled(shape: tuple[int, ...], value: jax.Array, like: Any) -> jax.Array:
    """An array of one value, which is `laid_out` like another one."""
    return laid_out(lambda x: jnp.full(shape, x), like, value)


def hidden(value: int, zero: jax.Array) -> jax.Array:
    """A number as uint32 that no compiler knows, by a `dependent_zero`.

    XLA for CPUs compiles a kernel once for all places that have the same one. A slice
    at a known place is a kernel of its own for every leaf. The number is read from an
    array of two that differ, since a constant of one value would be a part of the
    kernel again.
    """
    pair = np.array([value, value + 1], np.uint32) ^ zero
    return lax.squeeze(lax.slice(pair, (0,), (1,)), (0,))


def stored(vector: jax.Array) -> jax.Array:
    """The same vector, as an array that XLA stores.

    Nothing that reads it is compiled together with what made it: it comes out of a loop
    of which no compiler knows that it runs once.
    """
    found: jax.Array = _from_a_loop(vector) if is_concrete(vector) else _looped(vector)
    return found


def _looped(vector: jax.Array) -> jax.Array:
    once = hidden(1, dependent_zero(vector)).astype(jnp.int32)
    found: jax.Array = lax.fori_loop(0, once, lambda _, last: vector, -vector)
    return found


# Outside `jax.jit` a loop would be compiled at every call.
_from_a_loop = jax.jit(_looped)


def delayed_row(array: jax.Array, row: int, after: jax.Array, axis: int) -> jax.Array:
    """``array`` at a row of an axis, at a `hidden` place and not before ``after``."""
    if _varying(after) - _varying(array):
        return lax.index_in_dim(array, row, axis, keepdims=False)
    place = hidden(row, dependent_zero(after))
    found: jax.Array = lax.dynamic_index_in_dim(array, place, axis, keepdims=False)
    return found


def delayed_key(key: jax.Array, after: jax.Array) -> jax.Array:
    """The same PRNG key, but not before ``after`` has been computed.

    Inside ``shard_map`` a key that all devices share does not wait for an array that
    differs between them: it would count as different itself.
    """
    if _varying(after) - _varying(key):
        return key
    zero = dependent_zero(after)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key ^ zero
    words = jax.random.key_data(key) ^ zero
    later: jax.Array = jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))
    return later


def delayed(array: jax.Array, after: jax.Array) -> jax.Array:
    """The same array (but for the sign of a zero), not before ``after``."""
    if _varying(after) - _varying(array):
        return array
    return array + dependent_zero(after).astype(array.dtype)


def _varying(array: jax.Array) -> frozenset[str]:
    """The mesh axes of ``shard_map`` along which an array differs."""
    aval: Any = jax.typeof(array)
    if hasattr(aval, "mat"):  # since JAX 0.10
        return frozenset(aval.mat.varying)
    return frozenset(getattr(aval, "vma", ()))
