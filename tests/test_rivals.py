"""Estimators of others, by what their papers say of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.configs import rivals as config
from experiments.learners import optimizers, rivals
from fgrad import perturbations

SLOPE = jnp.arange(1.0, 9.0)


def linear(params, frozen):
    return 3 + jnp.sum(SLOPE * params["w"]) + frozen


def test_one_sided_differences_share_a_base_and_are_over_the_deviation():
    tx = rivals.one_sided(
        jax.random.key(0), 64, epsilon=1.0, perturbation=perturbations.normal()
    )
    params = {"w": jnp.zeros(8)}
    gradient, state = tx.update(
        params, tx.init(params), params, value_fn=linear, frozen=2.0
    )
    plus, base = np.asarray(state.losses)
    np.testing.assert_array_equal(base, 5.0)
    # On a linear loss L(w + εz) = 5 + ε slope · z, whose deviation is ε |slope|, so
    # that the estimate tends to the slope over its length.
    np.testing.assert_allclose(plus.std(), np.linalg.norm(SLOPE), rtol=0.3)
    unit = SLOPE / jnp.linalg.norm(SLOPE)
    assert abs(float(jnp.sum(gradient["w"] * unit)) - 1) < 0.5
    cosine = jnp.sum(gradient["w"] * unit) / jnp.linalg.norm(gradient["w"])
    assert cosine > 0.8  # √(m / (m + n)) = .94


def test_equal_losses_make_no_step():
    np.testing.assert_array_equal(
        rivals.over_deviation(jnp.ones(3), jnp.zeros(3), 1e-3), np.zeros(3)
    )


def test_directions_lie_in_a_cone_around_the_momentum():
    guide, rng = rivals.Cone(angle=1.0), np.random.default_rng(0)
    state = guide.init({"w": jnp.zeros(4000)}, {"w": True})
    momentum = np.zeros(4000)
    for _ in range(3):
        found = rng.normal(size=4000)
        momentum = 0.95 * momentum + 0.05 * found
        state = guide.advance(state, {"w": jnp.asarray(found, jnp.float32)}, ["['w']"])
    noise = jnp.asarray(np.clip(np.rint(rng.normal(size=4000) * 32), -127, 127))
    guidance = guide.at(state, jnp.int32(3), ["['w']"])
    z = guidance.mix(noise.astype(jnp.int8), guidance.directions["['w']"], 2.0**-5)
    z = np.asarray(z) / 32
    cosine = z @ momentum / np.linalg.norm(z) / np.linalg.norm(momentum)
    np.testing.assert_allclose(cosine, np.cos(1.0), atol=0.05)
    first = guide.at(state, jnp.int32(0), ["['w']"])
    assert (float(first.noise), float(first.pull)) == (1.0, 0.0)


def test_muon_takes_steps_of_equal_singular_values():
    params = {"kernel": jnp.zeros((3, 3, 2, 8)), "bias": jnp.zeros(8)}
    gradient = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(1), x.shape), params
    )
    tx = rivals.muon(1.0)
    updates, _ = tx.update(gradient, tx.init(params), params)
    values = np.linalg.svd(updates["kernel"].reshape(18, 8), compute_uv=False)
    assert values.max() / values.min() < 2
    given = np.linalg.svd(gradient["kernel"].reshape(18, 8), compute_uv=False)
    assert given.max() / given.min() > 3
    assert optax.tree.norm(updates["bias"]) > 0


@pytest.mark.parametrize("variant", ["full", "mnist"])
def test_all_methods_have_the_same_passes(variant):
    methods = config.get_config(variant).methods
    passes = {
        name: method.steps * optimizers.forward_passes(method)
        for name, method in methods.items()
    }
    assert set(passes.values()) == {22_400}
