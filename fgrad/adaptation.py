"""The best known method in one call: all layers of a network, by forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import optax

from fgrad import _checks, _loss_and_aux, activity
from fgrad.activity import joint_structure
from fgrad.transform import on_values, quantized_update

# What Prodigy begins with. Its own 1e-6 is less than half a step of most grids of 16
# bits, on which weights would stay where they are, and nothing be learned of the rate.
_FIRST_RATE = 1e-4


def adapt(
    key: jax.Array,
    value_fn: Callable[..., Any],
    params: Any,
    batch: Mapping[str, Any],
    *,
    steps: int = 720,
    learning_rate: float | Literal["auto"] = 3e-3,
    head: str | Sequence[str] | None = None,
    frozen: Sequence[str] = (),
    every: int = 8,
    correction: float | Literal["auto"] = 0.0,
    on_the_way: bool = False,
    has_aux: bool = False,
    initial_aux: Any = (),
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that adapts all layers of a network with forward passes alone.

    It is the chain of `fgrad.activity.joint_forward_grad`, Adam with a rate that decays
    linearly to zero, and `quantized_update`. The loss is traced, not run: from the
    trace come the head (the last layer before the loss), the activations of all other
    layers and their shapes. Where skip connections lead from layer to layer, as in a
    transformer, the gradient at their end is handed down along them (``residual``).
    Elsewhere joint pairs teach the feedback: 720 steps cost 900 evaluations of the
    network, and 720 times the products of the weights' gradients.

    Args:
      key: PRNG key, the only source of randomness.
      value_fn: ``value_fn(params, **batch)`` gives a loss for each example.
      params: pytree of float arrays and `QTensor`; only the shapes count.
      batch: the other arguments of ``value_fn``, such as ``{"x": x, "y": y}``: arrays,
        or `jax.ShapeDtypeStruct` in their place.
      steps: after so many the learning rate is zero.
      learning_rate: of the first step. "auto" finds it during the run, by Prodigy
        (``optax.contrib.prodigy``) in the place of Adam: from how far the weights went
        and how the gradients lay to that way. It keeps four numbers for each weight,
        where Adam keeps two.
      head: names of the layer of the logits; found by default.
      frozen: names of layers to leave as they are.
      every: a pair of evaluations is made in every n-th step.
      correction: as in `fgrad.activity.joint_forward_grad`.
      on_the_way: whether to save memory for one more pass in each step.
      has_aux: whether ``value_fn`` returns ``(losses, aux)``, where aux is a pytree of
        arrays, such as metrics or the statistics of a batch. ``optax.tree.get(state,
        "aux")`` is that of the last step, of the evaluation in which nothing is
        perturbed.
      initial_aux: the aux before the first step, as in `fixed_point_forward_grad`.

    Returns:
      A transformation whose ``update`` takes ``value_fn`` and the entries of the batch
      by their names. The incoming updates do not count.

    Raises:
      TypeError, ValueError: for bad options; for layers that cannot be followed, by
        name; for a head that is not found.

    Example:
      >>> import jax.numpy as jnp
      >>> def losses(params, x, y):  # one for each example
      ...     hidden = jax.nn.relu(x @ params["hidden"])
      ...     return jnp.sum((hidden @ params["head"] - y) ** 2, axis=-1)
      >>> x = jax.random.normal(jax.random.key(1), (32, 3))
      >>> y = jnp.abs(x[:, :1])
      >>> hidden = jax.random.normal(jax.random.key(2), (3, 16)) / 2
      >>> params = {"hidden": hidden, "head": jnp.zeros((16, 1))}
      >>> tx = adapt(jax.random.key(0), losses, params, {"x": x, "y": y})
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params, value_fn=losses, x=x, y=y)
      >>> params = optax.apply_updates(params, updates)
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}.")
    _loss_and_aux.Aux.of(has_aux, initial_aux)
    optimizer = _optimizer(learning_rate, steps)
    logits, sites = joint_structure.find_head(
        value_fn, params, batch, head=head, frozen=frozen
    )
    if sites:
        estimator = activity.joint_forward_grad(
            key,
            logits,
            sites,
            every=every,
            correction=correction,
            transposed_head=True,
            residual=joint_structure.has_stream(value_fn, params, logits, sites, batch),
            on_the_way=on_the_way,
            activations=activity.explain_joint(
                value_fn, params, logits, sites, **batch
            ),
            has_aux=has_aux,
            initial_aux=initial_aux,
        )
    else:  # the head is all there is, and exact
        estimator = activity.activity_forward_grad(
            key,
            [activity.Site(*logits, exact=True)],
            has_aux=has_aux,
            initial_aux=initial_aux,
        )
    return optax.chain(
        estimator,
        on_values(optimizer),
        quantized_update(stochastic_below=16),
    )


def _optimizer(
    learning_rate: float | Literal["auto"], steps: int
) -> optax.GradientTransformation:
    """Adam with a rate, or what finds the rate; either decays linearly to zero."""
    if isinstance(learning_rate, str) and learning_rate == "auto":
        decay = optax.linear_schedule(1.0, 0.0, steps)
        return optax.contrib.prodigy(decay, estim_lr0=_FIRST_RATE)
    _checks.at_least("learning_rate", learning_rate, 0, hint='; or give "auto"')
    return optax.adam(optax.linear_schedule(learning_rate, 0.0, steps))
