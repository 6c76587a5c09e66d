"""What is measured: networks with a loss and random data of real shapes."""

import contextlib
import contextvars
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fgrad
from experiments.benchmarks import measure
from experiments.benchmarks.problem import Problem
from experiments.models import cnn, efficientnet, lstm, mlp, resnet, vit
from fgrad import layers

# (bits of weights, bits of activations)
ARITHMETIC: dict[str, tuple[int, int] | None] = {
    "float32": None,
    "16w8a": (16, 8),
    "8w8a": (8, 8),
}
_CALIBRATION_EXAMPLES = 4


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network and the shape of what it reads.

    Attributes:
      network: ``network(num_classes=..., bits=...)`` gives the Flax module.
      input_shape: shape of one example.
      num_classes: number of classes.
    """

    network: Callable[..., nn.Module]
    input_shape: tuple[int, ...]
    num_classes: int = 10


def stack(width: int, depth: int) -> Subject:
    """A multilayer perceptron whose layers are all of one width."""
    network = functools.partial(mlp.MLP, width=width, depth=depth)
    return Subject(network, (width,))


# DeiT-tiny, ResNet18 and EfficientNet-Lite0 at 96 pixels, digits, and a second of
# speech in 50 frames.
SUBJECTS = {
    "vit": Subject(vit.ViT, (96, 96, 3)),
    "resnet18": Subject(resnet.ResNet, (96, 96, 3)),
    "efficientnet_lite0": Subject(efficientnet.EfficientNetLite0, (96, 96, 3)),
    "cnn": Subject(cnn.CNN, (8, 8, 1)),
    "lstm": Subject(lstm.LSTM, (50, 40), 12),
}


# In the tables over all batch sizes; to compile EfficientNet's steps takes minutes.
_COMPARED = ("vit", "resnet18", "cnn", "lstm")
_networks: contextvars.ContextVar[Sequence[str]] = contextvars.ContextVar(
    "networks of the tables", default=_COMPARED
)


@contextlib.contextmanager
def only(names: Sequence[str]) -> Iterator[None]:
    """Leaves other networks out of `cases`.

    Args:
      names: of networks that are compared; all if there are none.

    Raises:
      ValueError: for another name.
    """
    if unknown := set(names) - set(_COMPARED):
        raise ValueError(
            f"there are no networks {sorted(unknown)}; choose from {_COMPARED}."
        )
    token = _networks.set(tuple(names) or _COMPARED)
    try:
        yield
    finally:
        _networks.reset(token)


def chosen(smoke: bool) -> dict[str, Subject]:
    """`SUBJECTS`, or a tiny one that stands for all of them."""
    return {"mlp": stack(8, 1)} if smoke else SUBJECTS


def cases(smoke: bool, batch_sizes: Sequence[int]) -> Iterator[tuple[str, str, int]]:
    """Networks in float32 and 16w8a, with every batch size, by name."""
    networks = chosen(smoke) if smoke else _networks.get()
    return itertools.product(networks, ("float32", "16w8a"), batch_sizes)


class Batch(NamedTuple):
    """Examples and their classes.

    Attributes:
      inputs: float32 [batch, *input_shape].
      labels: int32 [batch].
    """

    inputs: jax.Array
    labels: jax.Array


def problem(
    subject: Subject,
    batch_size: int,
    arithmetic: str = "float32",
    *,
    simulated: bool = False,
    of_examples: bool = False,
) -> Problem:
    """Sets a problem.

    Args:
      subject: the network.
      batch_size: examples of the batch.
      arithmetic: a key of `ARITHMETIC`.
      simulated: keeps the weights in float and rounds weights and activations on the
        way, with a straight-through gradient: what backpropagation trains.
      of_examples: whether the loss is that of each example, and not their mean.
    """
    bits = ARITHMETIC[arithmetic]
    model = subject.network(num_classes=subject.num_classes, bits=bits)
    params, scales = _variables(subject, bits)
    if bits and not simulated:
        params = fgrad.quantize(params, bits=bits[0])

    def loss_fn(params: Any, scales: Any, batch: Batch) -> jax.Array:
        logits = model.apply({"params": params, **scales}, batch.inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return losses if of_examples else losses.mean()

    return Problem(
        loss_fn, params, {"scales": scales, "batch": _batch(subject, batch_size)}
    )


@functools.lru_cache(maxsize=8)
def _variables(subject: Subject, bits: layers.Bits) -> tuple[Any, Any]:
    """Float parameters, and the scales of the activations if they are integers."""
    model = subject.network(num_classes=subject.num_classes, bits=bits)
    inputs = _batch(subject, _CALIBRATION_EXAMPLES).inputs
    jit = functools.partial(jax.jit, compiler_options=measure.quick_options())
    params = jit(model.init)(jax.random.key(0), inputs)["params"]
    if not bits:
        return params, {}
    calibrate = functools.partial(layers.calibrate, model)
    variables = jit(calibrate)({"params": params}, inputs)
    return params, {layers.SCALES: variables[layers.SCALES]}


def _batch(subject: Subject, batch_size: int) -> Batch:
    # NumPy has nothing to compile.
    random = np.random.default_rng(1)
    shape = (batch_size, *subject.input_shape)
    inputs = random.standard_normal(shape, np.float32)
    labels = random.integers(subject.num_classes, size=batch_size, dtype=np.int32)
    return Batch(jnp.asarray(inputs), jnp.asarray(labels))
