"""What is compared: inference, and ways to train, each compiled as one program.

Training programs are whole steps whose weights and state are donated, as in a training
loop; gradients are what a step is made of, without the update.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import fgrad
from experiments.benchmarks.measure import Program
from experiments.benchmarks.problem import Problem
from experiments.models import sampled
from fgrad import fixed_point, perturbations

LEARNING_RATE = 1e-4
EPSILON = 1e-3


def inference(problem: Problem) -> Program:
    """The loss of the batch, which is what all else is compared with."""
    return Program(
        lambda params, data: problem.loss_fn(params, **data),
        problem.params,
        problem.data,
    )


def forward_step(
    problem: Problem,
    num_perturbations: int = 1,
    *,
    vectorize: int = 1,
    perturbation: perturbations.Perturbation | None = None,
) -> Program:
    """A step of ``fgrad.qzo_ff``; see there for the arguments."""
    tx = fgrad.qzo_ff(
        LEARNING_RATE,
        jax.random.key(2),
        epsilon=EPSILON,
        num_perturbations=num_perturbations,
        vectorize=vectorize,
        perturbation=perturbation,
    )

    return step(problem, tx)


def step(problem: Problem, tx: optax.GradientTransformationExtraArgs) -> Program:
    """A step of an optimizer that estimates gradients from the loss."""

    def step(carry: Any, data: Any) -> Any:
        params, state = carry
        # The incoming updates are ignored, so anything of their shape will do.
        updates, state = tx.update(
            params, state, params, value_fn=problem.loss_fn, **data
        )
        return optax.apply_updates(params, updates), state

    carry = (problem.params, tx.init(problem.params))
    return Program(step, carry, problem.data, carries=True)


def sparse_step(problem: Problem, density: float) -> Program:
    """A step of ``fgrad.qzo_ff`` that trains a share of the weights."""
    inner = fgrad.qzo_ff(
        LEARNING_RATE, jax.random.key(2), epsilon=EPSILON, num_perturbations=1
    )
    return step(problem, fgrad.enhancements.sparse_update(inner, density=density))


def low_rank_step(problem: Problem, pairs: int) -> Program:
    """A step of ``fgrad.qzo_ff`` with all its rank-1 perturbations at once."""
    return forward_step(
        problem, pairs, vectorize=pairs, perturbation=perturbations.low_rank(1)
    )


def low_rank_gradient(problem: Problem, pairs: int) -> Program:
    """The gradient that `low_rank_step` follows."""

    def gradient(params: Any, data: Any) -> Any:
        return fgrad.estimators.forward_gradient(
            problem.loss_fn,
            params,
            jax.random.key(2),
            epsilon=EPSILON,
            num_perturbations=pairs,
            vectorize=pairs,
            perturbation=perturbations.low_rank(1),
            kwargs=data,
        ).gradient

    return Program(gradient, problem.params, problem.data)


def backprop_step(problem: Problem, share: float = 1.0) -> Program:
    """A step of SGD on the gradient of the loss, by optax.

    Args:
      problem: what is trained.
      share: of the rows of each product's input that the backward pass keeps; less than
        all by winner-take-all sampling (`experiments.models.sampled`).
    """
    tx = optax.sgd(LEARNING_RATE)
    how = jax.random.key(2), share, "winner_take_all"

    def step(carry: Any, data: Any) -> Any:
        params, state = carry
        with sampled.products(*how) if share < 1 else contextlib.nullcontext():
            gradient = jax.grad(problem.loss_fn)(params, **data)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    carry = (problem.params, tx.init(problem.params))
    return Program(step, carry, problem.data, carries=True)


def vmap_step(problem: Problem, pairs: int) -> Program:
    """A step of sign-m-SPSA as one would write it by hand: `jax.vmap` over weights."""
    gradient_fn = _vmap_gradient_fn(problem, pairs)

    def step(carry: Any, data: Any) -> Any:
        params, key = carry
        key, z_key = jax.random.split(key)
        gradient = gradient_fn(params, z_key, data)
        return _moved(params, gradient, -LEARNING_RATE), key

    carry = (problem.params, jax.random.key(2))
    return Program(step, carry, problem.data, carries=True)


def vmap_gradient(problem: Problem, pairs: int) -> Program:
    """The gradient that `vmap_step` follows."""
    return Program(
        _vmap_gradient_fn(problem, pairs),
        problem.params,
        jax.random.key(2),
        problem.data,
    )


def _vmap_gradient_fn(problem: Problem, pairs: int) -> Callable[..., Any]:
    """``gradient(params, key, data)`` from `pairs` stored z and as many pairs of w."""

    def normal(key: jax.Array, params: Any) -> Any:
        return optax.tree.random_like(key, fgrad.dequantize(params))

    def gradient(params: Any, key: jax.Array, data: Any) -> Any:
        z = jax.vmap(normal, (0, None))(jax.random.split(key, pairs), params)

        def evaluate(epsilon: jax.Array, z: Any) -> jax.Array:
            return problem.loss_fn(_moved(params, z, epsilon), **data)

        signs = jnp.array([EPSILON, -EPSILON])
        all_pairs = jax.vmap(jax.vmap(evaluate, (None, 0)), (0, None))
        plus, minus = all_pairs(signs, z)
        coefficients = jnp.sign(plus - minus) / pairs
        return jax.tree.map(lambda z: jnp.tensordot(coefficients, z, 1), z)

    return gradient


def _moved(params: Any, direction: Any, scale: Any) -> Any:
    """``params + scale * direction``, each leaf on its own grid if it has one."""

    def leaf_fn(leaf: Any, direction: jax.Array) -> Any:
        value = jnp.asarray(leaf) + scale * direction
        if fixed_point.is_qtensor(leaf):
            return fixed_point.quantize_to_scale(value, leaf.scale, leaf.bits)
        return value.astype(jnp.result_type(leaf))

    return jax.tree.map(leaf_fn, params, direction, is_leaf=fixed_point.is_qtensor)
