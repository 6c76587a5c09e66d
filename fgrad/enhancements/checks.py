"""What the enhancements ask of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
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
