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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fgrad import perturbations
from fgrad.activity import mean_jacobians
from fgrad.activity.example_losses import ExampleLosses
from fgrad.activity.joint_parts import Correction, Part, Sums
from fgrad.activity.joint_sites import JointSite
from fgrad.activity.joint_split import Split
from fgrad.activity.mean_jacobians import Teaching
from fgrad.activity.site_gradients import root_mean, wide
from fgrad.tracing import execution_order, graph

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
      split: the losses of a part of the examples, to go through an activation in
        parts; None to take it as a whole.
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
    correction: Correction
    on_the_way: bool
    split: Split | None = None

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
            for group in self._groups.values():
                found |= (here := step._at(group, self.losses.values, unexplained))
                # One after the other, or the gradients of all would be there at once.
                step = dataclasses.replace(step, signal=_after(step.signal, here))
            return found, nonfinite

        def edit(number: int, values: dict[int, Any]) -> Any:
            if number not in self._groups:
                return None
            here = self._at(self._groups[number], values, unexplained)
            found.update(here)
            # What follows waits until nothing needs the layer's input any more.
            return _after(values[number], here)

        self._evaluate(list(self._groups), edit, after=unexplained)
        return found, nonfinite

    @functools.cached_property
    def _groups(self) -> dict[int, list[JointSite]]:
        """The sites by the number of the value with which all is known of them."""
        groups: dict[int, list[JointSite]] = {}
        for site in self.sites:
            groups.setdefault(site.ready, []).append(site)
        return groups

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
        """X [K, examples] of one pair for each direction, and the pairs left out."""

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
            key = keys.delayed(site.name, value) if value.size else keys[site.name]
            told, squares = self._told(site, values, key)
            scale = root_mean(squares, value.size)
            explained += (scale * told).astype(explained.dtype)
            u = self.perturbation.sample(key, value.shape).astype(wide(value))
            moved = jnp.where(site.slope(values) != 0, u, 0)
            amount = sign * self.epsilon * self.perturbation.step * scale
            return value + (amount * moved).astype(value.dtype)

        output = self.losses.output(self.loss_name)
        return self._evaluate([output], edit, after=sign)[output], explained

    def _keys(self, index: Any) -> perturbations.LeafKeys:
        names = [site.name for site in self.sites]
        return perturbations.leaf_keys(self.step_key(index), names)

    def _told(
        self, site: JointSite, values: Mapping[int, Any], key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See `Part.told`, of all examples."""
        unexplained = jnp.zeros((1, self.losses.examples), self.signal.dtype)

        def of_part(index: Any) -> tuple[jax.Array, jax.Array]:
            part = self._parts([site], values, unexplained, index)[site.name]
            return part.told(self._u(site, key, index))

        if self.split is None:
            return of_part(0)
        told, squares = jax.lax.map(of_part, jnp.arange(self.split.count))
        return told.reshape(-1), jnp.sum(squares)

    def _direction(self, site: JointSite, index: Any, k: jax.Array) -> jax.Array:
        """Direction k at an activation, in a part of the examples."""
        return self._u(site, self._keys(k)[site.name], index)

    def _u(self, site: JointSite, key: jax.Array, index: Any) -> jax.Array:
        """A direction at an activation, in a part of the examples."""
        count = 1 if self.split is None else self.split.count
        shape = self.losses.program.avals[site.activation].shape
        block = None if self.split is None else index
        u = self.perturbation.sample(key, (shape[0] // count, *shape[1:]), block)
        return self.perturbation.step * u

    # --------------------------------------------------------------------- gradients

    def _at(
        self,
        sites: Sequence[JointSite],
        values: Mapping[int, Any],
        unexplained: jax.Array,
    ) -> dict[str, SiteResult]:
        """The gradients of the leaves at some sites, and what these learn."""

        def sums(index: Any) -> dict[str, Sums]:
            parts = self._parts(sites, values, unexplained, index)
            return {
                name: part.sums(
                    functools.partial(self._direction, part.site, index),
                    self.asked,
                    self.correction,
                )
                for name, part in parts.items()
            }

        found = sums(0) if self.split is None else _summed(sums, self.split.count)
        sizes = {s.name: jnp.size(values[s.activation]) for s in sites}
        return {
            name: self._result(of_site, self.learned[name], sizes[name])
            for name, of_site in found.items()
        }

    def _parts(
        self,
        sites: Sequence[JointSite],
        values: Mapping[int, Any],
        unexplained: jax.Array,
        index: Any,
    ) -> dict[str, Part]:
        """A part of the examples at some sites, or all, by the names of the sites."""
        names = [site.name for site in sites]
        program, everywhere = self.losses.program, self.sites
        clean, signal = self.losses.values, self.signal
        even = 1 - jnp.arange(self.losses.examples, dtype=jnp.int32) % 2
        if self.split is not None:
            program, everywhere = self.split.losses.program, self.split.sites
            here = [site for site in everywhere if site.name in names]
            values = self.split.part(here, self.logits, values, index)
            clean = self.split.part(here, self.logits, clean, index)
            signal = self.split.block(signal, index, 0)
            unexplained = self.split.block(unexplained, index, 1)
            even = self.split.block(even, index, 0)
        shared: dict[int, dict[int, jax.Array]] = {}
        return {
            site.name: Part(
                program=program,
                sites=everywhere,
                site=site,
                logits=self.logits,
                values=values,
                clean=clean,
                signal=signal,
                unexplained=unexplained,
                jacobian=self.learned[site.name].jacobian,
                even=even,
                examples=self.losses.examples,
                shared=shared,
            )
            for site in everywhere
            if site.name in names
        }

    def _result(self, sums: Sums, learned: Learned, size: int) -> SiteResult:
        """The gradients and what is learned, from sums over the examples."""
        gradients = dict(sums.gradients)
        jacobian, errors = learned
        scale = root_mean(sums.squares, size)
        if sums.errors:
            halves = [
                {path: x / scale.astype(x.dtype) for path, x in half.items()}
                for half in sums.errors
            ]
            weight: Any = self.correction
            if self.correction == "auto":
                weight = correction_of(errors)
                rate = jnp.where(self.asked, self.teaching.rate(0, 1), 0)
                errors = errors + rate * (_energies(*halves) - errors)
            for path, own in gradients.items():
                added = sum((half[path] for half in halves), jnp.zeros_like(own))
                gradients[path] = own + jnp.asarray(weight, own.dtype) * added
        jacobian = mean_jacobians.learned(
            jacobian,
            self.signal,
            sums.evidence / scale,
            sums.open / max(size, 1),
            self.teaching,
        )
        return SiteResult(gradients, Learned(jacobian, errors))


def _summed(
    function: Callable[[jax.Array], dict[str, Sums]], count: int
) -> dict[str, Sums]:
    """The sum of what a function of 0 to count - 1 gives, one after the other."""
    first = jax.eval_shape(function, jax.ShapeDtypeStruct((), jnp.int32))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

    def add(total: Any, index: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(index)), None

    total: dict[str, Sums]
    total, _ = jax.lax.scan(add, zeros, jnp.arange(count))
    return total


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


def _energies(
    first: Mapping[str, jax.Array], second: Mapping[str, jax.Array]
) -> jax.Array:
    """Energy of the prediction's error, and that with the noise of u, as float32 [2].

    Both halves of a batch estimate half of the same error of the weights' gradient,
    each with noise of its own. The mean of their product holds no noise.
    """
    agreed = sum(
        (jnp.vdot(a, second[path]) for path, a in first.items()), jnp.zeros(())
    )
    both = [a + second[path] for path, a in first.items()]
    total = sum((jnp.vdot(a, a) for a in both), jnp.zeros(()))
    return jnp.stack([4 * agreed, total]).astype(jnp.float32)


def _after(value: jax.Array, results: Mapping[str, SiteResult]) -> jax.Array:
    """A value, not before the gradients at some sites have been computed."""
    for result in results.values():
        for done in (*result.gradients.values(), *result.learned):
            if done.size and value.size:
                value = execution_order.delayed(value, done)
    return value
