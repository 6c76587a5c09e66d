"""A vision transformer; by default DeiT-tiny, whose published weights it reads."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from experiments import checkpoints
from experiments.models import pytorch
from fgrad import fixed_point, layers

# Features of a head in DeiT and in the vision transformers of its paper's reference.
_HEAD_FEATURES = 64
# Ours and timm's name of each layer of a block, but for the attention's inputs.
_LAYERS = {
    "LayerNorm_0": "norm1",
    "MultiHeadDotProductAttention_0/out": "attn.proj",
    "LayerNorm_1": "norm2",
    "Dense_0": "mlp.fc1",
    "Dense_1": "mlp.fc2",
}


class Block(nn.Module):
    """A pre-norm encoder block: attention, then a perceptron, both residual.

    Attributes:
      num_heads: attention heads.
      mlp_width: hidden units of the perceptron.
      epsilon: of the normalisations.
      causal: whether a token attends to itself and those before it only.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.
    """

    num_heads: int
    mlp_width: int
    epsilon: float = 1e-6
    causal: bool = False
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens [batch, tokens, width] to tokens of the same shape."""
        settings: dict[str, Any] = {"bits": self.bits, "calibration": self.calibration}
        width = tokens.shape[-1]
        x = nn.LayerNorm(epsilon=self.epsilon)(tokens)
        mask = nn.make_causal_mask(x[..., 0], dtype=bool) if self.causal else None
        attention = layers.MultiHeadDotProductAttention(self.num_heads, **settings)
        tokens += attention(x, mask=mask)
        x = nn.LayerNorm(epsilon=self.epsilon)(tokens)
        x = layers.Dense(self.mlp_width, **settings)(x)
        x = nn.gelu(x, approximate=False)
        return tokens + layers.Dense(width, **settings)(x)


class ViT(nn.Module):
    """DeiT-tiny, or with other attributes any plain vision transformer.

    5,717,416 parameters for 224x224x3 images and 1,000 classes; 5,495,626 for
    96x96x3 (36 patches and the class token) and 10.

    Attributes:
      num_classes: number of logits.
      patch: side of a patch in pixels.
      width: features of a token.
      depth: number of blocks.
      num_heads: attention heads of a block.
      mlp_width: hidden units of a block's perceptron.
      mean_pooled: whether the head sees the mean of all tokens, not the class token.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.

    Reference:
      Touvron et al., "Training data-efficient image transformers & distillation
      through attention", ICML 2021, table 1.
    """

    num_classes: int = 10
    patch: int = 16
    width: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_width: int = 768
    mean_pooled: bool = False
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Parameters of each stage: embedding, blocks, last normalisation, head."""
        blocks = ((f"Block_{i}",) for i in range(self.depth))
        embedding = ("Conv_0", "class_token", "positions")
        return embedding, *blocks, ("LayerNorm_0",), ("Dense_0",)

    @nn.compact
    def __call__(
        self, x: jax.Array, start: int = 0, stop: int | None = None
    ) -> jax.Array:
        """Logits of images.

        Args:
          x: floats [batch, height, width, channels]; for weights of timm red first and
            normalised as those were trained. With ``start`` what the stages before it
            return.
          start: first stage to run.
          stop: stage to stop before, as in a slice.

        Returns:
          [batch, classes]; with ``stop`` what the stage before it returns.

        Raises:
          ValueError: if the sides are no multiples of the patch, or the positions are
            for another number of patches.
        """
        settings: dict[str, Any] = {"bits": self.bits, "calibration": self.calibration}

        def embed(images: jax.Array) -> jax.Array:
            self._check(images.shape)
            patch = (self.patch, self.patch)
            x = layers.Conv(
                self.width, patch, strides=patch, name="Conv_0", **settings
            )(images)
            x = x.reshape(x.shape[0], -1, self.width)
            small = nn.initializers.truncated_normal(0.02)
            # A QTensor here stands for its value.
            token = jnp.asarray(self.param("class_token", small, (1, 1, self.width)))
            x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
            return x + jnp.asarray(self.param("positions", small, (1, *x.shape[1:])))

        def block(index: int, tokens: jax.Array) -> jax.Array:
            return Block(
                self.num_heads, self.mlp_width, name=f"Block_{index}", **settings
            )(tokens)

        def normalise(tokens: jax.Array) -> jax.Array:
            tokens = nn.LayerNorm(epsilon=1e-6, name="LayerNorm_0")(tokens)
            return tokens.mean(1) if self.mean_pooled else tokens[:, 0]

        def classify(features: jax.Array) -> jax.Array:
            return layers.Dense(self.num_classes, name="Dense_0", **settings)(features)

        blocks = [functools.partial(block, index) for index in range(self.depth)]
        stages: list[Callable[[jax.Array], jax.Array]]
        stages = [embed, *blocks, normalise, classify]
        for stage in stages[start:stop]:
            x = stage(x)
        return x

    def _check(self, shape: tuple[int, ...]) -> None:
        height, width = shape[-3:-1]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"images of {height}x{width} pixels do not divide into patches of "
                f"{self.patch}x{self.patch}: resize or crop them."
            )
        patches = (height // self.patch) * (width // self.patch)
        positions = self.get_variable("params", "positions")
        if positions is not None and positions.shape[1] != 1 + patches:
            known = positions.shape[1] - 1
            side = self.patch * round(known**0.5)
            raise ValueError(
                f"images of {height}x{width} pixels have {patches} patches, and the "
                f"positions are for {known}: resize the images to {side}x{side}, or "
                "interpolate the positions."
            )


def from_state_dict(
    state: Mapping[str, np.ndarray], num_heads: int | None = None
) -> dict[str, Any]:
    """Parameters of `ViT` from those of timm's network.

    Args:
      state: the state dict of timm's ``deit_tiny_patch16_224``,
        ``vit_tiny_patch16_224`` or another plain vision transformer with a class token:
        any depth, width, patch, image size and number of classes.
      num_heads: attention heads, which the weights do not tell; by default one for each
        64 features, as in the published networks.

    Returns:
      float32 parameters, nested as Flax has them; `matching` makes their network.

    Raises:
      ValueError: if names are missing, or are those of another network; if the heads do
        not divide the width.

    Example:
      >>> from_state_dict({"blocks.0.norm1.weight": np.ones(192)})
      Traceback (most recent call last):
      ...
      ValueError: this is no vision transformer: it lacks ['blocks.0.attn.proj...

    Reference:
      Wightman, "PyTorch image models", https://doi.org/10.5281/zenodo.4414861.
    """
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    pytorch.check_names(state, set(_names(max(depth, 1))), "vision transformer")
    patches = state["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    params: dict[str, Any] = {
        **pytorch.float32(class_token=state["cls_token"], positions=state["pos_embed"]),
        "Conv_0": pytorch.float32(kernel=patches, bias=state["patch_embed.proj.bias"]),
        "LayerNorm_0": pytorch.norm(state, "norm"),
        "Dense_0": pytorch.dense(state, "head"),
    }
    for index in range(depth):
        source = f"blocks.{index}"
        joined = pytorch.dense(state, f"{source}.attn.qkv")
        # Side by side: all of the query, then the key, then the value.
        parts = (np.split(joined[name], 3, axis=-1) for name in ("kernel", "bias"))
        inputs = [
            {"kernel": kernel, "bias": bias}
            for kernel, bias in zip(*parts, strict=True)
        ]
        names = {ours: f"{source}.{theirs}" for ours, theirs in _LAYERS.items()}
        params[f"Block_{index}"] = read_block(state, names, inputs, num_heads)
    return params


def read_block(
    state: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    inputs: Sequence[Mapping[str, np.ndarray]],
    num_heads: int | None,
) -> dict[str, Any]:
    """Parameters of a `Block` from those of PyTorch's layers.

    Args:
      state: name to array.
      names: of each layer in the state dict, but for the attention's inputs.
      inputs: of query, key and value ``kernel`` [width, width] and ``bias`` [width].
      num_heads: attention heads; None for one for each 64 features.

    Returns:
      float32 parameters, nested as Flax has them.

    Raises:
      ValueError: if the heads do not divide the width.
    """
    width = len(inputs[0]["bias"])
    num_heads = width // _HEAD_FEATURES if num_heads is None else num_heads
    if num_heads < 1 or width % num_heads:
        raise ValueError(
            f"num_heads={num_heads} does not divide the width of {width}: say how many "
            "heads the network has."
        )
    heads = num_heads, width // num_heads
    params = {
        ours: (pytorch.norm if ours.startswith("LayerNorm") else pytorch.dense)(
            state, theirs
        )
        for ours, theirs in names.items()
    }
    attention = "MultiHeadDotProductAttention_0"
    for name, layer in zip(("query", "key", "value"), inputs, strict=True):
        params[f"{attention}/{name}"] = pytorch.float32(
            kernel=layer["kernel"].reshape(width, *heads),
            bias=layer["bias"].reshape(heads),
        )
    out = params[f"{attention}/out"]
    out["kernel"] = out["kernel"].reshape(*heads, width)
    return traverse_util.unflatten_dict(params, sep="/")


def _names(depth: int) -> Iterator[str]:
    """All names of timm's network."""
    yield from ("cls_token", "pos_embed")
    modules = ["patch_embed.proj", "norm", "head"]
    for index in range(depth):
        modules += [f"blocks.{index}.{n}" for n in ("attn.qkv", *_LAYERS.values())]
    for module in modules:
        yield from (f"{module}.weight", f"{module}.bias")


def load(path: str | os.PathLike[str], num_heads: int | None = None) -> dict[str, Any]:
    """Parameters in a file that timm or DeiT published; PyTorch is not needed.

    Args:
      path: a ``.safetensors`` or PyTorch file, see `experiments.checkpoints.load`.
        DeiT's own files keep the network under "model", which is fine.
      num_heads: as for `from_state_dict`.

    Returns:
      As `from_state_dict`.

    Raises:
      ValueError: as `from_state_dict` and `experiments.checkpoints.load`.

    Example:
      >>> params = load("deit_tiny_patch16_224.safetensors")  # doctest: +SKIP
      >>> model = matching(params)  # doctest: +SKIP
    """
    state = checkpoints.load(path)
    state = {name.removeprefix("model."): array for name, array in state.items()}
    return from_state_dict(state, num_heads)


def resized(
    model: ViT, params: Mapping[str, Any], shape: Sequence[int]
) -> dict[str, Any]:
    """Parameters whose positions are for images of another size.

    The positions of the patches, on their grid, are interpolated by cubic functions,
    which is what DeiT's authors do; that of the class token stays.

    Args:
      model: the network, of which only the patch counts.
      params: of it, with the positions of a square of patches.
      shape: of a batch of images, [batch, height, width, channels].

    Returns:
      The parameters, with positions [1, 1 + patches, width].

    Raises:
      ValueError: if the positions are those of no square.

    Example:
      >>> params = {"positions": jnp.ones((1, 1 + 4, 8))}  # of 2x2 patches
      >>> found = resized(ViT(patch=4), params, (1, 12, 16, 3))
      >>> found["positions"].shape  # of 3x4
      (1, 13, 8)
    """
    positions = jnp.asarray(params["positions"])
    own, grid = positions[:, :1], positions[:, 1:]
    rows, columns = shape[1] // model.patch, shape[2] // model.patch
    side = round(grid.shape[1] ** 0.5)
    if side**2 != grid.shape[1]:
        raise ValueError(
            f"{grid.shape[1]} positions are not those of a square of patches, so that "
            "they cannot be interpolated."
        )
    if (side, side) == (rows, columns):
        return dict(params)
    square = grid.reshape(1, side, side, -1)
    between = jax.image.resize(square, (1, rows, columns, grid.shape[-1]), "cubic")
    joined = jnp.concatenate([own, between.reshape(1, rows * columns, -1)], axis=1)
    return {**params, "positions": joined}


def matching(params: Mapping[str, Any], **settings: Any) -> ViT:
    """The network that has given parameters.

    Args:
      params: of a `ViT`, as `load` and `from_state_dict` return them.
      **settings: further attributes, such as ``bits``.

    Returns:
      The module.

    Example:
      >>> images = jnp.zeros((1, 32, 32, 3))
      >>> model = ViT(num_classes=5, depth=2, width=64, num_heads=2, mlp_width=128)
      >>> shapes = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> matching(shapes["params"]) == model
      True
    """
    return ViT(**sizes(params), **settings)


def sizes(params: Mapping[str, Any]) -> dict[str, int]:
    """What parameters tell of their network, by the names of its attributes."""
    query = params["Block_0"]["MultiHeadDotProductAttention_0"]["query"]["kernel"]
    width, num_heads, _ = query.shape
    return {
        "num_classes": params["Dense_0"]["kernel"].shape[-1],
        "patch": params["Conv_0"]["kernel"].shape[0],
        "width": width,
        "depth": sum(name.startswith("Block_") for name in params),
        "num_heads": num_heads,
        "mlp_width": params["Block_0"]["Dense_0"]["kernel"].shape[-1],
    }
