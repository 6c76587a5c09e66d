"""Gradients at activations and of leaves against the formulas of their estimates."""

import functools

import jax
import numpy as np
import pytest
from noisy_network import EXAMPLES, example_losses, network, params_and_data

from fgrad import estimators, perturbations
from fgrad.activity.site_gradients import Directions, site_gradient

KEY = jax.random.key(5)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("vectorize", [1, 3, 8])
@pytest.mark.parametrize("estimator", [estimators.spsa, estimators.sign_m_spsa])
def test_random_directions_make_the_gradient_of_the_formula(vectorize, estimator):
    """``1/(K rms B) Σₖ cₖ uₖ`` at the output, and from there the layer's transpose."""
    params, x = params_and_data()
    losses, (site,) = example_losses(["second"], loss="deep", epsilon=0.2)
    count, z = 5, perturbations.rademacher()
    step_key = functools.partial(perturbations.sample_key, KEY, 7)
    found = site_gradient(
        losses, site, Directions(step_key, count, z, estimator, vectorize)
    )
    _, activations = network(params, x, {})
    h = np.asarray(activations["second"])
    rms = np.sqrt(np.mean(h**2))
    dy, total = np.zeros_like(h), []
    for i in range(count):
        key = perturbations.sample_key(KEY, 7, i)
        key = perturbations.leaf_keys(key, ["second"])["second"]
        u = z.step * np.asarray(z.sample(key, h.shape), float)
        sides = [
            np.asarray(network(params, x, {"second": s * 0.2 * rms * u})[0]["deep"])
            for s in (1, -1)
        ]
        c = sides[0] - sides[1]
        c = np.sign(c) if estimator is estimators.sign_m_spsa else c / 0.4
        dy += c[:, None] * u / (count * rms * EXAMPLES)
        total += sides
    # The coefficients of SPSA are float32.
    np.testing.assert_allclose(next(iter(found.dy.values())), dy, rtol=1e-5, atol=1e-7)
    expected = np.tanh(np.asarray(activations["first"])).T @ dy
    np.testing.assert_allclose(found.gradients["second"], expected, rtol=1e-5)
    assert float(found.loss) == pytest.approx(np.mean(total), rel=1e-5)
    assert (found.loss_name, int(found.nonfinite_pairs)) == ("deep", 0)
    assert found.jacobian is None


def test_an_exact_site_takes_central_differences_along_each_coordinate():
    params, x = params_and_data()
    losses, (site,) = example_losses(["head"], loss="deep", exact=True, epsilon=0.1)
    step_key = functools.partial(perturbations.sample_key, KEY, 0)
    z = perturbations.rademacher()
    found = site_gradient(losses, site, Directions(step_key, 1, z, estimators.spsa, 1))
    y = np.asarray(network(params, x, {})[1]["head"])
    # Of y³: 3y² + ε².
    expected = (3 * y**2 + 0.1**2) / EXAMPLES
    np.testing.assert_allclose(next(iter(found.dy.values())), expected, rtol=1e-9)
