"""Weights of few bits: sparse integer steps that are both probe and update."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lanes import some

import fgrad
from fgrad import perturbations
from fgrad.evaluation import evaluate_pairs
from fgrad.fixed_point import QTensor, is_qtensor
from fgrad.leaves import Plan, Policy, low_bit
from fgrad.leaves.arithmetic import FixedPointArithmetic, GridArithmetic

COUNT = jnp.int32(0)


def density(rms, *, widening=1.0, probe=None):
    return low_bit.Sparsity(jnp.float32(rms), jnp.float32(widening), probe, 16)


def words(seed, size):
    return jax.random.bits(jax.random.key(seed), (size,), jnp.uint32)


@pytest.mark.parametrize("r", [0.01, 0.3, 1.0, 1.7, 5.0])
def test_z_has_the_density_and_size_of_the_formula(r):
    z = np.asarray(density(r).sample(words(0, 2**18), jnp.float32(1.0)), np.int64)
    largest = max(1, math.ceil(r))
    probability = (r / largest) ** 2
    assert set(np.unique(z)) <= {-largest, 0, largest}
    limit = 5 * math.sqrt(probability * (1 - probability) / z.size) + 1e-9
    assert abs(np.mean(z != 0) - probability) < limit
    # Zero mean and variance r²: an update is as long as one of sign-m-SPSA.
    assert abs(np.mean(z)) < 5 * r / math.sqrt(z.size)
    assert np.mean(z**2) == pytest.approx(r * r, rel=max(0.05, 10 / (r * 512)))


def test_z_of_every_word_is_what_integers_give():
    random = np.asarray(words(1, 1000))
    scale = np.float32(0.01)
    z = density(0.023).sample(jnp.asarray(random), jnp.asarray(scale))
    r = 0.023 / 0.01
    threshold = int((r / 3) ** 2 * 2**31)
    for word, value in zip(random.tolist(), np.asarray(z).tolist(), strict=True):
        if abs((word >> 1) - threshold) > 2**12:  # float32 rounds the threshold
            sign = 1 - 2 * (word & 1)
            assert value == (3 * sign if (word >> 1) < threshold else 0)


def test_a_learning_rate_of_zero_gives_no_steps_and_a_huge_one_is_bounded():
    assert not np.any(density(0.0).sample(words(2, 4096), jnp.float32(0.1)))
    z = density(1e9).sample(words(2, 4096), jnp.float32(0.1))
    assert set(np.unique(z)) == {-127, 127}


@pytest.mark.parametrize(
    ("bits", "widening", "expected"),
    [
        (8, 1.0, 4),
        (8, 2.6, 10),
        (8, 100.0, 16),
        (8, math.inf, 16),
        (7, 50.0, 8),
        (6, 9.0, 8),
        (5, 1.0, 2),
        (4, 9.0, 2),
        (3, 5.0, 2),
        (12, 1.0, 4),
    ],
)
def test_the_probe_widens_as_the_learning_rate_decays(bits, widening, expected):
    assert int(density(1.0, widening=widening).probe(bits)) == expected


def test_the_density_follows_the_schedule():
    options = low_bit.on_grid(optax.linear_schedule(0.1, 0.0, 100))
    first, later = options.at(COUNT, 4), options.at(jnp.int32(75), 4)
    assert float(first.rms) == pytest.approx(0.025)
    assert float(first.widening) == pytest.approx(1.0, rel=1e-5)
    assert float(later.rms) == pytest.approx(0.00625)
    assert float(later.widening) == pytest.approx(4.0)
    assert float(options.at(jnp.int32(100), 4).rms) == 0.0
    assert np.isinf(options.at(jnp.int32(100), 4).widening)


def test_the_probe_is_as_wide_as_the_rate_is_below_its_peak():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, 100)
    options = low_bit.on_grid(schedule)

    def rate(step):
        if step < 10:
            return 1e-2 * step / 10
        return 1e-2 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 90))

    widths = {}
    for step in (0, 1, 5, 10, 50, 70, 90, 100, 150):
        now = 0.0 if step >= 100 else rate(step)
        found = options.at(jnp.int32(step), 3)
        assert float(found.rms) == pytest.approx(now / 3, rel=1e-5, abs=1e-12)
        for bits, (first, largest) in low_bit.PROBES.items():
            wide = largest if now == 0 else min(largest, int(first * 1e-2 / now + 1e-6))
            assert int(found.probe(bits)) == wide
        widths[step] = int(found.probe(8))
    assert [widths[step] for step in (0, 1, 10, 50, 90)] == [16, 16, 4, 6, 16]


@pytest.mark.parametrize(
    ("schedule", "peak"),
    [
        (lambda count: 0.25, 0.25),
        (optax.constant_schedule(0.1), 0.1),
        (optax.linear_schedule(0.3, 0.0, 50), 0.3),
        (optax.linear_schedule(0.0, 0.3, 5000), 0.3),
        (optax.warmup_cosine_decay_schedule(0.0, 0.5, 3000, 9000), 0.5),
        (optax.warmup_cosine_decay_schedule(0.0, 0.5, 300_000, 900_000), 0.5),
        (optax.piecewise_constant_schedule(0.1, {777: 5.0, 778: 0.1}), 0.5),
        (optax.piecewise_constant_schedule(0.1, {1_000_000: 5.0}), 0.5),
        (optax.exponential_decay(0.2, 100, 0.5), 0.2),
        (lambda count: jnp.where(count == 1234, 3.0, 1.0), 3.0),
    ],
)
def test_the_peak_of_a_schedule_is_its_largest_value(schedule, peak):
    assert low_bit.on_grid(schedule).peak == pytest.approx(peak, rel=1e-4)


def test_the_peak_of_a_number_is_the_number():
    options = low_bit.on_grid(0.1)
    assert options.peak == 0.1
    assert float(options.at(jnp.int32(999), 2).widening) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda count: 0.1 * (1 - count / 100), r"gives -0.0.* at step 101; it must"),
        (lambda count: -0.1, "gives -0.1.* at step 0; it must be finite and not neg"),
        (lambda count: jnp.where(count > 20, jnp.nan, 0.1), "gives nan at step 21"),
        (lambda count: 1.0 / count, "gives inf at step 0"),
        (lambda count: 0.0, "is a schedule that is never positive"),
    ],
)
def test_a_schedule_that_cannot_be_a_learning_rate_is_refused(schedule, message):
    with pytest.raises(ValueError, match=f"learning_rate .*{message}"):
        low_bit.on_grid(schedule)
    with pytest.raises(ValueError, match=message):
        fgrad.qzo_ff(schedule, jax.random.key(0))


PARAMS = {
    "small": jnp.linspace(-1.0, 0.7, 12).reshape(3, 4),
    "large": jnp.sin(jnp.arange(1200.0)).reshape(40, 30),
}


def loss_fn(params, x):
    h = jnp.tanh(x @ jnp.asarray(params["large"]))
    return jnp.sum(h**2) / 64 + jnp.sum(jnp.sin(3 * jnp.asarray(params["small"])))


def reference_step(params, key, step, rate, m, probe):
    """The step of `low_bit`'s formulas in Python integers, from the same words."""
    leaves = {name: np.asarray(q.qvalue).astype(int) for name, q in params.items()}
    totals = {name: np.zeros_like(q) for name, q in leaves.items()}
    x = jnp.linspace(-1, 1, 80).reshape(2, 40)
    for i in range(m):
        z_key = perturbations.sample_key(key, step, i)
        keys = perturbations.leaf_keys(z_key, ["['large']", "['small']"])
        z, sides = {}, []
        for name, q in params.items():
            random = np.asarray(
                low_bit.WORDS.sample(keys[f"['{name}']"], leaves[name].shape)
            ).astype(np.int64)
            r = rate / m / np.broadcast_to(np.asarray(q.scale, float), random.shape)
            largest = np.maximum(1, np.ceil(r)).astype(int)
            chosen = (random >> 1) < (r / largest) ** 2 * 2**31
            z[name] = np.where(chosen, (1 - 2 * (random & 1)) * largest, 0)
        for sign in (1, -1):
            moved = {
                name: QTensor(
                    jnp.asarray(
                        np.clip(
                            leaves[name] + sign * probe * z[name],
                            -q.max_qvalue,
                            q.max_qvalue,
                        ),
                        q.qvalue.dtype,
                    ),
                    q.scale,
                    q.bits,
                )
                for name, q in params.items()
            }
            sides.append(float(loss_fn(moved, x)))
        c = int(np.sign(sides[0] - sides[1]))
        totals = {name: totals[name] + c * z[name] for name in totals}
    return {
        name: np.clip(leaves[name] - totals[name], -q.max_qvalue, q.max_qvalue)
        for name, q in params.items()
    }


@pytest.mark.parametrize("bits", some([8, 6, 4], [4]))
@pytest.mark.parametrize("channel_axis", [None, -1])
def test_qzo_ff_takes_the_steps_of_the_formulas(bits, channel_axis):
    params = fgrad.quantize(PARAMS, bits=bits, channel_axis=channel_axis)
    key, rate, m = jax.random.key(3), 0.08, 3
    tx = fgrad.qzo_ff(rate, key, num_perturbations=m)
    state, x = tx.init(params), jnp.linspace(-1, 1, 80).reshape(2, 40)
    step = jax.jit(lambda p, s: tx.update(p, s, p, value_fn=loss_fn, x=x))
    for count in range(3):
        probe = low_bit.default_probe(bits)[0]
        expected = reference_step(params, key, count, rate, m, probe)
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
        for name, values in expected.items():
            assert params[name].qvalue.dtype == jnp.int8
            np.testing.assert_array_equal(params[name].qvalue, values)
    # No state as large as a leaf.
    assert max(jnp.size(leaf) for leaf in jax.tree.leaves(state)) <= 2 * m
    assert 0 < float(optax.tree.get(state, "moved_fraction")) < 1
    assert float(optax.tree.get(state, "frozen_fraction")) == 0


@pytest.mark.slow
def test_leaves_of_other_kinds_learn_by_the_same_evaluations():
    params = {"small": PARAMS["small"], "large": fgrad.quantize(PARAMS["large"], 4)}
    x = jnp.linspace(-1, 1, 80).reshape(2, 40)
    tx = fgrad.qzo_ff(0.02, jax.random.key(3))
    updates, _ = tx.update(params, tx.init(params), params, value_fn=loss_fn, x=x)
    assert updates["small"].dtype == jnp.float32
    assert np.all(np.asarray(updates["small"]) != 0)  # dense z
    assert updates["large"].qvalue.dtype == jnp.int32
    assert 0 < np.mean(np.asarray(updates["large"].qvalue) != 0) < 0.5  # sparse z


@pytest.mark.slow
def test_grid_steps_are_counted_by_signs_whatever_the_estimator():
    params = fgrad.quantize(PARAMS, bits=4)
    x = jnp.linspace(-1, 1, 80).reshape(2, 40)

    def steps(estimator):
        tx = fgrad.qzo_ff(0.08, jax.random.key(3), estimator=estimator)
        return tx.update(params, tx.init(params), params, value_fn=loss_fn, x=x)[0]

    jax.tree.map(
        np.testing.assert_array_equal,
        steps(fgrad.estimators.spsa),
        steps(fgrad.estimators.sign_m_spsa),
    )


def test_below_says_which_leaves_move_by_steps():
    params = {"a": fgrad.quantize(PARAMS["small"], 8)}
    moved = Policy(0.1, low_bit=low_bit.on_grid(1e-2))
    kept = Policy(0.1, low_bit=low_bit.on_grid(1e-2, below=8))
    wide = {"a": fgrad.quantize(PARAMS["small"])}

    def kind(leaves, policy):
        (one,) = Plan(leaves, policy).arithmetic.values()
        return type(one)

    assert kind(params, moved) is GridArithmetic
    assert kind(params, kept) is FixedPointArithmetic
    assert kind(wide, moved) is FixedPointArithmetic


@pytest.mark.slow
def test_evaluations_are_those_at_the_explicitly_perturbed_weights():
    params = fgrad.quantize(PARAMS, bits=5)
    policy = Policy(1.0, low_bit=low_bit.on_grid(0.3))
    plan = Plan(params, policy)
    x, keys = jnp.ones((2, 40)), jax.random.split(jax.random.key(4), 4)
    for vectorize in (1, 4):
        losses = jax.jit(
            lambda p, v=vectorize: evaluate_pairs(
                lambda q: loss_fn(q, x),
                (plan := Plan(p, policy)),
                jax.vmap(plan.leaf_keys)(keys),
                vectorize=v,
            )[:2]
        )(params)
        for i, key in enumerate(keys):
            for side, sign in zip(losses[:2], (1, -1), strict=True):
                there = plan.perturbed(key, sign)
                assert all(
                    np.any(np.asarray(a.qvalue) != np.asarray(b.qvalue))
                    for a, b in zip(
                        jax.tree.leaves(there, is_leaf=is_qtensor),
                        jax.tree.leaves(params, is_leaf=is_qtensor),
                        strict=True,
                    )
                )
                np.testing.assert_allclose(side[i], loss_fn(there, x), rtol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_stacked_leaf_is_sampled_in_blocks_inside_a_scan(bits):
    stacked = jnp.sin(jnp.arange(3 * 48 * 48.0)).reshape(3, 48, 48)
    params = {"w": fgrad.quantize(stacked, bits, channel_axis=-1)}
    scale = jnp.broadcast_to(params["w"].scale, (3, 1, 48))
    params = {"w": QTensor(params["w"].qvalue, scale, bits)}
    x = jnp.ones((4, 48)) / 7

    def value_fn(p):
        layers = (p["w"].qvalue, p["w"].scale)
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ (w[0] * w[1])), None), x, layers)
        return jnp.sum(h**2)

    plan = Plan(params, Policy(1.0, low_bit=low_bit.on_grid(0.2)))
    key = jax.random.key(5)
    keys = jax.vmap(plan.leaf_keys)(key[None])
    plus, minus, _ = evaluate_pairs(value_fn, plan, keys)
    for loss, sign in ((plus, 1), (minus, -1)):
        there = plan.perturbed(key, sign)
        np.testing.assert_allclose(loss[0], value_fn(there), rtol=1e-5)
    assert plus[0] != minus[0]


@pytest.mark.slow
def test_weights_of_four_bits_learn_a_least_squares_problem():
    key = jax.random.key(6)
    x = jax.random.normal(key, (64, 16))
    truth = jax.random.normal(jax.random.key(7), (16, 4))
    params = fgrad.quantize({"w": jnp.zeros((16, 4))}, 4, zero_bound=2.0)

    def value_fn(p):
        return jnp.mean((x @ p["w"] - x @ truth) ** 2)

    def train(low_bit):
        tx = fgrad.qzo_ff(
            optax.linear_schedule(0.3, 0.0, 400),
            jax.random.key(8),
            epsilon=0.5,
            num_perturbations=4,
            low_bit=low_bit,
        )

        def step(carry, _):
            p, state = carry
            updates, state = tx.update(p, state, p, value_fn=value_fn)
            return (optax.apply_updates(p, updates), state), None

        carry, _ = jax.jit(lambda c: jax.lax.scan(step, c, length=400))(
            (params, tx.init(params))
        )
        return float(value_fn(carry[0]))

    nearest = fgrad.fixed_point.quantize_to_scale(truth, params["w"].scale, 4)
    assert train(True) < 0.25 * float(value_fn(params))
    assert train(True) > 0.5 * float(value_fn({"w": nearest}))  # no magic


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite"),
        ({"learning_rate": -0.1}, "learning_rate must be positive and finite"),
        ({"learning_rate": math.nan}, "learning_rate must be positive and finite"),
        ({"learning_rate": math.inf}, "learning_rate must be positive and finite"),
        ({"learning_rate": 0.1, "probe": (1,)}, "probe must be two integers"),
        ({"learning_rate": 0.1, "probe": (True, 2)}, "probe must be two integers"),
        ({"learning_rate": 0.1, "probe": (1.0, 2.0)}, "probe must be two integers"),
        ({"learning_rate": 0.1, "probe": (4, 2)}, "probe must be two integers"),
        ({"learning_rate": 0.1, "probe": (0, 2)}, "probe must be two integers"),
        (
            {"learning_rate": 0.1, "below": 2},
            "below, in bits, must be an integer",
        ),
    ],
)
def test_bad_options_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        fgrad.on_grid(**arguments)


@pytest.mark.parametrize("value", ["x", None, True, jnp.ones(2), 1j])
def test_a_learning_rate_that_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match="learning_rate must be a number or a schedule"):
        fgrad.on_grid(value)


def test_a_wrong_low_bit_option_raises():
    with pytest.raises(TypeError, match=r"low_bit must be fgrad\.on_grid"):
        fgrad.fixed_point_forward_grad(jax.random.key(0), low_bit=8)
