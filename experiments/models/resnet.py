"""A residual network as it is deployed: batch normalisation folded into biases."""

import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from experiments import checkpoints
from experiments.models import pytorch
from fgrad import fixed_point, layers

# Of the batch normalisations that are folded into the convolutions.
_EPSILON = 1e-5


class Block(nn.Module):
    """A basic block: two 3x3 convolutions, and a 1x1 where the shape changes.

    Attributes:
      features: output channels.
      stride: of the first convolution and of the shortcut.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.
    """

    features: int
    stride: int = 1
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, channels] to [batch, height / stride, …, features]."""
        settings: dict[str, Any] = {
            "kernel_init": nn.initializers.he_normal(),
            "bits": self.bits,
            "calibration": self.calibration,
        }
        y = layers.Conv(
            self.features, (3, 3), strides=self.stride, padding=1, **settings
        )(x)
        y = layers.Conv(self.features, (3, 3), padding=1, **settings)(nn.relu(y))
        if self.stride != 1 or x.shape[-1] != self.features:
            x = layers.Conv(self.features, (1, 1), strides=self.stride, **settings)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet18 in torchvision's topology, or with other stages a relative of it.

    11,684,712 parameters for 1,000 classes: torchvision's 11,689,512 with the scale
    and shift of each of its 4,800 normalised channels folded into one bias.

    Attributes:
      num_classes: number of logits.
      width: channels of the first stage; every stage doubles them.
      stage_sizes: blocks of each stage.
      small_images: starts with a 3x3 convolution at full resolution, as is usual for
        32x32 pixels, rather than with a 7x7 of stride 2 and a pooling of stride 2.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.

    Reference:
      He et al., "Deep residual learning for image recognition", CVPR 2016, table 1.
    """

    num_classes: int = 10
    width: int = 64
    stage_sizes: Sequence[int] = (2, 2, 2, 2)
    small_images: bool = False
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Parameters of each stage: stem, blocks, pooling, head."""
        blocks = ((f"Block_{index}",) for index in range(sum(self.stage_sizes)))
        return ("Conv_0",), *blocks, (), ("Dense_0",)

    @nn.compact
    def __call__(
        self, x: jax.Array, start: int = 0, stop: int | None = None
    ) -> jax.Array:
        """Logits of images.

        Args:
          x: floats [batch, height, width, channels] of any size; for weights of
            torchvision red first and normalised as those were trained. With ``start``
            what the stages before it return.
          start: first stage to run.
          stop: stage to stop before, as in a slice; -1 for the features.

        Returns:
          [batch, classes]; with ``stop`` what the stage before it returns.
        """
        settings: dict[str, Any] = {"bits": self.bits, "calibration": self.calibration}

        def stem(images: jax.Array) -> jax.Array:
            side, stride = (3, 1) if self.small_images else (7, 2)
            x = layers.Conv(
                self.width,
                (side, side),
                strides=stride,
                padding=side // 2,
                kernel_init=nn.initializers.he_normal(),
                name="Conv_0",
                **settings,
            )(images)
            x = nn.relu(x)
            if self.small_images:
                return x
            return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

        def block(name: str, features: int, stride: int, x: jax.Array) -> jax.Array:
            return Block(features, stride, name=name, **settings)(x)

        def pool(x: jax.Array) -> jax.Array:
            return x.mean(axis=(1, 2))

        def classify(features: jax.Array) -> jax.Array:
            return layers.Dense(self.num_classes, name="Dense_0", **settings)(features)

        shapes = [
            (self.width * 2**stage, 2 if stage and not repeat else 1)
            for stage, size in enumerate(self.stage_sizes)
            for repeat in range(size)
        ]
        blocks = [
            functools.partial(block, f"Block_{index}", *shape)
            for index, shape in enumerate(shapes)
        ]
        stages: list[Callable[[jax.Array], jax.Array]]
        stages = [stem, *blocks, pool, classify]
        for stage in stages[start:stop]:
            x = stage(x)
        return x


def from_state_dict(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of `ResNet` from those of torchvision's network.

    Each normalisation is folded, see `experiments.models.pytorch.convolution`.

    Args:
      state: the state dict of torchvision's ``resnet18``, or of a relative with basic
        blocks, such as ``resnet34``, with any width and number of classes.

    Returns:
      float32 parameters, nested as Flax has them; `matching` makes their network.

    Raises:
      ValueError: if names are missing, or are those of another network.

    Example:
      >>> from_state_dict({"conv1.weight": np.zeros((64, 3, 7, 7))})
      Traceback (most recent call last):
      ...
      ValueError: this is no ResNet of basic blocks: it lacks ['bn1.bias', ...
    """
    sources = {"Conv_0": ("conv1", "bn1")}
    for index, (stage, block) in enumerate(_blocks(state)):
        source, target = f"layer{stage}.{block}", f"Block_{index}"
        for conv in (1, 2):
            names = f"{source}.conv{conv}", f"{source}.bn{conv}"
            sources[f"{target}/Conv_{conv - 1}"] = names
        if stage > 1 and block == 0:  # where the shape changes
            names = f"{source}.downsample.0", f"{source}.downsample.1"
            sources[f"{target}/Conv_2"] = names
    expected = {"fc.weight", "fc.bias"}
    for names in sources.values():
        expected.update(pytorch.with_norm(*names))
    pytorch.check_names(state, expected, "ResNet of basic blocks")

    params = {"Dense_0": pytorch.dense(state, "fc")}
    for name, names in sources.items():
        params[name] = pytorch.convolution(state, *names, _EPSILON)
    return traverse_util.unflatten_dict(params, sep="/")


def _blocks(state: Mapping[str, np.ndarray]) -> list[tuple[int, int]]:
    """Stage, from 1, and number, from 0, of each block, in order; one at least."""
    matches = (re.match(r"layer(\d+)\.(\d+)\.", name) for name in state)
    found = {(int(m[1]), int(m[2])) for m in matches if m}
    return sorted(found) or [(1, 0)]


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parameters in a file that torchvision published; PyTorch is not needed.

    Args:
      path: a ``.safetensors`` or PyTorch file, see `experiments.checkpoints.load`.

    Returns:
      As `from_state_dict`.

    Raises:
      ValueError: as `from_state_dict` and `experiments.checkpoints.load`.

    Example:
      >>> params = load("resnet18-f37072fd.pth")  # doctest: +SKIP
      >>> model = matching(params)  # doctest: +SKIP
    """
    return from_state_dict(checkpoints.load(path))


def matching(params: Mapping[str, Any], **settings: Any) -> ResNet:
    """The network that has given parameters.

    Args:
      params: of a `ResNet`, as `load` and `from_state_dict` return them.
      **settings: further attributes, such as ``bits``.

    Returns:
      The module; its stem is that for small images if the kernel is 3x3.

    Example:
      >>> images = np.zeros((1, 8, 8, 3))
      >>> model = ResNet(5, width=4, stage_sizes=(1, 2), small_images=True)
      >>> shapes = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> matching(shapes["params"]) == model
      True
    """
    side, *_, width = params["Conv_0"]["kernel"].shape
    stages = Counter(
        block["Conv_0"]["kernel"].shape[-1]
        for name, block in params.items()
        if name.startswith("Block_")
    )
    return ResNet(
        num_classes=params["Dense_0"]["kernel"].shape[-1],
        width=width,
        stage_sizes=tuple(stages[features] for features in sorted(stages)),
        small_images=side == 3,
        **settings,
    )
