"""The step ahead against a training in float64 and Python integers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import fast_jit
from lanes import every_row
from training_reference import (
    LR,
    RHO,
    SAM_KEY,
    STEPS,
    Grid,
    M,
    Optimizer,
    chain,
    net,
    problem,
    sign_gradient,
    stepped,
    to_numpy,
    train,
    value,
)

import fgrad
from fgrad.enhancements import extrapolation, sharpness_aware


def difference(new, old):
    """What was added: in units of the weights, on a grid in steps."""
    return new.q - old.q if isinstance(new, Grid) else new - old


def ahead(leaf, update, scale):
    """The leaf one scaled update ahead."""
    if not isinstance(leaf, Grid):
        return leaf + scale * update
    q = leaf.q + np.rint(scale * update).astype(np.int64)
    return leaf._replace(q=np.clip(q, -leaf.limit, leaf.limit))


def applied(leaf, update):
    return ahead(leaf, update, 1)


def reference(params, x, scale, two_pass, optimizer):
    """The params after a few steps, in float64 and Python's rounding."""
    x = np.asarray(x, np.float64)
    leaves = {name: to_numpy(leaf) for name, leaf in params.items()}
    last = {name: 0 * difference(leaf, leaf) for name, leaf in leaves.items()}
    optimizers = {n: Optimizer(optimizer, value(v).size) for n, v in leaves.items()}

    def loss(leaves):
        return net({name: value(leaf) for name, leaf in leaves.items()}, x)

    def updates(at, step, optimizers):
        gradient = sign_gradient(loss, at, step)
        return {
            n: difference(
                stepped(v, optimizers[n].direction(gradient[n].reshape(-1))), v
            )
            for n, v in at.items()
        }

    for step in range(STEPS):
        if two_pass:  # by a plain optimizer, which has nothing to remember
            last = updates(leaves, step, optimizers)
        at = {n: ahead(v, last[n], scale) for n, v in leaves.items()}
        last = updates(at, step, optimizers)
        leaves = {n: applied(v, last[n]) for n, v in leaves.items()}
    return leaves


@pytest.mark.parametrize(
    ("bits", "channel_axis", "scale", "two_pass", "optimizer"),
    every_row(
        3,
        [
            (None, None, 3.0, False, "momentum"),
            (None, None, 1.0, False, "sgd"),
            (16, -1, 1.5, False, "momentum"),
            (None, None, 2.0, True, "sgd"),
            (8, None, 2.0, True, "sgd"),
        ],
    ),
)
def test_training_is_the_float64_reference(
    bits, channel_axis, scale, two_pass, optimizer
):
    params, x = problem(bits, channel_axis)
    tx = extrapolation(chain(optimizer=optimizer), scale=scale, two_pass=two_pass)
    trained, state = train(tx, params, batch=x)
    expected = reference(params, x, scale, two_pass, optimizer)
    plain, _ = train(chain(optimizer=optimizer), params, batch=x)
    for name, leaf in trained.items():
        before, after = to_numpy(params[name]), to_numpy(leaf)
        change = value(after) - value(before)
        wanted = value(expected[name]) - value(before)
        # float32 against float64: a tie may be rounded to the other side, once a step.
        grid = STEPS * np.max(after.scale) if bits else 0.0
        assert np.abs(change - wanted).max() <= grid + 1e-4 * np.abs(wanted).max()
        exact = np.mean(np.abs(change - wanted) <= 1e-4 * np.abs(wanted).max())
        assert exact > 0.99
        assert leaf.dtype == params[name].dtype
    # The step ahead matters: without it the training ends elsewhere.
    assert any(
        np.abs(value(to_numpy(plain[n])) - value(to_numpy(trained[n]))).max() > LR / M
        for n in params
    )
    assert int(state.inner_updates) == 1 + two_pass
    assert (state.last == ()) == two_pass


def test_the_weights_never_leave_their_grid():
    """w' may be clipped at the end of the grid while w is not, and the other way."""
    params = {
        "w": fgrad.QTensor(jnp.array([120, -120, 3], jnp.int8), jnp.float32(1), 8)
    }

    def update(updates, state, params=None):
        seen.append(params["w"].qvalue)
        return step, state

    seen = []
    step = {"w": fgrad.fixed_point.as_update(params["w"], jnp.array([40, -40, 1]))}
    tx = extrapolation(optax.GradientTransformation(lambda p: (), update), scale=2.0)
    state = tx.init(params)
    first, state = tx.update(params, state, params)
    assert first["w"].qvalue.tolist() == [7, -7, 1]
    params = optax.apply_updates(params, first)
    second, _ = tx.update(params, state, params)
    assert [q.tolist() for q in seen] == [[120, -120, 3], [127, -127, 6]]
    assert second["w"].qvalue.tolist() == [0, 0, 1]
    assert optax.apply_updates(params, second)["w"].qvalue.tolist() == [127, -127, 5]


@pytest.mark.parametrize(("two_pass", "passes"), [(False, 2 * M), (True, 4 * M)])
def test_forward_passes_are_those_that_happen(two_pass, passes):
    params, calls = {"w": jnp.ones(8)}, []

    def counted(params):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(params["w"] ** 2)

    tx = extrapolation(chain(), two_pass=two_pass)
    tx = sharpness_aware(tx, SAM_KEY, rho=RHO)  # which counts them
    _, state = fast_jit(functools.partial(tx.update, value_fn=counted))(
        params, tx.init(params), params
    )
    jax.effects_barrier()
    assert int(state.forward_passes) == len(calls) == 2 + passes


def test_bad_options_fail_when_the_transformation_is_built():
    with pytest.raises(ValueError, match="positive and finite, got 0"):
        extrapolation(chain(), scale=0.0)
    with pytest.raises(ValueError, match="positive and finite, got nan"):
        extrapolation(chain(), scale=float("nan"))
    with pytest.raises(TypeError, match="inner must be"):
        extrapolation(1)
    with pytest.raises(TypeError, match="two_pass must be True or False, got 2"):
        extrapolation(chain(), two_pass=2)
    params = {"w": jnp.ones(2)}
    tx = extrapolation(chain())
    with pytest.raises(ValueError, match="extrapolation needs the parameters"):
        tx.update(params, tx.init(params), value_fn=lambda p: jnp.float32(0))
