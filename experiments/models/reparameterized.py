r"""Convolutions that are sums of branches, folded into one kernel before each pass.

A block has a 3x3 convolution beside three of 1x1, each of which a fixed window follows:
a single pixel, a mean, and a cosine of one frequency for each channel. Every branch b
has a scale :math:`s_b` for each output channel in the place of a normalisation, so that
the block is linear, and one kernel does what all branches do together:

.. math:: W_{t, c, o} = \sum_b s_{b, o} \, f_{b, t, o} \, K_{b, t, c, o}

t is a place in the window and f the fixed window, 1 for the 3x3 convolution. Whoever
trains the scales alone trains 4 numbers for each channel. The kernel is folded online,
in every evaluation, so that the product costs what that of a single convolution costs.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fgrad import QTensor, fixed_point, layers

BRANCHES = ("full", "pointwise", "average", "frequency")
_SIDE = 3  # of the window
_TAPS = _SIDE * _SIDE
_ROWS = _TAPS + len(BRANCHES) - 1
# Fixed windows lie on a grid of 1 / 2**5, so that the fold can be exact in integers.
_WINDOW_BITS = 5
_FIRST_SCALES = (1.0, 0.5, 0.5, 0.5)
# By the two 8-bit halves of a scale the products of a fold stay within 32 bits.
_HALF = 8
_LEAST_BITS = 4


@functools.cache
def windows(features: int) -> np.ndarray:
    """The fixed windows in units of 1/32.

    The mean is 1/8 of the sum, which its scale makes a ninth if that is better. The
    frequencies are those of the cosine transform of 3x3 values but the constant one,
    and change from channel to channel.

    Args:
      features: output channels.

    Returns:
      int32 [branches, taps, features].
    """
    one = 2**_WINDOW_BITS
    found = np.zeros((len(BRANCHES), _TAPS, features), np.int32)
    found[0] = one
    found[1, _TAPS // 2] = one
    found[2] = one // (_TAPS - 1)
    places = (np.arange(_SIDE) + 0.5) * np.pi / _SIDE
    for channel in range(features):
        down, across = divmod(1 + channel % (_TAPS - 1), _SIDE)
        wave = np.outer(np.cos(down * places), np.cos(across * places))
        found[3, :, channel] = np.rint(one * wave).ravel()
    return found


def fold(branches: jax.Array | QTensor, scales: jax.Array | QTensor) -> Any:
    r"""The one kernel of all branches.

    Integers fold in integers. With weights of b bits on grids of steps
    :math:`Δ_K` and :math:`Δ_s` the kernel is

    .. math:: W_q = \Bigl\lfloor 2^{-(b + 6)} \sum_b s_{q, b} \, f_{q, b} K_{q, b}
      \Bigr\rceil, \quad Δ_W = 2^{b + 1} Δ_K Δ_s .

    The sum is exact. The rounding is the only one, to the nearest integer with ties to
    even. Four branches of any integers fit, so that nothing is clipped.

    Args:
      branches: [taps + 3, inputs, features]: the taps of the 3x3 kernel, then the three
        1x1 kernels. They have one leaf, so that they lie on one grid.
      scales: [branches, features].

    Returns:
      The kernel [3, 3, inputs, features]: a `QTensor` if both are, of their bits;
      otherwise floats.

    Raises:
      ValueError: for integers of different widths, or of less than 4 bits.

    Example:
      >>> branches = jnp.zeros((12, 1, 1)).at[4].set(3.0).at[9].set(2.0)
      >>> scales = jnp.array([[1.0], [0.5], [1.0], [1.0]])
      >>> fold(branches, scales)[1, 1]  # 1 * 3 + 0.5 * 2, in the middle
      Array([[4.]], dtype=float32)
    """
    if isinstance(branches, QTensor) and isinstance(scales, QTensor):
        return _fold_integers(branches, scales)
    branches, scales = jnp.asarray(branches), jnp.asarray(scales)
    fixed = windows(branches.shape[-1]) / 2.0**_WINDOW_BITS
    factors = scales[:, None] * fixed.astype(np.float32)  # [branches, taps, features]
    return _shaped(_summed(factors, branches))


def _summed(factors: jax.Array, branches: jax.Array) -> jax.Array:
    """The sum over branches of factors [branches, taps, features] times kernels."""
    total = factors[0][:, None] * branches[:_TAPS]
    for index in range(1, len(BRANCHES)):
        total += factors[index][:, None] * branches[_TAPS + index - 1]
    return total


def _shaped(kernel: jax.Array) -> jax.Array:
    return kernel.reshape(_SIDE, _SIDE, *kernel.shape[1:])


def _fold_integers(branches: QTensor, scales: QTensor) -> QTensor:
    bits = branches.bits
    if bits != scales.bits or bits < _LEAST_BITS:
        raise ValueError(
            f"branches and scales must have as many bits, {_LEAST_BITS} to 16, got "
            f"{branches.bits} and {scales.bits}."
        )
    kernels = fixed_point.integers_of(branches).astype(jnp.int32)
    numbers = fixed_point.integers_of(scales).astype(jnp.int32)
    fixed = windows(kernels.shape[-1])
    # numbers = 256 high + low; kernels times windows have 20 bits, so that both sums
    # of four products have at most 31.
    high, low = numbers >> _HALF, numbers & (2**_HALF - 1)
    high_sum = _summed(high[:, None] * fixed, kernels)
    low_sum = _summed(low[:, None] * fixed, kernels)
    carried = high_sum + (low_sum >> _HALF)
    rest = low_sum & (2**_HALF - 1)
    room = math.ceil(math.log2(len(BRANCHES)))
    shift = _WINDOW_BITS + room + bits - 1
    rounded = _rounded(carried, rest, shift - _HALF)
    step = fixed_point.scale_of(branches) * fixed_point.scale_of(scales)
    if step.ndim:  # one for each channel
        step = step.reshape(1, 1, 1, -1)
    dtype = fixed_point.integers_of(branches).dtype
    factor = 2.0 ** (shift - _WINDOW_BITS)
    return QTensor(_shaped(rounded).astype(dtype), factor * step, bits)


def _rounded(high: jax.Array, low: jax.Array, shift: int) -> jax.Array:
    """``(256 high + low) / 2**(shift + 8)`` for 0 <= low < 256, ties to even."""
    floor = high >> shift
    rest, half = high & (2**shift - 1), 2 ** (shift - 1)
    tie_up = (low > 0) | (floor & 1 == 1)
    return floor + ((rest > half) | ((rest == half) & tie_up)).astype(jnp.int32)


def _first_branches(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    """He's initial values, for inputs of 9 taps and of one."""
    taps = jnp.where(jnp.arange(_ROWS) < _TAPS, _TAPS, 1)
    deviation = jnp.sqrt(2 / (taps * shape[1]))
    return deviation[:, None, None] * jax.random.normal(key, tuple(shape), dtype)


def _first_scales(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    del key
    return jnp.broadcast_to(jnp.array(_FIRST_SCALES, dtype)[:, None], tuple(shape))


class OnlineConv(nn.Module):
    """Four branches in one kernel, and one normalisation behind it.

    The paper's is a batch normalisation. This one is of each example, over its pixels
    and channels (``flax.linen.GroupNorm`` of one group), so that an evaluation depends
    on no other example and on no running statistics.

    Attributes:
      features: output channels.
      strides: of the window, both ways.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.
    """

    features: int
    strides: int = 1
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, channels] to fewer pixels, ``features`` channels."""
        shape = (_ROWS, x.shape[-1], self.features)
        branches = self.param("branches", _first_branches, shape, jnp.float32)
        scales_shape = (len(BRANCHES), self.features)
        scales = self.param("scales", _first_scales, scales_shape, jnp.float32)
        product = layers.ConvGeneralDilated(
            bits=self.bits, calibration=self.calibration, name="product"
        )
        y = product(
            x,
            fold(branches, scales),
            window_strides=(self.strides,) * 2,
            padding="SAME",
            dimension_numbers=jax.lax.conv_dimension_numbers(
                x.shape, (_SIDE, _SIDE, *shape[1:]), ("NHWC", "HWIO", "NHWC")
            ),
        )
        return nn.GroupNorm(num_groups=1, name="norm")(y)


class ReparameterizedCNN(nn.Module):
    """Blocks of branches with ReLUs between them, a mean over pixels, and a head.

    By default 19,434 parameters for images of one channel and 10 classes, of which 320
    are scales of branches. Its stages are the blocks, the mean, and the head. The way
    `experiments.learners.adapt.branch_scales` trains the scales alone.

    Attributes:
      num_classes: number of logits.
      features: channels of each block.
      strides: stride of each block.
      bits: (bits of weights, bits of activations), as in `fgrad.layers.Dense`.
      calibration: how the scales of activations are found.

    Example:
      >>> model, images = ReparameterizedCNN(), jnp.zeros((1, 32, 32, 1))
      >>> params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      19434
      >>> sum(params[f"Block_{i}"]["scales"].size for i in range(3))
      320

    Reference:
      Hu et al., "Online convolutional re-parameterization", CVPR 2022 (arXiv
      2204.00826).
    """

    num_classes: int = 10
    features: Sequence[int] = (16, 32, 32)
    strides: Sequence[int] = (2, 2, 2)
    bits: layers.Bits = None
    calibration: fixed_point.Calibration = fixed_point.abs_max

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Names of the parameters of each stage."""
        return *((f"Block_{i}",) for i, _ in enumerate(self.features)), (), ("Dense_0",)

    @property
    def branch_scales(self) -> str:
        """The name of the leaves that scale branches."""
        return "scales"

    @nn.compact
    def __call__(
        self, x: jax.Array, start: int = 0, stop: int | None = None
    ) -> jax.Array:
        """Runs the network, or a slice of its stages.

        Args:
          x: float images [batch, height, width, channels]; with ``start`` what the
            stages before it return.
          start: first stage to run.
          stop: stage to stop before, as in a slice.

        Returns:
          Logits [batch, classes]; with ``stop`` what the stage before it returns.
        """
        settings: dict[str, Any] = {"bits": self.bits, "calibration": self.calibration}

        def block(index: int, x: jax.Array) -> jax.Array:
            features, strides = self.features[index], self.strides[index]
            layer = OnlineConv(features, strides, name=f"Block_{index}", **settings)
            return nn.relu(layer(x))

        def pool(x: jax.Array) -> jax.Array:
            return x.mean(axis=(1, 2))

        def classify(x: jax.Array) -> jax.Array:
            return layers.Dense(self.num_classes, name="Dense_0", **settings)(x)

        blocks = [functools.partial(block, i) for i, _ in enumerate(self.features)]
        stages: list[Callable[[jax.Array], jax.Array]] = [*blocks, pool, classify]
        for stage in stages[start:stop]:
            x = stage(x)
        return x
