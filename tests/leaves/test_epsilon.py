"""Epsilon per leaf: in its own units, unbiased, and refused where nothing moves."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fgrad
from fgrad import perturbations
from fgrad.leaves import Plan, Policy


def test_relative_epsilon_is_a_share_of_the_root_mean_square():
    params = {
        "big": jnp.array([30.0, -40.0]),
        "tiny": jnp.array([3e-2, -4e-2]),
        "zero": jnp.zeros(3),
        "grid": fgrad.quantize(jnp.array([3.0, -4.0])),
    }
    plan = Plan(params, Policy(fgrad.relative_epsilon(0.02, floor=0.01)))
    expected = {
        "big": 1250**0.5,
        "tiny": 1250**0.5 / 1e3,
        "zero": 0.01,
        "grid": 12.5**0.5,
    }
    for name, rms in expected.items():
        arithmetic = plan.arithmetic[f"['{name}']"]
        assert float(arithmetic.epsilon) == pytest.approx(0.02 * rms, rel=1e-4)


@pytest.mark.parametrize("channel_axis", [None, -1])
def test_step_epsilon_is_a_number_of_grid_steps(channel_axis):
    leaf = fgrad.quantize(
        jnp.array([[1.0, 10.0], [2.0, 30.0]]), 8, channel_axis=channel_axis
    )
    policy = Policy(fgrad.step_epsilon(3))
    (one,) = Plan(leaf, policy).arithmetic.values()
    steps = one.epsilon_in_steps()
    assert steps.shape == leaf.scale.shape
    np.testing.assert_allclose(steps, 3, rtol=1e-6)  # a quotient of float32
    # A move by a unit of z is that many whole steps, exactly.
    ones = jnp.full(leaf.shape, round(1 / one.step), jnp.int8)
    moved = one.perturbed(leaf.qvalue // 2, ones, 1)
    np.testing.assert_array_equal(moved - leaf.qvalue // 2, 3)
    with pytest.raises(TypeError, match="has none"):
        Plan(jnp.ones(2), policy)


@pytest.mark.parametrize("unit", ["relative", "schedule"])
def test_spsa_with_an_epsilon_per_leaf_is_unbiased(unit):
    params = {"a": jnp.array([100.0, -50.0]), "b": jnp.array([0.01, 0.02])}
    slope = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([300.0, 500.0])}

    def value_fn(p):
        return sum(jnp.vdot(p[name], slope[name]) for name in p)

    value = 0.01 if unit == "relative" else lambda count: 0.01 + 0 * count
    estimate = jax.jit(
        lambda p: (
            fgrad.estimators.forward_gradient(
                value_fn,
                p,
                jax.random.key(0),
                epsilon=fgrad.relative_epsilon(value),
                num_perturbations=20_000,
                perturbation=perturbations.rademacher(),
                estimator=fgrad.estimators.spsa,
                vectorize=1000,
            ).gradient
        )
    )(params)
    rms = {name: float(jnp.sqrt(jnp.mean(w**2))) for name, w in params.items()}
    for name in params:
        # The other leaf's slope is the noise, in the units of this one.
        total = sum(float(jnp.sum(slope[n] ** 2)) * rms[n] ** 2 for n in params)
        error = 5 * math.sqrt(total) / rms[name] / math.sqrt(20_000)
        assert np.max(np.abs(np.asarray(estimate[name] - slope[name]))) < error


MAKERS = {
    "epsilon": lambda value: fgrad.fixed_point_forward_grad(
        jax.random.key(0), epsilon=value
    ),
    "relative_epsilon": fgrad.relative_epsilon,
    "the floor of relative_epsilon": lambda value: fgrad.relative_epsilon(
        0.1, floor=value
    ),
    "step_epsilon": fgrad.step_epsilon,
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("value", [0, 0.0, -0.1, math.nan, math.inf, jnp.float32(-1)])
def test_an_epsilon_that_is_not_positive_and_finite_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, got"):
        MAKERS[name](value)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("value", ["x", None, True, [0.1], jnp.ones(2), 1j])
def test_an_epsilon_that_is_no_number_is_refused(name, value):
    message = f"{name} must be a number.*, got .* of type"
    with pytest.raises(TypeError, match=message):
        MAKERS[name](value)


@pytest.mark.parametrize("name", MAKERS)
def test_numbers_of_numpy_and_jax_are_numbers(name):
    for value in (1, 0.5, np.float32(0.5), np.float64(0.5), jnp.float32(0.5)):
        MAKERS[name](value)
    jax.jit(lambda value: MAKERS[name](value) and value)(0.5)


def test_an_epsilon_per_leaf_that_rounds_to_zero_raises():
    params = {"w": fgrad.quantize(jnp.array([1.0, -1.0]), 8)}
    tx = fgrad.fixed_point_forward_grad(
        jax.random.key(0), epsilon=fgrad.relative_epsilon(1e-3)
    )
    with pytest.raises(ValueError, match="rounds to zero on the grid"):
        tx.init(params)
