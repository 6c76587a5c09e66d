"""Enhancements alone and inside one another against a training in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import fast_jit
from training_reference import (
    CHOICE_KEY,
    RHO,
    SAM_KEY,
    STEPS,
    M,
    chain,
    magnitude_reference,
    problem,
    reference,
    to_numpy,
    train,
    value,
)

from fgrad.enhancements import kernel_normalization, sharpness_aware, sparse_update


@pytest.mark.parametrize(
    ("bits", "channel_axis", "density", "sam", "normalised", "optimizer", "vectorize"),
    [
        (None, None, None, "outside", False, "sgd", 1),
        (8, -1, None, "outside", True, "sgd", 1),
        (None, None, 0.1, None, False, "adam", 2),
        (8, None, 0.1, None, False, "sgd", M),
        (16, None, 0.6, "inside", True, "momentum", 1),
        (16, -1, 0.6, "outside", True, "adam", 1),
    ],
)
def test_training_is_the_float64_reference(
    bits, channel_axis, density, sam, normalised, optimizer, vectorize
):
    params, x = problem(bits, channel_axis)
    links = [kernel_normalization()] if normalised else []
    tx = chain(*links, optimizer=optimizer, vectorize=vectorize)
    ascent = functools.partial(sharpness_aware, key=SAM_KEY, rho=RHO)
    indices = None
    if sam == "inside" or (sam and not density):
        tx = ascent(tx)
    if density:
        tx = sparse_update(tx, density=density)
        indices = {n: magnitude_reference(v, density) for n, v in params.items()}
    if sam == "outside" and density:
        tx = ascent(tx)
    trained, _ = train(tx, params, batch=x)
    expected = reference(
        params, x, indices, sam=sam, normalised=normalised, optimizer=optimizer
    )
    for name, leaf in trained.items():
        before, after = to_numpy(params[name]), to_numpy(leaf)
        change = value(after) - value(before)
        wanted = value(expected[name]) - value(before)
        # float32 against float64: a tie may be rounded to the other side, once a step.
        grid = STEPS * np.max(after.scale) if bits else 0.0
        assert np.abs(change - wanted).max() <= grid + 1e-4 * np.abs(wanted).max()
        exact = np.mean(np.abs(change - wanted) <= 1e-4 * np.abs(wanted).max())
        assert exact > 0.99
        assert np.abs(wanted).max() > 0
        if density:
            outside = np.delete(change, indices[name])
            assert outside.size == 0 or np.all(outside == 0)
        assert jax.tree.map(lambda a: a.dtype, leaf) == jax.tree.map(
            lambda a: a.dtype, params[name]
        )


@pytest.mark.parametrize("wrap", ["sharpness", "sparse"])
def test_the_loss_gets_what_it_names_and_inner_gets_all(wrap):
    seen = {}

    def loss(params, batch, *, scale=1.0):
        seen.update(batch=batch, scale=scale)
        return jnp.sum(params["w"]) * scale

    def update(updates, state, params=None, **extra):
        seen.update(extra=set(extra))
        return updates, state

    listener = optax.GradientTransformationExtraArgs(lambda p: (), update)
    inner = optax.chain(chain(num_perturbations=1), listener)
    tx = (
        sharpness_aware(inner, SAM_KEY, rho=RHO)
        if wrap == "sharpness"
        else sparse_update(inner, density=0.5)
    )
    params = {"w": jnp.ones(4)}
    extra = {"batch": jnp.ones(1), "scale": 2.0, "unknown": 3}
    fast_jit(lambda p: tx.update(p, tx.init(p), p, obj_fn=loss, **extra)[0])(params)
    assert seen["scale"] == 2.0
    assert seen["extra"] == {"value_fn", *extra}
    with pytest.raises(TypeError, match="value_fn needs batch"):
        tx.update(params, tx.init(params), params, value_fn=loss)


def test_inner_wrappers_restart_too():
    params = {"w": jnp.linspace(-1, 1, 40)}

    def loss(params):
        return jnp.sum(params["w"] ** 2)

    tx = sparse_update(
        sharpness_aware(chain(optimizer="momentum"), SAM_KEY, rho=RHO),
        density=0.2,
        criterion="importance",
        key=CHOICE_KEY,
        num_perturbations=1,
        reselect_every=2,
    )
    trained, state = train(tx, params, steps=3, loss_fn=loss)
    assert int(state.inner_state.count) == 3
    assert int(state.inner_state.inner_state[0].count) == 3
    assert int(state.importance_passes) == 2
    assert float(loss(trained)) < float(loss(params))
