"""Coefficients of losses, and gradients of coefficients."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import every, every_row

import fgrad
from fgrad import estimators, perturbations


def coefficients(differences):
    zeros = jnp.zeros(len(differences))
    return estimators.normalized_spsa(jnp.asarray(differences), zeros, 1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_normalized_coefficients_have_unit_mean_square_whatever_the_loss(scale):
    d = np.random.default_rng(0).normal(size=16)
    expected = d / np.sqrt(np.mean(d**2))
    found = coefficients((d * scale).astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_normalized_coefficients_leave_out_what_is_not_finite():
    found = coefficients([3.0, np.nan, 4.0, np.inf])
    expected = np.array([3.0, 0.0, 4.0, 0.0]) / np.sqrt((9 + 16) / 2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(coefficients([0.0, 0.0]), 0)
    np.testing.assert_array_equal(coefficients([np.nan, np.nan]), 0)


@pytest.mark.parametrize("difference", [2.5, -1e-20, 0.0])
def test_one_normalized_difference_is_its_sign(difference):
    assert coefficients([difference])[0] == np.sign(difference)


@pytest.mark.parametrize("bits", every(2, [16, None]))
@pytest.mark.parametrize("vectorize", [1, 4])
def test_a_normalized_gradient_is_the_weighted_mean_of_z(bits, vectorize):
    rng = np.random.default_rng(1)
    target = jnp.asarray(rng.normal(size=6), jnp.float32)

    def loss_fn(w):
        return jnp.sum((jnp.asarray(w) - target) ** 2)

    w = jnp.asarray(rng.normal(size=6), jnp.float32)
    params = fgrad.quantize(w, bits=bits) if bits else w
    key, m = jax.random.key(3), 4
    gradient = estimators.forward_gradient(
        loss_fn,
        params,
        key,
        epsilon=1e-2,
        num_perturbations=m,
        vectorize=vectorize,
        estimator=estimators.normalized_spsa,
    ).gradient
    perturbation = perturbations.normal()
    total, differences, zs = np.zeros(6), [], []
    for i in range(m):
        z_key = perturbations.sample_key(key, 0, i)
        plus, minus = fgrad.dual_forward(loss_fn, params, z_key, 1e-2)
        leaf_key = perturbations.leaf_keys(z_key, [""])[""]
        z = np.asarray(perturbation.sample(leaf_key, (6,)), np.float64)
        zs.append(z * perturbation.step)
        differences.append(float(plus) - float(minus))
    c = np.array(differences) / np.sqrt(np.mean(np.square(differences)))
    total = sum(ci * z for ci, z in zip(c, zs, strict=True)) / m
    found = gradient.qvalue if bits else gradient
    np.testing.assert_allclose(found, total, rtol=1e-3, atol=1e-5)


# ------------------------------------------------- losses near the ends of their types


def exactly(x):
    """A loss as an exact rational number."""
    return (
        Fraction(float(x)) if np.issubdtype(x.dtype, np.floating) else Fraction(int(x))
    )


def extreme_losses(dtype):
    """All pairs of losses near the ends of a type, near zero and between."""
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(dtype)
        values = [info.min, info.min + 1, info.max - 1, info.max, 0, 1, 3]
        values += [int(0.93 * info.max), int(0.93 * info.min), int(info.max // 3)]
    else:
        info = jnp.finfo(dtype)
        values = [info.min, info.max, 0.0, info.tiny, 1.0, -1.0, 3.0]
        values += [0.9 * float(info.max), -0.9 * float(info.max)]
    values = np.array(values).astype(dtype)
    plus, minus = (side.ravel() for side in np.meshgrid(values, values))
    return plus, minus


TYPES = [np.int8, np.int16, np.int32, np.uint8, np.uint32]
TYPES += [np.float16, jnp.bfloat16, np.float32]
every_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda t: np.dtype(t).name)


@every_type
def test_the_sign_of_a_difference_is_right_up_to_the_ends_of_its_type(dtype):
    plus, minus = extreme_losses(np.dtype(dtype))
    found = estimators.sign_m_spsa(jnp.asarray(plus), jnp.asarray(minus), 1e-3)
    wide = [
        (exactly(np.asarray(a)), exactly(np.asarray(b)))
        for a, b in zip(
            plus.astype(np.float64) if np.dtype(dtype).kind not in "iu" else plus,
            minus.astype(np.float64) if np.dtype(dtype).kind not in "iu" else minus,
            strict=True,
        )
    ]
    assert found.dtype == jnp.int32
    assert found.tolist() == [(a > b) - (a < b) for a, b in wide]


@every_type
def test_half_a_difference_is_finite_and_rounded_once(dtype):
    plus, minus = extreme_losses(np.dtype(dtype))
    half = estimators.half_difference(jnp.asarray(plus), jnp.asarray(minus))
    assert half.dtype == jnp.float32
    floats = np.dtype(dtype).kind not in "iu"
    for a, b, found in zip(plus, minus, np.asarray(half), strict=True):
        a, b = (np.asarray(v, np.float64 if floats else None) for v in (a, b))
        wanted = (exactly(a) - exactly(b)) / 2
        assert np.isfinite(found)
        # A rounding of float32; what is below its normal numbers may be flushed.
        error = abs(Fraction(float(found)) - wanted)
        assert error <= abs(wanted) * Fraction(1, 2**23) + Fraction(2.0**-125)


@every_type
def test_normalized_coefficients_are_right_up_to_the_ends_of_their_type(dtype):
    plus, minus = extreme_losses(np.dtype(dtype))
    found = estimators.normalized_spsa(jnp.asarray(plus), jnp.asarray(minus), 1e-3)
    wide = np.longdouble if np.dtype(dtype).kind in "iu" else np.float64
    d = (plus.astype(wide) - minus.astype(wide)).astype(np.float64)
    d /= np.abs(d).max()
    np.testing.assert_allclose(found, d / np.sqrt(np.mean(d**2)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("high", "low", "difference"),
    [
        (np.int32(2_000_000_000), np.int32(-2_000_000_000), 4e9),
        (np.float16(6e4), np.float16(-6e4), 120_000.0),
        (np.float32(3e38), np.float32(-3e38), float(np.finfo(np.float32).max)),
    ],
)
@pytest.mark.parametrize(
    "estimator", [estimators.sign_m_spsa, estimators.normalized_spsa]
)
def test_a_step_on_losses_that_are_far_apart_is_finite(
    high, low, difference, estimator
):
    def loss_fn(w):
        return jnp.where(w[0] > 0, high, low)

    estimate = estimators.forward_gradient(
        loss_fn,
        jnp.zeros(1),
        jax.random.key(0),
        num_perturbations=5,
        estimator=estimator,
    )
    assert int(estimate.nonfinite_pairs) == 0
    moved = np.asarray(estimate.loss_differences)
    assert set(np.abs(moved[moved != 0])) == {np.float32(difference)}
    assert np.all(np.isfinite(estimate.loss))
    middle = (float(high) + float(low)) / 2
    assert abs(float(estimate.loss) - middle) <= 1e-6 * float(high)
    # The loss rises with w: a coefficient has the sign of z.
    assert np.isfinite(estimate.gradient[0])
    assert float(estimate.gradient[0]) > 0


def test_spsa_of_losses_whose_quotient_overflows_leaves_the_pair_out():
    estimate = estimators.forward_gradient(
        lambda w: jnp.where(w[0] > 0, 3e38, -3e38),
        jnp.zeros(1),
        jax.random.key(0),
        estimator=estimators.spsa,
        epsilon=1e-3,
    )
    assert int(estimate.nonfinite_pairs) == 3
    assert float(estimate.gradient[0]) == 0


# ------------------------------------------------------------- gradients from a record


POLICIES = {
    "float": (None, {}),
    "bfloat16": (jnp.bfloat16, {}),
    "int16": (16, {}),
    "int8 on its grid": (8, {"low_bit": fgrad.on_grid(0.3)}),
    "int8 rounded": (8, {"epsilon": 0.05}),
    "low rank": (None, {"perturbation": perturbations.low_rank(2)}),
    "int16, low rank": (16, {"perturbation": perturbations.low_rank(2)}),
    "relative epsilon": (16, {"epsilon": fgrad.relative_epsilon(0.02)}),
    "epsilon by a schedule": (None, {"epsilon": lambda count: 0.1 / (1 + count)}),
}


@pytest.mark.parametrize(
    ("name", "estimator"),
    every_row(
        3,
        [
            *((name, estimators.sign_m_spsa) for name in POLICIES),
            ("int16", estimators.spsa),
            ("float", estimators.normalized_spsa),
        ],
    ),
)
def test_the_recorded_losses_make_the_same_gradient(name, estimator):
    kind, policy = POLICIES[name]
    params = {
        "w": jnp.sin(jnp.arange(1200.0)).reshape(40, 30),
        "b": jnp.linspace(-1.0, 0.7, 12).reshape(3, 4),
        "frozen": jnp.ones(3),
    }
    mask = {"w": True, "b": True, "frozen": False}
    if isinstance(kind, int):
        params = fgrad.quantize(params, kind)
    elif kind is not None:
        params = jax.tree.map(lambda w: w.astype(kind), params)
    policy = {"epsilon": 0.02, **policy}

    def loss_fn(p):
        w, b = (jnp.asarray(p[n]).astype(jnp.float32) for n in ("w", "b"))
        return jnp.sum(jnp.tanh(w[:3] @ w.T)) + jnp.sum(jnp.sin(3 * b))

    record = []

    def recording(plus, minus, epsilon):
        record.append((np.asarray(plus), np.asarray(minus)))
        return estimator(plus, minus, epsilon)

    key, options = jax.random.key(3), {"mask": mask, **policy}
    whole = estimators.forward_gradient(
        loss_fn,
        params,
        key,
        step=7,
        num_perturbations=3,
        estimator=recording,
        vectorize=2,
        **options,
    )
    ((plus, minus),) = record
    assert plus.shape == (3,)
    assert np.all(plus != minus)
    half = fgrad.gradient_from_losses(
        params, key, 7, plus, minus, estimator=estimator, **options
    )
    assert jax.tree.structure(half) == jax.tree.structure(whole)
    for found, expected in zip(
        jax.tree.leaves(half), jax.tree.leaves(whole), strict=True
    ):
        assert found.dtype == expected.dtype
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()
    values = jax.tree.leaves(half.gradient["w"])[0]
    assert np.any(np.asarray(values).astype(np.float32) != 0)
    other = fgrad.gradient_from_losses(
        params, key, 8, plus, minus, estimator=estimator, **options
    )
    assert np.any(np.asarray(jax.tree.leaves(other.gradient["w"])[0] != values))


def test_a_recorded_pair_that_is_not_finite_is_left_out():
    w, key = jnp.ones(4), jax.random.key(0)
    plus, minus = jnp.array([1.0, jnp.nan, 2.0]), jnp.array([0.0, 1.0, 3.0])
    estimate = fgrad.gradient_from_losses(w, key, 0, plus, minus)
    assert int(estimate.nonfinite_pairs) == 1
    z = [
        np.asarray(
            perturbations.normal().sample(
                perturbations.leaf_keys(perturbations.sample_key(key, 0, i), [""])[""],
                (4,),
            ),
            np.float32,
        )
        for i in (0, 2)
    ]
    np.testing.assert_allclose(
        estimate.gradient, (z[0] - z[1]) / 32 / 3, rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize(
    "shapes", [((3,), (2,)), ((), ()), ((0,), (0,)), ((2, 2), (2, 2))]
)
def test_losses_that_are_no_two_vectors_are_refused(shapes):
    plus, minus = map(jnp.ones, shapes)
    with pytest.raises(ValueError, match=r"needs two arrays \[m\].*got shapes"):
        fgrad.gradient_from_losses(jnp.ones(2), jax.random.key(0), 0, plus, minus)
