"""A convolution, taken apart into the taps of its window.

A tap of a kernel meets one shifted and strided view of the image. A convolution is the
sum over the taps of view times weight; the gradient of its kernel is, for each tap, the
product of view and gradient. Both are written here with views only, for the places
where this is faster than XLA's own convolution, or where XLA has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Window:
    """The window that a convolution moves over an image.

    The fields have one entry for each axis of the image.

    Attributes:
      size: how many taps there are.
      strides: how far the window moves from one output to the next.
      padding: how many zeros stand before the image, and how many after it.
      dilation: the distance between neighbouring taps.
      image_dilation: the distance between neighbouring values of the image, with zeros
        between them; 1 along all axes by default.

    Example:
      >>> window = Window((2,), (1,), ((1, 0),), (1,))
      >>> image = window.padded(jnp.array([[[5], [6], [7]]]))  # [N, width, features]
      >>> [window.seen_by(tap, image)[0, :, 0].tolist() for tap in window.taps()]
      [[0, 5, 6], [5, 6, 7]]
    """

    size: Sequence[int]
    strides: Sequence[int]
    padding: Sequence[tuple[int, int]]
    dilation: Sequence[int]
    image_dilation: Sequence[int] = ()

    def taps(self) -> Iterator[tuple[int, ...]]:
        """The positions in the window, the last axis fastest."""
        return np.ndindex(*self.size)

    def padded(self, image: jax.Array) -> jax.Array:
        """The image with the zeros that the window needs around and inside it.

        Args:
          image: [N, *image, ...].
        """
        spread = self.image_dilation or [1] * len(self.size)
        edges = [(*pair, d - 1) for pair, d in zip(self.padding, spread, strict=True)]
        others = [(0, 0, 0)] * (image.ndim - 1 - len(edges))
        return lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *edges, *others])

    def seen_by(self, tap: Sequence[int], padded: jax.Array) -> jax.Array:
        """What one tap meets at all positions of the window.

        Args:
          tap: position in the window.
          padded: from `padded`, [N, *image, ...].

        Returns:
          A view [N, *outputs, ...].
        """
        start, stop = [0] * padded.ndim, list(padded.shape)
        strides = [1] * padded.ndim
        outputs = self._outputs(padded.shape[1:])
        for axis, (position, count) in enumerate(zip(tap, outputs, strict=True)):
            first, stride = position * self.dilation[axis], self.strides[axis]
            end = first + (count - 1) * stride + 1
            # An image that is smaller than the window has no output.
            start[axis + 1], stop[axis + 1] = (first, end) if count else (0, 0)
            strides[axis + 1] = stride
        return lax.slice(padded, start, stop, strides)

    def _outputs(self, image: Sequence[int]) -> list[int]:
        """How many positions the window has along each axis of a padded image."""
        return [
            max(0, (length - (taps - 1) * dilation - 1) // stride + 1)
            for length, taps, dilation, stride in zip(
                image[: len(self.size)],
                self.size,
                self.dilation,
                self.strides,
                strict=True,
            )
        ]


def features_last(array: jax.Array, spec: Sequence[int]) -> jax.Array:
    """An image or an output as [N, *image, features].

    Args:
      array: in the layout of a convolution.
      spec: its axes of N, of the features, and of the image, as in
        ``lax.ConvDimensionNumbers``.
    """
    batch, feature, *image = spec
    return array.transpose((batch, *image, feature))


def from_features_last(array: jax.Array, spec: Sequence[int]) -> jax.Array:
    """The inverse of `features_last`."""
    batch, feature, *image = spec
    return array.transpose(np.argsort((batch, *image, feature)))


def multiply_adds(
    x: jax.Array,
    q: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    rhs_dilation: Sequence[int],
    numbers: lax.ConvDimensionNumbers,
) -> jax.Array:
    """Depthwise convolution: ``Σ_taps x[shifted by the tap] * w[tap]``.

    Of integers in int32, which needs no limbs; of floats in float32 or wider. XLA fuses
    the sum into one pass over the image, where its depthwise convolution leaves the
    hardware idle.
    """
    out_feature, in_feature, *spatial = numbers.rhs_spec
    x = features_last(x, numbers.lhs_spec)
    integers = jnp.issubdtype(x.dtype, jnp.integer)
    wide = jnp.int32 if integers else jnp.promote_types(x.dtype, jnp.float32)
    w = q.transpose((*spatial, in_feature, out_feature)).astype(wide)
    size = w.shape[: len(spatial)]
    # Without the barrier XLA would fuse whatever makes the weights into the sum, and
    # run it again for every pixel.
    w = lax.optimization_barrier(w.reshape(*size, x.shape[-1], -1))
    window = Window(size, window_strides, padding, rhs_dilation)
    image = window.padded(x)
    total = jnp.zeros((), wide)
    for tap in window.taps():
        total += window.seen_by(tap, image)[..., None].astype(wide) * w[tap]
    y = total.reshape(*total.shape[:-2], -1)
    return from_features_last(y, numbers.out_spec)
