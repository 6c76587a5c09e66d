"""A way to train a network: backpropagation or forward gradients, float or fixed point.

A method is a `ConfigDict` (see ``configs/quickstart.py``). With a network and an
objective it becomes a `Learner`, whose functions are pure: they prepare the weights,
begin a run, take a step and predict. The learning rate and the number of steps are
arguments of the step, so one compilation serves all runs.

Ordinary training (`experiments.learners.classification`) and few-shot learning
(`experiments.learners.nearest_centroid`) differ in their objectives only.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

import fgrad
from experiments import features
from experiments.data.arrays import Split
from experiments.learners import adapt, optimizers
from experiments.models import sampled
from experiments.usage import UsageError
from fgrad import layers

# outputs(x) gives the logits of x, and by their names those of local heads. If the
# network has stages, outputs(x, start=i, stop=j) gives what a slice makes of x.
Outputs = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


class Objective(Protocol):
    """What a method minimises."""

    def batch(self, key: jax.Array, data: Any) -> Any:
        """Chooses the batch of a step.

        Args:
          key: PRNG key of the step.
          data: all there is to train on.
        """

    def losses(self, outputs: Outputs, batch: Any) -> Any:
        """Computes the losses of a batch.

        Args:
          outputs: what the network, at the weights of the step, makes of its input.
          batch: as `batch` chose it.

        Returns:
          A pytree of arrays of losses, whose means are added up.
        """


class Weights(NamedTuple):
    """The weights of a network as a method holds them, before the first step.

    Attributes:
      trained: weights that train, float or `fgrad.QTensor`.
      frozen: those that do not.
      scales: scales of activations; empty for float networks.
    """

    trained: Any
    frozen: Any
    scales: Any


class TrainState(NamedTuple):
    """The state of a run.

    Attributes:
      params: weights that train, float or `fgrad.QTensor`.
      frozen: those that do not.
      opt_state: state of the optax chain.
      scales: scales of activations; empty for float networks.
      key: PRNG key of the batches.
      count: int32 scalar, steps taken.
    """

    params: Any
    frozen: Any
    opt_state: Any
    scales: Any
    key: jax.Array
    count: jax.Array  # type: ignore[assignment]  # tuple has a count, too


@dataclasses.dataclass(frozen=True, eq=False)
class Learner:
    """A method applied to a network; made by `make_learner`.

    Its functions are pure and not jitted, unless they say so.

    Attributes:
      method: see ``configs/quickstart.py``.
      model: the network, in the arithmetic of the method, and the way to adapt it.
      objective: what is minimised.
      skips_frozen: whether `step` and `logits` are given what the frozen stages at the
        beginning of the network make of an input (`behind_frozen`) in its place.
      spread: how devices share the evaluations of a step, or None.
    """

    method: ConfigDict
    model: adapt.Adapted
    objective: Objective
    skips_frozen: bool
    spread: fgrad.Spread | None = None

    @property
    def passes_per_step(self) -> float:
        """Forward passes of a step; a backward pass counts as two."""
        return optimizers.forward_passes(self.method)

    def weights(self, params: Any, images: jax.Array, key: jax.Array) -> Weights:
        """Adds the leaves of the way to adapt, quantizes, and splits what trains off.

        Args:
          params: float parameters of the network.
          images: inputs of the network, to calibrate activations with.
          key: PRNG key of the leaves that are added.
        """
        params = self.model.begin(params, key, images[:1])
        bits = self.method.get("bits")
        params, scales = self._quantized(params, images) if bits else (params, {})
        params = jax.tree.map(jnp.copy, params)  # a step may donate its own
        return Weights(*self.model.split(params), scales)

    def begin(
        self, weights: Weights, batch_key: jax.Array, key: jax.Array
    ) -> TrainState:
        """The state before the first step.

        Args:
          weights: as `weights` prepares them.
          batch_key: PRNG key of the batches.
          key: PRNG key of the optimizer's state: of perturbations, for one.
        """
        # The state does not depend on the learning rate and the number of steps.
        optimizer = optimizers.make_optimizer(self.method, 0.0, 1, key)
        return TrainState(
            params=weights.trained,
            frozen=weights.frozen,
            opt_state=optimizer.init(weights.trained),
            scales=weights.scales,
            key=batch_key,
            count=jnp.int32(0),
        )

    def init(self, params: Any, images: jax.Array, seed: int) -> TrainState:
        """Prepares the weights and begins a run, all by one seed.

        Args:
          params: float parameters of the network.
          images: inputs of the network, to calibrate activations with.
          seed: of batches, perturbations and added leaves.
        """
        key = jax.random.key(seed)
        batch_key, z_key = jax.random.split(key)
        weights = self.weights(params, images, jax.random.fold_in(key, 0))
        return self.begin(weights, batch_key, z_key)

    def behind_frozen(
        self, trained: Any, frozen: Any, scales: Any, x: jax.Array
    ) -> jax.Array:
        """What the frozen stages at the beginning of the network make of an input.

        Args:
          trained: weights that train; only their names count.
          frozen: those that do not.
          scales: of activations.
          x: an input of the network.

        Returns:
          An input of the first stage that trains; ``x`` if that is the first of all, or
          if the learner does not skip what is frozen.
        """
        if not (cut := self._cut(trained)):
            return x
        return self.model.apply({"params": frozen, **scales}, x, stop=cut)

    def cached(
        self, state: TrainState, splits: Mapping[str, Split]
    ) -> Mapping[str, Split]:
        """Runs the frozen stages once for all steps, in batches and jitted.

        Args:
          state: of any step; what is frozen does not depend on it.
          splits: of images.

        Returns:
          Splits for `step` and `logits`, with the result of `behind_frozen` in the
          place of the images.
        """
        if not self._cut(state.params):
            return splits

        @jax.jit
        def apply(frozen: Any, scales: Any, x: jax.Array) -> jax.Array:
            return self.behind_frozen(state.params, frozen, scales, x)

        prefix = functools.partial(apply, state.frozen, state.scales)
        return {
            name: split._replace(
                images=jnp.asarray(features.batched(prefix, split.images))
            )
            for name, split in splits.items()
        }

    def step(
        self,
        state: TrainState,
        learning_rate: Any,
        steps: Any,
        data: Any,
        losses: jax.Array | None = None,
    ) -> TrainState:
        """Takes a step.

        Args:
          state: before it.
          learning_rate: of the first step of the run; it decays linearly to 0.
          steps: length of the run.
          data: what the objective draws the batch from.
          losses: [2, m] of a step of the gradient "forward" that was made before; it is
            made again, and ``data`` is not looked at.
        """
        optimizer = optimizers.make_optimizer(
            self.method, learning_rate, steps, state.key, self.spread
        )
        incoming: Any = state.params
        extra: dict[str, Any] = {}
        key = jax.random.fold_in(state.key, state.count)
        if losses is None:
            batch = self.objective.batch(key, data)
            extra = {"frozen": state.frozen, "scales": state.scales, "batch": batch}
        if losses is not None:
            extra = {"losses": losses}
        elif optimizers.differentiated(self.method):
            with self._sampled(jax.random.fold_in(key, 1)):
                incoming = jax.grad(self.loss_fn)(state.params, **extra)
            extra = {}
        else:  # the chain begins with a link that evaluates the loss
            extra["value_fn"] = self._value_fn
        updates, opt_state = optimizer.update(
            incoming, state.opt_state, state.params, **extra
        )
        return state._replace(
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            count=state.count + 1,
        )

    def _sampled(self, key: jax.Array) -> contextlib.AbstractContextManager[None]:
        """What keeps a part of the activations for a backward pass, or does nothing."""
        chosen = self.method.get("sampled", {})
        return sampled.products(key, **chosen) if chosen else contextlib.nullcontext()

    def outputs(self, params: Any, frozen: Any, scales: Any) -> Outputs:
        """The network at some weights, as a function of its input.

        Args:
          params: weights that train.
          frozen: those that do not.
          scales: of activations.
        """
        variables = {"params": adapt.merge(params, frozen), **scales}
        cut = self._cut(params)
        stages: dict[str, Any] = {"start": cut} if cut else {}
        if self.method.get("checkpoint", False):
            return functools.partial(self._checkpointed, variables, cut)
        return functools.partial(self.model.outputs, variables, **stages)

    def _checkpointed(
        self, variables: Any, cut: int, x: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The logits, of stages that keep nothing but their inputs for a gradient."""
        for index in range(cut, len(self.model.module.stages)):
            stage = functools.partial(self.model.apply, start=index, stop=index + 1)
            x = jax.checkpoint(stage)(variables, x)
        return x, {}

    def logits(self, state: TrainState, x: jax.Array) -> jax.Array:
        """What the network of a state says of an input, or of what stands for it.

        Args:
          state: of a run.
          x: images, or what `behind_frozen` makes of them.

        Returns:
          Float [examples, classes].
        """
        return self.outputs(state.params, state.frozen, state.scales)(x)[0]

    def losses_fn(self, params: Any, frozen: Any, scales: Any, batch: Any) -> Any:
        """The losses of a batch, as the objective gives them."""
        return self.objective.losses(self.outputs(params, frozen, scales), batch)

    def loss_fn(self, params: Any, frozen: Any, scales: Any, batch: Any) -> jax.Array:
        """The mean loss of a batch; with several kinds of losses the sum of means."""
        losses = jax.tree.leaves(self.losses_fn(params, frozen, scales, batch))
        return functools.reduce(jnp.add, [x.mean() for x in losses])

    def estimate(self, state: TrainState, key: jax.Array, batch: Any) -> Any:
        """An estimate of the gradient of `loss_fn` by a forward method's first link.

        Args:
          state: of a run, with what its synthetic gradients have learned so far.
          key: PRNG key of the perturbations.
          batch: examples of the estimate.
        """
        estimator = optimizers.make_estimator(
            self.method, key, optax.constant_schedule(1.0)
        )
        begun = estimator.init(state.params)
        if learned := optax.tree.get(state.opt_state, "jacobians", {}):
            begun = begun._replace(jacobians=learned)
        given = {"frozen": state.frozen, "scales": state.scales, "batch": batch}
        estimated, _ = estimator.update(
            state.params, begun, state.params, value_fn=self._value_fn, **given
        )
        return estimated

    @property
    def _value_fn(self) -> Callable[..., Any]:
        """What the first link evaluates: perturbed activities need every loss."""
        of_examples = self.method.gradient in ("activity", "joint")
        return self.losses_fn if of_examples else self.loss_fn

    @functools.cached_property
    def _quantized(self) -> Callable[..., tuple[Any, dict[str, Any]]]:
        """Compiled once for all runs."""
        return jax.jit(functools.partial(quantized, self.method, self.model))

    def _cut(self, trained: Any) -> int:
        """The stage at which the inputs enter the network."""
        return self.model.cut(trained) if self.skips_frozen else 0


def make_learner(
    method: ConfigDict,
    network: Callable[..., nn.Module],
    objective: Objective,
    *,
    skips_frozen: bool = False,
    spread: fgrad.Spread | None = None,
) -> Learner:
    """Applies a method to a network.

    Args:
      method: see ``configs/quickstart.py``.
      network: ``network(bits=...)`` gives the Flax module.
      objective: what to minimise.
      skips_frozen: see `Learner`; a method whose ``cache_frozen`` is set does as well.
      spread: see `Learner`.

    Raises:
      UsageError: for names that there are not, and for settings that contradict each
        other; see `check_method`.
    """
    check_method(method)
    bits = method.get("bits")
    module = network(bits=tuple(bits) if bits else None)
    model = adapt.make(module, method.get("adaptation", {}))
    skips_frozen = skips_frozen or method.get("cache_frozen", False)
    return Learner(method, model, objective, skips_frozen, spread)


def check_method(method: ConfigDict) -> None:
    """Makes sure that a method can be built, without a network.

    Args:
      method: see ``configs/quickstart.py``.

    Raises:
      UsageError: for names that there are not, and for frozen stages that are to run
        once on inputs that change in every step.
    """
    optimizers.check_method(method)
    adapt.check_way(method.get("adaptation", {}))
    augments = method.get("input_shift") or method.get("input_noise")
    if chosen := method.get("sampled", {}):
        sampled.check_settings(chosen)
        if method.gradient != "backward" or method.get("bits"):
            raise UsageError(
                "sampled keeps a part of the activations for a backward pass in "
                'float32: it needs gradient "backward" and no bits.'
            )
    adapter = method.get("adaptation", {}).get("adapter", {})
    if method.get("checkpoint", False) and adapter.get("local_heads", False):
        raise UsageError(
            "checkpoint keeps nothing of a stage but its input, and local_heads needs "
            "the logits of heads inside of stages; set one of them only."
        )
    if method.get("cache_frozen", False) and augments:
        raise UsageError(
            "cache_frozen keeps activations of images as they are, and input_shift or "
            "input_noise changes them in every step; set one of them only."
        )


def quantized(
    method: ConfigDict, model: adapt.Adapted, params: Any, images: jax.Array
) -> tuple[Any, dict[str, Any]]:
    """Parameters as integers, and the scales of activations.

    Args:
      method: one with ``bits``; with ``trained_bits`` the leaves that train have
        so many.
      model: of these bits.
      params: float.
      images: to calibrate the activations with.
    """
    settings = {
        "headroom": method.headroom,
        "zero_bound": method.zero_bound,
        "channel_axis": -1 if method.per_channel else None,
    }
    if trained_bits := method.get("trained_bits"):
        params = fgrad.quantize(
            params,
            trained_bits,
            where=lambda path, leaf: model.trains(tuple(path.split("/"))),
            **settings,
        )
    params = fgrad.quantize(params, method.bits[0], **settings)
    variables = layers.calibrate(
        model, {"params": params}, images, headroom=method.activation_headroom
    )
    return params, {layers.SCALES: variables[layers.SCALES]}
