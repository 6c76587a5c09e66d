"""Where z comes from: samplers of int8 perturbations, addressed and never stored.

The perturbation of a leaf is a pure function of (key, step, index, leaf path, shape):
`sample_key` folds the step and the index of the perturbation into the key, `leaf_keys`
the path of the leaf. Adding, masking or resharding another leaf changes nothing, and
the +, the - and the update regenerate the same z from its address.

The addresses are ``jax.random`` keys. From the key of a leaf, a hash of the counter
makes 32-bit words, and a word four values (two for `binomial`, 32 for `rademacher`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fgrad import fixed_point


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """A distribution of z with zero mean and unit variance, on an 8-bit grid.

    Attributes:
      name: as it was constructed, for messages.
      step: Δ_z, the value of one unit of z_q; ``z = step * z_q``.
      sample: ``sample(key, shape) -> z_q``, an int8 array.
    """

    name: str
    step: float
    sample: Callable[[jax.Array, tuple[int, ...]], jax.Array] = dataclasses.field(
        repr=False
    )


def normal(bits: int = 8, z_max: float | None = None) -> Perturbation:
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
    limit = fixed_point.max_qvalue(bits)
    if not 3 <= bits <= 8:
        raise ValueError(f"a normal perturbation has 3 to 8 bits, got bits={bits}.")
    if z_max is not None and not 2 <= z_max < math.inf:
        raise ValueError(
            f"z_max must be at least 2 standard deviations, got {z_max}: below, no "
            "clipped normal has unit variance."
        )
    step = 2.0 ** (3 - bits) if z_max is None else z_max / limit
    one = round(1 / step) * step
    if abs(one - 1) > 0.02:
        raise ValueError(
            f"z_max={z_max} with bits={bits} makes 1.0 = {one:.3f} on z's grid, which "
            "would rescale the weights by as much; leave z_max out."
        )
    table = _normal_table(step, limit)

    def sample(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(table)[_random_bytes(key, shape)]

    arguments = "" if bits == 8 and z_max is None else f"bits={bits}, z_max={z_max}"
    return Perturbation(f"normal({arguments})", step, sample)


def rademacher() -> Perturbation:
    """``z = ±1`` with equal probability; Δ_z = 1, one random bit per value.

    Example:
      >>> rademacher().sample(jax.random.key(0), (4,))
      Array([...], dtype=int8)
    """

    def sample(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        size = math.prod(shape)
        octets = _random_bytes(key, (-(-size // 8), 1))
        bit = (octets >> jnp.arange(8, dtype=jnp.uint8)) & 1
        return (2 * bit.astype(jnp.int8) - 1).reshape(-1)[:size].reshape(shape)

    return Perturbation("rademacher()", 1.0, sample)


def binomial() -> Perturbation:
    """``z_q = B(16, 1/2) - 8``: the number of ones among 16 random bits, centred.

    Its variance is 4, so Δ_z = 1/2 gives unit variance exactly; no table is needed.

    Example:
      >>> binomial().step
      0.5

    Reference:
      Section 4.2 of Feng et al. 2024 finds binomial z as good as normal.
    """

    def sample(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        pairs = _random_bytes(key, (*shape, 2))
        ones = jax.lax.population_count(pairs).astype(jnp.int8)
        return ones[..., 0] + ones[..., 1] - 8

    return Perturbation("binomial()", 0.5, sample)


def sample_key(key: jax.Array, step: Any, index: Any) -> jax.Array:
    """Key of the index-th perturbation of a step, shared by all leaves."""
    return jax.random.fold_in(jax.random.fold_in(key, step), index)


def leaf_keys(key: jax.Array, names: Sequence[str]) -> dict[str, jax.Array]:
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
    return {name: keys[i] for i, name in enumerate(names)}


def _random_bytes(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    size = math.prod(shape)
    octets = jax.lax.bitcast_convert_type(_random_words(key, -(-size // 4)), jnp.uint8)
    return octets.reshape(-1)[:size].reshape(shape)


def _random_words(key: jax.Array, size: int) -> jax.Array:
    """uint32 words that are a hash of their index, keyed by every word of the key.

    Each round is a bijection with an avalanche bias near the least possible for two
    multiplications (the constants are Chris Wellons' "lowbias32"). XLA fuses it into
    the addition to the weights; threefry takes a loop of its own for every leaf.
    """
    x = jax.lax.iota(jnp.uint32, size) * np.uint32(0x9E3779B9)
    words = jax.random.key_data(key).reshape(-1)
    for i in range(words.size):
        x = x ^ words[i]
        x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
        x = x ^ (x >> 16)
    return x


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
