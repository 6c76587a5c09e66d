"""Where the random numbers of a step come from: an address of two words, hashed.

They are those that ``fgrad.fixed_point_forward_grad`` draws for the same key.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry2x32_p

from fgrad.fixed_point import QTensor

Words = tuple[jax.Array, jax.Array]  # of a key


@dataclasses.dataclass(frozen=True)
class Address:
    """Where the z of a leaf comes from.

    Attributes:
      digests: two words, a hash of the leaf's path.
      shape: of the leaf.
    """

    digests: tuple[int, int]
    shape: tuple[int, ...]

    def key(self, key: Words) -> Words:
        """The words of the leaf's key, from those of a perturbation's."""
        for digest in self.digests:
            key = fold_in(key, jnp.uint32(digest))
        return key

    def indices(self, like: jax.Array) -> jax.Array:
        """The place of every value, uint32, from n-d indices: nothing is reshaped.

        Args:
          like: a word of one key, or of several along a first axis, which the result
            has as well.
        """
        before = like.shape[:1]
        shape, terms = (*before, *self.shape), []
        stride = 1
        for axis in range(len(self.shape) - 1, -1, -1):
            index = lax.broadcasted_iota(jnp.uint32, shape, axis + len(before))
            terms.append(index * np.uint32(stride) if stride > 1 else index)
            stride *= self.shape[axis]
        return sum(terms[1:], terms[0]) if terms else jnp.zeros(shape, jnp.uint32)


def address_of(path: Any, leaf: QTensor) -> Address:
    """Where the z of the leaf at a path comes from."""
    name = jax.tree_util.keystr(path)
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    first, second = np.frombuffer(digest, "<u4")
    return Address((int(first), int(second)), tuple(leaf.shape))


def fold_in(key: Words, data: jax.Array) -> Words:
    """``jax.random.fold_in`` on the two words of a Threefry key.

    A typed key would put a sharding call into the program, which other compilers than
    XLA do not know.
    """
    first, second, data = jnp.broadcast_arrays(*key, data)
    return tuple(threefry2x32_p.bind(first, second, jnp.zeros_like(data), data))


def counter_hash(key: Words, indices: jax.Array) -> jax.Array:
    """`fgrad.perturbations.counter_hash` for a key's two words."""
    x = indices * np.uint32(0x9E3779B9)
    for word in key:
        x = x ^ word
        x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
        x = x ^ (x >> 16)
    return x
