"""Settings of all tests."""

import os
import pathlib

import pytest
from lanes import SLOW_FILES, SLOW_TESTS

# Experiments that tests start leave nothing in the user's cache folder.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
# Most programs here run for microseconds and compile for seconds; those of processes
# that tests start as well.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
import jax

# If JAX was imported before.
jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_modifyitems(items):
    """Marks as slow what `lanes` names, and the examples of docstrings."""
    here = pathlib.Path(__file__).parent
    for item in items:
        ours = here in item.path.parents
        path = item.path.relative_to(here).as_posix() if ours else ""
        name = f"tests/{path}::{item.nodeid.partition('::')[2]}"
        if not ours or path in SLOW_FILES or name in SLOW_TESTS:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def optimized_if_asked(request, monkeypatch):
    """A test marked ``optimized`` compiles as users do."""
    if "optimized" not in request.keywords:
        yield
        return
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
