"""The exact gradient of the last layer in integers, against floats, and in C."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import every_row, some

import fgrad
from experiments.benchmarks import emulation
from fgrad.integer import (
    ConversionError,
    Fixed,
    audit,
    convert,
    integers,
    loss,
    train_step,
)
from tests.integer.conftest import TEST, function, steps_in_c

X = np.random.default_rng(0).uniform(-1, 1, (24, 6)).astype(np.float32)
LABELS = jnp.arange(24) % 3
PARAMS = {
    "hidden": {"w": np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)},
    "head": {
        "w": np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32),
        "b": np.array([0.1, -0.2, 0.3], np.float32),
    },
}
# So large that the C step writes the new kernel over the one that the head has read.
WIDE = {
    "hidden": {
        "w": np.random.default_rng(1).normal(size=(6, 20)).astype(np.float32)
        * np.geomspace(0.2, 5, 20, dtype=np.float32)
    },
    "head": {
        "w": np.random.default_rng(2).normal(size=(20, 3)).astype(np.float32)
        * np.array([0.1, 1, 3], np.float32),
        "b": np.array([0.1, -0.2, 0.3], np.float32),
    },
}


def hidden(params, x):
    return jnp.tanh(x @ jnp.asarray(params["hidden"]["w"]))


def logits(params, x):
    head = params["head"]
    return hidden(params, x) @ jnp.asarray(head["w"]) + jnp.asarray(head["b"])


def transposed(params, x):
    kernel = jnp.asarray(params["head"]["w"])
    products = jax.lax.dot_general(hidden(params, x), kernel, (((1,), (1,)), ((), ())))
    return products + jnp.asarray(params["head"]["b"])


@pytest.mark.parametrize("classes", some([2, 10, 300], [10]))
def test_the_error_of_a_softmax_against_float64(classes):
    rng = np.random.default_rng(0)
    q = rng.integers(-20000, 20000, (50, classes))
    labels = rng.integers(0, classes, 50)
    z = q * 2.0**-12
    found = loss.softmax_error(
        Fixed(jnp.asarray(q, jnp.int16), 2.0**-12, -32767, 32767), jnp.asarray(labels)
    )
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    exact = p - np.eye(classes)[labels]
    allowed = 2 * 2.0**-15 + classes * 2.0**-16 * p
    assert np.all(np.abs(np.asarray(found.q) * found.scale - exact) < allowed)
    assert found.q.dtype == jnp.int16


def test_too_many_classes_are_an_error():
    many = Fixed(jnp.zeros((1, 40_000), jnp.int16), 1.0, -32767, 32767)
    with pytest.raises(ConversionError, match="40000"):
        loss.softmax_error(many, jnp.zeros(1, jnp.int32))


@pytest.mark.parametrize("model", some([logits, transposed], [logits]))
def test_a_step_is_that_of_the_float_gradient(model):
    params = PARAMS
    if model is transposed:
        params = {**PARAMS, "head": {**PARAMS["head"], "w": PARAMS["head"]["w"].T}}
    program = convert(model, params, X)
    rate = 0.05
    init, step = train_step(
        program, jax.random.key(0), learning_rate=rate, exact_head="head"
    )
    weights, state = init()
    after, after_state = jax.jit(step)(weights, state, (program.encode(X), LABELS))
    values = fgrad.dequantize(program.params)

    def mean_loss(head):
        z = model({**values, "head": head}, X)
        return -jnp.mean(jax.nn.log_softmax(z)[jnp.arange(24), LABELS])

    gradient = jax.grad(mean_loss)(values["head"])
    for name in ("w", "b"):
        scale = program.params["head"][name].scale
        moved = (weights["head"][name] - after["head"][name]) * scale
        exact = rate * gradient[name]
        # Features have 8 bits, probabilities of their logits err by some 5e-4, and a
        # step rounds.
        allowed = 0.01 * np.max(np.abs(exact)) + 1e-3 * rate + scale
        assert np.max(np.abs(moved - exact)) < allowed
    np.testing.assert_array_equal(after["hidden"]["w"], weights["hidden"]["w"])
    assert int(after_state.count) == 1
    assert int(after_state.loss) * np.log(2) / 2**16 == pytest.approx(
        24 * float(mean_loss(values["head"])), rel=0.01
    )


@pytest.mark.slow
def test_few_bits_round_at_random_so_that_small_steps_count():
    params = fgrad.quantize(PARAMS, bits=8)
    program = convert(logits, params, X)
    moves = {}
    for rate in (2e-3, 2.0):
        _, step = train_step(
            program, jax.random.key(3), learning_rate=rate, exact_head="head"
        )
        weights, state = step.init()
        batch = program.encode(X), LABELS
        advance = jax.jit(step)
        total = np.zeros((5, 3))
        for count in range(400):
            state = state._replace(count=jnp.int32(count))
            after = advance(weights, state, batch)[0]["head"]["w"]
            total += np.asarray(weights["head"]["w"], float) - after
        moves[rate] = total / 400 / rate
    # A step at the small rate moves a weight once in some ten steps.
    assert np.max(np.abs(moves[2e-3] * 2e-3)) < 0.5
    spread = 0.5 / np.sqrt(400) / 2e-3
    assert np.max(np.abs(moves[2e-3] - moves[2.0])) < 5 * spread


@pytest.mark.slow
@pytest.mark.optimized
def test_a_head_learns_rotated_digits_on_a_frozen_backbone(digits, pretrained):
    _, images, labels = digits
    params = {
        name: fgrad.quantize(part, bits=16 if name == "Dense_0" else 8)
        for name, part in pretrained.items()
    }
    program = convert(function, params, images[:256])
    init, step = train_step(
        program,
        jax.random.key(0),
        learning_rate=0.1,
        decay_steps=300,
        exact_head="Dense_0",
    )
    weights, state = init()
    encoded, targets = program.encode(images), jnp.asarray(labels)
    types = audit.check(step, weights, state, (encoded[:4], targets[:4]))
    assert types <= {"i1", "i8", "i16", "i32", "ui32"}

    @jax.jit
    def train(weights, state):
        def one(carry, chosen):
            return step(*carry, (encoded[chosen], targets[chosen])), None

        batches = np.random.default_rng(0).integers(0, 1297, (300, 32))
        return jax.lax.scan(one, (weights, state), batches)[0]

    def accuracy(weights):
        found = jax.jit(program)(weights, encoded[TEST])
        return float(np.mean(np.argmax(found, 1) == labels[TEST]))

    before = accuracy(weights)
    after, state = train(weights, state)
    assert accuracy(after) > before + 0.15
    for name in ("Conv_0", "Conv_1"):
        assert weights[name]["kernel"].dtype == jnp.int8
        np.testing.assert_array_equal(after[name]["kernel"], weights[name]["kernel"])


@pytest.mark.slow
@pytest.mark.skipif(not emulation.has_host_compiler(), reason="needs gcc or cc")
@pytest.mark.parametrize(
    ("bits", "where", "channel_axis"),
    [
        (16, None, None),
        (8, None, -1),
        (16, lambda name: name.startswith("hidden"), None),
        (16, lambda name: name.startswith("hidden"), -1),
        (8, lambda name: name.startswith("hidden"), -1),
    ],
)
def test_c_has_the_bits_of_jax(bits, where, channel_axis, tmp_path):
    params = fgrad.quantize(WIDE, bits=bits, channel_axis=channel_axis)
    program = convert(logits, params, X)
    _, step = train_step(
        program,
        jax.random.key(0),
        learning_rate=0.3,
        epsilon=0.02,
        num_perturbations=2,
        decay_steps=50,
        exact_head="head",
        where=where,
    )
    batch = np.asarray(program.encode(X)), np.asarray(LABELS, np.int32)
    written, weights, _ = steps_in_c(step, [batch] * 20, tmp_path)
    assert len(written.fields["weights"]) == (2 if where is None else 3)
    start = integers(program.params)
    assert np.any(weights["head"]["w"] != start["head"]["w"])
    moved = np.any(weights["hidden"]["w"] != start["hidden"]["w"])
    assert moved == (where is not None)


def scaled(params, x):
    return 2.5 * logits(params, x) + hidden(params, x)[:, :3]


@pytest.mark.parametrize(
    ("model", "changes", "says"),
    every_row(
        2,
        [
            (scaled, {}, "goes into"),
            (logits, {"exact_head": "hidden"}, "goes into 'tanh'"),
            (logits, {"exact_head": "tail"}, "no kernel; the parameters are head/b"),
            (logits, {"exact_head": ("head/w",)}, "goes into 'add'"),
            (logits, {"loss": loss.sum_of_outputs}, "softmax_cross_entropy alone"),
            (logits, {"where": lambda name: True}, "epsilon must be given"),
        ],
    ),
)
def test_what_is_no_head(model, changes, says):
    program = convert(model, PARAMS, X)
    options = {"learning_rate": 0.1, "exact_head": "head", **changes}
    with pytest.raises(ValueError, match=says):
        train_step(program, jax.random.key(0), **options)


@pytest.mark.parametrize(("rate", "says"), [(1e-12, "raise it"), (1e6, "int32")])
def test_rates_out_of_range(rate, says):
    program = convert(logits, PARAMS, X)
    _, step = train_step(
        program, jax.random.key(0), learning_rate=rate, exact_head="head"
    )
    with pytest.raises(ConversionError, match=says):
        step(*step.init(), (program.encode(X), LABELS))
