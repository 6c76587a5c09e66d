import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments import compiled_programs

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    """An empty cache folder of the user, and JAX as it was afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_what_was_compiled_is_found_again(cache_home, monkeypatch):
    monkeypatch.setattr(compiled_programs, "LEAST_SECONDS", 0)
    folder = compiled_programs.keep()
    assert folder is not None
    assert folder.parent == cache_home / "fgrad"
    jax.config.update("jax_enable_compilation_cache", True)

    def compile_anew():
        jax.clear_caches()
        events.clear()
        return jax.jit(lambda x: jnp.sin(x) * 3)(jnp.ones(7))

    first = compile_anew()
    assert "/jax/compilation_cache/cache_hits" not in events
    assert list(folder.iterdir())
    assert (compile_anew() == first).all()
    assert "/jax/compilation_cache/cache_hits" in events


def test_a_folder_that_jax_was_told_of_stays(cache_home, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert compiled_programs.keep() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    assert not (cache_home / "fgrad").exists()


def test_the_oldest_files_make_room(cache_home, monkeypatch):
    folder = compiled_programs.keep()
    for age in range(5):
        path = folder / f"program_{age}"
        path.write_bytes(bytes(100))
        os.utime(path, (1000 - age, 1000 - age))
    monkeypatch.setattr(compiled_programs, "MOST_BYTES", 250)
    jax.config.update("jax_compilation_cache_dir", None)
    compiled_programs.keep()
    assert {path.name for path in folder.iterdir()} == {"program_0", "program_1"}
