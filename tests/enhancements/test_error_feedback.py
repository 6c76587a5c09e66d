import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fgrad
from fgrad import enhancements


def chain(**options):
    return optax.chain(enhancements.error_feedback(**options), fgrad.quantized_update())


def as_update(params, values):
    return dataclasses.replace(
        params, qvalue=values, scale=jnp.zeros_like(params.scale)
    )


@pytest.mark.parametrize("bits", [4, 8, 12])
@pytest.mark.parametrize("channel_axis", [None, -1])
def test_steps_and_residuals_are_those_of_python_integers(bits, channel_axis):
    rng = np.random.default_rng(0)
    params = fgrad.quantize(
        jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
        bits=bits,
        headroom=4.0,
        channel_axis=channel_axis,
    )
    tx = chain()
    state = tx.init(params)
    scale = np.broadcast_to(np.asarray(params.scale, np.float64), (5, 3))
    residual = np.zeros((5, 3), object)
    taken, asked = np.zeros((5, 3)), np.zeros((5, 3))
    step = jax.jit(tx.update)
    for _ in range(20):
        # Shares of a step that are whole 256ths, so that no rounding is in doubt.
        parts = rng.integers(-700, 700, size=(5, 3))
        values = jnp.asarray(parts / 256 * scale, jnp.float32)
        updates, state = step(as_update(params, values), state, params)
        for i in np.ndindex(5, 3):
            total = int(parts[i]) + residual[i]
            steps = (total + 128) // 256
            residual[i] = total - 256 * steps
            assert int(updates.qvalue[i]) == steps
            assert int(state[0].residual[i]) == residual[i]
        asked += parts / 256
        taken += np.asarray(updates.qvalue)
    # Nothing is lost: whatever was asked for and not taken is in the residual.
    np.testing.assert_allclose(asked - taken, np.asarray(state[0].residual) / 256)


def test_updates_that_rounding_loses_arrive():
    params = fgrad.quantize(jnp.array([1.0, -1.0]), bits=8, headroom=2.0)
    small = as_update(params, params.scale * jnp.array([0.1, -0.2]))
    for tx, expected in (
        (fgrad.quantized_update(stochastic_below=0), [0, 0]),
        (chain(), [10, -20]),
    ):
        trained, state = params, tx.init(params)
        for _ in range(100):
            updates, state = tx.update(small, state, trained)
            trained = optax.apply_updates(trained, updates)
        np.testing.assert_allclose(
            trained.qvalue - np.int32(params.qvalue), expected, atol=1
        )


def test_only_leaves_of_few_bits_that_are_trained_have_a_residual():
    w = jnp.ones(3)
    params = {
        "float": w,
        "wide": fgrad.quantize(w, bits=16),
        "narrow": fgrad.quantize(w, bits=8),
        "frozen": fgrad.quantize(w, bits=8),
    }
    mask = {"float": True, "wide": True, "narrow": True, "frozen": False}
    tx = enhancements.error_feedback(mask=mask)
    state = tx.init(params)
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == [jnp.int8]
    assert state.residual["narrow"].shape == (3,)
    updates = jax.tree.map(
        lambda p: (
            as_update(p, jnp.full(3, 1e-4)) if fgrad.fixed_point.is_qtensor(p) else p
        ),
        params,
        is_leaf=fgrad.fixed_point.is_qtensor,
    )
    after, state = tx.update(updates, state, params)
    for name in ("float", "wide", "frozen"):
        for found, given in zip(
            jax.tree.leaves(after[name]), jax.tree.leaves(updates[name]), strict=True
        ):
            np.testing.assert_array_equal(found, given)


def test_not_a_number_is_no_change():
    params = fgrad.quantize(jnp.array([1.0, 1.0]), bits=8)
    tx = enhancements.error_feedback()
    values = jnp.array([jnp.nan, 2.0]) * params.scale
    updates, state = tx.update(as_update(params, values), tx.init(params), params)
    np.testing.assert_allclose(updates.qvalue / params.scale, [0, 2], rtol=1e-6)
    np.testing.assert_array_equal(state.residual, 0)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="below, in bits, must be an integer from"):
        enhancements.error_feedback(below=2)
    params = fgrad.quantize(jnp.ones(2), bits=8)
    tx = enhancements.error_feedback()
    with pytest.raises(ValueError, match="error_feedback needs the parameters"):
        tx.update(params, tx.init(params))


def test_eight_bits_train_at_rates_that_rounding_freezes():
    target = jax.random.normal(jax.random.key(0), (4, 4))

    def loss_fn(w):
        return jnp.mean((jnp.asarray(w) - target) ** 2)

    start = fgrad.quantize(jnp.zeros((4, 4)) + 0.01, bits=8, headroom=300.0)

    def train(*links):
        tx = optax.chain(
            fgrad.fixed_point_forward_grad(
                jax.random.key(1), epsilon=0.1, num_perturbations=4
            ),
            optax.sgd(0.008),
            *links,
            fgrad.quantized_update(stochastic_below=0),
        )

        @jax.jit
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params, value_fn=loss_fn)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=800)
        return float(loss_fn(params))

    assert train(enhancements.error_feedback()) < 0.2 * train()
