"""A transformer in plain JAX whose blocks are scanned, for measurements at any size.

Weights of equal blocks are stacked, so that the program is as small for 64 blocks as
for one. They are random, made on the device, and of any arithmetic: floats of 32 or 16
bits, or integers on a grid with integer products.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fgrad
from experiments.benchmarks.problem import Problem
from fgrad import fixed_point, perturbations, products

# dtype of the matrices, and of all that is not a matrix
ARITHMETIC: dict[str, tuple[Any, Any]] = {
    "float32": (jnp.float32, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.bfloat16),
    "16w8a": (jnp.int16, jnp.float32),
    "8w8a": (jnp.int8, jnp.float32),
}
# Of a z as an integer: what random integers are made of.
_UNIT = round(1 / perturbations.normal().step)
# The grid of an activation: 127 steps reach 8 standard deviations of a normalised one.
_ACTIVATION_STEP = 1 / 16
# XLA counts what is in an array by 32 bits here and there: a larger one is stored as
# several.
_MAX_LEAF = 2**31


class Transformer(NamedTuple):
    """Sizes of a transformer.

    Attributes:
      width: features of a token.
      depth: number of blocks.
      num_heads: attention heads of a block.
      tokens: length of a sequence, of text or of patches and a class token.
      outputs: the vocabulary of a decoder, or the classes of an encoder.
      inputs: values of a patch, for an encoder; 0 for a decoder, which reads tokens.
      stages: parts that the blocks are stacked in, each a scan of its own.
      outputs_first: whether a block's matrices are stored as [out, in], rather than as
        [in, out]. Integer products on a GPU want the former: of the latter XLA makes
        a copy, and ahead of the scan, which is a second copy of the model.
      checkpointed: whether backpropagation computes a block again rather than store
        what is inside it.
    """

    width: int
    depth: int
    num_heads: int
    tokens: int
    outputs: int
    inputs: int = 0
    stages: int = 1
    outputs_first: bool = False
    checkpointed: bool = False

    def staged(self) -> "Transformer":
        """The same with as many stages as keep each leaf within 32 bits."""
        largest = max(1, (_MAX_LEAF - 1) // (4 * self.width**2))
        stages = max(self.stages, math.ceil(self.depth / largest))
        return self._replace(stages=stages)


# Of the published sizes: ViT-B/16 at 224 pixels, OPT-1.3B with its sequences cut short.
VIT_B16 = Transformer(768, 12, 12, 197, 1000, inputs=16 * 16 * 3)
DECODER = Transformer(2048, 24, 32, 512, 50_272)


def abstract_params(network: Transformer, arithmetic: str) -> Any:
    """The weights as `jax.ShapeDtypeStruct`: nothing is allocated.

    Args:
      network: sizes.
      arithmetic: a key of `ARITHMETIC`.

    Returns:
      A pytree; matrices of integers are `fgrad.QTensor`, with one scale for each.
    """
    matrix, other = ARITHMETIC[arithmetic]
    width, counts = (
        network.width,
        np.full(network.stages, network.depth // network.stages),
    )
    counts[: network.depth % network.stages] += 1

    def vector(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, other)

    def kernel(*shape: int) -> Any:
        array = jax.ShapeDtypeStruct(shape, matrix)
        if jnp.issubdtype(matrix, jnp.floating):
            return array
        scales = (*shape[:-2], 1, 1) if len(shape) > 2 else ()
        return fgrad.QTensor(array, jax.ShapeDtypeStruct(scales, jnp.float32))

    def dense(*shape: int) -> Any:
        *stacked, inputs, outputs = shape
        sides = (outputs, inputs) if network.outputs_first else (inputs, outputs)
        return {"kernel": kernel(*stacked, *sides), "bias": vector(*stacked, outputs)}

    def norm(*stacked: int) -> Any:
        return {"scale": vector(*stacked, width), "bias": vector(*stacked, width)}

    def stage(count: int) -> Any:
        square = {
            name: dense(count, width, width)
            for name in ("query", "key", "value", "out")
        }
        return {
            **square,
            "up": dense(count, width, 4 * width),
            "down": dense(count, 4 * width, width),
            "before_attention": norm(count),
            "before_perceptron": norm(count),
        }

    params = {
        "positions": vector(network.tokens, width),
        "norm": norm(),
        "stages": [stage(int(count)) for count in counts],
    }
    if network.inputs:
        params["patches"] = dense(network.inputs, width)
        params["class_token"] = vector(width)
        params["head"] = dense(width, network.outputs)
    else:
        params["embedding"] = kernel(network.outputs, width)
    return params


def random_params(network: Transformer, arithmetic: str) -> Any:
    """Weights like `abstract_params`, one leaf after the other, on the device."""
    abstract = abstract_params(network, arithmetic)
    paths, treedef = jax.tree_util.tree_flatten_with_path(
        abstract, is_leaf=fixed_point.is_qtensor
    )
    leaves: list[Any] = []
    for index, (path, leaf) in enumerate(paths):
        key = jax.random.fold_in(jax.random.key(0), index)
        name = fixed_point.path_str(path).split("/")[-1]
        rows = name == "embedding" or network.outputs_first
        fan_in = leaf.shape[-1 if rows else -2] if leaf.ndim > 1 else 1
        size = fan_in**-0.5
        if fixed_point.is_qtensor(leaf):
            units = 200 if leaf.bits > 8 else 1
            qvalue = random_array(key, leaf.shape, leaf.qvalue.dtype, units)
            scale = jnp.full(leaf.scale.shape, size / (_UNIT * units), jnp.float32)
            leaves.append(fgrad.QTensor(qvalue, scale))
        elif name in ("scale", "bias"):
            leaves.append(jnp.full(leaf.shape, float(name == "scale"), leaf.dtype))
        else:
            leaves.append(random_array(key, leaf.shape, leaf.dtype, size / _UNIT))
    return jax.tree.unflatten(treedef, leaves)


def _sample(key: jax.Array, shape: Any, dtype: Any, amplitude: float) -> jax.Array:
    z = perturbations.normal().sample(key, shape)
    return (z.astype(jnp.float32) * amplitude).astype(dtype)


random_array = jax.jit(_sample, static_argnums=(1, 2, 3))


def loss(network: Transformer, params: Any, batch: Any) -> jax.Array:
    """The mean cross-entropy, of the next token or of the class.

    Args:
      network: sizes.
      params: as `random_params`.
      batch: as `random_batch`.
    """
    if network.inputs:
        patches, labels = batch
        x = _dense(network, patches, params["patches"])
        token = jnp.broadcast_to(params["class_token"], (len(x), 1, network.width))
        x = jnp.concatenate([token.astype(x.dtype), x], axis=1)
    else:
        labels = batch[:, 1:]
        x = _rows(params["embedding"], batch[:, :-1])
    x += params["positions"][: x.shape[1]]
    for stage in params["stages"]:
        x = _blocks(network, x, stage)
    x = _norm(x, params["norm"])
    if network.inputs:
        logits = _dense(network, x[:, 0], params["head"])
    else:
        logits = _product(x, params["embedding"], 1)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), labels
    )
    return jnp.mean(losses)


def _blocks(network: Transformer, x: jax.Array, stage: Any) -> jax.Array:
    """Runs the blocks of a stage, one after the other."""
    dense = functools.partial(_dense, network)

    def block(x: jax.Array, layers: Any) -> tuple[jax.Array, None]:
        heads = (*x.shape[:2], network.num_heads, network.width // network.num_heads)
        y = _norm(x, layers["before_attention"])
        mixed = jax.nn.dot_product_attention(
            *(dense(y, layers[n]).reshape(heads) for n in ("query", "key", "value")),
            is_causal=not network.inputs,
        )
        x = x + dense(mixed.reshape(x.shape), layers["out"])
        y = dense(_norm(x, layers["before_perceptron"]), layers["up"])
        return x + dense(jax.nn.gelu(y), layers["down"]), None

    if network.checkpointed:
        block = jax.checkpoint(block)
    return jax.lax.scan(block, x, stage)[0]


def _norm(x: jax.Array, layer: Any) -> jax.Array:
    y = jax.nn.standardize(x.astype(jnp.float32), epsilon=1e-6)
    return (y * layer["scale"] + layer["bias"]).astype(x.dtype)


def _dense(network: Transformer, x: jax.Array, layer: Any) -> jax.Array:
    return _product(x, layer["kernel"], int(network.outputs_first)) + layer["bias"]


def _product(x: jax.Array, matrix: Any, axis: int) -> jax.Array:
    """``x`` [..., n] times a matrix, along an axis of it; integers in integers."""
    numbers = (((x.ndim - 1,), (axis,)), ((), ()))
    if not fixed_point.is_qtensor(matrix):
        return jax.lax.dot_general(x, matrix, numbers)
    step = jnp.float32(_ACTIVATION_STEP)
    return products.dot_general(
        fixed_point.quantize_to_scale(x, step, 8), matrix, numbers
    )


def _rows(matrix: Any, index: jax.Array) -> jax.Array:
    if not fixed_point.is_qtensor(matrix):
        return matrix[index]
    return matrix.qvalue[index] * matrix.scale


def abstract_batch(network: Transformer, batch_size: int, dtype: Any) -> Any:
    """The batch as `jax.ShapeDtypeStruct`; see `random_batch`."""
    if not network.inputs:
        return jax.ShapeDtypeStruct((batch_size, network.tokens + 1), jnp.int32)
    patches = (batch_size, network.tokens - 1, network.inputs)
    return (
        jax.ShapeDtypeStruct(patches, dtype),
        jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    )


def random_batch(network: Transformer, batch_size: int, dtype: Any) -> Any:
    """Tokens [batch, tokens + 1], or patches [batch, tokens - 1, inputs] and labels."""
    random = np.random.default_rng(1)

    def array(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(
                random.integers(network.outputs, size=leaf.shape), leaf.dtype
            )
        return jnp.asarray(random.standard_normal(leaf.shape, np.float32), leaf.dtype)

    return jax.tree.map(array, abstract_batch(network, batch_size, dtype))


def problem(
    network: Transformer,
    batch_size: int,
    arithmetic: str = "float32",
    *,
    params: Any = None,
    abstract: bool = False,
) -> Problem:
    """Sets a problem.

    Args:
      network: sizes.
      batch_size: sequences or images of the batch.
      arithmetic: a key of `ARITHMETIC`.
      params: weights that exist already; new ones by default.
      abstract: shapes take the place of arrays, for a plan of what is too large here.

    Returns:
      The `Problem`, whose loss takes ``batch``.
    """
    dtype = ARITHMETIC[arithmetic][1]
    if abstract:
        params = abstract_params(network, arithmetic)
        batch = abstract_batch(network, batch_size, dtype)
    else:
        params = random_params(network, arithmetic) if params is None else params
        batch = random_batch(network, batch_size, dtype)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return loss(network, params, batch)

    return Problem(loss_fn, params, {"batch": batch})
