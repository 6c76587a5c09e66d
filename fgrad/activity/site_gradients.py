r"""The gradient at a site's activations and of its leaves, from losses of examples.

An activation y is perturbed along random directions u, or along each coordinate in
turn. The differences of the losses give dL/dy, and each layer makes the gradient of its
weights of that.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fgrad import estimators, perturbations
from fgrad.activity import layer_gradients, synthetic_gradients
from fgrad.activity.example_losses import ExampleLosses
from fgrad.activity.sites import Site
from fgrad.activity.synthetic_gradients import Evidence
from fgrad.spread import Spread

# The least rms that an activation counts with, so that one of zeros can be perturbed.
_LEAST_SCALE = 1e-3
# The most coordinates of an exact site. Each costs two evaluations of what follows it.
_MOST_COORDINATES = 4096

# Arrays by the number of an activation in the graph.
_ByActivation = dict[int, jax.Array]


class SiteGradient(NamedTuple):
    """What the perturbation of one site found.

    Attributes:
      loss_name: name of the site's loss.
      gradients: of the site's leaves by their path, in units of the values that each
        leaf stores.
      loss: float32 scalar, mean over evaluations and examples.
      nonfinite_pairs: int32 scalar, pairs of an example's losses that were left out.
      dy: gradient of the mean loss by each activation, by its number.
      jacobian: running mean of a synthetic gradient after the step, or None.
    """

    loss_name: str
    gradients: dict[str, jax.Array]
    loss: jax.Array
    nonfinite_pairs: jax.Array
    dy: _ByActivation
    jacobian: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Directions:
    """Random directions of one step, and how losses along them are read.

    Attributes:
      step_key: ``step_key(k)`` is the key of direction k in this step.
      count: K, the number of directions.
      perturbation: where the directions come from.
      estimator: makes coefficients of the directions from losses.
      vectorize: how many directions are evaluated at once.
      spread: how devices share the evaluations, or None.
    """

    step_key: Callable[[Any], jax.Array]
    count: int
    perturbation: perturbations.Perturbation
    estimator: estimators.Estimator
    vectorize: int
    spread: Spread | None = None

    def evaluated(
        self, evaluate: Callable[[Any, Any], jax.Array], count: int
    ) -> tuple[jax.Array, jax.Array]:
        """``evaluate(sign, index)`` for both signs and ``count`` indices.

        Returns:
          Two arrays [count, ...].
        """
        at_once = min(self.vectorize, count)
        if self.spread is None:
            return _both_signs(evaluate, count, self.vectorize)
        # The coordinates of an exact site are as many as they are: some are evaluated
        # for nothing where devices cannot share them evenly.
        group = self.spread.devices_of_pairs * at_once
        indices = jnp.minimum(jnp.arange(-(-count // group) * group), count - 1)
        (table,) = self.spread.table(
            lambda sign, index, _: evaluate(sign, index), indices, {}, vectorize=at_once
        )
        plus, minus = table[:, :count]
        return plus, minus


def site_gradient(
    losses: ExampleLosses,
    site: Site,
    directions: Directions,
    evidence: Evidence | None = None,
) -> SiteGradient:
    """The gradients of a site's leaves.

    Args:
      losses: the losses of the examples.
      site: which activations are perturbed.
      directions: along what; for an exact site only how they are evaluated counts.
      evidence: for a site with a synthetic gradient, from `evidence_for`.
    """
    jacobian = None
    if site.exact:
        dy, plus, minus = _along_coordinates(losses, site, directions)
    elif site.synthetic is None or evidence is None:
        dy, plus, minus = _along_directions(losses, site, directions, {})
        dy = {output: value / losses.examples for output, value in dy.items()}
    else:
        (output,) = losses.outputs(site)
        predicted = synthetic_gradients.predicted(evidence, losses.values[output])
        found = _along_directions(losses, site, directions, {output: predicted})
        (excess,), plus, minus = found[0].values(), *found[1:]
        jacobian = synthetic_gradients.learned(
            evidence,
            excess,
            memory=site.synthetic.memory,
            num_perturbations=directions.count,
        )
        corrected = predicted + site.synthetic.correction * excess
        dy = {output: corrected / losses.examples}
    finite = jnp.isfinite(plus) & jnp.isfinite(minus)
    both = jnp.stack([plus, minus]).astype(jnp.float32)
    return SiteGradient(
        loss_name=losses.loss_name(site),
        gradients=_leaf_gradients(losses, site, dy),
        loss=jnp.mean(both, where=finite),
        nonfinite_pairs=jnp.sum(~finite, dtype=jnp.int32),
        dy=dy,
        jacobian=jacobian,
    )


def evidence_for(
    losses: ExampleLosses,
    site: Site,
    exact: Site,
    found: SiteGradient,
    jacobian: jax.Array,
    count: jax.Array,
) -> Evidence:
    """What the synthetic gradient of a site is predicted from.

    Args:
      losses: the losses of the examples.
      site: a site with a synthetic gradient.
      exact: the site that it names.
      found: the gradient at that site.
      jacobian: the running mean.
      count: steps taken.

    Raises:
      ValueError: if the shapes of the activations do not fit.
    """
    outputs, channels = jnp.shape(jacobian)
    signals = list(found.dy.values())
    shapes = [x.shape for x in signals]
    if shapes != [(losses.examples, outputs)]:
        raise ValueError(
            f"the synthetic gradient of site {site.names} is predicted from "
            f"{exact.names}, whose leaves end in an axis of {outputs} and whose "
            f"output has shape {shapes}; it has to be [examples, {outputs}]."
        )
    shapes = [jnp.shape(losses.values[output]) for output in losses.outputs(site)]
    if len(shapes) != 1 or shapes[0][-1] != channels:
        raise ValueError(
            f"the leaves of site {site.names} end in an axis of {channels}, but "
            f"its activations have shapes {shapes}; a synthetic gradient needs one "
            f"of [examples, ..., {channels}]. Name one layer, or leave out "
            "synthetic."
        )
    return Evidence(jacobian, losses.examples * signals[0], count)


def _leaf_gradients(
    losses: ExampleLosses, site: Site, dy: Mapping[int, jax.Array]
) -> dict[str, jax.Array]:
    """The gradients of a site's leaves from those at its activations."""
    return {
        path: layer_gradients.gradient(losses.program, layer, losses.values, dy[output])
        for output, layers in losses.outputs(site).items()
        for path, layer in layers.items()
    }


# -------------------------------------------------------------- along random directions


@dataclasses.dataclass(frozen=True)
class _Probes:
    """The perturbations ``± ε s u_k`` of a site's activations.

    Attributes:
      values: the activations.
      names: for each activation the path of a leaf. It addresses u, so that u stays
        the same when another site is added.
      scales: s, the rms of each activation.
      directions: where u comes from.
    """

    values: _ByActivation
    names: Mapping[int, str]
    scales: _ByActivation
    directions: Directions

    @classmethod
    def at(cls, losses: ExampleLosses, site: Site, directions: Directions) -> _Probes:
        outputs = losses.outputs(site)
        values = {output: losses.values[output] for output in outputs}
        names = {output: next(iter(layers)) for output, layers in outputs.items()}
        scales = {output: rms(value) for output, value in values.items()}
        return cls(values, names, scales, directions)

    def u(self, index: Any) -> _ByActivation:
        """Direction ``index`` at each activation."""
        perturbation = self.directions.perturbation
        step_key = self.directions.step_key(index)
        keys = perturbations.leaf_keys(step_key, list(self.names.values()))
        return {
            output: perturbation.step
            * perturbation.sample(keys[name], jnp.shape(self.values[output]))
            for output, name in self.names.items()
        }

    def noise(self, amplitude: Any, index: Any) -> _ByActivation:
        """``amplitude * s u_k`` in the dtype of each activation."""
        return {
            output: ((amplitude * self.scales[output]) * u).astype(
                self.values[output].dtype
            )
            for output, u in self.u(index).items()
        }


def _along_directions(
    losses: ExampleLosses,
    site: Site,
    directions: Directions,
    predictions: Mapping[int, jax.Array],
) -> tuple[_ByActivation, jax.Array, jax.Array]:
    """What the losses along random directions say of the activations' gradients.

    Args:
      losses: the losses of the examples.
      site: which activations are perturbed.
      directions: K random directions.
      predictions: predicted gradients of each example's own loss by the activations;
        or none.

    Returns:
      For each activation, the mean of ``d_k u_k`` over the directions k, where d_k is
      the derivative of each example's own loss along u_k; with a prediction, of the
      part of d_k that the prediction does not explain. Then the losses on both sides,
      two of [K, examples].
    """
    name = losses.loss_name(site)
    probes = _Probes.at(losses, site, directions)

    def evaluate(sign: Any, index: Any) -> jax.Array:
        return losses.evaluate(probes.noise(sign * site.epsilon, index), name)

    plus, minus = directions.evaluated(evaluate, directions.count)
    finite = jnp.isfinite(plus) & jnp.isfinite(minus)
    coefficients = directions.estimator(plus, minus, site.epsilon)

    def add(total: _ByActivation, index: Any) -> tuple[_ByActivation, None]:
        u = probes.u(index)
        unexplained = coefficients[index]
        for output, predicted in predictions.items():
            axes = tuple(range(1, predicted.ndim))
            unexplained -= probes.scales[output] * jnp.sum(predicted * u[output], axes)
        unexplained = jnp.where(finite[index], unexplained, 0)
        return {
            output: value + per_example(unexplained, value) * u[output]
            for output, value in total.items()
        }, None

    zeros = {
        output: jnp.zeros(jnp.shape(value), wide(value))
        for output, value in probes.values.items()
    }
    total, _ = jax.lax.scan(add, zeros, jnp.arange(directions.count))
    mean = {
        output: value / (directions.count * probes.scales[output])
        for output, value in total.items()
    }
    return mean, plus, minus


# --------------------------------------------------------------- along each coordinate


def _along_coordinates(
    losses: ExampleLosses, site: Site, directions: Directions
) -> tuple[_ByActivation, jax.Array, jax.Array]:
    """Central differences along every coordinate of an example.

    Returns:
      The gradient of the mean loss by each activation, and the losses on both sides,
      two of [coordinates, examples].
    """
    name = losses.loss_name(site)
    dy, all_plus, all_minus = {}, [], []
    for output in losses.outputs(site):
        value = losses.values[output]
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
            return losses.evaluate({output: noise}, name)

        plus, minus = directions.evaluated(evaluate, size)
        difference = (plus - minus) / (2 * site.epsilon * losses.examples)
        difference = jnp.where(jnp.isfinite(difference), difference, 0)
        dy[output] = difference.T.reshape(value.shape)
        all_plus.append(plus)
        all_minus.append(minus)
    return dy, jnp.concatenate(all_plus), jnp.concatenate(all_minus)


# ------------------------------------------------------------------------------ shared


def _both_signs(
    evaluate: Callable[[Any, Any], jax.Array], count: int, vectorize: int
) -> tuple[jax.Array, jax.Array]:
    """``evaluate(sign, index)`` for both signs and all indices: two of [count, …]."""
    batch_size = min(vectorize, count) if vectorize > 1 else None

    def of_sign(sign: jax.Array) -> Any:
        return jax.lax.map(
            functools.partial(evaluate, sign), jnp.arange(count), batch_size=batch_size
        )

    plus, minus = jax.lax.map(of_sign, jnp.array([1, -1], jnp.int32))
    return plus, minus


def rms(x: jax.Array) -> jax.Array:
    """The root mean square of an activation, but at least `_LEAST_SCALE`."""
    squares = jnp.mean(jnp.square(x.astype(wide(x))))
    return jnp.maximum(jnp.sqrt(squares), _LEAST_SCALE)


def root_mean(squares: jax.Array, size: int) -> jax.Array:
    """The root of the mean of ``size`` squares by their sum; see `rms`."""
    return jnp.maximum(jnp.sqrt(squares / max(size, 1)), _LEAST_SCALE)


def wide(x: jax.Array) -> Any:
    """The dtype that sums over an activation are made in: float32 or wider."""
    return jnp.promote_types(x.dtype, jnp.float32)


def per_example(coefficients: jax.Array, like: jax.Array) -> jax.Array:
    """Coefficients [examples] with as many axes as an activation, to multiply it."""
    return coefficients.reshape(-1, *[1] * (like.ndim - 1)).astype(like.dtype)
