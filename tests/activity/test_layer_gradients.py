import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from lanes import every

from fgrad.activity import layer_gradients

DOTS = {  # shapes of x and weight, dimension numbers
    "dense": ((6, 5), (5, 3), (((1,), (0,)), ((), ()))),
    "positions": ((2, 4, 5), (5, 3), (((2,), (0,)), ((), ()))),
    "heads": ((2, 4, 5), (5, 2, 3), (((2,), (0,)), ((), ()))),
    "projection": ((2, 4, 2, 3), (2, 3, 5), (((2, 3), (0, 1)), ((), ()))),
    "crossed": ((2, 3, 4, 2), (2, 5, 3), (((3, 1), (0, 2)), ((), ()))),
    "batch": ((6, 2, 5), (5, 3, 2), (((2,), (0,)), ((1,), (2,)))),
}


def integers(seed, shape):
    return np.random.default_rng(seed).integers(-127, 128, shape)


@pytest.mark.parametrize("name", DOTS)
def test_integer_dot(name):
    x_shape, w_shape, numbers = DOTS[name]
    x = integers(0, x_shape)
    with jax.enable_x64(True):
        product = lambda w: lax.dot_general(jnp.asarray(x, float), w, numbers)  # noqa: E731
        y, transpose = jax.vjp(product, jnp.zeros(w_shape))
        dy_q = integers(1, y.shape)
        dy_q.flat[0] = 127  # so that the grid is known
        (expected,) = transpose(jnp.asarray(dy_q, float))
        expected = np.asarray(expected)
    found = layer_gradients.integer_dot_gradient(
        jnp.asarray(x, jnp.int8),
        jnp.asarray(dy_q * 0.25, jnp.float32),
        w_shape,
        dimension_numbers=numbers,
    )
    np.testing.assert_array_equal(found, (expected * 0.25).astype(np.float32))


CONVOLUTIONS = {  # image, kernel, and what differs from a plain one
    "plain": ((2, 5, 6, 3), (3, 3, 3, 4), {}),
    "one by one": ((2, 5, 6, 3), (1, 1, 3, 4), {}),
    "strided": ((2, 7, 6, 3), (3, 2, 3, 4), {"window_strides": (2, 3)}),
    "no padding": ((2, 5, 6, 3), (3, 3, 3, 4), {"padding": ((0, 0), (0, 0))}),
    "uneven padding": ((2, 5, 6, 3), (3, 3, 3, 4), {"padding": ((2, 0), (0, 3))}),
    "cut": ((2, 5, 6, 3), (3, 3, 3, 4), {"padding": ((-1, 0), (1, -1))}),
    "grouped": ((2, 5, 6, 4), (3, 3, 2, 6), {"feature_group_count": 2}),
    "depthwise": ((2, 5, 6, 4), (3, 3, 1, 4), {"feature_group_count": 4}),
    "multiplied": ((2, 5, 6, 4), (3, 3, 1, 8), {"feature_group_count": 4}),
    "dilated": ((2, 7, 8, 3), (3, 3, 3, 4), {"rhs_dilation": (2, 1)}),
    "transposed": ((2, 4, 5, 3), (3, 3, 3, 4), {"lhs_dilation": (2, 3)}),
    "left over": ((2, 6, 6, 3), (3, 3, 3, 4), {"window_strides": (2, 2)}),
    "layout": (
        (2, 3, 5, 6),
        (4, 3, 3, 2),
        {"dimension_numbers": ("NCHW", "OIHW", "NHWC")},
    ),
    "line": (
        (2, 9, 3),
        (4, 3, 5),
        {
            "dimension_numbers": ("NWC", "WIO", "NWC"),
            "padding": ((1, 2),),
            "window_strides": (2,),
            "lhs_dilation": (1,),
            "rhs_dilation": (1,),
        },
    ),
}


@pytest.mark.parametrize("name", every(3, CONVOLUTIONS))
def test_integer_convolution(name):
    x_shape, w_shape, different = CONVOLUTIONS[name]
    settings = {
        "window_strides": (1, 1),
        "padding": ((1, 1), (1, 1)),
        "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1),
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
        "feature_group_count": 1,
    } | different
    settings["dimension_numbers"] = lax.conv_dimension_numbers(
        x_shape, w_shape, settings["dimension_numbers"]
    )
    x = integers(0, x_shape)
    with jax.enable_x64(True):
        y, transpose = jax.vjp(
            lambda w: lax.conv_general_dilated(jnp.asarray(x, float), w, **settings),
            jnp.zeros(w_shape),
        )
        dy_q = integers(1, y.shape)
        dy_q.flat[0] = 127
        (expected,) = transpose(jnp.asarray(dy_q, float))
        expected = np.asarray(expected)
    found = layer_gradients.integer_conv_gradient(
        jnp.asarray(x, jnp.int8),
        jnp.asarray(dy_q * 0.25, jnp.float32),
        w_shape,
        **settings,
    )
    np.testing.assert_array_equal(found, (expected * 0.25).astype(np.float32))


def test_sums_that_could_overflow_are_refused():
    # 2**17 terms of 127 * 127 stay below 2**31, and are added exactly.
    terms = 2**17
    numbers = (((1,), (0,)), ((), ()))

    def found(terms):
        x = jnp.full((terms, 1), 127, jnp.int8)
        dy = jnp.full((terms, 1), 127, jnp.float32)
        return layer_gradients.integer_dot_gradient(
            x, dy, (1, 1), dimension_numbers=numbers
        )

    assert float(found(terms)[0, 0]) == np.float32(terms * 127 * 127)
    with pytest.raises(
        ValueError, match=r"131073 examples and positions.*smaller batch"
    ):
        found(terms + 1)


def test_a_zero_gradient_stays_zero():
    found = layer_gradients.integer_dot_gradient(
        jnp.ones((2, 3), jnp.int8),
        jnp.zeros((2, 4)),
        (3, 4),
        dimension_numbers=(((1,), (0,)), ((), ())),
    )
    assert not found.any()
