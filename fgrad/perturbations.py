"""Where z comes from: samplers of int8 perturbations, addressed and never stored.

The perturbation of a leaf is a pure function of (key, step, index, leaf path, shape):
`sample_key` folds the step and the index of the perturbation into the key, `leaf_keys`
the path of the leaf. Adding, masking or resharding another leaf changes nothing, and
the +, the - and the update regenerate the same z from its address.

The addresses are ``jax.random`` keys. From the key of a leaf, a generator makes 32-bit
words by their index, and a word makes four values (two for `binomial`, 32 for
`rademacher`), so any block of a leaf can be had without the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import random as threefry

from fgrad import _checks, fixed_point
from fgrad.tracing import execution_order

# Values up to which leaves get their z together.
SMALL = 1024

_GOLDEN = np.uint32(0x9E3779B9)

# words(key, indices) -> uint32 words, one for each uint32 index
Generator = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """A distribution of z with zero mean and unit variance, on an 8-bit grid.

    Attributes:
      name: as it was constructed, for messages.
      step: Δ_z, the value of one unit of z_q; ``z = step * z_q``.
      values_per_word: how many values a random word makes.
      decode: ``decode(words) -> z_q``: uint32 [..., n] to int8
        [..., n * values_per_word].
      generator: makes the random words; `counter_hash` or `threefry_words`.
      largest: the largest value of z.
      value: ``value(words, places) -> z_q``: of each word the value at a place, which
        is an index below ``values_per_word``; arrays of the same shape. None if there
        is nothing but ``decode``.
    """

    name: str
    step: float
    values_per_word: int
    decode: Callable[[jax.Array], jax.Array] = dataclasses.field(repr=False)
    generator: Generator = dataclasses.field(repr=False)
    largest: float = 1.0
    value: Callable[[jax.Array, jax.Array], jax.Array] | None = dataclasses.field(
        default=None, repr=False, kw_only=True
    )

    def sample(
        self, key: jax.Array, shape: tuple[int, ...], block: Any = None
    ) -> jax.Array:
        """The perturbation of a leaf, or of one block of it.

        Args:
          key: from `leaf_keys`.
          shape: shape of the leaf; with ``block``, of the block.
          block: None for the whole leaf. An index i, which may be traced, for ``z[i]``
            of a leaf of shape ``(n, *shape)``; a leaf of shape ``(m, n, *shape)`` has
            blocks ``i * n + j``.

        Returns:
          int8 z_q of that shape.
        """
        if self.value is not None and _is_cut(shape, self.values_per_word):
            z: jax.Array = _sample_values(self, shape, key, block)
        else:
            z = _sample(self, shape, key, block)
        return z

    def sample_together(
        self,
        keys: jax.Array,
        shapes: Sequence[tuple[int, ...]],
    ) -> list[jax.Array]:
        """The perturbations of many small leaves at once.

        Args:
          keys: [n], of the leaves.
          shapes: their shapes.

        Returns:
          int8 z_q of each leaf.
        """
        vectors = self._vectors(keys, [math.prod(shape) for shape in shapes])
        return [z.reshape(shape) for z, shape in zip(vectors, shapes, strict=True)]

    def _vectors(self, keys: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
        """int8 [size] for each of the keys [n].

        XLA stores what a loop computes. Otherwise it would fuse the hash of a bias into
        the sum over a batch, and compute it again for every example.
        """
        starts, _ = self.packing(sizes)
        return pieces(self.packed(keys, sizes), starts, sizes)

    def _words(self, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, start and count of the words of each vector."""
        counts = np.array([-(-size // self.values_per_word) for size in sizes])
        ends = np.cumsum(counts)
        # The loop has two rounds, each makes a row; every vector is within one.
        rows = (ends > (ends[-1] + 1) // 2).astype(int)
        starts = ends - counts - np.where(rows, np.sum(counts[rows == 0]), 0)
        return rows, starts, counts

    def packing(self, sizes: Sequence[int]) -> tuple[np.ndarray, int]:
        """Where `packed` has each vector of these sizes, and the length of it all."""
        rows, starts, counts = self._words(sizes)
        length = max(1, max(starts + counts))
        return (starts + rows * length) * self.values_per_word, (
            2 * length * self.values_per_word
        )

    def packed(self, keys: jax.Array, sizes: Sequence[int]) -> jax.Array:
        """A vector of random values for each of the keys [n], all packed in one array.

        One loop makes them all. `packing` says where each of them is.
        """
        rows, starts, counts = self._words(sizes)
        owners, indices = np.zeros((2, 2, max(1, max(starts + counts))), np.uint32)
        for i, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
            owners[row, start : start + count] = i
            indices[row, start : start + count] = np.arange(count)

        def decode(words: tuple[jax.Array, jax.Array]) -> jax.Array:
            owner, index = words
            random = jax.vmap(self.generator)(keys[owner], index[:, None])
            return self.decode(random.reshape(-1))

        values: jax.Array = jax.lax.map(decode, (owners, indices))
        return values.reshape(-1)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises if a leaf has more values than 2**32 random words make.

        Raises:
          ValueError: for such a shape.
        """
        most = self.values_per_word * 2**32
        if math.prod(shape) > most:
            raise ValueError(
                f"it has {math.prod(shape):,} values, and {self.name} makes {most:,} "
                "random ones before they repeat. Make several leaves of it."
            )

    def is_small(self, shape: tuple[int, ...]) -> bool:
        """Whether a leaf is one for `sample_together`.

        A program for each of many biases costs more than their values.
        """
        return math.prod(shape) <= SMALL


@dataclasses.dataclass(frozen=True)
class LowRank(Perturbation):
    """A perturbation of rank r, ``z = r^(-1/2) Σᵣ uᵣ vᵣᵀ``; see `low_rank`.

    Attributes:
      rank: r.
    """

    rank: int = 1

    def factors(
        self, key: jax.Array, shape: tuple[int, ...], block: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """The u and v of ``z_q = Σᵣ uᵣ vᵣ``, shaped to broadcast against the leaf.

        Args:
          key: from `leaf_keys`.
          shape: shape of the leaf or block, of one axis or more.
          block: as in `sample`; the blocks of a leaf share v.

        Returns:
          int8 ``u[rank, *shape[:-1], 1]`` and ``v[rank, 1, ..., 1, shape[-1]]``.
        """
        keys = self._factor_keys(key)
        vector = super().sample
        u = jax.vmap(lambda k: vector(k, shape[:-1], block))(keys[: self.rank])
        v = jax.vmap(lambda k: vector(k, shape[-1:]))(keys[self.rank :])
        return u[..., None], v.reshape(self.rank, *[1] * (len(shape) - 1), shape[-1])

    def factors_together(
        self, keys: jax.Array, shapes: Sequence[tuple[int, ...]]
    ) -> list[tuple[jax.Array, jax.Array]]:
        """The `factors` of many leaves at once; a scalar counts as of shape [1]."""
        shapes = [shape or (1,) for shape in shapes]
        rank = self.rank
        sizes: list[int] = []
        for shape in shapes:
            sizes += rank * [math.prod(shape[:-1])] + rank * [shape[-1]]
        factor_keys = jax.vmap(self._factor_keys)(keys)
        factor_keys = factor_keys.reshape(-1, *factor_keys.shape[2:])
        vectors = iter(self._vectors(factor_keys, sizes))

        def factor(*shape: int) -> jax.Array:
            stacked = jnp.stack([next(vectors) for _ in range(rank)])
            return stacked.reshape(rank, *shape)

        return [
            (factor(*shape[:-1], 1), factor(*[1] * (len(shape) - 1), shape[-1]))
            for shape in shapes
        ]

    def _factor_keys(self, key: jax.Array) -> jax.Array:
        """The keys [2 rank] of the u and the v of a leaf."""
        words = jax.random.key_data(key)
        # Another last word is another key. Cheaper than fold_in for every factor.
        change = np.arange(1, 2 * self.rank + 1, dtype=np.uint32) * _GOLDEN
        words = jnp.tile(words, (2 * self.rank, 1)).at[:, -1].add(change)
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            return words
        impl = jax.random.key_impl(key)
        keys: jax.Array = jax.random.wrap_key_data(words, impl=impl)
        return keys

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises if one of the factors has too many values; see `Perturbation`."""
        super().check_shape(shape[:-1])
        super().check_shape(shape[-1:])

    def is_small(self, shape: tuple[int, ...]) -> bool:
        """Whether a leaf is one for `sample_together`; see `Perturbation`."""
        return len(shape) < 2 and super().is_small(shape)

    def sample(
        self, key: jax.Array, shape: tuple[int, ...], block: Any = None
    ) -> jax.Array:
        """The z of a leaf, or of a block of one axis or more; see `Perturbation`."""
        return product(*self.factors(key, shape or (1,), block)).reshape(shape)

    def sample_together(
        self,
        keys: jax.Array,
        shapes: Sequence[tuple[int, ...]],
    ) -> list[jax.Array]:
        """The z of many small leaves at once; see `Perturbation`."""
        pairs = self.factors_together(keys, shapes)
        return [
            product(*pair).reshape(shape)
            for pair, shape in zip(pairs, shapes, strict=True)
        ]

    def weighted_sum(
        self, keys: jax.Array, coefficients: jax.Array, shape: tuple[int, ...]
    ) -> jax.Array:
        """``Σᵢ cᵢ Σᵣ uᵢᵣ vᵢᵣᵀ`` as one product over i and r; no z is built."""
        u, v = jax.vmap(lambda key: self.factors(key, shape or (1,)))(keys)
        terms = len(coefficients) * self.rank
        c = jnp.repeat(coefficients, self.rank)[:, None]
        # Exact for integer coefficients, whose sums stay far below 2**24.
        u = (c * u.reshape(terms, -1)).astype(jnp.float32)
        v = v.reshape(terms, -1).astype(jnp.float32)
        total = jnp.einsum("ta,tb->ab", u, v, precision="highest")
        return total.astype(coefficients.dtype).reshape(shape)


def product(u: jax.Array, v: jax.Array) -> jax.Array:
    """``z_q = Σᵣ uᵣ vᵣ`` of the factors of a `LowRank` perturbation, as int8."""
    return jnp.sum(u * v, axis=0, dtype=jnp.int8)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(
    perturbation: Perturbation, shape: tuple[int, ...], key: jax.Array, block: Any
) -> jax.Array:
    """`Perturbation.sample`, traced once for leaves of the same shape."""
    per_word = perturbation.values_per_word
    axes = _axes_of_words(shape, per_word)
    if axes is not None:
        words = row_major(axes)
        if block is not None:
            words = words + _uint32(block) * np.uint32(math.prod(axes))
        return perturbation.decode(perturbation.generator(key, words)).reshape(shape)
    size = math.prod(shape)
    # One word more than needed where a block may start inside a word.
    aligned = block is None or size % per_word == 0
    count = -(-size // per_word) + (not aligned)
    first, offset = (0, 0) if block is None else word_of_block(block, size, per_word)
    words = jax.lax.iota(jnp.uint32, count) + first
    values = perturbation.decode(perturbation.generator(key, words))
    if not aligned:
        start = jnp.asarray(offset).astype(jnp.int32)
        values = jax.lax.dynamic_slice(values, (start,), (size,))
    return values[:size].reshape(shape)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample_values(
    perturbation: Perturbation, shape: tuple[int, ...], key: jax.Array, block: Any
) -> jax.Array:
    """`_sample` to the same bits, each value from a word of its own.

    It hashes as many words as there are values. In return all arrays have the shape of
    the leaf, and can be sharded as it is.
    """
    per_word, size = perturbation.values_per_word, math.prod(shape)
    first: Any = np.uint32(0)
    offset: Any = np.uint32(0)
    if block is not None:
        first, offset = word_of_block(block, size, per_word)
    # Otherwise the indices are made ahead of a loop over keys, and stored.
    zero = execution_order.dependent_zero(jax.random.key_data(key))
    first, offset = first + zero, offset + zero
    word = jnp.zeros(shape, jnp.uint32) + first
    place = jnp.zeros(shape, jnp.uint32) + offset
    stride = 1
    for axis in reversed(range(len(shape))):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        # The index of a value itself could need more than 32 bits.
        words, rest = divmod(stride, per_word)
        word = word + along * np.uint32(words % 2**32)
        place = place + along % np.uint32(per_word) * np.uint32(rest)
        word = word + along // np.uint32(per_word) * np.uint32(rest)
        stride *= shape[axis]
    word = word + place // np.uint32(per_word)
    assert perturbation.value is not None
    random = perturbation.generator(key, word)
    return perturbation.value(random, place % np.uint32(per_word))


def _is_cut(shape: tuple[int, ...], per_word: int) -> bool:
    """Whether some device of a mesh has a part of a leaf that cuts random words.

    That is what the axes of the mesh around would make of the leaf, along any of its
    own axes, except those that a ``shard_map`` has taken.
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = getattr(mesh, "manual_axes", ())
    sizes = [n for name, n in mesh.shape.items() if name not in manual and n > 1]
    if not sizes or per_word == 1:
        return False
    axes = _axes_of_words(shape, per_word) or ()
    counts = {
        math.prod(some)
        for r in range(1, len(sizes) + 1)
        for some in itertools.combinations(sizes, r)
    }
    for place, length in enumerate(shape):
        words = axes[place] if place < len(axes) else 1
        if any(length % n == 0 and words % n for n in counts):
            return True
    return False


def word_of_block(
    block: jax.typing.ArrayLike, size: int, per_word: int
) -> tuple[jax.Array, jax.Array]:
    """The word that a block of values starts in, and its place among those of the word.

    They are exact for all blocks that start within 2**32 words, though the number of
    values in front of the block may be too large for 32 bits.

    Args:
      block: index of the block; it may be traced.
      size: values of a block.
      per_word: values of a word.

    Returns:
      uint32 scalars, the quotient and the rest of ``block * size`` over ``per_word``.

    Example:
      >>> word_of_block(2**30, 12, 4)  # three times 2**32 values are 3 * 2**30 words
      (Array(3221225472, dtype=uint32), Array(0, dtype=uint32))
    """
    index, words, rest = _uint32(block), np.uint32(size // per_word), size % per_word
    if not rest:
        return index * words, jnp.uint32(0)
    whole, part = index // np.uint32(per_word), index % np.uint32(per_word)
    left = part * np.uint32(rest)
    first = index * words + whole * np.uint32(rest) + left // np.uint32(per_word)
    return first, left % np.uint32(per_word)


def _axes_of_words(shape: tuple[int, ...], per_word: int) -> tuple[int, ...] | None:
    """Axes of whole words that lie in memory as the values of a leaf do, or None.

    Words with the axes of their leaf are sharded as it is. The words of the last axis
    are a part of it. Where they do not fill it, they span some entries of the axis
    before, or some of that before the last two, and so on.
    """
    for left in reversed(range(len(shape))):
        inner = math.prod(shape[left:])
        entries = per_word // math.gcd(per_word, inner)
        if entries == 1:
            return (*shape[:left], inner // per_word)
        if left and shape[left - 1] % entries == 0:
            groups = shape[left - 1] // entries
            return (*shape[: left - 1], groups, entries * inner // per_word)
    return None


def row_major(axes: tuple[int, ...]) -> jax.Array:
    """uint32 indices of the entries of an array in memory.

    A sum over axes, where a flat index that is reshaped would be made as a whole on
    every device of a mesh.
    """
    index, stride = jnp.zeros(axes, jnp.uint32), 1
    for axis in reversed(range(len(axes))):
        along = jax.lax.broadcasted_iota(jnp.uint32, axes, axis)
        index = index + along * np.uint32(stride % 2**32)
        stride *= axes[axis]
    return index


def accumulate(
    sample: Callable[[jax.Array], jax.Array],
    keys: jax.Array,
    coefficients: jax.Array,
    shape: tuple[int, ...],
    like: Any = None,
) -> jax.Array:
    """``Σᵢ cᵢ sample(keyᵢ)``, one after the other, in the dtype of c.

    Args:
      sample: ``sample(key)`` is an array of that shape.
      keys: [m].
      coefficients: [m].
      shape: of the sum.
      like: an array as which the samples are sharded, or None.
    """

    def add(index: Any, total: jax.Array) -> jax.Array:
        z = sample(keys[index]).astype(coefficients.dtype)
        return total + coefficients[index] * z

    if len(coefficients) == 1:
        return add(0, jnp.zeros((), coefficients.dtype))
    # Plain zeros of all leaves would be made at once, long before they are needed.
    zero = execution_order.dependent_zero(jax.random.key_data(keys))
    start = execution_order.filled(shape, zero.astype(coefficients.dtype), like)
    total: jax.Array = jax.lax.fori_loop(0, len(coefficients), add, start)
    return total


def pieces(
    vector: jax.Array, starts: Sequence[int] | np.ndarray, sizes: Sequence[int]
) -> list[jax.Array]:
    """Parts of a vector, cut out at places that the compiler does not know.

    A slice at a known place would be a kernel of its own for every leaf; see
    `execution_order.hidden`.
    """
    if not vector.size:
        return [vector] * len(sizes)
    zero = execution_order.dependent_zero(vector)
    return [
        jax.lax.dynamic_slice(vector, (execution_order.hidden(start, zero),), (size,))
        for start, size in zip(starts, sizes, strict=True)
    ]


def counter_hash(key: jax.Array, indices: jax.Array) -> jax.Array:
    """uint32 words that are a `hashed` index, keyed by every word of the key."""
    return hashed(jax.random.key_data(key).reshape(-1), indices)


def hashed(words: jax.Array, indices: jax.Array) -> jax.Array:
    """uint32 hashes of indices, keyed by each of the uint32 ``words``.

    Each round is a bijection with an avalanche bias near the least possible for two
    multiplications (the constants are Chris Wellons' "lowbias32"). XLA fuses it into
    the addition to the weights.
    """
    x = indices * _GOLDEN
    for i in range(words.size):
        x = x ^ words[i]
        x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
        x = x ^ (x >> 16)
    return x


def threefry_words(key: jax.Array, indices: jax.Array) -> jax.Array:
    """uint32 words from Threefry-2x32, the cipher behind ``jax.random``.

    Slower than `counter_hash`, with a longer record: for checking that a result does
    not hang on the generator.
    """
    words = jax.random.key_data(key).reshape(-1, 2)
    pair = jnp.bitwise_xor.reduce(words, axis=0)
    flat = indices.reshape(-1)
    counts = jnp.concatenate([flat, jnp.zeros_like(flat)])
    random: jax.Array = threefry.threefry_2x32(pair, counts)
    return random[: flat.size].reshape(indices.shape)


def normal(
    bits: int = 8, z_max: float | None = None, *, generator: Generator = counter_hash
) -> Perturbation:
    r"""Standard normal z on a symmetric grid.

    .. math:: z_q = \lfloor c Φ^{-1}((u + 1/2) / 256) / Δ_z \rceil, \quad
      u \sim U\{0, …, 255\}

    One random byte picks one of 256 equally likely quantiles; c makes the variance 1.
    The tails end at 2.9, which makes the kurtosis 2.9 rather than 3.

    Args:
      bits: width b of z_q, 3 to 8.
      z_max: the value of the largest integer, ``Δ_z = z_max / (2**(b - 1) - 1)``.
        The paper's example is 3.5. By default ``Δ_z = 2**(3 - b)``, for 8 bits
        2**-5 (z_max = 3.97): then 1.0 is a whole number of steps and equation (6)
        leaves the weights themselves exact, where 3.5 shrinks them by 0.8%.
      generator: of the random bytes; `counter_hash` or `threefry_words`.

    Returns:
      A `Perturbation`.

    Raises:
      ValueError: if ``bits`` or ``z_max`` is out of range.

    Example:
      >>> z = normal()
      >>> z.step
      0.03125
      >>> z.sample(jax.random.key(0), (2, 3)).dtype
      dtype('int8')

    Reference:
      Section 3.2 of Feng et al., "Stepping Forward on the Last Mile", NeurIPS 2024.
    """
    fixed_point.max_qvalue(bits)
    if not 3 <= bits <= 8:
        raise ValueError(f"a normal perturbation has 3 to 8 bits, got bits={bits}.")
    if z_max is not None:
        below = ": below 2 standard deviations no clipped normal has unit variance"
        _checks.at_least("z_max", z_max, 2, hint=below)
    _checks.function("generator", generator, "key", "indices")
    return _normal(int(bits), None if z_max is None else float(z_max), generator)


# The table takes time, and jit knows a perturbation by its identity.
@functools.cache
def _normal(bits: int, z_max: float | None, generator: Generator) -> Perturbation:
    """The perturbation of `normal`, whose options are checked."""
    limit = fixed_point.max_qvalue(bits)
    step = 2.0 ** (3 - bits) if z_max is None else z_max / limit
    one = round(1 / step) * step
    if abs(one - 1) > 0.02:
        raise ValueError(
            f"z_max={z_max} with bits={bits} makes 1.0 = {one:.3f} on z's grid, which "
            "would rescale the weights by as much; leave z_max out."
        )
    table = _normal_table(step, limit)

    def decode(words: jax.Array) -> jax.Array:
        return _joined(jnp.asarray(table)[_bytes(words)])

    arguments = "" if bits == 8 and z_max is None else f"bits={bits}, z_max={z_max}"

    def value(words: jax.Array, places: jax.Array) -> jax.Array:
        return jnp.asarray(table)[(words >> (8 * places)).astype(jnp.uint8)]

    largest = step * float(np.abs(table).max())
    name = f"normal({arguments})"
    return Perturbation(name, step, 4, decode, generator, largest, value=value)


def rademacher(*, generator: Generator = counter_hash) -> Perturbation:
    """``z = ±1`` with equal probability; Δ_z = 1, one random bit per value.

    Args:
      generator: of the random bits; `counter_hash` or `threefry_words`.

    Example:
      >>> rademacher().sample(jax.random.key(0), (4,))
      Array([...], dtype=int8)
    """
    _checks.function("generator", generator, "key", "indices")
    return Perturbation("rademacher()", 1.0, 32, _signs, generator, value=_sign)


def low_rank(rank: int = 1, *, generator: Generator = counter_hash) -> LowRank:
    r"""Perturbations whose evaluations share one product with the unperturbed weights.

    .. math:: z = \frac{1}{\sqrt r} \sum_{i=1}^r u_i v_i^T, \quad
      x (W + ε z) = x W + \frac{ε}{\sqrt r} \sum_i (x u_i) v_i^T

    u and v are ±1, v along the last axis of a leaf (the outputs of a Flax kernel), u
    along all others. Each value of z has mean zero and variance one, and any two are
    uncorrelated; the values of a vector are sums of r independent signs.

    The evaluator applies the second form where a weight enters ``dot_general`` or
    ``conv_general_dilated``, of floats or in `fgrad.products`; elsewhere it uses the
    same w + εz. In fixed point ``w_q + ⌊ε Δ_z / Δ_w⌉ z_q`` is an integer without
    rounding, and weights nearer to the end of the grid than that are clipped first.

    Args:
      rank: r, 1 to 127; m directions give a gradient of rank m r at most.
      generator: of the random bits; `counter_hash` or `threefry_words`.

    Returns:
      A `LowRank` perturbation with ``Δ_z = r^(-1/2)``.

    Raises:
      ValueError: if ``rank`` is out of range.

    Example:
      >>> z = low_rank(rank=4)
      >>> z.step, z.sample(jax.random.key(0), (6, 3)).dtype
      (0.5, dtype('int8'))
      >>> u, v = z.factors(jax.random.key(0), (6, 3))
      >>> u.shape, v.shape
      ((4, 6, 1), (4, 1, 3))

    Reference:
      Sarkar et al. 2025, "Evolution Strategies at the Hyperscale" (arXiv 2511.16652),
      for sharing the product.
    """
    rank = _checks.integer("rank", rank, 1, 127)
    _checks.function("generator", generator, "key", "indices")
    name = f"low_rank(rank={rank})"
    return LowRank(name, rank**-0.5, 32, _signs, generator, rank**0.5, rank)


def binomial(*, generator: Generator = counter_hash) -> Perturbation:
    """``z_q = B(16, 1/2) - 8``: the number of ones among 16 random bits, centred.

    Its variance is 4, so Δ_z = 1/2 gives unit variance exactly; no table is needed.

    Args:
      generator: of the random bits; `counter_hash` or `threefry_words`.

    Example:
      >>> binomial().step
      0.5

    Reference:
      Section 4.2 of Feng et al. 2024 finds binomial z as good as normal.
    """
    _checks.function("generator", generator, "key", "indices")
    return _binomial(generator)


@functools.cache
def _binomial(generator: Generator) -> Perturbation:
    """The perturbation of `binomial`."""

    def decode(words: jax.Array) -> jax.Array:
        ones = jax.lax.population_count(_bytes(words)).astype(jnp.int8)
        return _joined(ones[..., ::2] + ones[..., 1::2] - 8)

    def value(words: jax.Array, places: jax.Array) -> jax.Array:
        bits = words >> (16 * places) & np.uint32(2**16 - 1)
        return jax.lax.population_count(bits).astype(jnp.int8) - 8

    return Perturbation("binomial()", 0.5, 2, decode, generator, 4.0, value=value)


def checked(z: Any) -> Perturbation:
    """The value, if it is a `Perturbation`; raises a TypeError otherwise."""
    if not isinstance(z, Perturbation):
        raise TypeError(
            f"perturbation must come from fgrad.perturbations, got {z!r}; "
            "use for example fgrad.perturbations.normal()."
        )
    return z


def sample_key(key: jax.Array, step: Any, index: Any) -> jax.Array:
    """Key of the index-th perturbation of a step, shared by all leaves."""
    return jax.random.fold_in(jax.random.fold_in(key, step), index)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("stacked",), meta_fields=("names",)
)
@dataclasses.dataclass(frozen=True)
class LeafKeys:
    """The keys of leaves, by their names.

    They lie in one array, since arrays of their own would be programs of their own.

    Attributes:
      stacked: keys [..., n], of any number of perturbations.
      names: those of the n leaves.
    """

    stacked: jax.Array
    names: tuple[str, ...]

    def __getitem__(self, name: str) -> jax.Array:
        return self.many([name])[..., 0, *self._words()]

    def _words(self) -> tuple[slice, ...]:
        typed = jnp.issubdtype(self.stacked.dtype, jax.dtypes.prng_key)
        return () if typed else (slice(None),)

    def many(self, names: Sequence[str]) -> jax.Array:
        """The keys [..., len(names)] of some leaves."""
        if tuple(names) == self.names:
            return self.stacked
        table = {name: i for i, name in enumerate(self.names)}
        places = np.array([table[name] for name in names], np.int32)
        axis = self.stacked.ndim - 1 - len(self._words())
        return jnp.take(self.stacked, places, axis=axis, mode="clip")

    def delayed(self, name: str, after: jax.Array) -> jax.Array:
        """The key of a leaf, not before ``after`` has been computed."""
        place = self.names.index(name)
        words = jax.random.key_data(self.stacked)
        words = execution_order.delayed_row(words, place, after, words.ndim - 2)
        if not jnp.issubdtype(self.stacked.dtype, jax.dtypes.prng_key):
            return words
        impl = jax.random.key_impl(self.stacked)
        key: jax.Array = jax.random.wrap_key_data(words, impl=impl)
        return key


def leaf_keys(key: jax.Array, names: Sequence[str]) -> LeafKeys:
    """Keys of leaves: ``key`` with a 64-bit hash of the leaf's path folded in.

    The keys of all leaves are computed at once, since each ``fold_in`` by itself costs
    compilation time; the key of a leaf depends on its own path only.

    Args:
      key: from `sample_key`.
      names: paths of the leaves, as text; all different.
    """
    digests = [hashlib.blake2b(n.encode(), digest_size=8).digest() for n in names]
    words = np.frombuffer(b"".join(digests), "<u4").reshape(-1, 2)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, words[:, 0])
    keys = jax.vmap(jax.random.fold_in)(keys, words[:, 1])
    return LeafKeys(keys, tuple(names))


def _bytes(words: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(words, jnp.uint8)


def _signs(words: jax.Array) -> jax.Array:
    bits = (_bytes(words)[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    return _joined(_joined(2 * bits.astype(jnp.int8) - 1))


def _sign(words: jax.Array, places: jax.Array) -> jax.Array:
    bits = words >> places & np.uint32(1)
    return 2 * bits.astype(jnp.int8) - 1


def _joined(values: jax.Array) -> jax.Array:
    """Without the last axis, whose entries follow each other in the axis before."""
    *axes, first, second = values.shape
    return values.reshape(*axes, first * second)


def _uint32(x: Any) -> jax.Array:
    return jnp.asarray(x).astype(jnp.uint32)


def _normal_table(step: float, limit: int) -> np.ndarray:
    """256 equally likely int8 values whose variance is as near to 1 as they allow."""
    quantile = statistics.NormalDist().inv_cdf
    continuous = np.array([quantile((i + 0.5) / 256) for i in range(256)])

    def rounded(c: float) -> np.ndarray:
        return np.clip(np.rint(c * continuous / step), -limit, limit)

    # Rounding makes the variance a staircase in c, so look rather than solve.
    candidates = np.linspace(0.8, 1.25, 901)
    error = [abs(np.var(rounded(c) * step) - 1) for c in candidates]
    return rounded(candidates[int(np.argmin(error))]).astype(np.int8)
