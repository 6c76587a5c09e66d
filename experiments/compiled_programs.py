"""Compiled programs that are kept from one start of an experiment to the next.

They are machine code, which is run as it is read. So they lie in the user's own cache
folder, and not in a workdir, which may come from somebody else.
"""

import hashlib
import os
import pathlib
import platform
from typing import Any

import jax

# What the folder holds at most when an experiment starts; the oldest files go first.
MOST_BYTES = 2**30
# Programs that compile faster are not worth a file.
LEAST_SECONDS = 0.1


def keep() -> pathlib.Path | None:
    """Lets JAX keep compiled programs in the user's cache folder, and find them again.

    Returns:
      The folder; None if JAX was told of another one, by ``JAX_COMPILATION_CACHE_DIR``.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir is not None:
        return None
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    _prune(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    return folder


def _folder() -> pathlib.Path:
    """The folder of this kind of processor, whose instructions the programs have."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    about = pathlib.Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    kind = "\n".join([platform.machine(), platform.processor(), flags])
    digest = hashlib.blake2b(kind.encode(), digest_size=4).hexdigest()
    return pathlib.Path(cache) / "fgrad" / f"compiled-{digest}"


def _prune(folder: pathlib.Path) -> None:
    """Removes the oldest files until the others are within `MOST_BYTES`."""
    files = []
    for path in folder.iterdir():
        try:
            about = path.stat()
        except FileNotFoundError:  # another process was faster
            continue
        files.append((about.st_mtime, about.st_size, path))
    left = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if left <= MOST_BYTES:
            return
        path.unlink(missing_ok=True)
        left -= size
