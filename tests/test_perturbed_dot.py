import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import perturbed_dot
from experiments.benchmarks.perturbed_dot import Blocks


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_kernel_multiplies_by_the_perturbed_weights(dtype, rows):
    key, other = jax.random.split(jax.random.key(3))
    # Small integers, and an ε that is a power of two: all sums are exact in float32.
    x = jax.random.randint(key, (rows, 64), -3, 4).astype(dtype)
    w = jax.random.randint(other, (64, 32), -7, 8).astype(dtype)
    blocks = Blocks(columns=16, terms=32)
    for epsilon in (0.5, -0.5):
        y = perturbed_dot.fused(x, w, key, epsilon, blocks=blocks, interpret=True)
        expected = jax.jit(perturbed_dot.plain)(x, w, key, epsilon)
        assert y.dtype == expected.dtype == jnp.float32
        np.testing.assert_array_equal(y, expected)
    assert (
        np.asarray(y) != np.asarray(x, np.float32) @ np.asarray(w, np.float32)
    ).all()


def test_the_kernel_refuses_what_it_cannot_divide():
    x, w = jnp.ones((1, 48)), jnp.ones((48, 32))
    with pytest.raises(ValueError, match=r"\(48, 32\) are no multiple of blocks"):
        perturbed_dot.fused(x, w, jax.random.key(0), 0.1, interpret=True)
