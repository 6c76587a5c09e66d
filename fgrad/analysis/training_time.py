r"""How many steps a training will take, predicted before it begins.

Near the weights w₀ of a pre-trained network its outputs are nearly linear in the
weights. How the outputs move then depends on the products J Jᵀ of their Jacobian alone,
and forward passes along k random directions z, the columns of Z, measure those:

.. math:: S = \frac{1}{\sqrt k} J Z, \quad E[S S^T] = J J^T, \quad
  J z ≈ \frac{f(w_0 + εz) - f(w_0 - εz)}{2ε} .

So a model of k numbers α with the outputs f(w₀) + S α trains as the network does: to
first order, by gradient descent and by forward gradients alike, and in a fraction of
the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fgrad import perturbations
from fgrad.evaluation import evaluate_examples
from fgrad.leaves import LeafEpsilon, Mask, Plan, Policy
from fgrad.tracing.promotion import usual_rules


class LinearModel(NamedTuple):
    """A network near its weights, as a linear model of k numbers.

    Attributes:
      outputs: float32 [examples, ...], of the network at its weights.
      slopes: float32 [k, examples, ...], S.
    """

    outputs: jax.Array
    slopes: jax.Array

    def __call__(self, coefficients: jax.Array) -> jax.Array:
        """The outputs [examples, ...] at the coefficients α [k]."""
        moved = jnp.tensordot(coefficients, self.slopes, axes=1, precision="highest")
        return self.outputs + moved


@usual_rules
def linear_model(
    apply_fn: Callable[..., jax.Array],
    params: Any,
    key: jax.Array,
    *,
    num_directions: int = 64,
    epsilon: float = 1e-2,
    perturbation: perturbations.Perturbation | None = None,
    mask: Mask = None,
    vectorize: int = 1,
    **kwargs: Any,
) -> LinearModel:
    r"""Measures how the outputs of a network depend on its weights, by forward passes.

    .. math:: S_k = \frac{f(w + εz_k) - f(w - εz_k)}{2ε \sqrt K}

    Args:
      apply_fn: ``apply_fn(params, **kwargs)`` gives outputs [examples, ...], such as
        logits.
      params: pytree of float arrays and `QTensor`.
      key: addresses the directions.
      num_directions: K; it costs 2K forward passes over the examples, and the memory of
        as many outputs. The more of them, the nearer S Sᵀ comes to J Jᵀ.
      epsilon: ε in units of the weights.
      perturbation: where the directions come from; ``perturbations.normal()`` by
        default.
      mask: leaves to train, as in `fgrad.dual_forward`.
      vectorize: how many directions are evaluated at once.
      **kwargs: passed to ``apply_fn``: the examples.

    Returns:
      A `LinearModel`.

    Raises:
      TypeError: for an epsilon of each leaf.

    Example:
      >>> def apply_fn(w, x):
      ...     return x @ w
      >>> w, x = jnp.ones((2, 1)), jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 2.0]])
      >>> model = linear_model(apply_fn, w, jax.random.key(0), num_directions=4000, x=x)
      >>> s = model.slopes.reshape(4000, 3)
      >>> jnp.round(s.T @ s) + 0  # x xᵀ
      Array([[1., 0., 1.],
             [0., 4., 4.],
             [1., 4., 5.]], dtype=float32)

    Reference:
      Zancato et al., "Predicting training time without training", NeurIPS 2020 (arXiv
      2008.12478).
    """
    if isinstance(epsilon, LeafEpsilon):
        raise TypeError(f"epsilon must be a number, got {epsilon.name}.")
    source = perturbations.normal() if perturbation is None else perturbation
    plan = Plan(params, Policy(epsilon, num_directions, source), mask=mask)
    outputs = apply_fn(params, **kwargs)

    def flat_fn(params: Any) -> jax.Array:
        return apply_fn(params, **kwargs).astype(jnp.float32).reshape(-1)

    plus, minus = evaluate_examples(flat_fn, plan, plan.keys(key), vectorize=vectorize)
    slopes = (plus - minus) / (2 * plan.epsilon * jnp.sqrt(jnp.float32(num_directions)))
    shape = (num_directions, *jnp.shape(outputs))
    return LinearModel(outputs.astype(jnp.float32), slopes.reshape(shape))


def predicted_losses(
    model: LinearModel,
    loss_fn: Callable[[jax.Array, Any], jax.Array],
    targets: Any,
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    steps: int,
    batch_size: int | None = None,
) -> jax.Array:
    """The losses of a training, predicted by that of the linear model.

    Args:
      model: from `linear_model`.
      loss_fn: ``loss_fn(outputs, targets)`` gives the mean loss of some examples.
      targets: pytree of arrays [examples, ...], such as labels.
      tx: how the network will be trained: SGD, with momentum or without, by a chain of
        optax, or one that begins with ``fgrad.fixed_point_forward_grad``, whose epsilon
        and m are those of the network's training. What treats each weight by its own
        history, such as Adam, means something else for the coefficients.
      key: of the batches.
      steps: how many are predicted.
      batch_size: examples of a batch, drawn with replacement; all by default.

    Returns:
      float32 [steps + 1], the mean loss of all examples before each step and at the
      end.

    Example:
      >>> model = LinearModel(jnp.zeros((1, 1)), jnp.ones((1, 1, 1)))
      >>> losses = predicted_losses(
      ...     model,
      ...     lambda y, targets: jnp.mean((y - targets) ** 2),
      ...     jnp.ones((1, 1)),
      ...     optax.sgd(0.25),
      ...     jax.random.key(0),
      ...     steps=2,
      ... )
      >>> losses  # the error is halved by each step
      Array([1.    , 0.25  , 0.0625], dtype=float32)
    """
    examples = len(model.outputs)
    chain = optax.with_extra_args_support(tx)

    def batch_loss(coefficients: jax.Array, index: jax.Array) -> jax.Array:
        some = LinearModel(model.outputs[index], model.slopes[:, index])
        return loss_fn(some(coefficients), jax.tree.map(lambda t: t[index], targets))

    def step(carry: Any, step_key: jax.Array) -> Any:
        coefficients, state = carry
        index = jnp.arange(examples)
        if batch_size is not None:
            index = jax.random.randint(step_key, (batch_size,), 0, examples)
        value_fn = functools.partial(batch_loss, index=index)
        # What is not used, as before an estimator, is not computed.
        gradient = jax.grad(value_fn)(coefficients)
        updates, state = chain.update(gradient, state, coefficients, value_fn=value_fn)
        coefficients = optax.apply_updates(coefficients, updates)
        return (coefficients, state), loss_fn(model(coefficients), targets)

    start = jnp.zeros(len(model.slopes), jnp.float32)
    keys = jax.random.split(key, steps)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[1])
    losses = run((start, chain.init(start)))
    return jnp.concatenate([loss_fn(model(start), targets)[None], losses])


def steps_to_reach(losses: jax.Array, target: float) -> int | None:
    """The first step before which a loss is at most the target; None if there is none.

    Args:
      losses: [steps + 1], from `predicted_losses` or of a run.
      target: the loss to reach.

    Example:
      >>> steps_to_reach(jnp.array([3.0, 2.0, 1.5, 0.9]), 1.5)
      2
    """
    reached = jnp.asarray(losses) <= target
    return int(jnp.argmax(reached)) if bool(jnp.any(reached)) else None
