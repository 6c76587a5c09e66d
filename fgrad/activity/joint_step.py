r"""One step of joint pairs: perturb all activations, learn, predict.

With the clean activation a = f(y) of a layer, its rms s, the gate
:math:`g = [f'(y) ≠ 0]` and random signs u, one pair evaluates all sites l together,

.. math::
  a_l \leftarrow a_l \pm ε s_l (u_l ∘ g_l), \quad
  x_i = \frac{l_i^+ - l_i^-}{2ε} - \sum_l s_l \, p_{il} · (u_{il} ∘ g_{il}), \quad
  r_{il} = x_i \, (u_{il} ∘ g_{il}) / s_l

for the predictions p = δ J̄. The mean of r over u is the error of p, where the gate is
open. s and g are taken from each evaluation itself, so that none has to be kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fgrad import perturbations
from fgrad.activity import layer_gradients, mean_jacobians
from fgrad.activity.example_losses import ExampleLosses
from fgrad.activity.joint_sites import JointSite
from fgrad.activity.mean_jacobians import Teaching
from fgrad.activity.site_gradients import per_example, rms, wide
from fgrad.tracing import derivatives, execution_order, graph

# edit(number, values so far) -> what an activation becomes, or None if it stays.
_Edit = Callable[[int, dict[int, Any]], Any]


class Learned(NamedTuple):
    """What is carried from step to step for one activation.

    Attributes:
      jacobian: J̄, float32 [outputs, channels] or [outputs, ..., channels].
      errors: float32 [2], running means for `correction="auto"`: the energy of the
        prediction's error in the gradient of the weights, and that with its noise.
    """

    jacobian: jax.Array
    errors: jax.Array


class SiteResult(NamedTuple):
    """What a step found at one activation.

    Attributes:
      gradients: of the leaves by their path, in units of what each leaf stores.
      learned: what is carried to the next step.
    """

    gradients: dict[str, jax.Array]
    learned: Learned


@dataclasses.dataclass(frozen=True, eq=False)
class JointStep:
    """A step at given parameters and data.

    Attributes:
      losses: the losses of the examples, evaluated.
      sites: activations in the order of their computation.
      logits: number of the head's output.
      loss_name: which loss.
      signal: δ [examples, outputs], the gradient of each example's loss by its logits.
      learned: by the names of the sites.
      step_key: ``step_key(k)`` is the key of direction k in this step.
      asked: bool scalar, whether this step perturbs.
      teaching: how fast the mean Jacobians move.
      perturbation: where u comes from.
      epsilon: ε, in units of each activation's rms.
      correction: the weight of r in the gradient, or "auto".
      on_the_way: whether to evaluate again instead of keeping activations.
    """

    losses: ExampleLosses
    sites: Sequence[JointSite]
    logits: int
    loss_name: str
    signal: jax.Array
    learned: Mapping[str, Learned]
    step_key: Callable[[Any], jax.Array]
    asked: jax.Array
    teaching: Teaching
    perturbation: perturbations.Perturbation
    epsilon: Any
    correction: float | Literal["auto"]
    on_the_way: bool

    def results(self) -> tuple[dict[str, SiteResult], jax.Array]:
        """What the step found by the names of the sites, and the pairs left out."""
        directions = self.teaching.num_perturbations
        shape = (directions, self.losses.examples)
        unexplained, nonfinite = jnp.zeros(shape, self.signal.dtype), jnp.int32(0)
        if self._taught:
            nothing = unexplained, nonfinite
            unexplained, nonfinite = jax.lax.cond(
                self.asked, self._unexplained, lambda: nothing
            )
        found: dict[str, SiteResult] = {}
        if not self.on_the_way:
            step: JointStep = self
            for site in self.sites:
                found[site.name] = step._at(site, self.losses.values, unexplained)
                # One after the other, or the gradients of all would be there at once.
                step = dataclasses.replace(
                    step, signal=_after(step.signal, found[site.name])
                )
            return found, nonfinite

        def edit(number: int, values: dict[int, Any]) -> Any:
            value = None
            for site in self.sites:
                if site.ready == number:
                    value = values[number] if value is None else value
                    found[site.name] = self._at(site, values, unexplained)
                    # What follows waits until nothing needs the layer's input any more.
                    value = _after(value, found[site.name])
            return value

        self._evaluate([site.ready for site in self.sites], edit, after=unexplained)
        return found, nonfinite

    @functools.cached_property
    def _taught(self) -> dict[int, JointSite]:
        """The sites that are perturbed, by the numbers of their activations."""
        return {s.activation: s for s in self.sites if s.feedback == "learned"}

    # ------------------------------------------------------------------- evaluations

    def _evaluate(
        self, outputs: Sequence[int], edit: _Edit, after: jax.Array
    ) -> dict[int, Any]:
        """Evaluates what some values need, with edited activations.

        What no edit changes is taken from the clean evaluation; if no activation is
        kept, it is evaluated again.

        Args:
          outputs: numbers of the values.
          edit: makes of an activation, and of the values known so far, what follows it
            reads in its place.
          after: what to wait for.
        """
        program, clean = self.losses.program, self.losses.values
        known = dict(self._inputs(after) if self.on_the_way else clean)
        stale: set[int] = set()
        for node in program.needed(outputs):
            if self.on_the_way or not stale.isdisjoint(node.values):
                results = node.evaluate(graph.operands(node, known))
                known.update(zip(node.outputs, results, strict=True))
                stale.update(node.outputs)
            for value in node.outputs:
                edited = edit(value, known)
                if edited is not None:
                    known[value] = edited
                    stale.add(value)
        return known

    def _inputs(self, after: jax.Array) -> dict[int, Any]:
        """What an evaluation starts from, with the data not before ``after``."""
        program = self.losses.program
        inputs = dict(program.constants)
        for number in program.inputs:
            array = self.losses.values[number]
            is_number = not jnp.issubdtype(array.dtype, jax.dtypes.extended)
            if number in self.losses.batch and is_number and array.size:
                array = execution_order.delayed(array, after)
            inputs[number] = array
        return inputs

    def _unexplained(self) -> tuple[jax.Array, jax.Array]:
        """x [K, examples] of one pair for each direction, and the pairs left out."""

        def of_sign(sign: jax.Array) -> Any:
            evaluate = functools.partial(self._perturbed, sign)
            return jax.lax.map(evaluate, jnp.arange(self.teaching.num_perturbations))

        losses, explained = jax.lax.map(of_sign, jnp.array([1, -1], jnp.int32))
        finite = jnp.isfinite(losses[0]) & jnp.isfinite(losses[1])
        measured = (losses[0] - losses[1]) / (2 * self.epsilon)
        unexplained = jnp.where(finite, measured - explained.mean(0), 0)
        nonfinite = jnp.sum(~finite, dtype=jnp.int32)
        return unexplained.astype(self.signal.dtype), nonfinite

    def _perturbed(
        self, sign: jax.Array, index: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The losses on one side of a pair, and what the predictions say of them."""
        keys = self._keys(index)
        explained = jnp.zeros(self.losses.examples, self.signal.dtype)

        def edit(activation: int, values: dict[int, Any]) -> Any:
            nonlocal explained
            if activation not in self._taught:
                return None
            site, value = self._taught[activation], values[activation]
            moved = rms(value) * self._gated(site, values, keys)
            predicted = self._predicted(site, values)
            told = jnp.sum(predicted * moved, tuple(range(1, value.ndim)))
            explained += told.astype(explained.dtype)
            return value + (sign * self.epsilon * moved).astype(value.dtype)

        output = self.losses.output(self.loss_name)
        return self._evaluate([output], edit, after=sign)[output], explained

    def _keys(self, index: Any) -> perturbations.LeafKeys:
        names = [site.name for site in self.sites]
        return perturbations.leaf_keys(self.step_key(index), names)

    def _gated(
        self,
        site: JointSite,
        values: Mapping[int, Any],
        keys: perturbations.LeafKeys,
    ) -> jax.Array:
        """u where the nonlinearity of a site is not flat, and 0 elsewhere."""
        value = values[site.activation]
        key = keys.delayed(site.name, value) if value.size else keys[site.name]
        u = self.perturbation.step * self.perturbation.sample(key, value.shape)
        return jnp.where(site.slope(values) != 0, u.astype(wide(value)), 0)

    # --------------------------------------------------------------------- gradients

    def _predicted(self, site: JointSite, values: Mapping[int, Any]) -> jax.Array:
        """The predicted gradient of each example's loss by an activation.

        Args:
          site: where.
          values: of an evaluation; all that a branch of the residual stream has.
        """
        if site.feedback == "learned":
            shape = jnp.shape(values[site.activation])
            jacobian = self.learned[site.name].jacobian
            return mean_jacobians.predicted(jacobian, self.signal, shape)
        if site.feedback == "head":
            return self._from_head(site)
        ends = next(site for site in self.sites if site.feedback == "head")
        at_end = self._from_head(ends)
        if site.feedback == "stream":
            return at_end
        return _transposed(
            self.losses.program, site.activation, site.target, values, at_end
        )

    def _from_head(self, site: JointSite) -> jax.Array:
        """The gradient at one of the last activations, which no other block follows."""
        program, values = self.losses.program, self.losses.values
        return _transposed(program, site.activation, self.logits, values, self.signal)

    def _at(
        self, site: JointSite, values: Mapping[int, Any], unexplained: jax.Array
    ) -> SiteResult:
        """The gradients of the leaves at a site, and what it learns."""
        predicted = self._predicted(site, values)
        gradients = self._of_leaves(site, values, predicted)
        learned = self.learned[site.name]
        if site.feedback != "learned":
            return SiteResult(gradients, learned)
        added, learned = jax.lax.cond(
            self.asked,
            lambda: self._taught_at(site, values, unexplained),
            lambda: (self._no_correction(gradients), learned),
        )
        for path, change in added.items():
            gradients[path] += change
        return SiteResult(gradients, learned)

    def _of_leaves(
        self, site: JointSite, values: Mapping[int, Any], gradient: jax.Array
    ) -> dict[str, jax.Array]:
        """The gradients of the leaves by the mean loss, from those by the activation.

        Args:
          site: where.
          values: of an evaluation.
          gradient: of each example's own loss by the site's activation.
        """
        dy = gradient * site.slope(values) / self.losses.examples
        program, known = self.losses.program, dict(values)
        return {
            path: layer_gradients.gradient(program, layer, known, dy)
            for path, layer in site.layers.items()
        }

    def _taught_at(
        self, site: JointSite, values: Mapping[int, Any], unexplained: jax.Array
    ) -> tuple[dict[str, jax.Array], Learned]:
        """What this step's pairs add to the leaves' gradients, and what they teach."""
        learned = self.learned[site.name]
        residual = self._residual(site, values, unexplained)
        share = jnp.mean(site.slope(values) != 0, dtype=residual.dtype)
        jacobian = mean_jacobians.learned(
            learned.jacobian, self.signal, residual, share, self.teaching
        )
        if self.correction == 0:
            return {}, learned._replace(jacobian=jacobian)
        if self.correction != "auto":
            added = self._of_leaves(site, values, self.correction * residual)
            return added, learned._replace(jacobian=jacobian)
        halves = [
            self._of_leaves(site, values, residual * half)
            for half in _halves(residual)
        ]
        weight = correction_of(learned.errors)
        both = {path: a + halves[1][path] for path, a in halves[0].items()}
        added = {path: weight.astype(a.dtype) * a for path, a in both.items()}
        rate = self.teaching.rate(0, 1)
        errors = learned.errors + rate * (_energies(*halves) - learned.errors)
        return added, Learned(jacobian, errors)

    def _no_correction(
        self, gradients: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        if self.correction == 0:
            return {}
        return {path: jnp.zeros_like(value) for path, value in gradients.items()}

    def _residual(
        self, site: JointSite, values: Mapping[int, Any], unexplained: jax.Array
    ) -> jax.Array:
        """r, the mean over the directions."""
        value = values[site.activation]

        def add(total: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            u = self._gated(site, values, self._keys(index))
            return total + per_example(unexplained[index], u) * u, None

        count = self.teaching.num_perturbations
        zeros = jnp.zeros(value.shape, wide(value))
        total, _ = jax.lax.scan(add, zeros, jnp.arange(count))
        return total / (count * rms(value))


def correction_of(errors: jax.Array) -> jax.Array:
    """The weight of r that makes the expected error of the gradient least.

    Args:
      errors: see `Learned`.

    Returns:
      The energy of the prediction's error as a share of that with its noise, between 0
      and 1.

    Example:
      >>> correction_of(jnp.array([0.2, 0.8]))
      Array(0.25, dtype=float32)
    """
    error, total = errors
    return jnp.clip(jnp.where(total > 0, error / jnp.maximum(total, 1e-30), 0), 0, 1)


def _halves(like: jax.Array) -> list[jax.Array]:
    """Ones for the examples of even number and zeros for the others; the reverse."""
    even = 1 - jnp.arange(len(like), dtype=jnp.int32) % 2
    return [per_example(half, like) for half in (even, 1 - even)]


def _energies(
    first: Mapping[str, jax.Array], second: Mapping[str, jax.Array]
) -> jax.Array:
    """Energy of the prediction's error, and that with the noise of u, as float32 [2].

    Both halves of a batch estimate half of the same error of the weights' gradient, each
    with noise of its own. The mean of their product holds no noise.
    """
    agreed = sum((jnp.vdot(a, second[path]) for path, a in first.items()), jnp.zeros(()))
    both = [a + second[path] for path, a in first.items()]
    total = sum((jnp.vdot(a, a) for a in both), jnp.zeros(()))
    return jnp.stack([4 * agreed, total]).astype(jnp.float32)


def _transposed(
    program: graph.Graph,
    start: int,
    end: int,
    values: Mapping[int, Any],
    gradient: jax.Array,
) -> jax.Array:
    """See `derivatives.transposed`; what has no closed form is told with a way out."""
    try:
        return derivatives.transposed(program, start, end, values, gradient)
    except ValueError as error:
        raise ValueError(
            f"the way back from an activation of shape {program.avals[end].shape} to "
            f"one of {program.avals[start].shape} is not known: {error}. Leave out "
            "transposed_head and residual."
        ) from None


def _after(value: jax.Array, result: SiteResult) -> jax.Array:
    """A value, not before the gradients at a site have been computed."""
    for done in (*result.gradients.values(), *result.learned):
        if done.size and value.size:
            value = execution_order.delayed(value, done)
    return value
