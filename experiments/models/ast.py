"""The Audio Spectrogram Transformer, whose published weights it reads."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments import checkpoints
from experiments.models import pytorch, vit
from fgrad import fixed_point, layers

_EPSILON = 1e-12  # of all normalisations, in the published weights' configuration
_TOKENS = 2  # before the patches: class and distillation
# Ours and Hugging Face's name of each layer of a block, but for attention's inputs.
_LAYERS = {
    "LayerNorm_0": "layernorm_before",
    "MultiHeadDotProductAttention_0/out": "attention.output.dense",
    "LayerNorm_1": "layernorm_after",
    "Dense_0": "intermediate.dense",
    "Dense_1": "output.dense",
}
_BODY = "audio_spectrogram_transformer."  # a prefix, of networks with a head


class AST(nn.Module):
    """AST-base, or with other attributes a relative of it.

    86,594,063 parameters for 1,024 frames of 128 mel bins and AudioSet's 527 classes:
    86,188,800 of them before the head and its normalisation.

    Attributes:
      num_classes: number of logits.
      patch: side of a patch, in frames and in mel bins.
      strides: between patches, in frames and in mel bins; smaller than a patch, they
        overlap.
      width: features of a token.
      depth: number of blocks.
      num_heads: attention heads of a block.
      mlp_width: hidden units of a block's perceptron.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.

    Example:
      >>> model, spectrograms = AST(527), jnp.zeros((1, 1024, 128, 1))
      >>> params = jax.eval_shape(model.init, jax.random.key(0), spectrograms)["params"]
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      86594063

    Reference:
      Gong et al., "AST: Audio Spectrogram Transformer", Interspeech 2021.
    """

    num_classes: int = 527
    patch: int = 16
    strides: tuple[int, int] = (10, 10)
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Parameters of each stage: embedding, blocks, normalised mean, head."""
        blocks = ((f"Block_{i}",) for i in range(self.depth))
        embedding = ("Conv_0", "class_token", "distillation_token", "positions")
        return embedding, *blocks, ("LayerNorm_0", "LayerNorm_1"), ("Dense_0",)

    @nn.compact
    def __call__(
        self, x: jax.Array, start: int = 0, stop: int | None = None
    ) -> jax.Array:
        """Logits of spectrograms.

        Args:
          x: floats [batch, frames, mels, 1], see `experiments.audio`. With ``start``
            what the stages before it return.
          start: first stage to run.
          stop: stage to stop before, as in a slice; -1 for the features.

        Returns:
          [batch, classes]; with ``stop`` what the stage before it returns.

        Raises:
          ValueError: if a spectrogram is smaller than a patch, or the positions are for
            another number of patches.
        """
        settings: dict[str, Any] = {"bits": self.bits, "calibration": self.calibration}
        norm = functools.partial(nn.LayerNorm, epsilon=_EPSILON)

        def embed(spectrograms: jax.Array) -> jax.Array:
            self._check(spectrograms.shape)
            # The weights' axes are mel bins first, and so is the order of patches.
            x = layers.Conv(
                self.width,
                (self.patch, self.patch),
                strides=self.strides[::-1],
                padding="VALID",
                name="Conv_0",
                **settings,
            )(spectrograms.swapaxes(1, 2))
            x = x.reshape(x.shape[0], -1, self.width)
            small = nn.initializers.truncated_normal(0.02)
            # A QTensor here stands for its value.
            tokens = [
                jnp.asarray(self.param(f"{name}_token", small, (1, 1, self.width)))
                for name in ("class", "distillation")
            ]
            tokens = [jnp.tile(token, (x.shape[0], 1, 1)) for token in tokens]
            x = jnp.concatenate([*tokens, x], axis=1)
            return x + jnp.asarray(self.param("positions", small, (1, *x.shape[1:])))

        def block(index: int, tokens: jax.Array) -> jax.Array:
            return vit.Block(
                self.num_heads,
                self.mlp_width,
                _EPSILON,
                name=f"Block_{index}",
                **settings,
            )(tokens)

        def mean(tokens: jax.Array) -> jax.Array:
            own = norm(name="LayerNorm_0")(tokens[:, :_TOKENS])
            return norm(name="LayerNorm_1")(own.mean(axis=1))

        def classify(features: jax.Array) -> jax.Array:
            return layers.Dense(self.num_classes, name="Dense_0", **settings)(features)

        blocks = [functools.partial(block, index) for index in range(self.depth)]
        stages: list[Callable[[jax.Array], jax.Array]]
        stages = [embed, *blocks, mean, classify]
        for stage in stages[start:stop]:
            x = stage(x)
        return x

    def patches(self, shape: Sequence[int]) -> tuple[int, int]:
        """Patches along time and along mel bins of [batch, frames, mels, 1]."""
        along, up = (
            1 + (size - self.patch) // stride
            for size, stride in zip(shape[1:3], self.strides, strict=True)
        )
        return along, up

    def _check(self, shape: tuple[int, ...]) -> None:
        frames, mels = shape[1:3]
        if min(frames, mels) < self.patch:
            raise ValueError(
                f"spectrograms of {frames} frames and {mels} mel bins are smaller than "
                f"a patch of {self.patch}x{self.patch}: make them larger or it smaller."
            )
        along, up = self.patches(shape)
        positions = self.get_variable("params", "positions")
        if positions is not None and positions.shape[1] != _TOKENS + along * up:
            raise ValueError(
                f"spectrograms of {frames} frames and {mels} mel bins have "
                f"{along}x{up} patches, and the positions are for "
                f"{positions.shape[1] - _TOKENS}: cut or pad the spectrograms, or "
                "interpolate the positions."
            )


def from_state_dict(
    state: Mapping[str, np.ndarray], num_heads: int | None = None
) -> dict[str, Any]:
    """Parameters of `AST` from those of Hugging Face's network.

    Args:
      state: the state dict of ``ASTForAudioClassification``, of any size.
      num_heads: attention heads, which the weights do not tell; by default one for each
        64 features, as in the published networks.

    Returns:
      float32 parameters, nested as Flax has them; `matching` makes their network.

    Raises:
      ValueError: if names are missing, or are those of another network; if the heads do
        not divide the width.

    Example:
      >>> from_state_dict({"classifier.dense.bias": np.ones(5)})
      Traceback (most recent call last):
      ...
      ValueError: this is no audio spectrogram transformer: it lacks ['audio_spe...

    Reference:
      ``MIT/ast-finetuned-audioset-10-10-0.4593`` and its relatives, of the reference's
      authors.
    """
    found = {name.split(".")[3] for name in state if name.startswith(f"{_BODY}encoder")}
    depth = len(found)
    expected = set(_names(max(depth, 1)))
    pytorch.check_names(state, expected, "audio spectrogram transformer")
    embeddings = f"{_BODY}embeddings"
    patches = f"{embeddings}.patch_embeddings.projection"
    params: dict[str, Any] = {
        **pytorch.float32(
            class_token=state[f"{embeddings}.cls_token"],
            distillation_token=state[f"{embeddings}.distillation_token"],
            positions=state[f"{embeddings}.position_embeddings"],
        ),
        "Conv_0": pytorch.float32(
            kernel=state[f"{patches}.weight"].transpose(2, 3, 1, 0),
            bias=state[f"{patches}.bias"],
        ),
        "LayerNorm_0": pytorch.norm(state, f"{_BODY}layernorm"),
        "LayerNorm_1": pytorch.norm(state, "classifier.layernorm"),
        "Dense_0": pytorch.dense(state, "classifier.dense"),
    }
    for index in range(depth):
        source = f"{_BODY}encoder.layer.{index}"
        inputs = [
            pytorch.dense(state, f"{source}.attention.attention.{name}")
            for name in ("query", "key", "value")
        ]
        names = {ours: f"{source}.{theirs}" for ours, theirs in _LAYERS.items()}
        params[f"Block_{index}"] = vit.read_block(state, names, inputs, num_heads)
    return params


def _names(depth: int) -> Iterator[str]:
    """All names of Hugging Face's network."""
    embeddings = f"{_BODY}embeddings"
    for name in ("cls_token", "distillation_token", "position_embeddings"):
        yield f"{embeddings}.{name}"
    modules = [
        f"{embeddings}.patch_embeddings.projection",
        f"{_BODY}layernorm",
        "classifier.layernorm",
        "classifier.dense",
    ]
    attention = (f"attention.attention.{name}" for name in ("query", "key", "value"))
    parts = [*attention, *_LAYERS.values()]
    for index in range(depth):
        modules += [f"{_BODY}encoder.layer.{index}.{part}" for part in parts]
    for module in modules:
        yield from (f"{module}.weight", f"{module}.bias")


def load(path: str | os.PathLike[str], num_heads: int | None = None) -> dict[str, Any]:
    """Parameters in a file that Hugging Face publishes; PyTorch is not needed.

    Args:
      path: ``model.safetensors`` or a PyTorch file, see `experiments.checkpoints.load`.
      num_heads: as for `from_state_dict`.

    Returns:
      As `from_state_dict`.

    Raises:
      ValueError: as `from_state_dict` and `experiments.checkpoints.load`.

    Example:
      >>> params = load("model.safetensors")  # doctest: +SKIP
      >>> model = matching(params)  # doctest: +SKIP
    """
    return from_state_dict(checkpoints.load(path), num_heads)


def resized(
    model: AST, params: Mapping[str, Any], shape: Sequence[int]
) -> dict[str, Any]:
    """Parameters whose positions are for spectrograms of another length.

    For a shorter one the positions of the middle are taken, for a longer one they are
    interpolated linearly along time, as the reference does.

    Args:
      model: the network, of which the patch and the strides count.
      params: of it.
      shape: of a batch of spectrograms, [batch, frames, mels, 1].

    Returns:
      The parameters, with positions [1, 2 + patches, width].

    Raises:
      ValueError: if the positions are for another number of mel bins.

    Example:
      >>> params = {"positions": jnp.ones((1, 2 + 2 * 5, 8))}  # 2 along mel bins
      >>> model = AST(patch=4, strides=(4, 4))
      >>> resized(model, params, (1, 12, 8, 1))["positions"].shape  # 2x3
      (1, 8, 8)
    """
    positions = jnp.asarray(params["positions"])
    own, grid = positions[:, :_TOKENS], positions[:, _TOKENS:]
    along, up = model.patches(shape)
    known, rest = divmod(grid.shape[1], up)
    if rest:
        raise ValueError(
            f"{grid.shape[1]} positions are for another number of mel bins than "
            f"{shape[2]}: make spectrograms of as many as the network was trained on."
        )
    if known == along:
        return dict(params)
    square = grid.reshape(1, up, known, -1)
    if known > along:
        first = (known - along) // 2
        fitted = square[:, :, first : first + along]
    else:
        fitted = jax.image.resize(square, (1, up, along, grid.shape[-1]), "linear")
    joined = jnp.concatenate([own, fitted.reshape(1, up * along, -1)], axis=1)
    return {**params, "positions": joined}


def matching(params: Mapping[str, Any], **settings: Any) -> AST:
    """The network that has given parameters.

    Args:
      params: of an `AST`, as `load` and `from_state_dict` return them.
      **settings: further attributes, such as ``bits``, and ``strides`` unless they are
        the published ones.

    Returns:
      The module.

    Example:
      >>> model = AST(5, patch=4, width=64, depth=2, num_heads=2, mlp_width=128)
      >>> shapes = jax.eval_shape(
      ...     model.init, jax.random.key(0), jnp.zeros((1, 24, 8, 1))
      ... )
      >>> matching(shapes["params"]) == model
      True
    """
    return AST(**vit.sizes(params), **settings)
