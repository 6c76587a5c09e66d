"""Kernel normalization against NumPy's norms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import fast_jit
from training_reference import (
    EPSILON,
    KEY,
    draw,
    loss_fn,
    nominal_over_realised,
    problem,
    to_numpy,
    value,
)

import fgrad
from fgrad.enhancements import kernel_normalization


def norm(array, per):
    axes = tuple(range(array.ndim - 1)) if per == "channel" and array.ndim > 1 else None
    return np.sqrt(np.sum(array.astype(np.float64) ** 2, axis=axes, keepdims=True))


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize(
    ("bits", "channel_axis"), [(None, None), (16, None), (16, -1), (16, 0), (8, None)]
)
def test_gradients_get_the_norms_of_the_weights(per, bits, channel_axis):
    rng = np.random.default_rng(2)
    shapes = {"k": (3, 4, 5), "v": (7,), "s": ()}
    params = {
        n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()
    }
    gradient = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
    given = gradient
    if bits:
        params = fgrad.quantize(params, bits=bits, channel_axis=channel_axis)
        given = {
            n: fgrad.QTensor(gradient[n], jnp.zeros_like(p.scale), p.bits)
            for n, p in params.items()
        }
    tx = kernel_normalization(per=per)
    updates, _ = fast_jit(tx.update)(given, tx.init(params), params)
    for name, leaf in params.items():
        g = np.asarray(gradient[name])
        wanted = g / norm(g, per) * norm(value(to_numpy(leaf)), per)
        got = updates[name].qvalue if bits else updates[name]
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
        assert got.dtype == jnp.float32


def test_zeros_make_no_nan_and_zero_weights_move():
    params = {
        "zero": jnp.zeros(4),
        "grid": fgrad.quantize(jnp.zeros((2, 3))),
        "bias": jnp.ones(2),
        "tiny": jnp.array([3e-16, 4e-16]),
    }
    gradient = {
        "zero": jnp.array([0.0, 0.0, 2.0, 0.0]),
        "grid": fgrad.QTensor(jnp.ones((2, 3)), jnp.float32(0), 16),
        "bias": jnp.zeros(2),
        "tiny": jnp.array([0.0, 1e-12]),
    }
    tx = kernel_normalization(floor=0.01)
    updates, _ = fast_jit(tx.update)(gradient, tx.init(params), params)
    # The floor is a root mean square: 0.01 √4, 0.01 √6 / √6 and 0.01 √2.
    np.testing.assert_allclose(updates["zero"], [0, 0, 0.02, 0], rtol=1e-6)
    np.testing.assert_allclose(updates["grid"].qvalue, np.full((2, 3), 0.01), rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], [0, 0])
    np.testing.assert_allclose(updates["tiny"], [0, 0.01 * math.sqrt(2)], rtol=1e-6)


def test_one_direction_is_the_papers_equation():
    params, x = problem(16)
    tx = optax.chain(
        fgrad.fixed_point_forward_grad(KEY, epsilon=EPSILON, num_perturbations=1),
        kernel_normalization(mask={"w1": True, "b1": True, "w2": False}),
    )
    update = fast_jit(functools.partial(tx.update, value_fn=loss_fn))
    updates, state = update(params, tx.init(params), params, batch=x)
    sign = np.sign(state[0].loss_differences[0])
    z = draw(KEY, 0, 0, {n: to_numpy(p) for n, p in params.items()})
    for name in ("w1", "b1"):
        w = np.linalg.norm(value(to_numpy(params[name])))
        wanted = sign * z[name] / np.linalg.norm(z[name]) * w
        np.testing.assert_allclose(updates[name].qvalue, wanted, rtol=1e-5)
    factor = nominal_over_realised(to_numpy(params["w2"]), EPSILON)
    wanted = sign * z["w2"] / 32 * factor
    np.testing.assert_allclose(updates["w2"].qvalue, wanted, rtol=1e-6)


def test_float_dtypes_are_kept():
    params = {"w": jnp.ones(8, jnp.bfloat16)}
    tx = kernel_normalization()
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [({"per": "row"}, "got 'row'"), ({"floor": 0.0}, "positive and finite, got 0.0")],
)
def test_bad_options_fail_when_the_transformation_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        kernel_normalization(**options)


def test_update_needs_the_parameters():
    params = {"w": jnp.ones(4)}
    with pytest.raises(ValueError, match="needs the parameters"):
        kernel_normalization().update(params, optax.EmptyState())
