"""Momentum-guided sampling against references in float64 and Python integers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fgrad
from fgrad import evaluation, perturbations
from fgrad.enhancements import momentum_guided_sampling
from fgrad.fixed_point import is_qtensor
from fgrad.leaves import Guidance, Plan, Policy

KEY = jax.random.key(0)


def direction(shape, seed=1):
    d = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(
        np.clip(np.rint(d / np.sqrt(np.mean(d**2)) * 32), -127, 127), jnp.int8
    )


@pytest.mark.parametrize("alpha", [0.01, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("beta", [0.3, 0.9, 1.0])
def test_the_shares_are_those_of_the_definition(alpha, beta):
    guide = momentum_guided_sampling(alpha, beta)
    guidance = guide.at({}, jnp.int32(1), [])
    rng = np.random.default_rng(2)
    n1, n2 = rng.standard_normal((2, 200_000))
    z1 = math.sqrt(alpha) * n1
    z2 = 1.0 + math.sqrt(1 - alpha) * n2  # around a direction of one
    z = beta * z1 + (1 - beta) * z2
    length = math.sqrt(np.mean(z**2))
    assert float(guidance.pull) == pytest.approx(np.mean(z) / length, abs=0.01)
    assert float(guidance.noise) == pytest.approx(np.std(z) / length, abs=0.01)
    assert float(guidance.pull**2 + guidance.noise**2) == pytest.approx(1.0)
    neither = momentum_guided_sampling(0.0, 1.0).at({}, jnp.int32(1), [])
    assert (float(neither.pull), float(neither.noise)) == (0.0, 1.0)
    first = guide.at({}, jnp.int32(0), [])
    assert (float(first.pull), float(first.noise)) == (0.0, 1.0)


@pytest.mark.parametrize("base", [perturbations.normal(), perturbations.rademacher()])
def test_guided_z_is_an_integer_mix_of_unit_variance_around_the_direction(base):
    shape = (40, 50)
    guidance = Guidance({"['w']": direction(shape)}, jnp.float32(0.8), jnp.float32(0.6))
    plan = Plan({"w": jnp.zeros(shape)}, Policy(1.0, perturbation=base))
    one = plan.guided(guidance).arithmetic["['w']"]
    keys = jax.random.split(KEY, 400)
    z = np.asarray(jax.vmap(lambda k: one.sample(k, jnp.zeros(shape)))(keys), np.int64)
    assert one.step == 2**-5
    noise = round(1024 * np.float32(0.8) * base.step * 32)
    pull = round(1024 * np.float32(0.6))
    n = np.asarray(base.sample(keys[0], shape), int).ravel().tolist()
    d = np.asarray(guidance.directions["['w']"], int).ravel().tolist()
    for got, a, b in zip(z[0].ravel().tolist(), n, d, strict=True):
        assert got == max(-127, min(127, (noise * a + pull * b + 512) >> 10))
    values = z * one.step
    assert np.mean(values**2) == pytest.approx(1.0, abs=0.02)
    expected = 0.6 * np.asarray(guidance.directions["['w']"]) * one.step
    assert np.abs(values.mean(0) - expected).max() < 0.8 * 5 / math.sqrt(400) + 1 / 32


PARAMS = {"w": jnp.sin(jnp.arange(1600.0)).reshape(40, 40), "b": jnp.ones(3)}


def loss_fn(params):
    w = jnp.asarray(params["w"])
    return jnp.sum(jnp.tanh(w @ w)) / 40 + jnp.sum(jnp.asarray(params["b"]) ** 2)


@pytest.mark.parametrize("bits", [None, 16])
@pytest.mark.parametrize("vectorize", [1, 2])
def test_a_step_is_that_of_the_explicit_formulas(bits, vectorize):
    params = PARAMS if bits is None else fgrad.quantize(PARAMS, bits)
    m, epsilon = 2, 0.05
    tx = fgrad.fixed_point_forward_grad(
        KEY,
        epsilon=epsilon,
        num_perturbations=m,
        vectorize=vectorize,
        guide=momentum_guided_sampling(0.5, 0.6),
    )
    state = tx.init(params)
    step = jax.jit(lambda state: tx.update(params, state, params, value_fn=loss_fn))
    guide = {name: np.zeros(w.shape) for name, w in PARAMS.items()}
    for count in range(3):
        gradient, state = step(state)
        if count == 0:
            pull, noise = 0.0, 1.0
        else:
            noise = math.sqrt(0.36 * 0.5 + 0.16 * 0.5)
            pull = 0.4 / math.hypot(noise, 0.4)
            noise /= math.hypot(noise, 0.4)
        total = {name: np.zeros(w.shape) for name, w in PARAMS.items()}
        for i in range(m):
            keys = perturbations.leaf_keys(
                perturbations.sample_key(KEY, count, i), ["['b']", "['w']"]
            )
            z = {}
            for name, w in PARAMS.items():
                n = np.asarray(
                    perturbations.normal().sample(keys[f"['{name}']"], w.shape)
                )
                mixed = round(1024 * noise) * n.astype(int)
                mixed = mixed + round(1024 * pull) * guide[name].astype(int)
                z[name] = np.clip((mixed + 512) >> 10, -127, 127) / 32
            sides = []
            for sign in (1, -1):
                if bits is None:
                    moved = {k: PARAMS[k] + sign * epsilon * z[k] for k in PARAMS}
                else:
                    q = {
                        k: np.rint(
                            np.asarray(params[k].qvalue)
                            + sign * np.rint(epsilon / float(params[k].scale)) * z[k]
                        )
                        for k in PARAMS
                    }
                    moved = {k: q[k] * float(params[k].scale) for k in PARAMS}
                sides.append(float(loss_fn(jax.tree.map(jnp.float32, moved))))
            for name in PARAMS:
                factor = 1.0
                if bits:  # the losses are those at a whole number of steps
                    steps = np.float32(epsilon) / np.asarray(params[name].scale)
                    factor = steps / np.rint(steps)
                total[name] += np.sign(sides[0] - sides[1]) * z[name] * factor / m
        for name in PARAMS:
            got = gradient[name].qvalue if bits else gradient[name]
            np.testing.assert_allclose(got, total[name], atol=1e-6)
            rms = math.sqrt(np.mean(total[name] ** 2))
            expected = np.clip(np.rint(total[name] / rms * 32), -127, 127)
            kept = np.asarray(state.guide[name])
            assert kept.dtype == np.int8
            assert np.abs(kept - expected).max() <= 1  # float32 decides ties
            guide[name] = kept


@pytest.mark.slow
def test_without_guidance_the_z_are_those_of_the_perturbation():
    def gradients(**options):
        tx = fgrad.fixed_point_forward_grad(KEY, **options)
        state, found = tx.init(PARAMS), []
        for _ in range(2):
            g, state = tx.update(PARAMS, state, PARAMS, value_fn=loss_fn)
            found.append(g)
        return found

    plain, guided = gradients(), gradients(guide=momentum_guided_sampling(1.0, 1.0))
    jax.tree.map(np.testing.assert_array_equal, plain, guided)


def test_a_tie_keeps_the_direction():
    guide = momentum_guided_sampling()
    state = {"w": direction((3, 4))}
    after = guide.advance(state, {"w": jnp.zeros((3, 4))}, ["['w']"])
    np.testing.assert_array_equal(after["w"], state["w"])


def test_frozen_leaves_and_leaves_of_few_bits_have_no_direction():
    params = {"a": jnp.ones(4), "b": jnp.ones(5), "c": fgrad.quantize(jnp.ones(6), 8)}
    tx = fgrad.fixed_point_forward_grad(
        KEY,
        mask={"a": True, "b": False, "c": True},
        low_bit=fgrad.on_grid(0.1),
        guide=momentum_guided_sampling(),
    )
    state = tx.init(params)
    assert state.guide["a"].dtype == jnp.int8
    assert (state.guide["b"], state.guide["c"]) == (None, None)

    def value_fn(p):
        return jnp.sum(p["a"] ** 2) + jnp.sum(p["b"]) + jnp.sum(p["c"] * 1.0)

    gradient, state = tx.update(params, state, params, value_fn=value_fn)
    assert np.any(np.asarray(gradient["a"]))
    assert not np.any(np.asarray(gradient["b"]))


def test_a_stacked_leaf_is_guided_in_blocks_inside_a_scan():
    stacked = jnp.sin(jnp.arange(3 * 48 * 48.0)).reshape(3, 48, 48)
    x = jnp.ones((4, 48)) / 7

    def value_fn(p):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])
        return jnp.sum(h**2)

    guidance = Guidance(
        {"['w']": direction(stacked.shape)}, jnp.float32(0.6), jnp.float32(0.8)
    )
    plan = Plan({"w": stacked}, Policy(0.1)).guided(guidance)
    keys = jax.vmap(plan.leaf_keys)(KEY[None])
    plus, *_ = evaluation.evaluate_pairs(value_fn, plan, keys)
    there = plan.perturbed(KEY)
    np.testing.assert_allclose(plus[0], value_fn(there), rtol=1e-5)


def test_it_trains_and_survives_chains_and_quantized_updates():
    params = fgrad.quantize(PARAMS)
    tx = optax.chain(
        fgrad.fixed_point_forward_grad(
            KEY,
            epsilon=1e-2,
            guide=momentum_guided_sampling(beta=lambda t: 0.9 + 0 * t),
        ),
        fgrad.on_values(optax.sgd(2e-3, momentum=0.9)),
        fgrad.quantized_update(),
    )

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(p, state, p, value_fn=loss_fn)
        return (optax.apply_updates(p, updates), state), None

    carry = (params, tx.init(params))
    (trained, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=100))(carry)
    assert loss_fn(trained) < loss_fn(params) - 1
    assert all(
        q.qvalue.dtype == jnp.int16
        for q in jax.tree.leaves(trained, is_leaf=is_qtensor)
    )


@pytest.mark.parametrize("options", [{"alpha": 1.1}, {"beta": -0.1}, {"beta": 0.0}])
def test_bad_options_raise(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        momentum_guided_sampling(**options)


def test_a_guide_takes_no_low_rank_perturbation():
    with pytest.raises(ValueError, match="shares products between"):
        fgrad.fixed_point_forward_grad(
            KEY,
            perturbation=perturbations.low_rank(),
            guide=momentum_guided_sampling(),
        )
