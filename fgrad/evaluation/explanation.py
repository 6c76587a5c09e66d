"""Says where the evaluator perturbs each leaf of a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fgrad import _checks, perturbations
from fgrad._trees import path_str
from fgrad.evaluation import point_of_use
from fgrad.evaluation.pairs import TracedLoss
from fgrad.leaves import Mask, Plan, Policy


class PerturbedLeaf(NamedTuple):
    """What `explain` says of a leaf.

    Attributes:
      name: path of the leaf.
      way: "at use"; "low rank", as base product plus correction; "first", with all
        other small leaves; "before", ahead of a call that cannot be followed or of a
        loop that uses it many times; "unused".
      primitives: the equations that used it, or that it was perturbed before.
    """

    name: str
    way: str
    primitives: tuple[str, ...]


def explain(
    value_fn: Callable[..., jax.Array],
    params: Any,
    perturbation: perturbations.Perturbation | None = None,
    *,
    mask: Mask = None,
    **kwargs: Any,
) -> list[PerturbedLeaf]:
    """Says where the evaluator perturbs each trained leaf of a function.

    Nothing is computed. A leaf that goes "before" costs memory of its own size for as
    long as the call or loop lasts, and is right all the same.

    Args:
      value_fn: as in `dual_forward`, like all that follow.
      params: pytree of float arrays and `QTensor`.
      perturbation: where z comes from.
      mask: leaves to perturb.
      **kwargs: passed to ``value_fn``.

    Returns:
      A `PerturbedLeaf` for each trained leaf and way.

    Example:
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
      >>> loss = lambda p, x: jnp.sum(x @ p["w"] + p["b"])
      >>> for line in explain(
      ...     loss, params, perturbations.low_rank(), x=jnp.ones((4, 3))
      ... ):
      ...     print(line.name, "|", line.way, "|", *line.primitives)
      b | first |
      w | low rank | dot_general
    """
    perturbation = perturbations.normal() if perturbation is None else perturbation
    _checks.function("value_fn", value_fn, "params", **kwargs)
    policy = Policy(1.0, perturbation=perturbation)
    plan = Plan(params, policy, mask=mask)
    events: list[point_of_use.Event] = []

    def evaluate() -> jax.Array:
        loss = TracedLoss(lambda p: value_fn(p, **kwargs), plan)
        return loss(plan.leaf_keys(jax.random.key(0)), jnp.int32(1), events)

    jax.eval_shape(evaluate)
    lines = []
    for path, name in zip(plan.paths, plan.names, strict=True):
        if name not in plan.arithmetic:
            continue
        found: dict[str, list[str]] = {}
        for event in events:
            if event.leaf == name:
                found.setdefault(event.way, []).append(event.primitive)
        if plan.arithmetic[name].is_small:
            found = {"first": []}
        lines += [
            PerturbedLeaf(path_str(path), way, tuple(dict.fromkeys(primitives)))
            for way, primitives in (found or {"unused": []}).items()
        ]
    return lines
