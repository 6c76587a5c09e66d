"""What each tap of a window sees, against NumPy loops over single values."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fgrad.fixed_point import windows
from fgrad.fixed_point.windows import Window

# Size, strides, padding, dilation, dilation of the image; the image's shape.
CASES = {
    "one axis": ((3,), (1,), ((0, 0),), (1,), (), (7,)),
    "padded": ((3,), (1,), ((1, 2),), (1,), (), (5,)),
    "strided": ((2,), (3,), ((0, 1),), (1,), (), (9,)),
    "dilated": ((3,), (1,), ((2, 2),), (2,), (), (6,)),
    "image dilated": ((3,), (1,), ((1, 1),), (1,), (2,), (5,)),
    "cropped": ((2,), (1,), ((-1, -2),), (1,), (), (8,)),
    "two axes": ((3, 2), (2, 1), ((1, 1), (0, 1)), (1, 2), (), (6, 5)),
    "all": ((2, 3), (2, 3), ((2, 0), (1, 3)), (3, 2), (1, 2), (7, 4)),
    "three axes": (
        (2, 1, 2),
        (1, 2, 1),
        ((0, 0), (1, 0), (0, 1)),
        (1,) * 3,
        (),
        (3,) * 3,
    ),
    "too small": ((4,), (2,), ((0, 0),), (1,), (), (2,)),
}


def value_at(image, place, padding, spread):
    """The value of a padded and dilated image at one place; zero between and around."""
    source = []
    for x, (low, _), distance, length in zip(
        place, padding, spread, image.shape[1:-1], strict=True
    ):
        x -= low
        if x < 0 or x % distance or x // distance >= length:
            return np.zeros_like(image[:, *[0] * len(place)])
        source.append(x // distance)
    return image[:, *source]


def outputs_of(size, strides, padding, dilation, spread, shape):
    """The number of outputs along each axis, by counting the windows that fit."""
    counts = []
    for taps, stride, (low, high), d, distance, length in zip(
        size, strides, padding, dilation, spread, shape, strict=True
    ):
        padded = low + high + (length - 1) * distance + 1
        starts = range(0, max(padded, 0), stride)
        counts.append(sum(start + (taps - 1) * d < padded for start in starts))
    return counts


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_each_tap_sees_what_a_loop_finds(name, dtype):
    size, strides, padding, dilation, spread, shape = CASES[name]
    image = np.random.default_rng(0).integers(-99, 100, (2, *shape, 3)).astype(dtype)
    window = Window(size, strides, padding, dilation, spread)
    padded = window.padded(jnp.asarray(image))
    spread = spread or (1,) * len(size)
    outputs = outputs_of(size, strides, padding, dilation, spread, shape)
    taps = list(window.taps())
    assert taps == list(itertools.product(*map(range, size)))
    for tap in taps:
        seen = window.seen_by(tap, padded)
        assert seen.dtype == dtype
        assert seen.shape == (2, *outputs, 3)
        for out in np.ndindex(*outputs):
            place = [
                o * stride + t * d
                for o, stride, t, d in zip(out, strides, tap, dilation, strict=True)
            ]
            expected = value_at(image, place, padding, spread)
            np.testing.assert_array_equal(seen[:, *out], expected)


@pytest.mark.parametrize("spec", [(0, 3, 1, 2), (0, 1, 2, 3), (3, 0, 2, 1)])
def test_layouts_there_and_back(spec):
    shape = {spec[0]: 2, spec[1]: 5, spec[2]: 3, spec[3]: 4}
    array = jnp.arange(120).reshape([shape[axis] for axis in range(4)])
    moved = windows.features_last(array, spec)
    assert moved.shape == (2, 3, 4, 5)
    place = {spec[0]: 1, spec[1]: 4, spec[2]: 0, spec[3]: 2}
    assert moved[1, 0, 2, 4] == array[tuple(place[axis] for axis in range(4))]
    back = windows.from_features_last(moved, spec)
    np.testing.assert_array_equal(back, array)


def test_axes_behind_the_image_stay():
    """The evaluator slices images with an axis of taps and one of ranks."""
    image = jnp.arange(2 * 4 * 3 * 5).reshape(2, 4, 3, 5)
    window = Window((2,), (2,), ((1, 0),), (1,))
    seen = window.seen_by((1,), window.padded(image))
    np.testing.assert_array_equal(seen, image[:, ::2][:, :2])


def test_a_convolution_is_the_sum_over_the_taps():
    rng = np.random.default_rng(1)
    x = rng.integers(-9, 10, (2, 6, 5, 3)).astype(np.float32)
    w = rng.integers(-9, 10, (3, 2, 3, 4)).astype(np.float32)
    window = Window((3, 2), (2, 1), ((1, 1), (0, 1)), (1, 2))
    image = window.padded(jnp.asarray(x))
    found = sum(window.seen_by(tap, image) @ w[tap] for tap in window.taps())
    expected = jax.lax.conv_general_dilated(
        x, w, (2, 1), ((1, 1), (0, 1)), None, (1, 2), ("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_array_equal(found, expected)
