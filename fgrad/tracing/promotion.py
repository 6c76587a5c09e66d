"""The library's arithmetic under JAX's usual rules of promotion, whatever a user set.

JAX can be told to refuse operands of different ranks or dtypes
(``jax_numpy_rank_promotion``, ``jax_numpy_dtype_promotion``). Such a setting is about
the user's code: it holds in their loss, and not in what this library computes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")

# Arguments of public functions that are functions of the user.
_USERS = ("value_fn", "obj_fn")


def usual_rules(function: Callable[P, R]) -> Callable[P, R]:
    """The function under JAX's usual rules; the user's functions keep their own.

    Functions of the user are the arguments ``value_fn`` and ``obj_fn``.

    Example:
      >>> import jax.numpy as jnp
      >>> add = usual_rules(lambda x, y: x + y)
      >>> with jax.numpy_rank_promotion("raise"):
      ...     add(jnp.ones((2, 1)), jnp.ones(1)).shape
      (2, 1)
    """
    first = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        config: Any = jax.config
        dtypes = config.jax_numpy_dtype_promotion
        ranks = config.jax_numpy_rank_promotion
        if dtypes == "standard" and ranks == "allow":
            return function(*args, **kwargs)

        def of_user(name: str, value: Any) -> Any:
            theirs = name in _USERS and callable(value)
            return _under(value, dtypes, ranks) if theirs else value

        given: Any = [of_user(first if i == 0 else "", x) for i, x in enumerate(args)]
        named: Any = {name: of_user(name, x) for name, x in kwargs.items()}
        with _rules("standard", "allow"):
            return function(*given, **named)

    return wrapped


def _under(function: Callable[..., Any], dtypes: str, ranks: str) -> Callable[..., Any]:
    # With the signature of the function, which says what arguments it is given.
    @functools.wraps(function, updated=())
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _rules(dtypes, ranks):
            return function(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def _rules(dtypes: str, ranks: str) -> Any:
    with jax.numpy_dtype_promotion(dtypes), jax.numpy_rank_promotion(ranks):
        yield
