"""The activations that a joint pair perturbs, found in the traced loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fgrad.activity import nonlinearities
from fgrad.activity.example_losses import ExampleLosses
from fgrad.activity.layer_gradients import Layer
from fgrad.activity.nonlinearities import Nonlinearity
from fgrad.activity.sites import Site
from fgrad.fixed_point import is_qtensor, path_str
from fgrad.tracing import derivatives, roundings
from fgrad.tracing.graph import Graph

Feedback = Literal["learned", "head", "stream", "branch"]


@dataclasses.dataclass(frozen=True, eq=False)
class JointSite:
    """An activation, and the layers whose weights get their gradient from it.

    Attributes:
      name: path of the first leaf of these layers.
      layers: by the paths of their leaves.
      output: number of the layers' output.
      nonlinearity: what follows the output, if that acts on each value by itself.
      feedback: where its gradient comes from. "learned": from the mean Jacobian.
        "head": from that by the logits, back through the head. "stream": the gradient
        at the end of the residual stream, as if the blocks between were the identity.
        "branch": of the next activation on the stream, back through the rest of its own
        block.
      target: number of the value from which a gradient is taken back: the activation
        that the branch joins, or the logits; else -1.
    """

    name: str
    layers: Mapping[str, Layer]
    output: int
    nonlinearity: Nonlinearity | None
    feedback: Feedback = "learned"
    target: int = -1

    @property
    def activation(self) -> int:
        """Number of the value that is perturbed."""
        return self.output if self.nonlinearity is None else self.nonlinearity.end

    @property
    def ready(self) -> int:
        """Number of the value with which all is known that the gradient needs."""
        return self.activation if self.target < 0 else self.target

    def slope(self, values: Mapping[int, Any]) -> jax.Array:
        """The derivative of the activation by the layers' output, value by value.

        Args:
          values: of an evaluation, by number.
        """
        if self.nonlinearity is None:
            return jnp.ones_like(values[self.output])
        return self.nonlinearity.slope(values)


def joint_sites(
    losses: ExampleLosses,
    hidden: Site,
    head: Site,
    *,
    transposed_head: bool,
    residual: bool,
) -> list[JointSite]:
    """The activations of some layers, in the order of their computation.

    Args:
      losses: the traced losses.
      hidden: all layers that are perturbed.
      head: the layer of the logits.
      transposed_head: whether the last activation gets its gradient from the head.
      residual: whether those on the residual stream that ends there get it as well,
        and those in its branches.

    Raises:
      ValueError: for a last activation behind which the head cannot be transposed.
    """
    program = losses.program
    found = [
        JointSite(
            next(iter(layers)), layers, output, nonlinearities.behind(program, output)
        )
        for output, layers in losses.outputs(hidden).items()
    ]
    place = {v: i for i, node in enumerate(program.nodes) for v in node.outputs}
    found.sort(key=lambda site: place[site.activation])
    if not (transposed_head or residual) or not found:
        return found
    *before, last = found
    logits = logits_of(losses, head)
    if not derivatives.between(program, [last.activation], logits):
        raise ValueError(
            f"the head {head.names} does not read the last activation, that of "
            f"{last.name!r}; leave transposed_head and residual out."
        )
    if residual:
        return _with_stream(program, found, logits)
    return [*before, dataclasses.replace(last, feedback="head", target=logits)]


def stream_of(sites: Sequence[JointSite]) -> int | None:
    """Number of the last activation on the residual stream, or None."""
    on_it = [site.activation for site in sites if site.feedback == "stream"]
    return on_it[-1] if on_it else None


def end_of_stream(program: Graph, sites: Sequence[JointSite]) -> int | None:
    """The place of the site where the residual stream ends.

    It is the last one whose activation skip connections lead to from that of another.

    Args:
      program: the traced losses.
      sites: in the order of their computation.

    Returns:
      Its place among the sites, or None if there is no such stream.
    """
    for place in reversed(range(len(sites))):
        end = sites[place].activation
        if any(_on_stream(program, site.activation, end) for site in sites[:place]):
            return place
    return None


def _with_stream(
    program: Graph, sites: Sequence[JointSite], logits: int
) -> list[JointSite]:
    """Sites with feedback along the residual stream.

    What follows the end of the stream, such as the scale of a normalisation, gets its
    gradient from the head.
    """
    place = end_of_stream(program, sites)
    if place is None:
        raise ValueError(
            "residual=True, but no skip connection leads from the activation of one "
            "layer to that of another; leave residual out."
        )
    end = sites[place].activation
    joins = [end]  # the activations on the stream, the next one first
    last, *behind = sites[place:]
    found = [dataclasses.replace(last, feedback="stream")]
    found += [dataclasses.replace(x, feedback="head", target=logits) for x in behind]
    begins = min(
        i for i, s in enumerate(sites) if _on_stream(program, s.activation, end)
    )
    for index in reversed(range(place)):
        site = sites[index]
        if _on_stream(program, site.activation, end):
            joins.insert(0, site.activation)
            site = dataclasses.replace(site, feedback="stream")
        else:
            after = program.depending([site.activation])
            target = next((join for join in joins if join in after), -1)
            # Before the stream begins there are no blocks to be inside of.
            others = {s.activation for s in sites[index + 1 : begins]}
            if target >= 0 and (index > begins or after.isdisjoint(others)):
                site = dataclasses.replace(site, feedback="branch", target=target)
        found.insert(0, site)
    return found


def _on_stream(program: Graph, value: int, end: int) -> bool:
    """Whether skip connections lead from one value to another of the same shape."""
    if program.avals[value].shape != program.avals[end].shape:
        return False
    return end in roundings.along_skips(program, value)


def logits_of(losses: ExampleLosses, head: Site) -> int:
    """The number of the head's output.

    Raises:
      ValueError: if it is not one array [examples, outputs].
    """
    outputs = list(losses.outputs(head))
    shapes = [losses.program.avals[output].shape for output in outputs]
    if len(outputs) != 1 or len(shapes[0]) != 2:
        raise ValueError(
            f"the head {head.names} has outputs of shapes {shapes}; it has to be one "
            "layer with an output [examples, classes]."
        )
    return outputs[0]


def last_axes(params: Any, paths: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The last axis of some leaves, by their path; of a scalar none.

    Args:
      params: pytree of float arrays and `QTensor`.
      paths: of its leaves.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor)
    shapes = {path_str(path): jnp.shape(leaf) for path, leaf in leaves}
    return {path: shapes[path][-1:] for path in paths}
