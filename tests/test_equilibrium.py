"""A network that is a fixed point: its gradient, its memory, and its guard."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import fast_jit
from scipy import optimize

import fgrad
from experiments.models import equilibrium
from fgrad import evaluation, perturbations

WIDTH, INPUTS, EXAMPLES = 6, 5, 4
X = jax.random.normal(jax.random.key(0), (EXAMPLES, INPUTS))
Y = jnp.arange(EXAMPLES) % 3


def make(**options):
    model = equilibrium.Equilibrium(
        **{"num_classes": 3, "width": WIDTH, "tolerance": 1e-6, "contraction": None}
        | options
    )
    return model, model.init(jax.random.key(1), X)["params"]


def loss_of(model):
    def loss_fn(params):
        logits = model.apply({"params": params}, X)
        return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()

    return loss_fn


def test_the_solver_finds_the_fixed_point():
    model, params = make()
    logits = fast_jit(model.apply)({"params": params}, X)
    w = {k: np.asarray(v, np.float64) for k, v in params.items() if k != "head"}
    for x, found in zip(np.asarray(X, np.float64), logits, strict=True):
        drive = x @ w["input"] + w["bias"]
        z = optimize.root(lambda z, d=drive: np.tanh(z @ w["state"] + d) - z, 0 * drive)
        assert z.success
        head = params["head"]
        np.testing.assert_allclose(
            found, z.x @ np.asarray(head["kernel"]) + head["bias"], atol=2e-5
        )


def test_a_bounded_layer_converges_whatever_its_weights():
    model, params = make(contraction=0.9, max_steps=200)
    wild = params | {"state": -6.0 * jnp.eye(WIDTH) + params["state"]}
    assert np.isfinite(fast_jit(model.apply)({"params": wild}, X)).all()
    assert int(equilibrium.solver_steps(model, wild, X)) < 200
    used = np.asarray(model.bounded(wild)["state"], np.float64)
    assert 0.5 < np.linalg.norm(used, 2) <= 0.9 + 1e-6
    tame = params | {"state": 0.01 * params["state"]}  # is left as it is
    np.testing.assert_array_equal(model.bounded(tame)["state"], tame["state"])


def test_the_implicit_gradient_is_that_of_many_unrolled_steps():
    model, params = make()

    def unrolled(params):
        z = jnp.zeros((EXAMPLES, WIDTH))
        for _ in range(40):
            z = equilibrium._cell(params, z, X)
        logits = z @ params["head"]["kernel"] + params["head"]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()

    found = fast_jit(jax.grad(loss_of(model)))(params)
    true = fast_jit(jax.grad(unrolled))(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(true), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_slopes_by_forward_passes_are_those_of_the_implicit_function():
    model, params = make()
    gradient = fast_jit(jax.grad(loss_of(model)))(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    epsilon, z = 1e-2, perturbations.normal()
    both = fast_jit(
        lambda key: evaluation.dual_forward(loss_of(model), params, key, epsilon, z)
    )
    slopes, expected = [], []
    for key in jax.random.split(jax.random.key(2), 5):
        plus, minus = both(key)
        slopes.append((plus - minus) / (2 * epsilon))
        direction = evaluation.perturb(zeros, key, 1.0, z)
        products = jax.tree.map(jnp.vdot, gradient, direction)
        expected.append(sum(jax.tree.leaves(products)))
    np.testing.assert_allclose(slopes, expected, rtol=0.02, atol=2e-3)


def test_the_phantom_gradient_is_near_and_not_equal():
    gradients = []
    for steps in (0, 1, 20):
        model, params = make(phantom_steps=steps)
        found = fast_jit(jax.grad(loss_of(model)))(params)
        gradients.append(np.concatenate([np.ravel(g) for g in jax.tree.leaves(found)]))
    exact, one, many = gradients
    cosines = [
        g @ exact / np.linalg.norm(g) / np.linalg.norm(exact) for g in (one, many)
    ]
    assert 0.5 < cosines[0] < 0.999
    assert cosines[1] > 0.9999


def temporaries(function, params):
    compiled = jax.jit(function).lower(params).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_memory_of_a_forward_step_does_not_depend_on_the_solver_steps():
    tx = fgrad.qzo_ff(0.1, jax.random.key(0), num_perturbations=2)
    sizes = []
    for steps in (5, 500):
        model, params = make(max_steps=steps)
        state = tx.init(params)

        def step(params, model=model, state=state):
            return tx.update(params, state, params, value_fn=loss_of(model))[0]

        sizes.append(temporaries(step, params))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
def test_a_solver_that_does_not_converge_is_no_slope(on_nonfinite):
    model, params = make(max_steps=60)
    # A negative feedback this strong has no stable fixed point: z flips for ever.
    params = params | {"state": -6.0 * jnp.eye(WIDTH)}
    tx = fgrad.fixed_point_forward_grad(
        jax.random.key(0), num_perturbations=2, on_nonfinite=on_nonfinite
    )
    update = fast_jit(lambda p: tx.update(p, tx.init(p), p, value_fn=loss_of(model)))
    if on_nonfinite == "raise":
        with pytest.raises(jax.errors.JaxRuntimeError, match="non-finite loss at step"):
            jax.block_until_ready(update(params))
        return
    gradient, state = update(params)
    assert int(state.nonfinite_pairs) == 2
    assert not any(np.any(g) for g in jax.tree.leaves(gradient))
    # The examples that converge keep their values.
    z, count = equilibrium.solved(
        lambda z: jnp.stack([0.5 * z[0], -z[1]]),
        jnp.ones((2, 1)),
        tolerance=1e-3,
        max_steps=30,
    )
    assert abs(float(z[0, 0])) < 1e-3
    assert np.isnan(z[1, 0])
    assert int(count) == 30
