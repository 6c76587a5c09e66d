"""Settings of all tests."""

import jax
import pytest

# Most programs here run for microseconds and compile for seconds.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def optimized_if_asked(request):
    """A test marked ``optimized`` compiles as users do."""
    if "optimized" not in request.keywords:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
