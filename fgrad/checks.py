"""What the optax transformations ask of their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fgrad import perturbations


def transformation(inner: Any) -> optax.GradientTransformationExtraArgs:
    """The wrapped transformation, taking extra arguments."""
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"inner must be an optax transformation, got {inner!r}; use for example "
            "fgrad.qzo_ff(learning_rate, key)."
        )
    return optax.with_extra_args_support(inner)


def perturbation(z: Any) -> None:
    """Raises unless z is None or a `Perturbation`."""
    if z is not None and not isinstance(z, perturbations.Perturbation):
        raise TypeError(
            f"perturbation must come from fgrad.perturbations, got {z!r}; "
            "use for example fgrad.perturbations.normal()."
        )


def loss(
    name: str,
    params: Any,
    value_fn: Callable[..., jax.Array] | None,
    obj_fn: Callable[..., jax.Array] | None,
) -> Callable[..., jax.Array]:
    """The one of value_fn and obj_fn that was given; raises without it or params."""
    if params is None:
        raise ValueError(
            f"{name} needs the parameters: call "
            "tx.update(updates, state, params, value_fn=...)."
        )
    loss_fn = obj_fn if value_fn is None else value_fn
    if loss_fn is None or (value_fn is not None and obj_fn is not None):
        raise ValueError(
            f"{name} needs the loss: call tx.update(updates, state, params, "
            "value_fn=loss_fn, batch=...), with value_fn or its alias obj_fn, not both."
        )
    return loss_fn


def visible(params: Any) -> None:
    """Raises if a wrapper of optax hides leaves from the loss."""

    def hidden(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    if any(map(hidden, jax.tree.leaves(params, is_leaf=hidden))):
        raise ValueError(
            "optax.masked or optax.partition hid leaves of params, which value_fn "
            "needs. Use the mask= of fixed_point_forward_grad or qzo_ff instead, and "
            "wrap only the optimizer that follows."
        )


def key(value: Any) -> None:
    """Raises unless the value is a PRNG key."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not (
        jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32
    ):
        raise TypeError(
            f"key must be a PRNG key, got {value!r}; use jax.random.key(0)."
        )


def count(name: str, value: Any) -> None:
    """Raises unless the value is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{name} must be a positive integer, got {value!r}; under "
            "optax.inject_hyperparams list it in static_args."
        )


def named_arguments(
    value_fn: Callable[..., Any], extra_args: dict[str, Any]
) -> dict[str, Any]:
    """Those of the extra arguments that ``value_fn`` names, after its params."""
    try:
        named = list(inspect.signature(value_fn).parameters.values())[1:]
    except (TypeError, ValueError):  # no signature to be had: a C function
        return extra_args
    if any(p.kind is p.VAR_KEYWORD for p in named):
        return extra_args
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    keywords = [p for p in named if p.kind in kinds]
    missing = [
        p.name for p in keywords if p.default is p.empty and p.name not in extra_args
    ]
    if missing:
        raise TypeError(
            f"value_fn needs {', '.join(missing)}, which update() did not receive: "
            f"call tx.update(..., value_fn=value_fn, {missing[0]}=...)."
        )
    return {p.name: extra_args[p.name] for p in keywords if p.name in extra_args}
