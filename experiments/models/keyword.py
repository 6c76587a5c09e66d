"""Published keyword networks of int8: frozen first layers, and blocks that train.

The networks of pymicro-wakeword hear one word each. They are a convolution over time
and blocks, each of a depthwise convolution over time and a product over channels. Their
first blocks stay in the integers of the file, bit for bit
(`experiments.models.int8_network`). One or more blocks behind them become layers of
`fgrad.layers` (`Tail`), whose kernels begin as the integers of the file, on its grids;
a new head tells new words apart by the mean over time.
"""

import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import fgrad
from experiments import features
from experiments.data.tflite import Graph, Operation
from experiments.models import int8_network
from experiments.models.int8_network import Int8Network
from fgrad import fixed_point, layers

HEAD = "head"
_CHUNK = 320  # bytes, 10 ms: what the front end takes at once
_PACKAGE = "pymicro_wakeword"


class Tail(nn.Module):
    """Blocks of a keyword network, and a head on the mean over time.

    Attributes:
      windows: steps that the depthwise convolution of each block reaches back.
      widths: channels behind each block.
      num_classes: number of logits.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.
    """

    windows: Sequence[int]
    widths: Sequence[int]
    num_classes: int = 10
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [batch, classes] of what a `Cut` makes of a sound."""
        settings: dict[str, Any] = {"bits": self.bits, "calibration": self.calibration}
        for i, (window, width) in enumerate(
            zip(self.windows, self.widths, strict=True)
        ):
            channels = x.shape[-1]
            x = layers.Conv(
                channels,
                (window,),
                feature_group_count=channels,
                padding="CAUSAL",
                name=f"depthwise_{i}",
                **settings,
            )(x)
            x = nn.relu(layers.Dense(width, name=f"pointwise_{i}", **settings)(x))
        return layers.Dense(self.num_classes, name=HEAD, **settings)(x.mean(axis=1))


class Cut(NamedTuple):
    """A keyword network that is cut between two blocks.

    Attributes:
      frozen: the layers before the cut; what its last one computes is int8.
      scale: the step of that grid.
      zero_point: the integer that stands for 0 there.
      params: those of `Tail` but for its head: kernels as `fgrad.QTensor` with the
        integers of the file, biases in float32.
      windows: for `Tail`.
      widths: for `Tail`.
    """

    frozen: Int8Network
    scale: float
    zero_point: int
    params: dict[str, dict[str, Any]]
    windows: tuple[int, ...]
    widths: tuple[int, ...]

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Runs the frozen layers.

        Args:
          samples: int16 [examples, samples] at 16 kHz.

        Returns:
          float32 [examples, steps of 30 ms, channels], on the grid.
        """
        (given,) = self.frozen.inputs
        frames = given.shape[1]
        heard = np.stack([frontend(one) for one in samples])
        heard = heard[:, : heard.shape[1] // frames * frames]
        quantized = np.rint(heard / given.scale[0]) + given.zero_point[0]
        quantized = np.clip(quantized, -128, 127).astype(np.int8)
        steps = quantized.reshape(len(heard), -1, frames, heard.shape[2])
        found = features.batched(jax.jit(self._streamed), jnp.asarray(steps), 64)
        return self.scale * (found.astype(np.float32) - self.zero_point)

    def _streamed(self, x: jax.Array) -> jax.Array:
        """int8 [batch, steps, channels] of int8 [batch, steps, frames, bins]."""
        state = jax.tree.map(
            lambda s: jnp.broadcast_to(s, (len(x), *s.shape[1:])),
            self.frozen.initial_state(),
        )

        def step(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            computed, state = self.frozen(self.frozen.params, state, x)
            return state, computed[-1][:, 0, 0]

        _, found = jax.lax.scan(step, state, jnp.moveaxis(x, 1, 0))
        return jnp.moveaxis(found, 0, 1)


def published(name: str) -> pathlib.Path:
    """Where a network of pymicro-wakeword lies; nothing of the package is run.

    Args:
      name: "alexa", "hey_jarvis" or "hey_mycroft"; "okay_nabu" has blocks of other
        parts, which `cut` refuses.

    Raises:
      ModuleNotFoundError: without the package.
      FileNotFoundError: if it has no such network.
    """
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            "published keyword networks are in a package that is not installed: "
            "pip install pymicro-wakeword"
        )
    folder = pathlib.Path(found.submodule_search_locations[0]) / "models"
    path = folder / f"{name}.tflite"
    if not path.exists():
        names = sorted(path.stem for path in folder.glob("*.tflite"))
        raise FileNotFoundError(
            f"{_PACKAGE} has no network {name!r}; it has {', '.join(names)}."
        )
    return path


def frontend(samples: np.ndarray) -> np.ndarray:
    """What a microphone's samples are to the networks: TFLite Micro's audio front end.

    Args:
      samples: int16 [samples] at 16 kHz.

    Returns:
      float32 [frames of 10 ms, 40].

    Raises:
      ModuleNotFoundError: without the package pymicro-features.
    """
    try:
        from pymicro_features import MicroFrontend
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "features of keyword networks are made by a package that is not "
            "installed: pip install pymicro-features"
        ) from error
    end, content, frames = MicroFrontend(), samples.astype("<i2").tobytes(), []
    for start in range(0, len(content) - _CHUNK + 1, _CHUNK):
        if found := end.process_samples(content[start : start + _CHUNK]).features:
            frames.append(found)
    return np.array(frames, np.float32)


def cut(network: Int8Network, first: int, last: int) -> Cut:
    """Cuts a network in front of a block; what is behind another one is left out.

    Args:
      network: a published one.
      first: the first block that trains, from 1.
      last: the last one.

    Raises:
      ValueError: for blocks that there are not, or that have other parts.
    """
    graph = network.graphs[0]
    places = [i for i, op in enumerate(graph.operations) if "CONV_2D" in op.name]
    blocks = list(zip(places[1::2], places[2::2], strict=False))
    kinds = [graph.operations[i].name for i in places]
    plain = ["CONV_2D", *["DEPTHWISE_CONV_2D", "CONV_2D"] * len(blocks)]
    if kinds != plain or any(op.name == "SPLIT_V" for op in graph.operations):
        raise ValueError(
            "the blocks of the network must be a depthwise convolution and a product "
            f"over channels each, got {kinds}."
        )
    if not 1 <= first <= last <= len(blocks):
        raise ValueError(
            f"first={first} and last={last} must be in order among the {len(blocks)} "
            "blocks."
        )
    end = places[2 * first - 2]
    begun = graph._replace(operations=graph.operations[: end + 1])
    out = graph.tensors[graph.operations[end].outputs[0]]
    params: dict[str, dict[str, Any]] = {}
    windows, widths = [], []
    for i, (depthwise, pointwise) in enumerate(blocks[first - 1 : last]):
        over_time = _layer(graph, graph.operations[depthwise])
        over_channels = _layer(graph, graph.operations[pointwise])
        params |= {f"depthwise_{i}": over_time, f"pointwise_{i}": over_channels}
        windows.append(over_time["kernel"].shape[0])
        widths.append(over_channels["kernel"].shape[1])
    return Cut(
        int8_network.of_graphs((begun, *network.graphs[1:])),
        float(out.scale[0]),
        int(out.zero_point[0]),
        params,
        tuple(windows),
        tuple(widths),
    )


def _layer(graph: Graph, operation: Operation) -> dict[str, Any]:
    """Kernel and bias of an operation, with axes as `Tail` has them."""
    x, kernel, bias = (graph.tensors[i] for i in operation.inputs)
    if kernel.data is None or bias.data is None:
        raise ValueError(f"{operation.name} has no weights in the file.")
    if operation.name == "DEPTHWISE_CONV_2D":  # [1, steps, 1, channels]
        q = kernel.data[0]
    else:  # [outputs, 1, 1, inputs]
        q = kernel.data[:, 0, 0].T
    # One scale for each output, or one for all.
    scale = jnp.asarray(kernel.scale.reshape(*[1] * (q.ndim - 1), -1))
    values = bias.data * (x.scale[0] * kernel.scale)
    return {
        "kernel": fgrad.QTensor(jnp.asarray(q, jnp.int8), scale, 8),
        "bias": jnp.asarray(values, jnp.float32),
    }
