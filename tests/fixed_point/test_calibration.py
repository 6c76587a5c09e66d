"""Grid steps against NumPy."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from fgrad import fixed_point


def random_array(seed, shape, exponent=0):
    x = np.random.default_rng(seed).normal(size=shape) * 2.0**exponent
    return x.astype(np.float32)


def f64(x):
    return np.asarray(x).astype(np.float64)


@pytest.mark.parametrize("axes", [(0, 1), (0,), (1,)])
def test_abs_max_is_the_largest_magnitude(axes):
    x = random_array(7, (9, 6))
    got = fixed_point.abs_max(jnp.array(x), axes, 8)
    np.testing.assert_array_equal(got, np.abs(x).max(axis=axes, keepdims=True))


@pytest.mark.parametrize("q", [0.5, 50, 99, 100])
@pytest.mark.parametrize("axes", [(0, 1), (0,)])
def test_percentile_equals_numpy(q, axes):
    x = random_array(8, (101, 7))
    got = fixed_point.percentile(q)(jnp.array(x), axes, 8)
    expected = np.percentile(np.abs(f64(x)), q, axis=axes, keepdims=True)
    # Interpolation in float32 between values below 5.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_percentile_clips_outliers():
    x = np.append(random_array(9, 999), np.float32(100.0))
    q = fixed_point.quantize(
        jnp.array(x), 8, calibration=fixed_point.percentile(99), headroom=1.0
    )
    assert q.qvalue[-1] == 127
    bound = np.percentile(np.abs(x), 99)
    np.testing.assert_allclose(q.dequantize()[-1], bound, rtol=1e-5)
    inside = np.abs(x) <= bound
    error = np.abs(f64(q.dequantize()) - f64(x))[inside]
    # The bulk is as fine as if the outlier were not there.
    assert error.max() <= bound / 127 * (0.5 + 1e-4)


@pytest.mark.parametrize("q", [0, -1, 100.5, math.nan])
def test_percentile_raises_out_of_range(q):
    with pytest.raises(ValueError, match="percentile must be in"):
        fixed_point.percentile(q)


def quantization_mse(x, bound, bits, axes):
    limit = 2 ** (bits - 1) - 1
    scale = bound / limit
    rounded = np.clip(np.rint(x / scale), -limit, limit) * scale
    return np.mean((x - rounded) ** 2, axis=axes, keepdims=True)


@pytest.mark.parametrize(
    ("bits", "num_candidates", "axes"),
    [(2, 64, (0, 1)), (4, 64, (0, 1)), (8, 64, (0, 1)), (4, 10, (0,))],
)
def test_mse_optimal_finds_the_best_of_its_candidates(bits, num_candidates, axes):
    # Heavy tails: the best bound is far below the largest value.
    x = f64(random_array(10, (300, 4)) ** 3)
    bound = fixed_point.mse_optimal(num_candidates)(jnp.array(x), axes, bits)
    largest = np.abs(x).max(axis=axes, keepdims=True)
    assert bound.shape == largest.shape
    errors = [
        quantization_mse(x, largest * i / num_candidates, bits, axes)
        for i in range(1, num_candidates + 1)
    ]
    got = quantization_mse(x, f64(bound), bits, axes)
    # The search compares float32 means: errors of 1e-2 or more between values of up to
    # 30 with 2**-24 of rounding, so candidates within 1e-3 of each other are the same.
    assert (got <= np.min(errors, axis=0) * (1 + 1e-3)).all()
    assert (got <= quantization_mse(x, largest, bits, axes) * (1 + 1e-3)).all()


def test_mse_optimal_raises_without_candidates():
    with pytest.raises(ValueError, match="num_candidates must be an integer from 1"):
        fixed_point.mse_optimal(0)
