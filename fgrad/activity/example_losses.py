"""The losses of examples, traced once and evaluated again after perturbed activations.

Everything up to a site is computed once. What depends on the site, and only that, is
computed again for every direction and both signs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fgrad import estimators, perturbations
from fgrad.activity import layer_gradients, synthetic_gradients
from fgrad.activity.layer_gradients import Layer
from fgrad.activity.sites import Site, site_leaves
from fgrad.fixed_point import is_qtensor, path_str
from fgrad.tracing import graph
from fgrad.tracing.graph import Graph

# Least rms of an activation, for a site that is all zeros.
_LEAST_SCALE = 1e-3
# Most coordinates of an exact site; each costs two evaluations of what follows it.
_MOST_COORDINATES = 4096


class Estimate(NamedTuple):
    """What came of one site.

    Attributes:
      name: of its loss.
      gradients: by path of the leaf, in units of the values that it stores.
      loss: float32 scalar, mean over evaluations and examples.
      nonfinite_pairs: int32 scalar, pairs of an example's losses that were left out.
      dy: gradient of the mean loss by each activation, by number.
      jacobian: of a synthetic gradient after the step, or None.
    """

    name: str
    gradients: dict[str, jax.Array]
    loss: jax.Array
    nonfinite_pairs: jax.Array
    dy: dict[int, jax.Array]
    jacobian: jax.Array | None


class Tapped:
    """The losses, traced and evaluated once; then again after a site.

    Attributes:
      program: the traced losses.
      values: the values of its evaluation, by number.
    """

    def __init__(
        self,
        value_fn: Callable[..., Any],
        params: Any,
        sites: Sequence[Site],
        kwargs: Mapping[str, Any],
    ) -> None:
        self._leaves = site_leaves(sites, params)
        names: list[str] = []

        def function(params: Any, kwargs: Any) -> list[jax.Array]:
            losses = named_losses(value_fn(params, **kwargs))
            names.extend(losses)
            return list(losses.values())

        self.program: Graph = graph.trace(function, params, dict(kwargs))
        self._losses = dict(zip(names, self.program.outputs, strict=True))
        arrays = jax.tree.leaves((params, dict(kwargs)))
        inputs = dict(zip(self.program.inputs, arrays, strict=True))
        self._examples = self._check_losses()
        position = {
            path: self.program.inputs[i]
            for i, path in enumerate(_value_paths(params))
            if path is not None
        }
        in_params = len(jax.tree.leaves(params))
        batch = [
            value
            for value in self.program.inputs[in_params:]
            if self.program.avals[value].shape[:1] == (self._examples,)
        ]
        data = self.program.depending(batch)
        self._layers = {
            path: self._layer(path, position[path], data)
            for paths in self._leaves.values()
            for path in paths
        }
        self.values = graph.evaluate(
            self.program.nodes, {**self.program.constants, **inputs}
        )

    def _check_losses(self) -> int:
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
        return first[0]

    def _layer(self, path: str, leaf: int, data: set[int]) -> Layer:
        try:
            return layer_gradients.layer_of(self.program, leaf, data, self._examples)
        except ValueError as error:
            raise ValueError(
                f"the layer of leaf {path!r} has no output to perturb: {error}. Name "
                "other sites, or train the leaf by weight perturbation: "
                "others=fgrad.fixed_point_forward_grad(...)."
            ) from None

    def outputs(self, site: Site) -> dict[int, dict[str, Layer]]:
        """The activations of a site, each with its layers by the leaf's path."""
        found: dict[int, dict[str, Layer]] = {}
        for path in self._leaves[site]:
            layer = self._layers[path]
            found.setdefault(layer.output, {})[path] = layer
        return found

    def losses(self, noise: Mapping[int, jax.Array], output: graph.Operand) -> Any:
        """A loss [examples] with noise added to some activations."""
        program = self.program
        after = program.depending(noise)
        known = dict(self.values)
        for value, added in noise.items():
            known[value] = known[value] + added
        for node in program.needed([output]):
            if after.isdisjoint(node.outputs):
                continue
            if not after.isdisjoint(x for x in node.inputs if isinstance(x, int)):
                made = dict(
                    zip(
                        node.outputs,
                        node.evaluate(graph.operands(node, known)),
                        strict=True,
                    )
                )
                for value in noise.keys() & made.keys():
                    made[value] = made[value] + noise[value]
                known.update(made)
        return known[output] if isinstance(output, int) else output.value

    def estimate(
        self,
        site: Site,
        step_key: Callable[[Any], jax.Array],
        *,
        count: int,
        perturbation: perturbations.Perturbation,
        estimator: estimators.Estimator,
        vectorize: int,
        evidence: synthetic_gradients.Evidence | None = None,
    ) -> Estimate:
        """The gradients of a site's leaves."""
        outputs = self.outputs(site)
        name = self._loss_name(site)
        loss = self._losses[name]
        jacobian = None
        if site.exact:
            dy, plus, minus = self._coordinates(site, outputs, loss, vectorize)
        else:
            guesses = {}
            if evidence is not None:
                guesses = {
                    output: synthetic_gradients.predicted(evidence, self.values[output])
                    for output in outputs
                }
            dy, plus, minus = self._directions(
                outputs,
                loss,
                step_key,
                site.epsilon,
                count,
                perturbation,
                estimator,
                vectorize,
                guesses,
            )
            if site.synthetic is not None and evidence is not None:
                (output,) = outputs
                jacobian = synthetic_gradients.learned(
                    evidence,
                    dy[output],
                    memory=site.synthetic.memory,
                    num_perturbations=count,
                )
                dy = {output: guesses[output] + site.synthetic.correction * dy[output]}
            dy = {output: value / self._examples for output, value in dy.items()}
        finite = jnp.isfinite(plus) & jnp.isfinite(minus)
        both = jnp.stack([plus, minus]).astype(jnp.float32)
        return Estimate(
            name=name,
            gradients={
                path: layer_gradients.gradient(
                    self.program, layer, self.values, dy[output]
                )
                for output, layers in outputs.items()
                for path, layer in layers.items()
            },
            loss=jnp.mean(both, where=finite),
            nonfinite_pairs=jnp.sum(~finite, dtype=jnp.int32),
            dy=dy,
            jacobian=jacobian,
        )

    def evidence(
        self, site: Site, exact: Site, estimate: Estimate, jacobian: Any, count: Any
    ) -> synthetic_gradients.Evidence:
        """What a site's gradient is predicted from; checked.

        Args:
          site: one with a synthetic gradient.
          exact: the site that it names.
          estimate: what came of that.
          jacobian: the running mean.
          count: steps taken.
        """
        outputs, channels = jnp.shape(jacobian)
        signals = list(estimate.dy.values())
        shapes = [x.shape for x in signals]
        if shapes != [(self._examples, outputs)]:
            raise ValueError(
                f"the synthetic gradient of site {site.names} is predicted from "
                f"{exact.names}, whose leaves end in an axis of {outputs} and whose "
                f"output has shape {shapes}; it has to be [examples, {outputs}]."
            )
        shapes = [jnp.shape(self.values[output]) for output in self.outputs(site)]
        if len(shapes) != 1 or shapes[0][-1] != channels:
            raise ValueError(
                f"the leaves of site {site.names} end in an axis of {channels}, but "
                f"its activations have shapes {shapes}; a synthetic gradient needs one "
                f"of [examples, ..., {channels}]. Name one layer, or leave out "
                "synthetic."
            )
        return synthetic_gradients.Evidence(
            jacobian, self._examples * signals[0], count
        )

    def _loss_name(self, site: Site) -> str:
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

    def _directions(
        self,
        outputs: Mapping[int, Mapping[str, Layer]],
        loss: graph.Operand,
        step_key: Callable[[Any], jax.Array],
        epsilon: float,
        count: int,
        perturbation: perturbations.Perturbation,
        estimator: estimators.Estimator,
        vectorize: int,
        guesses: Mapping[int, jax.Array],
    ) -> tuple[dict[int, jax.Array], jax.Array, jax.Array]:
        """What random directions say of each output; the losses, [K, examples].

        Of the gradient of each example's loss, or of what a guess leaves of it.
        """
        # Named by a leaf, so that u stays when another site is added.
        name_of = {output: next(iter(layers)) for output, layers in outputs.items()}
        scales = {output: _rms(self.values[output]) for output in outputs}

        def directions(index: Any) -> dict[int, jax.Array]:
            keys = perturbations.leaf_keys(step_key(index), list(name_of.values()))
            return {
                output: perturbation.step
                * perturbation.sample(keys[name], jnp.shape(self.values[output]))
                for output, name in name_of.items()
            }

        def evaluate(sign: Any, index: Any) -> jax.Array:
            noise = {
                output: ((sign * epsilon * scales[output]) * u).astype(
                    self.values[output].dtype
                )
                for output, u in directions(index).items()
            }
            return self.losses(noise, loss)

        plus, minus = _both_signs(evaluate, count, vectorize)
        finite = jnp.isfinite(plus) & jnp.isfinite(minus)
        coefficients = estimator(plus, minus, epsilon)

        def add(total: dict[int, jax.Array], index: Any) -> tuple[Any, None]:
            u = directions(index)
            found = coefficients[index]
            for output, guess in guesses.items():
                axes = tuple(range(1, guess.ndim))
                found -= scales[output] * jnp.sum(guess * u[output], axes)
            found = jnp.where(finite[index], found, 0)
            return {
                output: value + _per_example(found, value) * u[output]
                for output, value in total.items()
            }, None

        zeros = {
            output: jnp.zeros(
                jnp.shape(self.values[output]), _wide(self.values[output])
            )
            for output in outputs
        }
        total, _ = jax.lax.scan(add, zeros, jnp.arange(count))
        mean = {
            output: value / (count * scales[output]) for output, value in total.items()
        }
        return mean, plus, minus

    def _coordinates(
        self,
        site: Site,
        outputs: Mapping[int, Mapping[str, Layer]],
        loss: graph.Operand,
        vectorize: int,
    ) -> tuple[dict[int, jax.Array], jax.Array, jax.Array]:
        """dL/dy by central differences along every coordinate of an example."""
        dy, all_plus, all_minus = {}, [], []
        for output in outputs:
            value = self.values[output]
            size = math.prod(value.shape[1:])
            if size > _MOST_COORDINATES:
                raise ValueError(
                    f"site {site.names} is exact, but its output has {size} values "
                    f"for each example, shape {value.shape}; at most "
                    f"{_MOST_COORDINATES} are taken one by one. Use random "
                    "directions: exact=False."
                )

            def evaluate(
                sign: Any, index: Any, output: int = output, value: Any = value
            ) -> jax.Array:
                u = jax.nn.one_hot(index, math.prod(value.shape[1:]), dtype=value.dtype)
                step = jnp.asarray(sign * site.epsilon, value.dtype)
                noise = jnp.broadcast_to(step * u.reshape(value.shape[1:]), value.shape)
                return self.losses({output: noise}, loss)

            plus, minus = _both_signs(evaluate, size, vectorize)
            difference = (plus - minus) / (2 * site.epsilon * self._examples)
            difference = jnp.where(jnp.isfinite(difference), difference, 0)
            dy[output] = difference.T.reshape(value.shape)
            all_plus.append(plus)
            all_minus.append(minus)
        return dy, jnp.concatenate(all_plus), jnp.concatenate(all_minus)


def _both_signs(
    evaluate: Callable[[Any, Any], jax.Array], count: int, vectorize: int
) -> tuple[jax.Array, jax.Array]:
    """``evaluate(sign, index)`` for both signs and all indices: two of [count, …]."""
    batch_size = min(vectorize, count) if vectorize > 1 else None

    def of_sign(sign: jax.Array) -> jax.Array:
        return jax.lax.map(
            functools.partial(evaluate, sign), jnp.arange(count), batch_size=batch_size
        )

    plus, minus = jax.lax.map(of_sign, jnp.array([1, -1], jnp.int32))
    return plus, minus


def _rms(x: jax.Array) -> jax.Array:
    squares = jnp.mean(jnp.square(x.astype(_wide(x))))
    return jnp.maximum(jnp.sqrt(squares), _LEAST_SCALE)


def _wide(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _per_example(coefficients: jax.Array, like: jax.Array) -> jax.Array:
    return coefficients.reshape(-1, *[1] * (like.ndim - 1)).astype(like.dtype)


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


def named_losses(losses: Any) -> dict[str, jax.Array]:
    """What ``value_fn`` returned, as a dict."""
    if not isinstance(losses, dict):
        losses = {"loss": losses}
    return {name: jnp.asarray(value) for name, value in losses.items()}
