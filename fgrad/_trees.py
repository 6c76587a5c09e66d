"""Small questions about the leaves of pytrees."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def path_str(path: tuple[Any, ...]) -> str:
    """A leaf's key path as text, ``params/conv/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_concrete(x: Any) -> bool:
    """Whether ``x`` holds values now, rather than being traced."""
    return not isinstance(x, jax.core.Tracer)


def is_here(x: Any) -> bool:
    """Whether this process has all numbers of an array, be it one of several."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return True
    return bool(x.is_fully_replicated)


def numbers(x: Any) -> np.ndarray:
    """The numbers of an array; those of other processes are asked for, by all."""
    return np.asarray(
        x if is_here(x) else multihost_utils.process_allgather(x, tiled=True)
    )
