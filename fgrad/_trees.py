"""Small questions about the leaves of pytrees."""

from __future__ import annotations

from typing import Any

import jax


def path_str(path: tuple[Any, ...]) -> str:
    """A leaf's key path as text, ``params/conv/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_concrete(x: Any) -> bool:
    """Whether ``x`` holds values now, rather than being traced."""
    return not isinstance(x, jax.core.Tracer)
