"""What one example can change is bounded, to the bit; and what privacy costs."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import fast_jit
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from training_reference import Z, draw

import fgrad
from fgrad.enhancements import privacy_spent, private_forward_grad
from fgrad.enhancements.private import clipped_parts, noisy_sum, unanimous_signs

KEY, NOISE_KEY = jax.random.key(1), jax.random.key(2)
UNITS = 2**14
M, EXAMPLES, INPUTS = 4, 6, 5
X = jax.random.normal(jax.random.key(0), (EXAMPLES, INPUTS))
W = jax.random.normal(jax.random.key(1), (INPUTS, 3))


def losses_fn(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"]) ** 2, axis=-1)


def link(**options):
    options = {"clip": 1.0, "batch_size": EXAMPLES, "epsilon": 0.05} | options
    return private_forward_grad(KEY, NOISE_KEY, **options)


def integer_norm(column):
    """The squared length of a column, in Python's integers."""
    return sum(int(q) ** 2 for q in column)


floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(floats, min_size=3, max_size=3), min_size=1, max_size=4),
    st.sampled_from([1e-30, 1e-3, 0.7, 1.0, 1e4, 1e30]),
)
def test_no_example_has_a_longer_part_than_the_bound(slopes, clip):
    found = np.asarray(clipped_parts(jnp.asarray(slopes, jnp.float32), clip))
    exact = np.asarray(slopes, np.float64)
    exact = np.where(np.isfinite(exact), exact, 0)
    length = np.maximum(np.linalg.norm(exact, axis=0), np.float64(np.float32(clip)))
    for column, wanted in zip(found.T, (UNITS * exact / length).T, strict=True):
        assert integer_norm(column) <= UNITS**2
        # Rounded towards zero, after a margin of 2**-12.
        assert np.all(np.abs(column) <= np.abs(wanted) + 1e-3)
        assert np.abs(column - wanted).max() <= 1 + UNITS * 2.0**-11


@pytest.mark.parametrize("m", [1, 1024])
def test_the_bound_holds_where_every_float_is_on_its_edge(m):
    rng = np.random.default_rng(m)
    slopes = jnp.asarray(rng.standard_cauchy((m, 500)), jnp.float32)
    parts = np.asarray(clipped_parts(slopes, 1e-6))
    lengths = [integer_norm(column) for column in parts.T]
    assert max(lengths) <= UNITS**2
    assert min(lengths) > 0.97 * UNITS**2 - 2 * m**0.5 * UNITS


def test_another_example_changes_its_own_part_only_and_the_sum_by_the_bound():
    @fast_jit
    def parts_of(x):
        tx = link(num_perturbations=M)
        params = {"w": W}
        _, state = tx.update(params, tx.init(params), params, value_fn=losses_fn, x=x)
        return state.released

    def whole(x):
        released = np.asarray(parts_of(x), np.float64)
        sums = released * EXAMPLES * UNITS  # C is 1
        assert np.abs(sums - np.rint(sums)).max() < 0.01
        return np.rint(sums).astype(int)

    base = whole(X)
    for index in range(EXAMPLES):
        gone = whole(X.at[index].set(0))  # an example of no loss has no slope
        part = base - gone
        assert 0 < integer_norm(part) <= UNITS**2
        other = whole(X.at[index].set(1e3 * X[(index + 1) % EXAMPLES]))
        assert integer_norm(other - gone) <= UNITS**2
        poisoned = whole(X.at[index].set(jnp.nan))
        assert np.array_equal(poisoned, gone)


def test_a_step_is_that_of_the_formula():
    clip, batch_size = 0.4, 4
    tx = link(num_perturbations=M, clip=clip, batch_size=batch_size)
    params = {"w": W}
    found, state = fast_jit(
        lambda p: tx.update(p, tx.init(p), p, value_fn=losses_fn, x=X)
    )(params)

    w, x = np.asarray(W, np.float64), np.asarray(X, np.float64)
    z = [draw(KEY, 0, k, {"w": w})["w"] * Z.step for k in range(M)]
    slopes = np.stack(
        [
            np.sum(np.tanh(x @ (w + 0.05 * d)) ** 2, -1)
            - np.sum(np.tanh(x @ (w - 0.05 * d)) ** 2, -1)
            for d in z
        ]
    ) / (2 * 0.05)
    norms = np.linalg.norm(slopes, axis=0)
    assert (norms > clip).any()
    c = (slopes * np.minimum(1, clip / norms)).sum(1) / batch_size
    np.testing.assert_allclose(state.released, c, atol=EXAMPLES * clip / UNITS * 6)
    expected = sum(a * d for a, d in zip(c, z, strict=True)) / M
    np.testing.assert_allclose(found["w"], expected, atol=1e-3 * np.abs(c).max() * 3)


def test_the_noise_is_gaussian_and_another_in_each_step():
    sigma, draws = 0.7, 4000
    parts = jnp.array([[5, -2], [7, 1]])
    keys = jax.random.split(jax.random.key(5), draws)
    found = np.asarray(
        fast_jit(jax.vmap(lambda key: noisy_sum(parts, sigma, key)))(keys)
    )
    noise = (found - np.array([3, 8])) / (sigma * UNITS)
    for column in noise.T:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise.T)[0, 1]) < 5 / draws**0.5

    tx = link(noise_multiplier=sigma)
    step = fast_jit(lambda p, s: tx.update(p, s, p, value_fn=losses_fn, x=0 * X)[1])
    state = tx.init({"w": W})
    released = []
    for _ in range(3):
        state = step({"w": W}, state)
        released.append(float(state.released[0]))
    assert len(set(released)) == 3  # there is nothing but noise


@pytest.mark.parametrize("bits", [None, 16])
def test_signs_are_those_of_the_noisy_sum(bits):
    params = {"w": W} if bits is None else fgrad.quantize({"w": W}, bits)

    def loss(params, x):
        return losses_fn({"w": jnp.asarray(params["w"])}, x)

    results = {}
    for mechanism in ("gaussian", "sign"):
        tx = link(noise_multiplier=1.0, mechanism=mechanism, num_perturbations=M)
        results[mechanism] = fast_jit(
            lambda p, tx=tx: tx.update(p, tx.init(p), p, value_fn=loss, x=X)
        )(params)
    signs = results["sign"][1].released
    np.testing.assert_array_equal(signs, np.sign(results["gaussian"][1].released))
    z = [draw(KEY, 0, k, {"w": np.asarray(W)})["w"] * Z.step for k in range(M)]
    gradient = results["sign"][0]["w"]
    array = gradient.qvalue if bits else gradient
    expected = sum(s * d for s, d in zip(np.asarray(signs), z, strict=True)) / M
    np.testing.assert_allclose(array, expected, rtol=2e-2 if bits else 1e-6, atol=1e-6)


def test_what_is_released_does_not_depend_on_the_secret_subset():
    rng = np.random.default_rng(0)
    parts = rng.integers(-50, 90, (40, 30))
    candidates = rng.random((30, 8)) < 0.5
    found = np.asarray(unanimous_signs(jnp.array(parts), jnp.array(candidates), KEY))
    again = np.asarray(
        unanimous_signs(jnp.array(parts), jnp.array(candidates), NOISE_KEY)
    )
    sums = parts @ candidates.astype(int)
    agreed = np.all(sums > 0, 1) | np.all(sums < 0, 1)
    assert 0 < agreed.sum() < 40
    np.testing.assert_array_equal(found[agreed], np.sign(sums[agreed, 0]))
    assert set(found) <= {-1, 1}
    assert (found[agreed] == again[agreed]).all()
    assert (found[~agreed] != again[~agreed]).any()  # coins
    # Whichever column is the secret one, the same bits come out.
    rolled = unanimous_signs(
        jnp.array(parts), jnp.array(np.roll(candidates, 3, 1)), KEY
    )
    np.testing.assert_array_equal(found, rolled)

    tx = link(mechanism="unanimous", num_perturbations=2)
    params, everybody = {"w": W}, jnp.ones((EXAMPLES, 3), bool)
    state = tx.init(params)
    _, state = tx.update(
        params, state, params, value_fn=losses_fn, x=X, candidates=everybody
    )
    plain = link(mechanism="sign", num_perturbations=2)
    _, other = plain.update(params, plain.init(params), params, value_fn=losses_fn, x=X)
    np.testing.assert_array_equal(state.released, other.released)


def analytic_epsilon(mu, delta):
    """ε of a Gaussian mechanism, theorem 8 of Balle and Wang 2018; mu: its sensitivity
    over its deviation."""

    def excess(epsilon):
        upper = stats.norm.cdf(mu / 2 - epsilon / mu)
        return (
            upper - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu) - delta
        )

    return optimize.brentq(excess, 0, 100)


def renyi_epsilon(mu, delta):
    """An upper bound: Rényi divergence α mu²/2, the best order by hand."""
    alpha = 1 + math.sqrt(2 * math.log(1 / delta)) / mu
    return alpha * mu**2 / 2 + math.log(1 / delta) / (alpha - 1)


@pytest.mark.parametrize(("sigma", "steps"), [(2.0, 1), (10.0, 50), (4.0, 16)])
def test_epsilon_is_that_of_a_calculation_by_hand(sigma, steps):
    delta, mu = 1e-5, math.sqrt(steps) / sigma
    by_hand, bound = analytic_epsilon(mu, delta), renyi_epsilon(mu, delta)
    # The bound in closed form is mu²/2 + mu √(2 log 1/δ).
    assert bound == pytest.approx(mu**2 / 2 + mu * math.sqrt(2 * math.log(1e5)))
    assert by_hand < bound
    pytest.importorskip("dp_accounting")
    spent = privacy_spent(
        noise_multiplier=sigma, sampling_probability=1.0, steps=steps, delta=delta
    )
    assert spent == pytest.approx(by_hand, rel=2e-3)
    sampled = privacy_spent(
        noise_multiplier=sigma, sampling_probability=0.1, steps=steps, delta=delta
    )
    assert sampled < 0.5 * spent


def test_what_privacy_spent_refuses(monkeypatch):
    numbers = {"sampling_probability": 0.1, "steps": 10, "delta": 1e-5}
    assert privacy_spent(noise_multiplier=0.0, **numbers) == math.inf
    with pytest.raises(ValueError, match=r"delta in \(0, 1\).*got 0.1, 2 and 10"):
        privacy_spent(noise_multiplier=1.0, **(numbers | {"delta": 2}))
    with pytest.raises(ValueError, match="noise_multiplier must be >= 0, got -1"):
        privacy_spent(noise_multiplier=-1, **numbers)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ModuleNotFoundError, match=r"fgrad\[privacy\]"):
        privacy_spent(noise_multiplier=1.0, **numbers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0.0}, "clip must be positive"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"noise_multiplier": -1.0}, "at least 0 and finite, got -1"),
        ({"mechanism": "laplace"}, "one of gaussian, sign, unanimous, got 'laplace'"),
        ({"mechanism": "unanimous", "noise_multiplier": 1.0}, "adds no noise"),
        ({"num_perturbations": 2000}, "at most 1024 here, got 2000"),
    ],
)
def test_bad_options_fail_when_the_transformation_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        link(**options)


def test_what_else_it_refuses():
    with pytest.raises(ValueError, match="are the same"):
        private_forward_grad(KEY, KEY, clip=1.0, batch_size=1)
    params, tx = {"w": W}, link()
    state = tx.init(params)
    with pytest.raises(TypeError, match="one loss for each example"):
        tx.update(params, state, params, value_fn=lambda p: jnp.sum(p["w"]))
    with pytest.raises(ValueError, match="40000 examples is more than 32768"):
        jax.eval_shape(
            lambda p: tx.update(p, state, p, value_fn=lambda p: jnp.zeros(40_000))[0],
            params,
        )
    everybody = jnp.ones((EXAMPLES, 2), bool)
    arguments = {"value_fn": losses_fn, "x": X}
    with pytest.raises(ValueError, match="got 'gaussian' with it"):
        tx.update(params, state, params, candidates=everybody, **arguments)
    tx = link(mechanism="unanimous")
    with pytest.raises(ValueError, match="got 'unanimous' without it"):
        tx.update(params, state, params, **arguments)
    with pytest.raises(ValueError, match=r"bool \[6, M\].*shape \(6,\)"):
        tx.update(params, state, params, candidates=everybody[:, 0], **arguments)
    # Nothing in the state was computed from the data without noise.
    assert set(state._fields) == {"key", "noise_key", "count", "released"}
