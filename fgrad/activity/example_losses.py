"""The losses of examples, traced once and evaluated again after perturbed activations.

Everything up to a perturbed activation is computed once. What depends on it, and only
that, is computed again for every perturbation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from fgrad import _loss_and_aux
from fgrad.activity import layer_gradients
from fgrad.activity.layer_gradients import Layer
from fgrad.activity.sites import Site, site_leaves
from fgrad.fixed_point import integer_reads, is_qtensor, path_str
from fgrad.tracing import graph, unrolled
from fgrad.tracing.graph import Graph


class Traced(NamedTuple):
    """A traced loss function of examples.

    Attributes:
      program: of the leaves of params and arguments: losses, and the leaves of an aux.
      names: of the losses.
      aux: the structure of the aux.
    """

    program: core.ClosedJaxpr
    names: tuple[str, ...]
    aux: Any


def traced(
    value_fn: Callable[..., Any],
    params: Any,
    kwargs: Mapping[str, Any],
    *,
    has_aux: bool = False,
    over_layers: bool = False,
) -> Traced:
    """The jaxpr of ``value_fn(params, **kwargs)``, and what it returns.

    Args:
      value_fn: ``value_fn(params, **kwargs)`` gives the losses [examples].
      params: pytree of float arrays and `QTensor`.
      kwargs: its other arguments.
      has_aux: whether it returns an aux beside the losses.
      over_layers: whether to write out every ``scan`` over weights.
    """
    names: list[str] = []
    structures: list[Any] = []

    @integer_reads.checked
    def function(params: Any, kwargs: Any) -> list[jax.Array]:
        result = value_fn(params, **kwargs)
        losses, aux = _loss_and_aux.split(result) if has_aux else (result, ())
        losses = named_losses(losses)
        names.extend(losses)
        leaves, structure = jax.tree.flatten(aux)
        structures.append(structure)
        return [*losses.values(), *leaves]

    program = jax.make_jaxpr(function)(params, dict(kwargs))
    if over_layers:
        program = unrolled.over_layers(program, len(jax.tree.leaves(params)))
    return Traced(program, tuple(names), structures[0])


class ExampleLosses:
    """A loss function of examples at given parameters and data.

    Values of the traced function, such as activations, are called by their number in
    the graph.

    Attributes:
      program: the traced function.
      values: all values of its evaluation at the parameters, by number.
      examples: how many examples there are.
      aux: the leaves of what the losses came with.
      batch: numbers of the arguments whose first axis is that of the examples.
    """

    def __init__(
        self,
        program: core.ClosedJaxpr,
        names: Sequence[str],
        params: Any,
        sites: Sequence[Site],
        kwargs: Mapping[str, Any],
        *,
        over_layers: bool = False,
    ) -> None:
        """Evaluates what `traced` returned, at the same ``params`` and ``kwargs``.

        Args:
          program: from `traced`.
          names: of the losses.
          params: pytree of float arrays and `QTensor`.
          sites: layers that are going to be asked for.
          kwargs: the other arguments of the losses.
          over_layers: whether a leaf may hold the weights of several layers, in rows.

        Raises:
          TypeError, ValueError: for losses of another shape than [examples], and for
            sites that name no layers or layers that cannot be followed.
        """
        self._leaves = site_leaves(sites, params)
        kwargs = dict(kwargs)
        whole = graph.of(program)
        # Sites are found by what the losses make of their leaves.
        self.program: Graph = whole.of_outputs(whole.outputs[: len(names)])
        self._losses = dict(zip(names, self.program.outputs, strict=True))
        self.examples = self._check_losses()
        of_data = self.program.inputs[len(jax.tree.leaves(params)) :]
        self.batch = frozenset(
            number
            for number in of_data
            if self.program.avals[number].shape[:1] == (self.examples,)
        )
        self._numbers = {
            path: self.program.inputs[i]
            for i, path in enumerate(_value_paths(params))
            if path is not None
        }
        self._over_layers = over_layers
        self._layers = {
            path: self.layers(path) for paths in self._leaves.values() for path in paths
        }
        arrays = jax.tree.leaves((params, kwargs))
        inputs = dict(zip(self.program.inputs, arrays, strict=True))
        self.values = graph.evaluate(whole.nodes, {**whole.constants, **inputs})
        self.aux = [
            self.values[x] if isinstance(x, int) else x.value
            for x in whole.outputs[len(names) :]
        ]

    @classmethod
    def of(
        cls,
        value_fn: Callable[..., Any],
        params: Any,
        sites: Sequence[Site],
        kwargs: Mapping[str, Any],
        *,
        over_layers: bool = False,
    ) -> ExampleLosses:
        """Those of ``value_fn(params, **kwargs)``, which is traced first.

        An aux that comes beside the losses is left out.
        """

        @functools.wraps(value_fn)
        def alone(params: Any, **kwargs: Any) -> Any:
            return _loss_and_aux.loss_alone(value_fn(params, **kwargs))

        found = traced(alone, params, kwargs, over_layers=over_layers)
        return cls(
            found.program, found.names, params, sites, kwargs, over_layers=over_layers
        )

    def outputs(self, site: Site) -> dict[int, dict[str, Layer]]:
        """The activations of a site, each with its layers by their leaf's path."""
        found: dict[int, dict[str, Layer]] = {}
        for path in self._leaves[site]:
            for name, layer in self._layers[path].items():
                found.setdefault(layer.output, {})[name] = layer
        return found

    def layers(self, path: str) -> dict[str, Layer]:
        """The layers of a leaf by the leaf's path, or by those of its rows.

        A leaf of [layers, ...] that a scan goes over has one for each row, named by its
        number: "kernel/0".

        Raises:
          ValueError: if one cannot be followed to an activation.
        """
        leaf = self._numbers[path]
        rows = layer_gradients.rows(self.program, leaf) if self._over_layers else []
        if not rows:
            return {path: self._layer(path, leaf)}
        return {f"{path}/{i}": self._layer(path, row) for i, row in enumerate(rows)}

    def whole_leaves(self, gradients: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Gradients by the paths of leaves, from those by the names of `layers`."""
        found = dict(gradients)
        for path, layers in self._layers.items():
            if path not in layers and layers.keys() <= found.keys():
                found[path] = jnp.stack([found.pop(name) for name in layers])
        return found

    def _layer(self, path: str, leaf: int) -> Layer:
        """The layer of a leaf or a row of it, by the number of its values."""
        data = self.program.depending(self.batch)
        try:
            return layer_gradients.layer_of(self.program, leaf, data, self.examples)
        except ValueError as error:
            raise ValueError(
                f"the layer of leaf {path!r} has no output to perturb: {error}. Name "
                "other sites, or train the leaf by weight perturbation: "
                "others=fgrad.fixed_point_forward_grad(...)."
            ) from None

    def loss_name(self, site: Site) -> str:
        """The name of a site's loss.

        Raises:
          ValueError: if there is no such loss, or several and the site names none.
        """
        names = list(self._losses)
        if site.loss is None and len(names) > 1:
            raise ValueError(
                f"value_fn returns losses {names}, and site {site.names} does not say "
                "which is its own; use Site(..., loss=...)."
            )
        if site.loss is not None and site.loss not in names:
            raise ValueError(
                f"site {site.names} has the loss {site.loss!r}, but value_fn returns "
                f"{names}."
            )
        return names[0] if site.loss is None else site.loss

    def only_loss(self) -> str:
        """The name of the loss, of which there must be one.

        Raises:
          ValueError: if ``value_fn`` returns several.
        """
        if len(self._losses) > 1:
            raise ValueError(
                f"value_fn returns losses {list(self._losses)}, and joint pairs need "
                "one for each example; return their sum, or use "
                "fgrad.activity_forward_grad, whose sites have losses of their own."
            )
        return next(iter(self._losses))

    def output(self, loss_name: str) -> int:
        """The number of a loss.

        Raises:
          ValueError: for a loss that depends on nothing.
        """
        output = self._losses[loss_name]
        if not isinstance(output, int):
            raise ValueError(f"the loss is {output.value} whatever the parameters are.")
        return output

    def evaluate(self, noise: Mapping[int, jax.Array], loss_name: str) -> jax.Array:
        """A loss [examples] with noise added to some activations.

        Args:
          noise: what is added to the activations, by number.
          loss_name: which loss is evaluated.
        """
        output = self._losses[loss_name]
        after = self.program.depending(noise)
        known = dict(self.values)
        for value, added in noise.items():
            known[value] = known[value] + added
        for node in self.program.needed([output]):
            if after.isdisjoint(node.values):
                continue
            results = node.evaluate(graph.operands(node, known))
            for value, result in zip(node.outputs, results, strict=True):
                known[value] = result + noise[value] if value in noise else result
        found: jax.Array = known[output] if isinstance(output, int) else output.value
        return found

    def _check_losses(self) -> int:
        """The number of examples; raises unless each loss is an array [examples]."""
        shapes = {
            name: jnp.shape(x.value)
            if not isinstance(x, int)
            else self.program.avals[x].shape
            for name, x in self._losses.items()
        }
        first = next(iter(shapes.values()))
        if any(len(shape) != 1 or shape != first for shape in shapes.values()):
            raise TypeError(
                "activity_forward_grad needs a loss for each example, an array "
                f"[examples], but value_fn returns {list(shapes.values())}. Leave out "
                "the mean over the batch; a scalar loss is for "
                "fixed_point_forward_grad."
            )
        return int(first[0])


def named_losses(losses: Any) -> dict[str, jax.Array]:
    """What ``value_fn`` returned, as a dict."""
    if not isinstance(losses, dict):
        losses = {"loss": losses}
    return {name: jnp.asarray(value) for name, value in losses.items()}


def mean_of(
    value_fn: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., jax.Array]:
    """A scalar loss: the mean over examples, summed over the losses if several."""

    @functools.wraps(value_fn)
    def mean(params: Any, **kwargs: Any) -> jax.Array:
        result = value_fn(params, **kwargs)
        losses = named_losses(_loss_and_aux.split(result)[0] if has_aux else result)
        return sum((jnp.mean(x) for x in losses.values()), jnp.zeros([]))

    return mean


def _value_paths(params: Any) -> list[str | None]:
    """For each array of params in flat order its leaf's path; None for scales."""
    paths: list[str | None] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor):
        text = path_str(path)
        arrays = jax.tree.leaves(leaf)
        paths += [
            text if not is_qtensor(leaf) or x is leaf.qvalue else None for x in arrays
        ]
    return paths
