"""Training in integers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lanes import some

import fgrad
from fgrad.integer import Fixed, audit, convert, integers, loss, train_step
from tests.integer.conftest import TEST, function


@pytest.fixture(scope="module")
def program(digits, pretrained):
    return convert(function, pretrained, digits[1][:256])


def accuracy(program, weights, images, labels):
    found = jax.jit(program)(weights, program.encode(images))
    return float(np.mean(np.argmax(found, 1) == labels))


@pytest.mark.optimized
@pytest.mark.parametrize("bits", some([16, 8], [8]))
@pytest.mark.slow
def test_digits_are_adapted_without_a_float(digits, pretrained, program, bits):
    _, images, labels = digits
    if bits == 8:
        program = convert(function, pretrained, images[:256], bits=(8, 8))
    init, step = train_step(
        program,
        jax.random.key(0),
        learning_rate=2e-2,
        epsilon=3e-2,
        num_perturbations=8,
        decay_steps=150,
        estimator="normalized",
    )
    weights, state = init()
    encoded, targets = program.encode(images), jnp.asarray(labels)
    types = audit.check(step, weights, state, (encoded[:4], targets[:4]))
    assert types <= {"i1", "i8", "i16", "i32", "ui32"}

    @jax.jit
    def train(weights, state):
        def one(carry, chosen):
            return step(*carry, (encoded[chosen], targets[chosen])), None

        batches = np.random.default_rng(0).integers(0, 1297, (150, 64))
        return jax.lax.scan(one, (weights, state), batches)[0]

    before = accuracy(program, weights, images[TEST], labels[TEST])
    weights, state = train(weights, state)
    assert int(state.count) == 150
    after = accuracy(program, weights, images[TEST], labels[TEST])
    assert after > before + 0.1, (before, after)
    restored = step.restore(weights)
    assert (
        restored["Conv_0"]["kernel"].scale == program.params["Conv_0"]["kernel"].scale
    )


@pytest.mark.parametrize("channel_axis", some([None, -1], [None]))
def test_the_optax_link_takes_the_same_trajectory(channel_axis):
    x = np.random.default_rng(0).integers(-127, 128, (8, 5)).astype(np.float32) / 127
    labels = jnp.arange(8) % 3
    start = fgrad.quantize(
        {"w": jnp.eye(5, 3) * jnp.array([1.0, 4, 0.5])},
        bits=16,
        channel_axis=channel_axis,
    )

    def logits(params, x):
        return x @ jnp.asarray(params["w"])

    program = convert(logits, start, x)
    encoded = program.encode(x)
    scale = float(jnp.max(start["w"].scale))
    # A unit of z is 7 whole grid steps of the perturbation and 3 of the update, or
    # four or eight times as many in a channel of finer steps: both arithmetics hold
    # these exactly.
    epsilon, rate = 7 * 32 * scale, 3 * 2 * scale * 32
    init, step = train_step(
        program,
        jax.random.key(4),
        learning_rate=rate,
        epsilon=epsilon,
        num_perturbations=2,
    )

    def value_fn(params):
        value = step.loss(integers(params), (encoded, labels))
        return value.astype(jnp.float32)

    tx = optax.chain(
        fgrad.fixed_point_forward_grad(
            jax.random.key(4), epsilon=epsilon, num_perturbations=2
        ),
        optax.sgd(rate),
        fgrad.quantized_update(),
    )
    params, tx_state = start, tx.init(start)
    weights, state = init()
    link = jax.jit(lambda p, s: tx.update(p, s, p, value_fn=value_fn))
    advance = jax.jit(step)
    for _ in range(5):
        updates, tx_state = link(params, tx_state)
        params = optax.apply_updates(params, updates)
        weights, state = advance(weights, state, (encoded, labels))
        np.testing.assert_array_equal(weights["w"], params["w"].qvalue)
    assert np.any(np.asarray(weights["w"]) != np.asarray(start["w"].qvalue))


@pytest.mark.parametrize("classes", [2, 10, 700])
def test_cross_entropy_against_float64(classes):
    rng = np.random.default_rng(0)
    q = rng.integers(-32767, 32768, (50, classes))
    labels = rng.integers(0, classes, 50)
    logits = Fixed(jnp.asarray(q, jnp.int16), 2.0**-11, -32767, 32767)
    found = loss.softmax_cross_entropy(logits, jnp.asarray(labels))
    z = q * 2.0**-11
    exact = np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1)
    exact -= z[np.arange(50), labels]
    units = exact / found.scale
    factor = 2.0**-15
    assert abs(int(found.q) - units.sum()) < 50 * 3.5 + factor * units.sum()
    assert found.low <= int(found.q) <= found.high < 2**31
    assert found.scale < 1.1e-5 or classes > 256


def test_a_batch_whose_losses_would_not_fit_is_coarser():
    logits = Fixed(jnp.zeros((4096, 10), jnp.int16), 2.0**-10, -32767, 32767)
    found = loss.softmax_cross_entropy(logits, jnp.zeros(4096, jnp.int32))
    assert found.high < 2**31
    assert int(found.q) * found.scale == pytest.approx(4096 * np.log(10), rel=1e-3)


def test_what_is_out_of_range(program):
    key = jax.random.key(0)
    good = {"learning_rate": 0.01, "epsilon": 0.01}
    for bad in (
        {"learning_rate": -1.0},
        {"epsilon": 0.0},
        {"num_perturbations": 0},
        {"estimator": "spsa"},
        {"decay_steps": 0},
        {"epsilon": 1e-9},
        {"where": lambda name: False},
    ):
        with pytest.raises(ValueError, match=r"must|epsilon"):
            train_step(program, key, **{**good, **bad})


def test_leaves_that_are_not_chosen_stay(program, digits):
    init, step = train_step(
        program,
        jax.random.key(0),
        learning_rate=0.1,
        epsilon=0.03,
        num_perturbations=1,
        where=lambda name: name.startswith("Dense"),
    )
    weights, state = init()
    batch = program.encode(digits[1][:8]), jnp.asarray(digits[2][:8])
    after, _ = jax.jit(step)(weights, state, batch)
    np.testing.assert_array_equal(
        after["Conv_0"]["kernel"], weights["Conv_0"]["kernel"]
    )
    assert np.any(after["Dense_0"]["kernel"] != weights["Dense_0"]["kernel"])
