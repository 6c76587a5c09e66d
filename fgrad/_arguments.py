"""What the optax links ask of their arguments: each question raises a clear error.

Options are looked at when a link is built, the arguments of ``update`` when it is
traced.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fgrad import _checks, perturbations
from fgrad import spread as spreads
from fgrad.leaves import Epsilon, OnGrid, Policy
from fgrad.leaves import epsilon as epsilons
from fgrad.spread import Spread
from fgrad.tracing import promotion

# The arguments of every transformation's update, which a loss cannot have.
_OF_UPDATE = ("updates", "state", "params", "value_fn", "obj_fn")


def link(
    init_fn: Callable[[Any], Any],
    update_fn: Callable[..., tuple[Any, Any]],
    spread: Spread | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A transformation that computes under JAX's usual rules of promotion.

    Args:
      init_fn: of the transformation.
      update_fn: of the transformation.
      spread: how devices share the evaluations that ``update_fn`` makes.
    """
    if spread is not None:
        update_fn = spreads.with_auto_axes(update_fn, spread.mesh)
    usual = promotion.usual_rules(update_fn)

    @functools.wraps(usual)
    def update(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        twice = [name for name in _OF_UPDATE[: len(args)] if name in kwargs]
        if twice:
            raise TypeError(
                f"tx.update got two arguments {twice[0]!r}: it has one of that name "
                "itself. Give the argument of value_fn another name, such as "
                f"{'model_' + twice[0]!r}."
            )
        result: tuple[Any, Any] = usual(*args, **kwargs)
        return result

    return optax.GradientTransformationExtraArgs(promotion.usual_rules(init_fn), update)


def transformation(
    inner: Any, example: str = "fgrad.qzo_ff(learning_rate, key)"
) -> optax.GradientTransformationExtraArgs:
    """The wrapped transformation, taking extra arguments."""
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"inner must be an optax transformation, got {inner!r}; use for example "
            f"{example}."
        )
    return optax.with_extra_args_support(inner)


def policy(
    epsilon: Epsilon,
    num_perturbations: int,
    z: Any,
    low_bit: OnGrid | None = None,
    *,
    name: str = "epsilon",
) -> Policy:
    """The options of how leaves are perturbed, checked.

    Args:
      epsilon: see `Policy`, like the three that follow.
      num_perturbations: m.
      z: where z comes from; normal by default.
      low_bit: how weights of few bits are trained.
      name: how the link calls its epsilon.
    """
    epsilons.check(name, epsilons.value_of(epsilon))
    z = perturbation(z, perturbations.normal)
    return Policy(epsilon, num_perturbations, z, low_bit)


def perturbation(
    z: Any, default: Callable[[], perturbations.Perturbation]
) -> perturbations.Perturbation:
    """A `Perturbation`, by default ``default()``."""
    return default() if z is None else perturbations.checked(z)


def estimator(
    fn: Callable[..., Any] | None, default: Callable[..., Any], choices: str
) -> Callable[..., Any]:
    """A function from losses to coefficients, by default ``default``."""
    if fn is None:
        return default
    if not callable(fn):
        raise TypeError(f"estimator must be a function, got {fn!r}; use {choices}.")
    _checks.function("estimator", fn, "loss_plus", "loss_minus", "epsilon")
    return fn


def given(name: str, params: Any) -> None:
    """Raises if a link that needs the parameters got none."""
    if params is None:
        raise ValueError(
            f"{name} needs the parameters: call tx.update(updates, state, params, ...)."
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
    if not callable(loss_fn) or isinstance(loss_fn, type):
        raise TypeError(
            f"value_fn must be a function of the parameters, got {loss_fn!r}."
        )
    return loss_fn


def has_losses(value_fn: Any, obj_fn: Any, extra_args: dict[str, Any]) -> bool:
    """Whether ``update`` was given losses in the place of a function."""
    return value_fn is None and obj_fn is None and "losses" in extra_args


def losses(value: Any, count: int) -> tuple[jax.Array, jax.Array]:
    """The losses [m] on both sides, of an array [2, m]."""
    if jnp.shape(value) != (2, count):
        raise ValueError(
            f"losses must be an array [2, m] of the losses of m={count} pairs, those "
            f"at w + εz first, got shape {jnp.shape(value)}."
        )
    plus, minus = jnp.asarray(value)
    return plus, minus


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
    _checks.key(value)


def count(name: str, value: Any) -> int:
    """The value as a Python integer; raises unless it is a positive integer."""
    return Policy.count(name, value)


def spread(value: Any, pairs: int | None = None, vectorize: int = 1) -> None:
    """Raises unless the value is a `Spread` whose devices can share the pairs, or None.

    Args:
      value: the ``spread=`` of a link.
      pairs: m, or None if devices do not share them.
      vectorize: how many pairs a device evaluates at once.
    """
    if value is None:
        return
    if not isinstance(value, Spread):
        raise TypeError(
            f'spread must be fgrad.Spread(mesh, pairs="seeds") or None, got {value!r}.'
        )
    if pairs is not None:
        value.check_pairs(pairs, vectorize)


def named_arguments(
    value_fn: Callable[..., Any], extra_args: dict[str, Any]
) -> dict[str, Any]:
    """Those of the extra arguments that ``value_fn`` names, after its params."""
    try:
        first, *named = inspect.signature(value_fn).parameters.values()
    except TypeError:  # no signature to be had: a C function
        return extra_args
    except ValueError:  # none, or one of no parameter
        _checks.function("value_fn", value_fn, "params")
        return extra_args
    if first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD):
        _checks.function("value_fn", value_fn, "params")
    if any(p.kind is p.VAR_KEYWORD for p in named):
        return extra_args
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    keywords = [p for p in named if p.kind in kinds]
    missing = [
        p.name for p in keywords if p.default is p.empty and p.name not in extra_args
    ]
    taken = [name for name in missing if name in _OF_UPDATE]
    if taken:
        raise TypeError(
            f"value_fn names an argument {taken[0]!r}, which is an argument of "
            "tx.update itself and cannot be passed on; give it another name, such as "
            f"{'model_' + taken[0]!r}."
        )
    if missing:
        raise TypeError(
            f"value_fn needs {', '.join(missing)}, which update() did not receive: "
            f"call tx.update(..., value_fn=value_fn, {missing[0]}=...)."
        )
    return {p.name: extra_args[p.name] for p in keywords if p.name in extra_args}
