"""Ways to train a network: backpropagation or forward gradients, float or fixed point.

A method is a `ConfigDict` (see ``configs/quickstart.py``) that becomes a `Learner`:
pure functions that start a run, take a step and predict. The learning rate
and the number of steps are arguments of the step, so one compilation serves all runs.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

import fgrad
from experiments import adapt, features
from experiments.data.arrays import Split
from experiments.learners.optimizers import forward_passes, make_estimator, make_optimizer
from fgrad import layers


class TrainState(NamedTuple):
    """State of a run.

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


class Learner(NamedTuple):
    """A method applied to a network.

    Attributes:
      init: ``init(params, calibration_images, seed) -> TrainState`` from float params.
      cached: ``cached(state, splits) -> splits``, in which the activations behind the
        frozen part of the network are in the place of images if the method keeps them;
        for `step` and `logits`.
      step: ``step(state, learning_rate, steps, split) -> TrainState``; not jitted.
      logits: ``logits(state, images) -> `` [examples, classes]; jitted.
      loss_fn: ``loss_fn(trained, frozen, scales, batch)``, the mean over the batch; of
        the network's loss and local ones the sum.
      estimate: ``estimate(state, key, batch)``, an estimate of its gradient by the
        forward method's first link, with what its synthetic gradients have learned.
      passes_per_step: forward passes of a step; a backward pass counts as two.
    """

    init: Callable[[Any, jax.Array, int], TrainState]
    cached: Callable[[TrainState, Mapping[str, Split]], Mapping[str, Split]]
    step: Callable[[TrainState, jax.Array, jax.Array, Split], TrainState]
    logits: Callable[[TrainState, jax.Array], jax.Array]
    loss_fn: Callable[[Any, Any, Any, Split], jax.Array]
    estimate: Callable[[TrainState, jax.Array, Split], Any]
    passes_per_step: int


def make_learner(method: ConfigDict, network: Callable[..., nn.Module]) -> Learner:
    """Builds the functions of a method.

    Args:
      method: see ``configs/quickstart.py``.
      network: ``network(bits=...)`` gives the Flax module.
    """
    if method.gradient not in ("backward", "forward", "activity"):
        raise ValueError(
            'gradient must be "backward", "forward" or "activity", got '
            f"{method.gradient!r}."
        )
    bits = method.get("bits")
    way = method.get("adaptation", {})
    model = adapt.make(network(bits=tuple(bits) if bits else None), way)
    cache = method.get("cache_frozen", False)
    if cache and (method.get("input_shift") or method.get("input_noise")):
        raise ValueError(
            "cache_frozen keeps activations of images as they are, and input_shift or "
            "input_noise changes them in every step; set one of them only."
        )

    def outputs(
        trained: Any, frozen: Any, scales: Any, x: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits of images, or of what is cached; those of local heads."""
        cut = model.cut(trained) if cache else 0
        stages = {"start": cut} if cut else {}
        params = adapt.merge(trained, frozen)
        return model.outputs({"params": params, **scales}, x, **stages)

    def losses_fn(params: Any, frozen: Any, scales: Any, batch: Split) -> Any:
        logits, local = outputs(params, frozen, scales, batch.images)
        labels = jax.nn.one_hot(batch.labels, logits.shape[-1])
        labels = optax.smooth_labels(labels, method.get("label_smoothing", 0.0))
        losses = functools.partial(optax.softmax_cross_entropy, labels=labels)
        if not local:
            return losses(logits)
        return {"network": losses(logits), **jax.tree.map(losses, local)}

    def loss_fn(params: Any, frozen: Any, scales: Any, batch: Split) -> jax.Array:
        losses = jax.tree.leaves(losses_fn(params, frozen, scales, batch))
        return functools.reduce(jnp.add, [x.mean() for x in losses])

    quantize = jax.jit(functools.partial(quantized, method, model))

    def init(params: Any, images: jax.Array, seed: int) -> TrainState:
        key = jax.random.key(seed)
        batch_key, z_key = jax.random.split(key)
        params = model.begin(params, jax.random.fold_in(key, 0), images[:1])
        params, scales = quantize(params, images) if bits else (params, {})
        params = jax.tree.map(jnp.copy, params)  # the step donates its own
        trained, frozen = model.split(params)
        opt_state = make_optimizer(method, 0.0, 1, z_key).init(trained)
        return TrainState(trained, frozen, opt_state, scales, batch_key, jnp.int32(0))

    def cached(state: TrainState, splits: Mapping[str, Split]) -> Mapping[str, Split]:
        if not (cut := model.cut(state.params) if cache else 0):
            return splits
        variables = {"params": state.frozen, **state.scales}
        apply = jax.jit(functools.partial(model.apply, stop=cut))
        prefix = functools.partial(apply, variables)
        return {
            name: split._replace(
                images=jnp.asarray(features.batched(prefix, split.images))
            )
            for name, split in splits.items()
        }

    def estimate(state: TrainState, key: jax.Array, batch: Split) -> Any:
        tx = make_estimator(method, key, optax.constant_schedule(1.0))
        value_fn = losses_fn if method.gradient == "activity" else loss_fn
        given = {"frozen": state.frozen, "scales": state.scales, "batch": batch}
        begun = tx.init(state.params)
        if learned := optax.tree.get(state.opt_state, "jacobians", {}):
            begun = begun._replace(jacobians=learned)
        return tx.update(state.params, begun, state.params, value_fn=value_fn, **given)[
            0
        ]

    def step(
        state: TrainState, learning_rate: jax.Array, steps: jax.Array, split: Split
    ) -> TrainState:
        batch = _sample(method, jax.random.fold_in(state.key, state.count), split)
        tx = make_optimizer(method, learning_rate, steps, state.key)
        if method.gradient == "backward":
            gradient = jax.grad(loss_fn)(
                state.params, state.frozen, state.scales, batch
            )
            updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        else:
            updates, opt_state = tx.update(
                state.params,
                state.opt_state,
                state.params,
                value_fn=losses_fn if method.gradient == "activity" else loss_fn,
                frozen=state.frozen,
                scales=state.scales,
                batch=batch,
            )
        return state._replace(
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            count=state.count + 1,
        )

    @jax.jit
    def logits(state: TrainState, images: jax.Array) -> jax.Array:
        return outputs(state.params, state.frozen, state.scales, images)[0]

    return Learner(
        init, cached, step, logits, loss_fn, estimate, forward_passes(method)
    )


def quantized(
    method: ConfigDict, model: adapt.Adapted, params: Any, images: jax.Array
) -> tuple[Any, dict[str, Any]]:
    """Parameters as integers, and the scales of activations.

    Args:
      method: one with ``bits``.
      model: of these bits.
      params: float.
      images: to calibrate the activations with.
    """
    params = fgrad.quantize(
        params,
        bits=method.bits[0],
        headroom=method.headroom,
        zero_bound=method.zero_bound,
        channel_axis=-1 if method.per_channel else None,
    )
    variables = layers.calibrate(
        model, {"params": params}, images, headroom=method.activation_headroom
    )
    return params, {layers.SCALES: variables[layers.SCALES]}


def _sample(method: ConfigDict, key: jax.Array, split: Split) -> Split:
    """A batch drawn with replacement, augmented as the method asks."""
    index_key, *keys = jax.random.split(key, 3)
    size = (method.batch_size,)
    indices = jax.random.randint(index_key, size, 0, split.labels.shape[0])
    return Split(augmented(method, keys, split.images[indices]), split.labels[indices])


def augmented(
    method: ConfigDict, keys: Sequence[jax.Array], images: jax.Array
) -> jax.Array:
    """Images that are shifted and noisy, as far as the method says.

    Args:
      method: with ``input_shift`` and ``input_noise``; see ``configs/quickstart.py``.
      keys: of the shifts and of the noise.
      images: [examples, height, width, channels].
    """
    shift_key, noise_key = keys
    if shift := method.get("input_shift", 0):
        size = (len(images), 2)
        offsets = jax.random.randint(shift_key, size, -shift, shift + 1)
        images = jax.vmap(_translate)(images, offsets)
    if noise := method.get("input_noise", 0.0):
        images += noise * jax.random.normal(noise_key, images.shape)
    return images


def _translate(image: jax.Array, offset: jax.Array) -> jax.Array:
    """Moves an image [height, width, channels] by whole pixels; zeros come in."""
    height, width, _ = image.shape
    padded = jnp.pad(image, ((height, height), (width, width), (0, 0)))
    start = (height - offset[0], width - offset[1], 0)
    return jax.lax.dynamic_slice(padded, start, image.shape)
