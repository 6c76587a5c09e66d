"""The ascent of sharpness-aware updates: when it happens, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from compiling import fast_jit
from training_reference import CHOICE_KEY, EPSILON, KEY, RHO, SAM_KEY, M, chain

import fgrad
from fgrad import perturbations
from fgrad.enhancements import sharpness_aware, sparse_update


def test_forward_passes_are_those_that_happen():
    params = {"w": jnp.ones(8)}
    calls = []

    def counted(params):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(params["w"] ** 2)

    inner = sparse_update(
        chain(),
        density=0.5,
        criterion="importance",
        key=CHOICE_KEY,
        num_perturbations=2,
    )
    tx = sharpness_aware(inner, SAM_KEY, rho=RHO)
    update = fast_jit(functools.partial(tx.update, value_fn=counted))
    state, passes = tx.init(params), []
    for _ in range(2):
        _, state = update(params, state, params)
        jax.effects_barrier()
        passes.append((int(state.forward_passes), len(calls)))
        calls.clear()
    assert passes == [(2 + 2 * 2 + 2 * M,) * 2, (2 + 2 * M,) * 2]
    assert int(state.count) == 2


def test_the_ascent_waits_for_a_difference():
    params = {"w": jnp.ones(8)}
    tx = sharpness_aware(chain(num_perturbations=1), SAM_KEY, rho=RHO)

    @fast_jit
    def ascent(factor):
        def loss(params):
            return factor * jnp.sum(params["w"])

        return tx.update(params, tx.init(params), params, obj_fn=loss)[1].ascent

    up = int(ascent(1.0))
    assert abs(up) == 1
    assert [int(ascent(f)) for f in (-1.0, 0.0, jnp.nan)] == [-up, 0, 0]


def test_masked_leaves_take_no_part_in_the_ascent():
    params = {"w": jnp.array([1.0]), "v": jnp.array([1.0])}
    seen = []

    def loss(p):
        jax.debug.callback(
            lambda *p: seen.append([float(x[0]) for x in p]), *p.values()
        )
        return jnp.sum(p["w"] + p["v"])

    inner = fgrad.fixed_point_forward_grad(
        KEY, num_perturbations=1, mask=False, epsilon=EPSILON
    )
    tx = sharpness_aware(
        inner,
        SAM_KEY,
        rho=optax.constant_schedule(0.5),
        perturbation=perturbations.rademacher(),
        mask={"w": True, "v": False},
    )
    fast_jit(functools.partial(tx.update, value_fn=loss))(
        params, tx.init(params), params
    )
    jax.effects_barrier()
    # Leaves come in the order of their names. Up is where w is larger.
    assert sorted(seen) == [[1.0, 0.5], [1.0, 1.5], [1.0, 1.5], [1.0, 1.5]]


def test_the_ascent_makes_no_copy_of_the_weights():
    layers, width = 6, 256
    params = {f"w{i}": jnp.full((width, width), 0.01) for i in range(layers)}

    def deep(params, batch):
        for i in range(layers):
            batch = jnp.tanh(batch @ params[f"w{i}"])
        return jnp.mean(batch)

    inner = fgrad.fixed_point_forward_grad(KEY, num_perturbations=1)
    tx = sharpness_aware(inner, SAM_KEY, rho=RHO)
    state = jax.eval_shape(tx.init, params)

    @jax.jit
    def losses(params, state, batch):
        _, state = tx.update(params, state, params, value_fn=deep, batch=batch)
        return state.inner_state.loss_differences

    compiled = losses.lower(params, state, jnp.ones((8, width))).compile()
    layer = 4 * width**2
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * layer


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda t: sharpness_aware(t, KEY, rho=0.0), ValueError, "positive, got 0.0"),
        (lambda t: sharpness_aware(t, 0, rho=1.0), TypeError, "jax.random.key"),
        (lambda t: sharpness_aware(1, KEY, rho=1.0), TypeError, "inner must be"),
        (
            lambda t: sharpness_aware(t, KEY, rho=fgrad.relative_epsilon(1.0)),
            TypeError,
            "number or a schedule",
        ),
        (
            lambda t: sharpness_aware(t, KEY, rho=1.0, perturbation="normal"),
            TypeError,
            "use for example fgrad.perturbations",
        ),
    ],
)
def test_bad_options_fail_when_the_transformation_is_built(build, error, message):
    with pytest.raises(error, match=message):
        build(chain())


def test_what_init_and_update_refuse():
    params = {"w": jnp.ones(4)}
    tx = sharpness_aware(chain(), KEY, rho=1e-3)
    with pytest.raises(ValueError, match=r"rho of sharpness_aware.*half a weight"):
        tx.init({"w": fgrad.quantize(jnp.ones(4), bits=8)})
    state = tx.init(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, state, value_fn=lambda p: 0.0)
    with pytest.raises(ValueError, match="needs the loss"):
        tx.update(params, state, params)
