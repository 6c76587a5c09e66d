r"""One step of joint pairs: perturb all activations, learn, predict.

With the clean activation a = f(y) of a layer, its rms s, the gate
:math:`g = [f'(y) ≠ 0]` and random signs u, one pair evaluates all sites l together,

.. math::
  a_l \leftarrow a_l \pm ε s_l (u_l ∘ g_l), \quad
  x_i = \frac{l_i^+ - l_i^-}{2ε} - \sum_l s_l \, p_{il} · (u_{il} ∘ g_{il}), \quad
  r_{il} = x_i \, (u_{il} ∘ g_{il}) / s_l

for the predictions p = δ J̄. The mean of r over u is the error of p, where the gate is
open. s and g are taken from each evaluation itself, so that none has to be kept.

On the way, all that is kept of the first evaluation is δ, and the gradient at the end
of a residual stream. Another one goes from layer to layer. What lies between is done
for one part of the examples after the other: the layer's product, the gradient of its
weights, and the activation that the next one reads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fgrad import perturbations
from fgrad.activity import joint_sites, mean_jacobians
from fgrad.activity.example_losses import ExampleLosses
from fgrad.activity.joint_parts import Correction, Part, Sums, nodes_of, transposed
from fgrad.activity.joint_sites import JointSite
from fgrad.activity.joint_split import Region, Split
from fgrad.activity.mean_jacobians import Teaching
from fgrad.activity.site_gradients import root_mean, wide
from fgrad.tracing import derivatives, execution_order, graph

# The gradients of each example's loss that are known exactly, by what they serve:
# "head", by the logits; "stream" and "branch", at the end of the residual stream.
_Given = Mapping[str, jax.Array]


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
        parts.
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
    split: Split

    def results(self) -> tuple[dict[str, SiteResult], jax.Array]:
        """What the step found by the names of the sites, and the pairs left out."""
        given = self._given()
        unexplained, nonfinite = self._measured(given)
        found: dict[str, SiteResult] = {}
        if not self.on_the_way:
            values = self.losses.values
            for group in self._groups.values():
                here, _ = self._at(
                    group, lambda _: values, unexplained, given, self.signal
                )
                found |= here
                # One after the other, or the gradients of all would be there at once.
                given = {name: _after(value, here) for name, value in given.items()}
            return found, nonfinite
        way = self._evaluation([*given.values(), unexplained])
        for ready, group in self._groups.items():
            region = self._region(group)
            way.find(region.sources)
            waits = [way.values[number] for number in self._movable(region)]
            measured = unexplained if self._taught else given["head"]
            after = [*_arrays(waits), measured][0]
            read = functools.partial(self.split.values, region, self._sources(way))
            here, following = self._at(group, read, unexplained, given, after)
            found |= here
            way.values[ready] = following
        return found, nonfinite

    @functools.cached_property
    def _groups(self) -> dict[int, list[JointSite]]:
        """The sites by the number of the value with which all is known of them."""
        groups: dict[int, list[JointSite]] = {}
        for site in self.sites:
            groups.setdefault(site.ready, []).append(site)
        return groups

    @functools.cached_property
    def _taught(self) -> list[JointSite]:
        """The sites that are perturbed."""
        return [site for site in self.sites if site.feedback == "learned"]

    def _given(self) -> _Given:
        """The gradients that are known exactly."""
        end = joint_sites.stream_of(self.sites)
        if end is None:
            return {"head": self.signal}
        program, values = self.split.losses.program, self.losses.values
        nodes = derivatives.between(program, [end], self.logits)
        region = self.split.region(nodes, [self.logits])

        def of_part(index: Any) -> tuple[Any, jax.Array]:
            signal, here = self.split.block(self.signal, index, 0), values
            if self.on_the_way:
                here = self.split.values(region, values, index)
            (at_end,) = transposed(program, [end], self.logits, here, signal)
            return (), at_end

        if self.split.count == 1:
            _, at_end = of_part(0)
        else:
            _, at_end = _in_turn(of_part, self.split.count, self.signal)
        signal = _delayed(self.signal, [at_end]) if self.on_the_way else self.signal
        return {"head": signal, "stream": at_end, "branch": at_end}

    # ------------------------------------------------------------------- evaluations

    def _evaluation(self, after: Sequence[jax.Array]) -> graph.Evaluation:
        """An evaluation that starts with the data, not before some arrays are there."""
        inputs = dict(self.losses.program.constants)
        for number in self.losses.program.inputs:
            array = self.losses.values[number]
            of_data = number in self.losses.batch
            inputs[number] = _delayed(array, after) if of_data else array
        return graph.Evaluation(self.losses.program, inputs)

    def _sources(self, evaluation: graph.Evaluation) -> dict[int, Any]:
        """What parts start from. They wait by themselves, and need no delayed data."""
        if self.split.count == 1:
            return evaluation.values
        data = {number: self.losses.values[number] for number in self.losses.batch}
        return evaluation.values | data

    def _region(self, sites: Sequence[JointSite]) -> Region:
        """What a part of the examples goes through at some sites of one group."""
        program = self.split.losses.program
        here = [site for site in self.split.sites if site.name in _names(sites)]
        nodes = [node for site in here for node in nodes_of(program, site)]
        read = (x for s in here for x in (s.output, s.activation, s.ready))
        return self.split.region(nodes, read)

    def _measured(self, given: _Given) -> tuple[jax.Array, jax.Array]:
        """X [K, examples] of this step, or zeros, and the pairs left out."""
        shape = (self.teaching.num_perturbations, self.losses.examples)
        nothing = jnp.zeros(shape, self.signal.dtype), jnp.int32(0)
        if not self._taught:
            return nothing
        found: tuple[jax.Array, jax.Array] = jax.lax.cond(
            self.asked, lambda: self._unexplained(given), lambda: nothing
        )
        return found

    def _unexplained(self, given: _Given) -> tuple[jax.Array, jax.Array]:
        """X [K, examples] of one pair for each direction, and the pairs left out."""

        def of_sign(sign: jax.Array) -> Any:
            evaluate = functools.partial(self._perturbed, given, sign)
            return jax.lax.map(evaluate, jnp.arange(self.teaching.num_perturbations))

        losses, explained = jax.lax.map(of_sign, jnp.array([1, -1], jnp.int32))
        finite = jnp.isfinite(losses[0]) & jnp.isfinite(losses[1])
        measured = (losses[0] - losses[1]) / (2 * self.epsilon)
        unexplained = jnp.where(finite, measured - explained.mean(0), 0)
        nonfinite = jnp.sum(~finite, dtype=jnp.int32)
        return unexplained.astype(self.signal.dtype), nonfinite

    def _perturbed(
        self, given: _Given, sign: jax.Array, index: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The losses on one side of a pair, and what the predictions say of them."""
        keys = self._keys(index)
        explained = jnp.zeros(self.losses.examples, self.signal.dtype)
        pair = self._evaluation([sign])
        if not self.on_the_way:  # what no perturbation changes is known
            after = self.losses.program.depending(s.activation for s in self._taught)
            clean = self.losses.values.items()
            pair.values.update((v, array) for v, array in clean if v not in after)
        for site in self._taught:
            self._find_output(site, pair, sign)
            told, squares = self._told(site, pair, keys, given)
            pair.find([site.activation])
            value = pair.values[site.activation]
            scale = root_mean(squares, value.size)
            explained += (scale * told).astype(explained.dtype)
            key = keys.delayed(site.name, squares) if value.size else keys[site.name]
            u = self.perturbation.sample(key, value.shape).astype(wide(value))
            moved = jnp.where(site.slope(pair.values) != 0, u, 0)
            amount = sign * self.epsilon * self.perturbation.step * scale
            pair.values[site.activation] = value + (amount * moved).astype(value.dtype)
        output = self.losses.output(self.loss_name)
        pair.find([output])
        return pair.values[output], explained

    def _keys(self, index: Any) -> perturbations.LeafKeys:
        names = [site.name for site in self.sites]
        return perturbations.leaf_keys(self.step_key(index), names)

    def _find_output(
        self, site: JointSite, pair: graph.Evaluation, sign: jax.Array
    ) -> None:
        """Computes the output of an integer layer in parts, on the way.

        A product with weights of 16 bits is two products in int32, and their sum is a
        third array of the same size. Integers add up to the same in any parts.
        """
        (here,) = (s for s in self.split.sites if s.name == site.name)
        nodes = [node for layer in here.layers.values() for node in layer.nodes]
        of_integers = any(node.name.startswith("integer_") for node in nodes)
        if self.split.count == 1 or not of_integers:
            return
        region = self.split.region(nodes, [here.output])
        pair.find(region.sources)
        sources = {number: pair.values[number] for number in region.sources}

        def of_part(index: Any) -> tuple[Any, jax.Array]:
            return (), self.split.values(region, sources, index)[here.output]

        waits = _arrays(sources[number] for number in self._movable(region))
        _, output = _in_turn(of_part, self.split.count, [*waits, sign][0])
        pair.values[here.output] = output

    def _told(
        self,
        site: JointSite,
        pair: graph.Evaluation,
        keys: perturbations.LeafKeys,
        given: _Given,
    ) -> tuple[jax.Array, jax.Array]:
        """See `Part.told`, of all examples. On the way, what follows waits for it."""
        unexplained = jnp.zeros((1, self.losses.examples), self.signal.dtype)
        program = self.split.losses.program
        (here,) = (s for s in self.split.sites if s.name == site.name)
        if here.output in pair.values and here.nonlinearity is not None:
            facts = [(node, node.facts) for node in here.nonlinearity.nodes]
        else:
            facts = [(node, node.facts) for node in nodes_of(program, here)]
        nodes = [node for node, known in facts if known.elementwise or known.view]
        region = self.split.region(nodes, [here.activation])
        pair.find(region.sources)
        sources = {number: pair.values[number] for number in region.sources}
        key = keys[site.name]
        if waits := _arrays(sources[v] for v in self._movable(region)):
            key = keys.delayed(site.name, waits[0])

        def of_part(index: Any) -> tuple[jax.Array, jax.Array]:
            values = self.split.values(region, sources, index)
            part = self._parts([site], values, unexplained, given, index)[site.name]
            told, squares = part.told(self._u(site, key, index))
            return squares, told

        if self.split.count == 1:
            squares, told = of_part(0)
            return told, squares
        squares, told = _in_turn(of_part, self.split.count, given["head"])
        for number in self._movable(region):
            pair.values[number] = _delayed(sources[number], [told])
        return told, squares

    def _movable(self, region: Region) -> list[int]:
        """The sources of a region that are computed from the batch."""
        program = self.losses.program
        computed = program.depending(self.losses.batch) - set(program.inputs)
        return [number for number in region.sources if number in computed]

    def _direction(self, site: JointSite, index: Any, k: jax.Array) -> jax.Array:
        """Direction k at an activation, in a part of the examples."""
        return self._u(site, self._keys(k)[site.name], index)

    def _u(self, site: JointSite, key: jax.Array, index: Any) -> jax.Array:
        """A direction at an activation, in a part of the examples."""
        count = self.split.count
        shape = self.losses.program.avals[site.activation].shape
        block = None if count == 1 else index
        u = self.perturbation.sample(key, (shape[0] // count, *shape[1:]), block)
        return self.perturbation.step * u

    # --------------------------------------------------------------------- gradients

    def _at(
        self,
        sites: Sequence[JointSite],
        read: Callable[[Any], Mapping[int, Any]],
        unexplained: jax.Array,
        given: _Given,
        after: jax.Array,
    ) -> tuple[dict[str, SiteResult], jax.Array]:
        """The gradients of the leaves at the sites of a group, and what these learn.

        Args:
          sites: of one group.
          read: ``read(index)`` are the values of a part of the examples.
          unexplained: x.
          given: the gradients that are known exactly.
          after: what to wait for.

        Returns:
          The results by the names of the sites, and the value with which the group is
          ready.
        """
        (ready,) = {site.ready for site in sites}

        def sums(index: Any) -> tuple[dict[str, Sums], jax.Array]:
            values = read(index)
            parts = self._parts(sites, values, unexplained, given, index)
            return {
                name: part.sums(
                    functools.partial(self._direction, part.site, index),
                    self.asked,
                    self.correction,
                )
                for name, part in parts.items()
            }, values[ready]

        avals = self.losses.program.avals
        if self.split.count == 1:
            found, following = sums(0)
        else:
            found, following = _in_turn(sums, self.split.count, after)
        results = {
            s.name: self._result(
                found[s.name],
                self.learned[s.name],
                math.prod(avals[s.activation].shape),
            )
            for s in sites
        }
        if self.split.count == 1 and self.on_the_way:
            following = _after(following, results)
        return results, following

    def _parts(
        self,
        sites: Sequence[JointSite],
        values: Mapping[int, Any],
        unexplained: jax.Array,
        given: _Given,
        index: Any,
    ) -> dict[str, Part]:
        """A part of the examples at some sites, by the names of the sites."""
        even = 1 - jnp.arange(self.losses.examples, dtype=jnp.int32) % 2
        shared: dict[int, dict[int, jax.Array]] = {}
        here = {name: self.split.block(x, index, 0) for name, x in given.items()}
        return {
            site.name: Part(
                program=self.split.losses.program,
                sites=self.split.sites,
                site=site,
                values=values,
                signal=here["head"],
                at_target=here.get(site.feedback, here["head"]),
                unexplained=self.split.block(unexplained, index, 1),
                jacobian=self.learned[site.name].jacobian,
                even=self.split.block(even, index, 0),
                examples=self.losses.examples,
                shared=shared,
            )
            for site in self.split.sites
            if site.name in _names(sites)
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


def _in_turn(
    function: Callable[[jax.Array], tuple[Any, jax.Array]],
    count: int,
    after: jax.Array,
) -> tuple[Any, jax.Array]:
    """The sums of what a function of 0 to count - 1 gives, and its values in a row.

    Args:
      function: gives a pytree of arrays to sum up, and a value [examples of a part,
        ...], for the number of a part.
      count: of parts, which are taken one after the other.
      after: what to wait for before there is room for the results.

    Returns:
      The sums, and the values [examples, ...].
    """
    sums, value = jax.eval_shape(function, jax.ShapeDtypeStruct((), jnp.int32))
    zero, size = execution_order.dependent_zero(after), len(value)
    row = jax.ShapeDtypeStruct((count * size, *value.shape[1:]), value.dtype)
    # Zeros that wait: as constants, those of all layers would be there at once.
    start = jax.tree.map(lambda x: jnp.full(x.shape, zero.astype(x.dtype)), (sums, row))

    def add(total: Any, index: jax.Array) -> tuple[Any, None]:
        sums, row = total
        more, value = function(index)
        row = jax.lax.dynamic_update_slice_in_dim(row, value, index * size, 0)
        return (jax.tree.map(jnp.add, sums, more), row), None

    found: tuple[Any, jax.Array]
    found, _ = jax.lax.scan(add, start, jnp.arange(count))
    return found


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


def _names(sites: Sequence[JointSite]) -> set[str]:
    return {site.name for site in sites}


def _after(value: jax.Array, results: Mapping[str, SiteResult]) -> jax.Array:
    """A value, not before the gradients at some sites have been computed."""
    done = ((*x.gradients.values(), *x.learned) for x in results.values())
    return _delayed(value, [array for arrays in done for array in arrays])


def _delayed(value: jax.Array, after: Iterable[jax.Array]) -> jax.Array:
    """A value, not before some arrays have been computed."""
    for done in _arrays(after):
        if _arrays([value]):
            value = execution_order.delayed(value, done)
    return value


def _arrays(values: Iterable[Any]) -> list[jax.Array]:
    """Those of some values that hold numbers."""
    extended = jax.dtypes.extended
    return [x for x in values if x.size and not jnp.issubdtype(x.dtype, extended)]
