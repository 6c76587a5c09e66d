import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fgrad.tracing.execution_order import delayed, delayed_key, dependent_zero

VALUES = [
    jnp.array([1.5, jnp.nan]),
    jnp.array([jnp.nan]),
    jnp.array(-jnp.inf),
    jnp.array([[3, 4]], jnp.int8),
    jnp.array(-(2**31), jnp.int32),
    jnp.array([True, False]),
    jnp.array([2.5], jnp.bfloat16),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: str(v.dtype))
def test_the_zero_is_zero(value):
    zero = dependent_zero(value)
    assert zero.dtype == jnp.uint32
    assert zero == 0


def test_the_zero_is_zero_for_every_low_byte():
    words = jnp.arange(2**16, dtype=jnp.uint32) * 65521
    assert not jax.vmap(dependent_zero)(words).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.int8])
def test_the_compiler_keeps_the_dependency(dtype):
    """The optimised program reads the argument on which the zero depends."""
    compiled = jax.jit(dependent_zero).lower(jnp.zeros((3,), dtype)).compile()
    text = compiled.as_text()
    entry = text[text.index("ENTRY") :]
    root = next(line for line in entry.splitlines() if "ROOT" in line)
    assert "constant" not in root.split("=")[1]
    assert compiled.memory_analysis().argument_size_in_bytes > 0


def test_a_delayed_key_is_the_same_key():
    after = jnp.array([jnp.nan])
    for key in (jax.random.key(3), jax.random.PRNGKey(3)):
        np.testing.assert_array_equal(
            jax.random.bits(delayed_key(key, after)),
            jax.random.bits(key),
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.bfloat16])
def test_a_delayed_array_is_the_same_array(dtype):
    array = jnp.array([1, -2, 0], dtype)
    np.testing.assert_array_equal(delayed(array, jnp.array(jnp.nan)), array)
