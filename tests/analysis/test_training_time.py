"""Predicted training, beside `jax.jvp`, NumPy and trainings that happen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import fast_jit

import fgrad
from fgrad import analysis, evaluation, perturbations

KEY = jax.random.key(0)
EXAMPLES, INPUTS, OUTPUTS = 10, 4, 2
X = jax.random.normal(jax.random.key(1), (EXAMPLES, INPUTS))
Y = jax.random.normal(jax.random.key(2), (EXAMPLES, OUTPUTS))
PARAMS = {
    "a": jax.random.normal(jax.random.key(3), (INPUTS, 5)) / 2,
    "b": jax.random.normal(jax.random.key(4), (5, OUTPUTS)) / 2,
}


def apply_fn(params, x):
    return jnp.tanh(x @ jnp.asarray(params["a"])) @ jnp.asarray(params["b"])


def linear_fn(w, x):
    return x @ w


def square(outputs, targets):
    return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, axis=-1))


@pytest.mark.parametrize("bits", [None, 16])
def test_slopes_are_those_of_jvp(bits):
    count = 3
    params = PARAMS if bits is None else fgrad.quantize(PARAMS, bits)
    model = fast_jit(
        lambda p: analysis.linear_model(
            apply_fn, p, KEY, num_directions=count, epsilon=5e-3, vectorize=2, x=X
        )
    )(params)
    np.testing.assert_allclose(model.outputs, apply_fn(params, X), atol=1e-6)
    assert model.slopes.shape == (count, EXAMPLES, OUTPUTS)
    values = fgrad.dequantize(params)
    for k in range(count):
        z_key = perturbations.sample_key(KEY, 0, k)
        zeros = jax.tree.map(jnp.zeros_like, values)
        z = evaluation.perturb(zeros, z_key, 1.0, perturbations.normal())
        _, true = jax.jvp(lambda p: apply_fn(p, X), (values,), (z,))
        found = model.slopes[k] * count**0.5
        np.testing.assert_allclose(found, true, atol=5e-3 * np.abs(true).max() + 1e-4)


def test_the_model_trains_as_numpy_says():
    rng = np.random.default_rng(0)
    outputs, slopes = rng.normal(size=(6, 2)), rng.normal(size=(3, 6, 2))
    targets, rate, momentum = rng.normal(size=(6, 2)), 0.05, 0.5
    model = analysis.LinearModel(jnp.float32(outputs), jnp.float32(slopes))
    found = analysis.predicted_losses(
        model, square, jnp.float32(targets), optax.sgd(rate, momentum), KEY, steps=5
    )
    a, velocity, expected = np.zeros(3), np.zeros(3), []
    for _ in range(6):
        error = outputs + np.einsum("k,knc->nc", a, slopes) - targets
        expected.append(0.5 * np.mean(np.sum(error**2, -1)))
        velocity = momentum * velocity + np.einsum("knc,nc->k", slopes, error) / 6
        a = a - rate * velocity
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def actual(tx, seed, steps):
    """The losses of a linear network that is trained."""
    w = jnp.zeros((INPUTS, OUTPUTS))

    def loss(w):
        return square(linear_fn(w, X), Y)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w, value_fn=loss)
        w = optax.apply_updates(w, updates)
        return (w, state), loss(w)

    tx = optax.with_extra_args_support(tx(seed))
    _, losses = jax.lax.scan(step, (w, tx.init(w)), length=steps)
    return jnp.append(loss(w), losses)


def predicted(tx, seed, steps, directions):
    """The losses of the same training, predicted."""
    w = jnp.zeros((INPUTS, OUTPUTS))
    model = analysis.linear_model(
        linear_fn, w, jax.random.key(100 + seed), num_directions=directions, x=X
    )
    return analysis.predicted_losses(model, square, Y, tx(seed), KEY, steps=steps)


def over_seeds(function, tx, steps, seeds, *options):
    """The mean losses over seeds, compiled once."""
    found = jax.vmap(lambda seed: function(tx, seed, steps, *options))
    return np.asarray(jax.jit(found)(jnp.arange(seeds))).mean(0)


def test_gradient_descent_is_predicted():
    def tx(seed):
        return optax.sgd(0.3)

    found = over_seeds(predicted, tx, 12, 1, 3000)
    true = over_seeds(actual, tx, 12, 1)
    np.testing.assert_allclose(found, true, rtol=0.03)
    assert true[-1] < 0.75 * true[0]


def test_forward_gradients_are_predicted_with_their_noise():
    """On average over seeds, also where the noise holds the loss up."""

    def tx(seed):
        return optax.chain(
            fgrad.fixed_point_forward_grad(
                jax.random.key(seed),
                estimator=fgrad.estimators.spsa,
                num_perturbations=2,
                epsilon=1e-2,
            ),
            optax.sgd(0.08),
        )

    steps, seeds = 40, 16
    found = over_seeds(predicted, tx, steps, seeds, 400)
    true = over_seeds(actual, tx, steps, seeds)
    descent = over_seeds(actual, lambda seed: optax.sgd(0.08), steps, 1)
    target = 0.7 * true[0]
    reached = [analysis.steps_to_reach(x, target) for x in (found, true, descent)]
    assert reached[0] == pytest.approx(reached[1], rel=0.25)
    # The noise costs steps, which a scaled-down descent would not know of.
    assert min(reached[:2]) > reached[2]
    assert found[-1] == pytest.approx(true[-1], rel=0.15)


def test_batches_are_drawn_and_targets_may_be_out_of_reach():
    model = analysis.LinearModel(jnp.zeros((4, 1)), jnp.ones((1, 4, 1)))
    targets = jnp.arange(4.0)[:, None]
    runs = [
        analysis.predicted_losses(
            model, square, targets, optax.sgd(0.1), key, steps=3, batch_size=batch
        )
        for key, batch in ((KEY, 2), (KEY, 2), (jax.random.key(9), 2), (KEY, None))
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()
    assert (runs[0] != runs[3]).any()
    assert analysis.steps_to_reach(runs[3], 0.0) is None
    assert analysis.steps_to_reach(runs[3], 100.0) == 0


def test_an_epsilon_of_each_leaf_is_refused():
    with pytest.raises(TypeError, match="must be a number, got relative_epsilon"):
        analysis.linear_model(
            apply_fn, PARAMS, KEY, epsilon=fgrad.relative_epsilon(0.01), x=X
        )
