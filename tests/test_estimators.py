import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fgrad
from fgrad import estimators, perturbations


def coefficients(differences):
    zeros = jnp.zeros(len(differences))
    return estimators.normalized_spsa(jnp.asarray(differences), zeros, 1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_normalized_coefficients_have_unit_mean_square_whatever_the_loss(scale):
    d = np.random.default_rng(0).normal(size=16)
    expected = d / np.sqrt(np.mean(d**2))
    found = coefficients((d * scale).astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_normalized_coefficients_leave_out_what_is_not_finite():
    found = coefficients([3.0, np.nan, 4.0, np.inf])
    expected = np.array([3.0, 0.0, 4.0, 0.0]) / np.sqrt((9 + 16) / 2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(coefficients([0.0, 0.0]), 0)
    np.testing.assert_array_equal(coefficients([np.nan, np.nan]), 0)


@pytest.mark.parametrize("difference", [2.5, -1e-20, 0.0])
def test_one_normalized_difference_is_its_sign(difference):
    assert coefficients([difference])[0] == np.sign(difference)


@pytest.mark.parametrize("bits", [None, 16])
@pytest.mark.parametrize("vectorize", [1, 4])
def test_a_normalized_gradient_is_the_weighted_mean_of_z(bits, vectorize):
    rng = np.random.default_rng(1)
    target = jnp.asarray(rng.normal(size=6), jnp.float32)

    def loss_fn(w):
        return jnp.sum((jnp.asarray(w) - target) ** 2)

    w = jnp.asarray(rng.normal(size=6), jnp.float32)
    params = fgrad.quantize(w, bits=bits) if bits else w
    key, m = jax.random.key(3), 4
    gradient = estimators.forward_gradient(
        loss_fn,
        params,
        key,
        epsilon=1e-2,
        num_perturbations=m,
        vectorize=vectorize,
        estimator=estimators.normalized_spsa,
    ).gradient
    perturbation = perturbations.normal()
    total, differences, zs = np.zeros(6), [], []
    for i in range(m):
        z_key = perturbations.sample_key(key, 0, i)
        plus, minus = fgrad.dual_forward(loss_fn, params, z_key, 1e-2)
        leaf_key = perturbations.leaf_keys(z_key, [""])[""]
        z = np.asarray(perturbation.sample(leaf_key, (6,)), np.float64)
        zs.append(z * perturbation.step)
        differences.append(float(plus) - float(minus))
    c = np.array(differences) / np.sqrt(np.mean(np.square(differences)))
    total = sum(ci * z for ci, z in zip(c, zs, strict=True)) / m
    found = gradient.qvalue if bits else gradient
    np.testing.assert_allclose(found, total, rtol=1e-3, atol=1e-5)
