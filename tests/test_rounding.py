"""How `quantized_update` rounds: to the nearest, or by chance with the right mean.

The oracles are NumPy's rounding and the mean of a Bernoulli variable.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxprs import all_equations

import fgrad
from fgrad.fixed_point import QTensor, as_gradient

SIZE = 20_000


def weights(bits, scale=0.25, size=SIZE):
    dtype = jnp.int8 if bits <= 8 else jnp.int16
    return QTensor(jnp.zeros(size, dtype), jnp.float32(scale), bits)


def steps_of(params, steps, **options):
    """What `quantized_update` makes of an update of so many grid steps."""
    tx = fgrad.quantized_update(**options)
    change = jnp.asarray(steps, jnp.float32) * params.scale
    change = jnp.broadcast_to(change, params.shape)
    update = jax.jit(lambda u, p: tx.update(u, tx.init(p), p))
    updates, state = update(as_gradient(params, change), params)
    assert updates.qvalue.dtype == jnp.int32
    return np.asarray(updates.qvalue), float(state.moved_fraction)


@pytest.mark.parametrize("bits", [4, 8, 12])
@pytest.mark.parametrize("steps", [0.03, 0.37, 0.5, 0.9, -0.25, -0.5, 2.3, -3.7])
def test_the_mean_of_many_roundings_is_the_update(bits, steps):
    found, moved = steps_of(weights(bits), steps)
    assert set(np.unique(found)) == {math.floor(steps), math.ceil(steps)}
    f = steps - math.floor(steps)
    assert abs(found.mean() - steps) < 5 * math.sqrt(f * (1 - f) / SIZE)
    assert moved == pytest.approx(np.mean(found != 0))
    # Neighbours are drawn apart.
    left, right = found[:-1] - found.mean(), found[1:] - found.mean()
    assert abs(np.mean(left * right)) < 5 * f * (1 - f) / math.sqrt(SIZE)


def test_the_mean_over_steps_of_one_weight_is_its_update():
    params = weights(8, size=3)
    tx = fgrad.quantized_update()
    rng = np.random.default_rng(0)
    steps = rng.uniform(-1.0, 1.0, size=(4000, 3)).astype(np.float32)

    def one(values):
        update = as_gradient(params, values * params.scale)
        return tx.update(update, tx.init(params), params)[0].qvalue

    found = np.asarray(jax.jit(lambda s: jax.lax.map(one, s))(steps))
    assert np.all(np.abs(found - steps) < 1)
    f = steps - np.floor(steps)
    error = np.sqrt(np.sum(f * (1 - f), 0)) / len(steps)
    assert np.all(np.abs(found.mean(0) - steps.mean(0)) < 5 * error)


@pytest.mark.parametrize("scale", [0.25, 0.1, 1 / 127, 3.3e-5, 7.7])
def test_whole_numbers_of_steps_are_taken_as_they_are(scale):
    for sign in (1, -1):
        whole = sign * np.arange(128)
        found, _ = steps_of(weights(8, scale, size=128), whole)
        np.testing.assert_array_equal(found, whole)
        # As other links leave them: a quotient and a product in float32.
        learning_rate = np.float32(0.0123)
        gradient = whole.astype(np.float32) * np.float32(scale) / learning_rate
        change = gradient * learning_rate / np.float32(scale)
        found, _ = steps_of(weights(8, scale, size=128), change)
        np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize(
    ("bits", "options"),
    [(4, {"stochastic_below": 0}), (8, {"stochastic_below": 8}), (16, {})],
)
def test_other_leaves_are_rounded_to_the_nearest(bits, options):
    steps = np.random.default_rng(1).uniform(-5, 5, SIZE).astype(np.float32)
    found, _ = steps_of(weights(bits, 0.25), steps, **options)
    np.testing.assert_array_equal(found, np.rint(steps))


def test_sixteen_bits_are_rounded_by_chance_if_asked():
    found, _ = steps_of(weights(16), 0.3, stochastic_below=17)
    assert found.mean() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / SIZE))


def test_the_same_update_is_rounded_in_the_same_way():
    first, second = (steps_of(weights(8), 0.4)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    other, _ = steps_of(weights(8), np.float32(0.4) + np.float32(2.0**-20))
    # Of independent draws 2 f (1 - f) differ.
    assert np.mean(other != first) == pytest.approx(0.48, abs=0.02)


def test_not_a_number_and_what_is_beyond_the_grid():
    found, _ = steps_of(
        weights(8, size=5), np.array([np.nan, np.inf, -np.inf, 1e30, 0.0])
    )
    np.testing.assert_array_equal(found, [0, 127, -127, 127, 0])


@pytest.mark.parametrize("below", [-1, 18])
def test_an_impossible_width_is_refused(below):
    with pytest.raises(ValueError, match=f"from 0 to 17, got {below}"):
        fgrad.quantized_update(stochastic_below=below)


# --------------------------------------------------- links that rescale grid steps

RATE = 0.2
BETWEEN = {
    "clip_by_global_norm": lambda: optax.chain(
        optax.clip_by_global_norm(20.0), optax.sgd(RATE)
    ),
    "scale": lambda: optax.chain(optax.scale(0.3), optax.sgd(RATE)),
    "average of four": lambda: fgrad.on_values(
        optax.MultiSteps(optax.sgd(RATE), 4).gradient_transformation()
    ),
    "momentum": lambda: fgrad.on_values(optax.sgd(RATE, momentum=0.9)),
}


def value_fn(params):
    return jnp.sum(jnp.sin(jnp.asarray(params) + jnp.arange(4000.0)))


@pytest.mark.parametrize("name", BETWEEN)
def test_grid_steps_that_are_rescaled_still_move(name):
    params = weights(8, 0.25, 4000)
    estimator = fgrad.fixed_point_forward_grad(
        jax.random.key(0), low_bit=fgrad.on_grid(RATE)
    )
    optimizer, last = BETWEEN[name](), fgrad.quantized_update()
    whole = optax.chain(estimator, optimizer, last)
    parts = optax.chain(estimator, optimizer)  # the same without rounding
    step = jax.jit(lambda s, t, p: whole.update(p, s, p, value_fn=value_fn))
    exact = jax.jit(lambda t, p: parts.update(p, t, p, value_fn=value_fn))
    state, other = whole.init(params), parts.init(params)
    fractions, taken, asked, variance = [], 0.0, 0.0, 0.0
    for _ in range(8):
        updates, state = step(state, other, params)
        change, other = exact(other, params)
        wanted = np.asarray(change.qvalue, np.float64) / 0.25
        found = np.asarray(updates.qvalue)
        assert np.abs(found - wanted).max() < 1 + 1e-3
        direction = np.sign(wanted)  # all of one sign, or the mean says nothing
        taken += np.sum(direction * found)
        asked += np.sum(direction * wanted)
        f = wanted - np.floor(wanted)
        variance += np.sum(f * (1 - f))
        fractions.append(float(optax.tree.get(state, "moved_fraction")))
        params = optax.apply_updates(params, updates)
        # Both chains see the weights that the rounded updates made.
    assert max(fractions) > 0
    assert asked > 100
    assert abs(taken - asked) < 5 * math.sqrt(variance) + 1e-2


def test_grid_steps_that_are_clipped_learn():
    target = jax.random.normal(jax.random.key(1), (40,))
    params = fgrad.quantize(jnp.zeros(40), 6, zero_bound=3.0)

    def loss(p):
        return jnp.mean((jnp.asarray(p) - target) ** 2)

    tx = optax.chain(
        fgrad.fixed_point_forward_grad(
            jax.random.key(0), low_bit=fgrad.on_grid(0.1), num_perturbations=4
        ),
        optax.clip_by_global_norm(1.0),
        optax.sgd(0.1),
        fgrad.quantized_update(),
    )

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(p, state, p, value_fn=loss)
        return (optax.apply_updates(p, updates), state), None

    carry = (params, tx.init(params))
    (trained, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=400))(carry)
    assert loss(trained) < 0.5 * loss(params)


def test_the_steps_that_are_counted_are_not_stored():
    """A GPU would store what both the count and the update read: 4 bytes a weight."""
    params = fgrad.quantize(jnp.ones((40, 32)), bits=8)
    tx = fgrad.quantized_update()
    jaxpr = jax.make_jaxpr(lambda u, p: tx.update(u, tx.init(p), p))(
        as_gradient(params, jnp.ones((40, 32))), params
    )
    names = [equation.primitive.name for equation in all_equations(jaxpr.jaxpr)]
    assert names.count("round") == 2


def test_what_is_counted_is_what_moves_in_leaves_large_and_small():
    rng = np.random.default_rng(3)
    shapes = {"a": (40, 32), "b": (30,), "c": (32, 40), "d": (64, 32)}
    values = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), values)
    params = fgrad.quantize(params, bits=8) | {"d": params["d"]}
    steps = {name: rng.uniform(-1.5, 1.5, shape) for name, shape in shapes.items()}
    scales = {name: getattr(leaf, "scale", 1) for name, leaf in params.items()}
    given = {
        name: as_gradient(params[name], jnp.float32(steps[name]) * scales[name])
        for name in shapes
    }
    tx = fgrad.quantized_update()

    def step(updates, params):
        updates, state = tx.update(updates, tx.init(params), params)
        return optax.apply_updates(params, updates), state

    new, state = jax.jit(step)(given, params)
    before, after = (jax.tree.map(np.asarray, x) for x in (params, new))
    moved = 0
    for name in shapes:
        if name == "d":
            moved += np.sum(before[name] != after[name])
            expected = before[name] + steps[name]
            np.testing.assert_allclose(after[name], expected, atol=1e-6)
            continue
        q, r = before[name].qvalue.astype(int), after[name].qvalue.astype(int)
        moved += np.sum(q != r)
        low, high = np.floor(steps[name]), np.ceil(steps[name])
        clipped = [np.clip(q + x, -127, 127) for x in (low, high)]
        assert np.all((r == clipped[0]) | (r == clipped[1]))
        assert abs(np.mean(r - q - steps[name])) < 2 / math.sqrt(q.size)
    total = sum(np.prod(shape) for shape in shapes.values())
    assert float(state.moved_fraction) == pytest.approx(moved / total)
