"""A product with perturbed weights that reads the weights once.

The plain way makes W + εz in memory and reads it again for the product. Here a Pallas
kernel makes z in registers, by the hash and the table of `fgrad.perturbations.normal`,
adds it to a block of W and multiplies. At few rows a step is bound by the memory that
weights cross, so this is what could make it faster. It is a measurement, no part of the
library: `gpu_sections.kernel` times it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from fgrad import perturbations

# Rows of the least block that tensor cores multiply.
MIN_ROWS = 16
# A random word makes four values.
_PER_WORD = 4


class Blocks(NamedTuple):
    """How the kernel divides its work.

    Attributes:
      columns: outputs of a program.
      terms: of the sums, added at a time.
      num_warps: of a program.
      num_stages: loads that are under way at once.
    """

    columns: int = 32
    terms: int = 128
    num_warps: int = 4
    num_stages: int = 3


DEFAULT = Blocks()


def plain(
    x: jax.Array, w: jax.Array, key: jax.Array, epsilon: jax.typing.ArrayLike
) -> jax.Array:
    """``x (W + εz)`` as the evaluator computes it: the sum first, then the product.

    Args:
      x: [m, k].
      w: [k, n] of the same dtype.
      key: of z.
      epsilon: ε; of the negative for the other side.

    Returns:
      float32 [m, n].
    """
    source = perturbations.normal()
    amplitude = jnp.float32(source.step) * epsilon
    z = source.sample(key, w.shape).astype(jnp.float32)
    perturbed = (w + amplitude * z).astype(w.dtype)
    return jnp.dot(x, perturbed, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnames=("blocks", "interpret"))
def fused(
    x: jax.Array,
    w: jax.Array,
    key: jax.Array,
    epsilon: jax.typing.ArrayLike,
    *,
    blocks: Blocks = DEFAULT,
    interpret: bool = False,
) -> jax.Array:
    """The same as `plain` in one kernel, up to the order of the sums.

    Args:
      x: [m, k].
      w: [k, n] of the same dtype; k and n are multiples of the blocks'.
      key: of z.
      epsilon: ε.
      blocks: how the work is divided.
      interpret: runs it without a GPU, slowly.

    Returns:
      float32 [m, n].

    Raises:
      ValueError: for sizes that are no multiples of the blocks'.
    """
    (rows, terms), columns = x.shape, w.shape[1]
    if terms % blocks.terms or columns % blocks.columns:
        raise ValueError(
            f"weights of shape {w.shape} are no multiple of blocks of "
            f"({blocks.terms}, {blocks.columns}); give other blocks."
        )
    source = perturbations.normal()
    amplitude = jnp.float32(source.step) * epsilon
    # The values of the bytes 0 to 255, as float32.
    table = source.decode(jnp.arange(256, dtype=jnp.uint32))[::_PER_WORD]
    padding = max(MIN_ROWS, pl.next_power_of_2(rows)) - rows
    x = jnp.pad(x, ((0, padding), (0, 0)))
    whole = functools.partial(pl.BlockSpec, index_map=lambda j: (0,))
    call = pl.pallas_call(
        functools.partial(_kernel, blocks, columns),
        out_shape=jax.ShapeDtypeStruct((len(x), columns), jnp.float32),
        grid=(columns // blocks.columns,),
        in_specs=[
            whole((2,)),
            whole((1,)),
            whole((256,)),
            pl.BlockSpec(x.shape, lambda j: (0, 0)),
            pl.BlockSpec((terms, blocks.columns), lambda j: (0, j)),
        ],
        out_specs=pl.BlockSpec((len(x), blocks.columns), lambda j: (0, j)),
        compiler_params=triton.CompilerParams(
            num_warps=blocks.num_warps, num_stages=blocks.num_stages
        ),
        interpret=interpret,
    )
    words = jax.random.key_data(key)
    out = call(words, amplitude.reshape(1), table.astype(jnp.float32), x, w)
    return out[:rows]


def _kernel(
    blocks: Blocks,
    columns: int,
    key: Any,
    amplitude: Any,
    table: Any,
    x: Any,
    w: Any,
    out: Any,
) -> None:
    """One program: all rows of some columns."""
    shape = (blocks.terms, blocks.columns)
    first = pl.program_id(0) * blocks.columns
    column = (first + jax.lax.broadcasted_iota(jnp.int32, shape, 1)).astype(jnp.uint32)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0).astype(jnp.uint32)
    place = row * np.uint32(columns) + column
    words, scale = (key[0], key[1]), amplitude[0]

    def add(index: Any, total: jax.Array) -> jax.Array:
        some = pl.ds(index * blocks.terms, blocks.terms)
        start = (index * (blocks.terms * columns)).astype(jnp.uint32)
        at = place + start
        word = _hash(words, at // np.uint32(_PER_WORD))
        byte = (word >> (8 * (at % np.uint32(_PER_WORD)))) & np.uint32(255)
        z = table[byte.astype(jnp.int32)]
        block = w[some, :]
        perturbed = (block.astype(jnp.float32) + scale * z).astype(block.dtype)
        return total + jnp.dot(
            x[:, some], perturbed, preferred_element_type=jnp.float32
        )

    zeros = jnp.zeros(out.shape, jnp.float32)
    out[:, :] = jax.lax.fori_loop(0, w.shape[0] // blocks.terms, add, zeros)


def _hash(words: tuple[jax.Array, jax.Array], indices: jax.Array) -> jax.Array:
    """`perturbations.counter_hash`, whose key is two scalars here."""
    x = indices * np.uint32(0x9E3779B9)
    for word in words:
        x = x ^ word
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        x = x ^ (x >> np.uint32(16))
    return x
