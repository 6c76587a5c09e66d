"""The activations that a joint pair perturbs, found in the traced loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fgrad.activity import nonlinearities
from fgrad.activity.example_losses import ExampleLosses
from fgrad.activity.layer_gradients import Layer
from fgrad.activity.nonlinearities import Nonlinearity
from fgrad.activity.sites import Site
from fgrad.fixed_point import is_qtensor, path_str
from fgrad.tracing import derivatives


@dataclasses.dataclass(frozen=True, eq=False)
class JointSite:
    """An activation, and the layers whose weights get their gradient from it.

    Attributes:
      name: path of the first leaf of these layers.
      layers: by the paths of their leaves.
      output: number of the layers' output.
      nonlinearity: what follows the output, if that acts on each value by itself.
      transposed: whether the gradient is the head's own transposed product.
    """

    name: str
    layers: Mapping[str, Layer]
    output: int
    nonlinearity: Nonlinearity | None
    transposed: bool = False

    @property
    def activation(self) -> int:
        """Number of the value that is perturbed."""
        return self.output if self.nonlinearity is None else self.nonlinearity.end

    def slope(self, values: Mapping[int, Any]) -> jax.Array:
        """The derivative of the activation by the layers' output, value by value.

        Args:
          values: of an evaluation, by number.
        """
        if self.nonlinearity is None:
            return jnp.ones_like(values[self.output])
        return self.nonlinearity.slope(values)


def joint_sites(
    losses: ExampleLosses, hidden: Site, head: Site, *, transposed_head: bool
) -> list[JointSite]:
    """The activations of some layers, in the order of their computation.

    Args:
      losses: the traced losses.
      hidden: all layers that are perturbed.
      head: the layer of the logits.
      transposed_head: whether the last activation gets its gradient from the head.

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
    if not transposed_head or not found:
        return found
    *before, last = found
    between = derivatives.between(program, last.activation, logits_of(losses, head))
    if not between:
        raise ValueError(
            f"transposed_head=True, but the head {head.names} does not read the last "
            f"activation, that of {last.name!r}; leave transposed_head out."
        )
    return [*before, dataclasses.replace(last, transposed=True)]


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
