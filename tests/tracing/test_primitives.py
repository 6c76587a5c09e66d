import jax
import jax.numpy as jnp

from fgrad.tracing import primitives


def test_multiply_adds():
    def function(x, w, kernel):
        y = jax.lax.fori_loop(0, 7, lambda _, v: v @ w, x)  # a scan of 7
        image = y.reshape(1, 4, 4, 1)
        z = jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.lax.cond(z.sum() > 0, lambda v: v @ w, lambda v: v, y)

    closed = jax.make_jaxpr(function)(
        jnp.ones((4, 4)), jnp.ones((4, 4)), jnp.ones((3, 3, 1, 2))
    )
    convolution = 2 * 2 * 2 * 9  # outputs of 9 taps each
    assert primitives.multiply_adds(closed.jaxpr.eqns) == (7 + 1) * 64 + convolution
