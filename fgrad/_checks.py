"""Questions about a single option or leaf, which every part of the library asks.

Each raises an error that names the option, the value that came, and what would do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fgrad._trees import is_concrete, path_str

# Beyond it a number is infinite in float32.
LARGEST = float(np.finfo(np.float32).max)


def integer(name: str, value: Any, low: int, high: int, hint: str = "") -> int:
    """The value as a Python integer; raises unless it is one from low to high.

    Example:
      >>> integer("rank", np.int64(3), 1, 127)
      3
      >>> integer("rank", 0, 1, 127)
      Traceback (most recent call last):
      ...
      ValueError: rank must be an integer from 1 to 127, got 0.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not low <= value <= high:
        raise ValueError(
            f"{name} must be an integer from {low} to {high}, got {value!r}{hint}."
        )
    return int(value)


def number(
    name: str,
    value: Any,
    wanted: str,
    holds: Callable[[Any], Any],
    *,
    hint: str = "",
    or_else: str = "",
) -> None:
    """Raises unless the value is a real number for which a condition holds.

    A traced number is taken as it is: its value is not known yet.

    Args:
      name: of the option.
      value: what came.
      wanted: the condition in words, such as "positive".
      holds: the condition.
      hint: what to do, at the end of the message.
      or_else: what the option may be beside a number, such as " or a schedule of it".

    Example:
      >>> number("floor", "x", "positive", lambda x: x > 0)
      Traceback (most recent call last):
      ...
      TypeError: floor must be a number, got 'x' of type str.
    """
    dtype = getattr(value, "dtype", None)
    real = (
        isinstance(value, int | float) and not isinstance(value, bool)
        if dtype is None
        else jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    )
    if not real or np.shape(value) != ():
        raise TypeError(
            f"{name} must be a number{or_else}, got {value!r} of type "
            f"{type(value).__name__}{hint}."
        )
    if not is_concrete(value):
        return
    if dtype is not None:  # inside jit a comparison of JAX would be traced
        value = np.asarray(value)[()]
    if not holds(value):
        raise ValueError(f"{name} must be {wanted}, got {value}{hint}.")


def positive(name: str, value: Any, *, hint: str = "", or_else: str = "") -> None:
    """Raises unless the value is a positive number that float32 holds."""
    number(
        name,
        value,
        "positive and finite",
        lambda x: 0 < x <= LARGEST,
        hint=hint,
        or_else=or_else,
    )


def fraction(name: str, value: Any, *, hint: str = "") -> None:
    """Raises unless the value is a number from 0 to 1."""
    number(name, value, "between 0 and 1", lambda x: 0 <= x <= 1, hint=hint)


def at_least(name: str, value: Any, low: float, *, hint: str = "") -> None:
    """Raises unless the value is a finite number that is not below another."""
    wanted = f"finite and at least {low:g}"
    number(name, value, wanted, lambda x: low <= x <= LARGEST, hint=hint)


def step(value: Any) -> None:
    """Raises unless the value is the number of a step, which may be traced."""
    whole = "a whole number, 0 or more"
    number("step", value, whole, lambda x: 0 <= x < 2**31 and x == int(x))


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """The value; raises unless it is one of some words."""
    if not isinstance(value, str) or value not in choices:
        listed = " or ".join(f'"{word}"' for word in choices)
        raise ValueError(f"{name} must be {listed}, got {value!r}.")
    return value


def function(name: str, value: Any, *arguments: str, **named: Any) -> None:
    """Raises unless the value can be called with so many arguments.

    Args:
      name: of the option.
      value: what came.
      *arguments: what it is called with, in words.
      **named: what it is called with by name.

    Example:
      >>> function("mask", lambda: True, "params")
      Traceback (most recent call last):
      ...
      TypeError: mask is called as mask(params), which <lambda> does not take: too many
      positional arguments.
    """
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} must be a function, got {value!r}.")
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # no signature to be had: a C function
        return
    try:
        signature.bind(*arguments, **named)
    except TypeError as error:
        called = getattr(value, "__name__", repr(value))
        given = ", ".join([*arguments, *(f"{key}=" for key in named)])
        raise TypeError(
            f"{name} is called as {name}({given}), which {called} does not take: "
            f"{error}."
        ) from None


def key(value: Any) -> None:
    """Raises unless the value is one PRNG key, typed or of the old kind."""
    dtype = getattr(value, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if dtype is None or not (typed or dtype == jnp.uint32):
        raise TypeError(
            f"key must be a PRNG key, got {value!r}; use jax.random.key(0)."
        )
    one = value.shape == () if typed else value.shape == _raw_shape()
    if not one:
        raise TypeError(
            f"key must be one PRNG key, got an array of shape {value.shape} and dtype "
            f"{dtype}; use jax.random.key(0), and of several keys one, keys[0]."
        )


def _raw_shape() -> tuple[int, ...]:
    """Shape of the numbers of a key of JAX's default implementation."""
    shape: tuple[int, ...] = jax.eval_shape(lambda: jax.random.PRNGKey(0)).shape
    return shape


def arrays(params: Any, is_leaf: Callable[[Any], bool]) -> None:
    """Raises for a leaf that is no array and no number, such as a function.

    Args:
      params: any pytree.
      is_leaf: what counts as an array, whatever it is.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_leaf):
        if is_leaf(leaf) or _is_array(leaf):
            continue
        kind = "function" if callable(leaf) else type(leaf).__name__
        what = f"a {kind}, {leaf!r:.60}"
        if isinstance(leaf, np.ndarray | np.generic):
            what = f"an array of dtype {leaf.dtype}"
        raise TypeError(
            f"leaf {path_str(path)!r} of params is {what}. Params are pytrees of "
            "arrays, numbers and QTensor. Split a module into its arrays and the rest, "
            "params, static = eqx.partition(module, eqx.is_inexact_array), and put it "
            "together in the loss, eqx.combine(params, static); a mask is not enough."
        )


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array | bool | int | float | complex):
        return True
    if not isinstance(leaf, np.ndarray | np.generic):
        return False
    return leaf.dtype.kind in "biufcV" and leaf.dtype.names is None
