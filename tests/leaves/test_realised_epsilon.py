"""SPSA is unbiased where rounding makes another perturbation of εz."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fgrad
from fgrad import estimators

SLOPE = {"a": 2.0, "b": 1.0}
M = 20_000


def linear_loss(params):
    return sum(SLOPE[name] * jnp.sum(jnp.asarray(q)) for name, q in params.items())


def two_grids(bits):
    """Eight weights each, in the middle of grids of which one is finer."""
    step = 2.0**-6 if bits == 8 else 2.0**-13
    dtype = jnp.int8 if bits == 8 else jnp.int16
    qvalue = jnp.arange(-4, 4).astype(dtype)
    return {
        "a": fgrad.QTensor(qvalue, jnp.float32(step), bits),
        "b": fgrad.QTensor(qvalue, jnp.float32(0.83 * step), bits),
    }


def mean_gradient(params, estimator, steps):
    """The mean over the weights of each leaf, and the steps that were made of ε."""
    epsilon = steps * float(params["a"].scale)
    gradient = jax.jit(
        lambda p: (
            estimators.forward_gradient(
                linear_loss,
                p,
                jax.random.key(3),
                epsilon=epsilon,
                num_perturbations=M,
                estimator=estimator,
                vectorize=1000,
            ).gradient
        )
    )(params)
    means = {name: float(jnp.mean(g.qvalue)) for name, g in gradient.items()}
    nominal = {name: epsilon / float(q.scale) for name, q in params.items()}
    return means, {name: round(n) / n for name, n in nominal.items()}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("steps", [0.6, 1.4, 5.2])
def test_spsa_on_two_grids_is_the_gradient(bits, steps):
    params = two_grids(bits)
    means, realised = mean_gradient(params, estimators.spsa, steps)
    # The signal of all weights is the noise in each; rounding adds a twelfth.
    signal = sum(8 * (SLOPE[n] * realised[n]) ** 2 for n in params)
    for name in params:
        noise = math.sqrt(13 / 12 * signal / 8) / realised[name]
        error = math.hypot(noise, SLOPE[name]) / math.sqrt(M)
        assert abs(means[name] - SLOPE[name]) < 5 * error
        # Enough to see a quotient of the nominal ε, unless it is the same.
        assert 5 * error < 0.13 * SLOPE[name]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("steps", [0.6, 1.4])
def test_the_mean_of_signs_points_along_the_gradient(bits, steps):
    means, realised = mean_gradient(two_grids(bits), estimators.sign_m_spsa, steps)
    wanted = SLOPE["a"] / SLOPE["b"]
    # Without the steps that were made the ratio is off by their quotient.
    assert abs(realised["a"] / realised["b"] - 1) > 0.15
    assert means["a"] / means["b"] == pytest.approx(wanted, rel=0.08)


@pytest.mark.parametrize("sizes", [(64, 512), (64, 2048)], ids=["small", "large"])
def test_spsa_on_bfloat16_is_the_gradient(sizes):
    """At w = .5 and ε = 1e-3 rounding leaves 79% of z, ``E[d z]``, and more of d²."""
    params = {
        "w": jnp.full(sizes[0], 0.5, jnp.bfloat16),
        "v": jnp.linspace(0.1, 2.0, sizes[1]).astype(jnp.bfloat16),
    }
    slope = {"w": 2.0, "v": 8 / math.sqrt(sizes[1])}

    def loss(p):
        return sum(slope[n] * jnp.sum(p[n].astype(jnp.float32)) for n in p)

    gradient = jax.jit(
        lambda p: (
            estimators.forward_gradient(
                loss,
                p,
                jax.random.key(3),
                epsilon=1e-3,
                num_perturbations=4000,
                estimator=estimators.spsa,
                vectorize=200,
            ).gradient
        )
    )(params)
    for name in params:
        found = float(jnp.mean(gradient[name].astype(jnp.float32)))
        # A standard error is 3%.
        assert found == pytest.approx(slope[name], rel=0.15)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [12, 2000], ids=["small", "large"])
def test_the_direction_of_narrow_floats_is_what_rounding_left(dtype, size):
    """Against NumPy's rounding of ``w ± εz``, one direction after the other."""
    m, epsilon = 3, 1e-2 if dtype == jnp.bfloat16 else 1e-3
    w = jnp.linspace(-2.0, 2.0, size).astype(dtype)
    key = jax.random.key(5)
    make = functools.partial(fgrad.estimators.forward_gradient, epsilon=epsilon)
    c = np.array([1.0, -2.0, 0.5])
    found = make(
        lambda p: jnp.sum(p["w"].astype(jnp.float32)),
        {"w": w},
        key,
        num_perturbations=m,
        estimator=lambda plus, minus, epsilon: jnp.asarray(c, jnp.float32),
    ).gradient["w"]
    assert found.dtype == dtype
    total, squares, of_z = np.zeros(size), 0.0, 0.0
    for i in range(m):
        z_key = fgrad.perturbations.sample_key(key, 0, i)
        leaf_key = fgrad.perturbations.leaf_keys(z_key, ["['w']"])["['w']"]
        z = np.asarray(fgrad.perturbations.normal().sample(leaf_key, (size,))) / 32
        wide = np.asarray(w, np.float32)
        up, down = (
            (wide + np.float32(sign * epsilon) * z.astype(np.float32)).astype(dtype)
            for sign in (1, -1)
        )
        d = (up.astype(np.float64) - down.astype(np.float64)) / (2 * epsilon)
        total += c[i] * d
        squares += np.mean(d**2)
        of_z += np.mean(z.astype(np.float64) ** 2)
    squares /= of_z  # the mean square of z is known: it is 1
    wanted = total / m / squares
    rtol = 2.0**-7 if dtype == jnp.bfloat16 else 2.0**-9
    np.testing.assert_allclose(
        np.asarray(found, np.float64), wanted, rtol=rtol, atol=1e-3
    )


@pytest.mark.parametrize("size", [1, 4])
def test_where_nothing_is_rounded_the_gradient_of_a_narrow_bias_has_no_noise_more(size):
    """At w = 0 all of εz is left, and few values say little of the mean of z²."""
    w = {"b": jnp.zeros(size, jnp.bfloat16)}
    make = jax.jit(
        lambda w, key: estimators.forward_gradient(
            lambda p: jnp.sum(p["b"].astype(jnp.float32)),
            w,
            key,
            epsilon=2.0**-6,
            num_perturbations=2,
            estimator=estimators.spsa,
        ).gradient["b"]
    )
    for seed in range(3):
        key = jax.random.key(seed)
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), w)
        # z has 7 bits and a sign, which bfloat16 holds.
        np.testing.assert_allclose(
            np.asarray(make(w, key), np.float32), make(wide, key), rtol=2.0**-7
        )
