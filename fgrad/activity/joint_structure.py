"""What joint pairs find in a model before any step: head, activations, stream."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fgrad import fixed_point
from fgrad.activity import joint_sites
from fgrad.activity.example_losses import ExampleLosses
from fgrad.activity.sites import Site, site_leaves
from fgrad.activity.transform import PerturbedActivation
from fgrad.fixed_point import is_qtensor


def explain_joint(
    value_fn: Callable[..., Any],
    params: Any,
    head: str | Sequence[str],
    sites: Sequence[str] | None = None,
    **kwargs: Any,
) -> list[PerturbedActivation]:
    """Says which activations `joint_forward_grad` perturbs.

    Nothing is computed.

    Args:
      value_fn: ``value_fn(params, **kwargs)`` gives the losses [examples], or these and
        an aux.
      params: pytree of float arrays and `QTensor`.
      head: as in `joint_forward_grad`.
      sites: likewise.
      **kwargs: passed to ``value_fn``.

    Returns:
      A `PerturbedActivation` for each activation in the order of their computation,
      with the primitives of the nonlinearity last; then that of the head.

    Raises:
      TypeError, ValueError: as ``update`` of `joint_forward_grad`.

    Example:
      >>> import jax.numpy as jnp
      >>> losses = lambda p, x: jnp.sum(jax.nn.silu(x @ p["a"] + p["b"]) @ p["c"], -1)
      >>> params = {"a": jnp.ones((3, 3)), "b": jnp.ones(3), "c": jnp.ones((3, 1))}
      >>> hidden, head = explain_joint(losses, params, "c", x=jnp.ones((4, 3)))
      >>> hidden.leaves, hidden.primitives
      (('a', 'b'), ('dot_general', 'add', 'logistic', 'mul'))
    """
    exact = as_head(head)
    names = outside_of(exact, params) if sites is None else tuple(sites)
    lines: list[PerturbedActivation] = []

    def collect(params: Any, kwargs: Any) -> None:
        hidden = Site(*names)
        losses = _losses(value_fn, params, [hidden, exact], kwargs)
        for site in joint_sites.joint_sites(
            losses, hidden, exact, transposed_head=False, residual=False
        ):
            path = max((layer.path for layer in site.layers.values()), key=len)
            path += () if site.nonlinearity is None else site.nonlinearity.path
            lines.append(_line(losses, site.activation, tuple(site.layers), path))
        logits = joint_sites.logits_of(losses, exact)
        layers = losses.outputs(exact)[logits]
        path = max((layer.path for layer in layers.values()), key=len)
        lines.append(_line(losses, logits, tuple(layers), path))

    jax.eval_shape(collect, params, kwargs)
    return lines


def find_head(
    value_fn: Callable[..., Any],
    params: Any,
    kwargs: Mapping[str, Any],
    *,
    head: str | Sequence[str] | None = None,
    frozen: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """Tells the layer of the logits from all others: the last one before the loss.

    Args:
      value_fn: ``value_fn(params, **kwargs)`` gives the losses [examples], or these and
        an aux.
      params: pytree of float arrays and `QTensor`.
      kwargs: arrays or `jax.ShapeDtypeStruct`.
      head: its names, if they are known.
      frozen: names of layers to leave out.

    Returns:
      The paths of the leaves of the head, and those of all other layers.

    Raises:
      ValueError: for leaves that cannot be followed to an activation, and for a last
        layer whose output is not [examples, outputs].

    Example:
      >>> import jax.numpy as jnp
      >>> losses = lambda p, x: jnp.sum(jnp.tanh(x @ p["a"]) @ p["b"] + p["c"], -1)
      >>> params = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 1)), "c": jnp.ones(1)}
      >>> find_head(losses, params, {"x": jnp.ones((4, 3))})
      (['b', 'c'], ['a'])
    """
    known = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor)
    paths = [fixed_point.path_str(path) for path, _ in known]
    out = site_leaves([Site(*frozen)], params) if frozen else {}
    left_out = {path for found in out.values() for path in found}
    outputs: dict[str, int] = {}
    shapes: dict[int, tuple[int, ...]] = {}

    def collect(params: Any, kwargs: Any) -> None:
        losses, lost = _losses(value_fn, params, [], kwargs), []
        for path in paths:
            if path in left_out:
                continue
            try:
                layers = losses.layers(path).values()
                outputs[path] = max(layer.output for layer in layers)
            except ValueError as error:
                lost.append(str(error).partition(". Name")[0])
        if lost:
            raise ValueError(
                f"{'; '.join(lost)}. To leave such layers as they are, give their "
                'names: frozen=["..."].'
            )
        shapes.update({x: losses.program.avals[x].shape for x in outputs.values()})

    jax.eval_shape(collect, params, dict(kwargs))
    if head is not None:
        named = site_leaves([as_head(head)], params)
        inside = [path for found in named.values() for path in found]
        return inside, [path for path in outputs if path not in inside]
    last = max(outputs.values(), default=-1)
    if len(shapes.get(last, ())) != 2:
        raise ValueError(
            "the head cannot be found: the last layer before the loss has an output of "
            f"shape {shapes.get(last)}, and not [examples, classes]; name it: head=..."
        )
    inside = [path for path, output in outputs.items() if output == last]
    return inside, [path for path in outputs if path not in inside]


def has_stream(
    value_fn: Callable[..., Any],
    params: Any,
    head: Sequence[str],
    sites: Sequence[str],
    kwargs: Mapping[str, Any],
) -> bool:
    """Whether skip connections lead from layer to layer, as in a transformer.

    Args:
      value_fn: ``value_fn(params, **kwargs)`` gives the losses [examples], or these and
        an aux.
      params: pytree of float arrays and `QTensor`.
      head: names of the layer of the logits.
      sites: names of the other layers.
      kwargs: arrays or `jax.ShapeDtypeStruct`.
    """
    found: list[int | None] = []

    def collect(params: Any, kwargs: Any) -> None:
        hidden, exact = Site(*sites), as_head(head)
        losses = _losses(value_fn, params, [hidden, exact], kwargs)
        all_sites = joint_sites.joint_sites(
            losses, hidden, exact, transposed_head=False, residual=False
        )
        found.append(joint_sites.end_of_stream(losses.program, all_sites))

    jax.eval_shape(collect, params, dict(kwargs))
    return found[0] is not None


# Layers of a scan are found as well.
_losses = functools.partial(ExampleLosses.of, over_layers=True)


def outside_of(head: Site, params: Any) -> tuple[str, ...]:
    """The paths of all leaves that are not the head's."""
    inside = set(site_leaves([head], params)[head])
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor)
    paths = [fixed_point.path_str(path) for path, _ in leaves]
    return tuple(path for path in paths if path not in inside)


def as_head(head: Any) -> Site:
    """The head as an exact site."""
    names = [head] if isinstance(head, str) else list(head)
    return Site(*names, exact=True)


def _line(
    losses: ExampleLosses, activation: int, leaves: tuple[str, ...], path: Any
) -> PerturbedActivation:
    aval = losses.program.avals[activation]
    return PerturbedActivation(
        leaves=leaves,
        primitives=path,
        shape=aval.shape,
        bytes=math.prod(aval.shape) * aval.dtype.itemsize,
        evaluated_again=1.0,
    )
