"""Quantized tensors: their grids, and how they act as their values."""

import fractions
import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgrad import fixed_point
from fgrad.fixed_point import QTensor

Fraction = fractions.Fraction


def clip(value, bits):
    limit = 2 ** (bits - 1) - 1
    return max(-limit, min(limit, value))


def random_array(seed, shape, exponent=0):
    x = np.random.default_rng(seed).normal(size=shape) * 2.0**exponent
    return x.astype(np.float32)


def f64(x):
    return np.asarray(x).astype(np.float64)


# ----------------------------------------------------------- quantize and dequantize


SHAPES = [(), (7,), (2, 3, 5)]


@settings(max_examples=25, deadline=None)
@given(
    bits=st.integers(2, 16),
    shape=st.sampled_from(SHAPES),
    channel_axis=st.sampled_from([None, 1]),
    headroom=st.sampled_from([1.0, 1.5, 4.0]),
    exponent=st.integers(-60, 60),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_errs_by_half_a_grid_step_at_most(
    bits, shape, channel_axis, headroom, exponent, seed
):
    x = random_array(seed, shape, exponent)
    q = fixed_point.quantize(
        jnp.array(x), bits, channel_axis=channel_axis, headroom=headroom
    )
    limit = 2 ** (bits - 1) - 1
    assert q.qvalue.shape == x.shape
    assert np.abs(f64(q.qvalue)).max() <= limit
    per_channel = channel_axis is not None and len(shape) > 1
    expected_shape = [1] * len(shape) if per_channel else []
    if per_channel:
        expected_shape[channel_axis] = shape[channel_axis]
    assert q.scale.shape == tuple(expected_shape)
    back = fixed_point.dequantize(q)
    assert back.dtype == jnp.float32
    # The division x / scale and the product scale * qvalue each round a float32 of at
    # most `limit` grid steps: 2**-24 of it. Four times that is the tolerance.
    tolerance = f64(q.scale) * (0.5 + limit * 2.0**-22)
    assert (np.abs(f64(back) - f64(x)) <= tolerance).all()


@pytest.mark.parametrize("bits", [2, 3, 8, 9, 16])
@pytest.mark.parametrize("channel_axis", [None, -1])
def test_quantize_is_equation_5_with_unit_headroom(bits, channel_axis):
    x = random_array(4, (40, 8))
    q = fixed_point.quantize(
        jnp.array(x), bits, headroom=1.0, channel_axis=channel_axis
    )
    limit = 2 ** (bits - 1) - 1
    largest = np.abs(f64(x)).max(axis=None if channel_axis is None else 0)
    scale = largest / limit
    # float32 division: half a unit in the last place.
    np.testing.assert_allclose(f64(q.scale).squeeze(), scale, rtol=2.0**-23)
    exact = f64(x) / scale
    distance = np.abs(f64(q.qvalue) - exact)
    # Near a tie the float32 scale and quotient may decide otherwise.
    assert distance.max() <= 0.5 + limit * 2.0**-22
    assert (np.abs(np.asarray(q.qvalue, np.int64)).max(axis=0) <= limit).all()
    hits_limit = np.abs(f64(q.qvalue)) == limit
    assert hits_limit[np.abs(x) == largest.astype(np.float32)].all()


@pytest.mark.parametrize("bits", [2, 5, 8, 16])
def test_quantize_rounds_ties_to_even(bits):
    limit = 2 ** (bits - 1) - 1
    # The largest value makes the step exactly 2**-3: every quotient is exact.
    steps = np.concatenate([[limit], np.arange(-2 * limit, 2 * limit + 1) / 2])
    steps = np.resize(steps.astype(np.float32), 2001)  # one length for all widths
    q = fixed_point.quantize(jnp.array(steps * 2.0**-3), bits, headroom=1.0)
    assert float(q.scale) == 2.0**-3
    expected = [round(Fraction(float(s))) for s in steps]
    assert np.asarray(q.qvalue).tolist() == expected


@pytest.mark.parametrize("headroom", [1.0, 1.5, 3.0])
def test_headroom_multiplies_the_grid_step(headroom):
    x = random_array(5, (30,))
    q = fixed_point.quantize(jnp.array(x), 16, headroom=headroom)
    expected = np.abs(f64(x)).max() * headroom / 32767
    # Two float32 roundings.
    np.testing.assert_allclose(float(q.scale), expected, rtol=2.0**-22)
    assert round(32767 / headroom) == pytest.approx(int(abs(q.qvalue).max()), abs=1)


def test_default_headroom_is_one_and_a_half():
    q = fixed_point.quantize(jnp.array([1.0, -2.0]))
    np.testing.assert_allclose(float(q.scale), 2.0 * 1.5 / 32767, rtol=2.0**-22)


@pytest.mark.parametrize("zero_bound", [0.05, 2.0])
def test_zero_bound_gives_zero_tensors_and_zero_channels_a_grid(zero_bound):
    weights = np.array([[1.0, 0.0, -3.0], [2.0, 0.0, 0.5]], np.float32)
    params = {"bias": jnp.zeros(4), "kernel": jnp.array(weights)}
    q = fixed_point.quantize(
        params, 8, channel_axis=-1, headroom=1.0, zero_bound=zero_bound
    )
    np.testing.assert_allclose(float(q["bias"].scale), zero_bound / 127, rtol=1e-6)
    assert not np.asarray(q["bias"].qvalue).any()
    expected = np.array([[2.0, zero_bound, 3.0]]) / 127
    np.testing.assert_allclose(q["kernel"].scale, expected, rtol=1e-6)
    assert not np.asarray(q["kernel"].qvalue)[:, 1].any()


def test_where_picks_leaves_by_path_and_value():
    params = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "b": jnp.ones(3)}
    seen = {}

    def where(path, leaf):
        seen[path] = leaf.shape
        return path.endswith("kernel")

    q = fixed_point.quantize(params, 8, where=where)
    assert seen == {"a/kernel": (2, 2), "a/bias": (2,), "b": (3,)}
    assert isinstance(q["a"]["kernel"], QTensor)
    assert q["a"]["bias"] is params["a"]["bias"]
    assert q["b"] is params["b"]


def test_leaves_that_are_no_floats_are_untouched():
    params = {"count": jnp.array(3), "flag": jnp.array(True), "w": jnp.ones(2)}
    q = fixed_point.quantize(params, 8)
    assert q["count"] is params["count"]
    assert q["flag"] is params["flag"]
    assert isinstance(q["w"], QTensor)
    assert fixed_point.dequantize(q)["count"] is params["count"]


def test_mixed_widths_take_one_call_each():
    params = {"first": jnp.array([0.5, -1.0]), "second": jnp.array([0.25, 4.0])}
    once = fixed_point.quantize(params, 8, where=lambda path, leaf: path == "first")
    twice = fixed_point.quantize(once, 16)
    assert twice["first"].bits == 8
    assert twice["second"].bits == 16
    np.testing.assert_array_equal(twice["first"].qvalue, once["first"].qvalue)
    assert twice["first"].scale == once["first"].scale


@pytest.mark.parametrize("bits", range(2, 17))
def test_storage_is_int8_up_to_8_bits_and_int16_above(bits):
    q = fixed_point.quantize(jnp.array([1.0, -1.0]), bits, headroom=1.0)
    assert q.bits == bits
    assert q.qvalue.dtype == (jnp.int8 if bits <= 8 else jnp.int16)
    assert q.scale.dtype == jnp.float32
    assert q.qvalue.tolist() == [2 ** (bits - 1) - 1, 1 - 2 ** (bits - 1)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_quantize_raises_for_values_without_a_grid(bad):
    params = {"head": {"kernel": jnp.array([1.0, bad])}}
    with pytest.raises(ValueError, match="'head/kernel' holds NaN or infinity"):
        fixed_point.quantize(params)


@pytest.mark.parametrize(
    ("bits", "error"),
    [(1, ValueError), (17, ValueError), (8.0, TypeError), (True, TypeError)],
)
def test_impossible_bits_raise(bits, error):
    for call in (
        lambda: fixed_point.quantize({"w": jnp.ones(2)}, bits),
        lambda: fixed_point.quantize({}, bits),
        lambda: fixed_point.max_qvalue(bits),
        lambda: fixed_point.fake_quantize(jnp.ones(2), jnp.float32(1), bits),
    ):
        with pytest.raises(error, match="bits must"):
            call()


@pytest.mark.parametrize("name", ["headroom", "zero_bound"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_headroom_and_zero_bound_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        fixed_point.quantize(jnp.ones(2), **{name: value})


def test_channel_axis_is_ignored_for_leaves_with_fewer_than_two_axes():
    params = {"bias": jnp.array([1.0, 2.0]), "gain": jnp.array(3.0)}
    per_channel = fixed_point.quantize(params, channel_axis=-1)
    per_tensor = fixed_point.quantize(params)
    for name in params:
        assert per_channel[name].scale.shape == ()
        assert per_channel[name].scale == per_tensor[name].scale
        np.testing.assert_array_equal(per_channel[name].qvalue, per_tensor[name].qvalue)


def test_quantize_under_jit_equals_quantize_but_for_the_last_bit_of_the_scale():
    x = {"w": jnp.array(random_array(6, (12, 5)))}
    eager = fixed_point.quantize(x, 8, channel_axis=-1)["w"]
    jitted = jax.jit(lambda p: fixed_point.quantize(p, 8, channel_axis=-1))(x)["w"]
    assert (jitted.bits, jitted.qvalue.dtype) == (8, jnp.int8)
    # XLA may fuse the two roundings of the scale into one.
    np.testing.assert_allclose(jitted.scale, eager.scale, rtol=2.0**-22)
    np.testing.assert_array_equal(jitted.qvalue, eager.qvalue)


# --------------------------------------------------------------------- fake_quantize


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_fake_quantize_has_the_value_of_the_quantized_tensor(bits):
    x = jnp.array(random_array(11, (50, 4)))
    # Half the largest value: some are clipped.
    scale = fixed_point.calibrate_scale(x, bits, channel_axis=1, headroom=0.5)
    expected = fixed_point.quantize_to_scale(x, scale, bits).dequantize()
    np.testing.assert_array_equal(fixed_point.fake_quantize(x, scale, bits), expected)


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_fake_quantize_has_a_gradient_inside_and_none_where_it_clips(bits):
    limit = 2 ** (bits - 1) - 1
    scale = jnp.float32(2.0**-4)  # a power of two: x / scale is exact
    inner = [0, 0.3, 0.5, -limit, limit, limit + 0.4, -limit - 0.5]
    steps = np.array([*inner, limit + 0.6, -limit - 1, 4 * limit])
    cotangent = np.arange(1.0, 11.0, dtype=np.float32)
    x = jnp.array(steps * 2.0**-4, jnp.float32)
    _, pullback = jax.vjp(lambda v: fixed_point.fake_quantize(v, scale, bits), x)
    # Values that are clipped by more than half a step have no gradient.
    inside = np.arange(10) < len(inner)
    np.testing.assert_array_equal(pullback(jnp.array(cotangent))[0], cotangent * inside)


def test_fake_quantize_sends_no_gradient_to_the_scale():
    x = jnp.array([0.3, -5.0])
    gradient = jax.grad(lambda s: fixed_point.fake_quantize(x, s, 8).sum())(0.01)
    assert gradient == 0


def test_fake_quantize_has_a_gradient_everywhere_on_the_abs_max_grid():
    def total(x):
        scale = fixed_point.calibrate_scale(x, 8)
        return fixed_point.fake_quantize(x, scale, 8).sum()

    # max|x| / scale rounds to more than 127 for a fifth of these tensors.
    x = jnp.array(random_array(12, (200, 16)))
    gradient = jax.vmap(jax.grad(total))(x)
    # A division by the scale and a multiplication, each rounded.
    np.testing.assert_allclose(gradient, np.ones(x.shape), rtol=2.0**-22)


def test_fake_quantize_keeps_the_dtype_of_its_input():
    x = jnp.ones(2, jnp.bfloat16)
    assert fixed_point.fake_quantize(x, jnp.float32(0.1), 8).dtype == jnp.bfloat16


# --------------------------------------------------------------------------- QTensor


def make_qtensor(bits=16, channel_axis=None, shape=(4, 3)):
    x = jnp.array(random_array(13, shape))
    return fixed_point.quantize(x, bits, channel_axis=channel_axis)


@pytest.mark.parametrize("bits", [4, 8, 12, 16])
def test_qtensor_keeps_its_bits_through_flatten_jit_and_tree_map(bits):
    q = make_qtensor(bits)
    leaves, structure = jax.tree.flatten(q)
    assert len(leaves) == 2
    for copy in (
        jax.tree.unflatten(structure, leaves),
        jax.jit(lambda x: x)(q),
        jax.tree.map(lambda x: x, q),
        jax.device_put(q),
    ):
        assert isinstance(copy, QTensor)
        assert copy.bits == bits
        assert copy.qvalue.dtype == q.qvalue.dtype
        np.testing.assert_array_equal(copy.qvalue, q.qvalue)
        np.testing.assert_array_equal(copy.scale, q.scale)


def test_qtensors_of_other_bits_have_another_tree_structure():
    assert jax.tree.structure(make_qtensor(12)) != jax.tree.structure(make_qtensor(16))


def test_qtensor_may_hold_placeholders_as_tree_transformations_need():
    abstract = jax.eval_shape(lambda: make_qtensor(12))
    assert abstract.bits == 12
    assert jax.tree.map(lambda x: None, make_qtensor(12)).bits == 12


@pytest.mark.parametrize(("dtype", "bits"), [(jnp.int8, 8), (jnp.int16, 16)])
def test_qtensor_infers_its_bits_from_its_storage(dtype, bits):
    q = QTensor(jnp.ones(2, dtype), jnp.float32(1))
    assert (q.bits, q.max_qvalue) == (bits, 2 ** (bits - 1) - 1)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32, jnp.uint8])
def test_qtensor_cannot_infer_bits_from_other_storage(dtype):
    with pytest.raises(TypeError, match="cannot infer its bits"):
        QTensor(jnp.ones(2, dtype), jnp.float32(1))
    if dtype != jnp.uint8:
        assert QTensor(jnp.ones(2, dtype), jnp.float32(1), bits=8).bits == 8


@pytest.mark.parametrize("channel_axis", [None, -1])
def test_qtensor_stands_for_its_value_in_jax_functions(channel_axis):
    q = make_qtensor(16, channel_axis)
    value = np.asarray(q.qvalue, np.float32) * np.asarray(q.scale)
    x = jnp.array(random_array(14, (2, 4)))
    np.testing.assert_array_equal(jnp.asarray(q), value)
    # XLA may fuse the product with the scale into what follows: one rounding fewer.
    np.testing.assert_allclose(jnp.add(q, 4.0), value + 4, rtol=2.0**-23)
    np.testing.assert_allclose(jnp.matmul(x, q), x @ value, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(jnp.max(q), value.max())
    np.testing.assert_array_equal(q.reshape(2, 6), value.reshape(2, 6))
    assert (q.shape, q.ndim, q.size, q.dtype) == ((4, 3), 2, 12, jnp.float32)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channel_axis", [None, 0, -1])
@pytest.mark.parametrize("shape", [(2, 3, 2)])
def test_to_aqt_dequantizes_to_the_same_value(bits, channel_axis, shape):
    q = make_qtensor(bits, channel_axis, shape)
    converted = q.to_aqt()
    np.testing.assert_array_equal(converted.dequant(), q.dequantize())
    assert converted.qvalue.dtype == q.qvalue.dtype
    assert converted.scale[0].ndim == q.ndim


def test_optax_apply_updates_keeps_int16_and_lands_on_the_sum():
    q = make_qtensor(16)
    change = jnp.array(np.random.default_rng(15).integers(-(2**17), 2**17, (4, 3)))
    change = fixed_point.update_qvalue(q.qvalue, change.astype(jnp.int32), 16)
    updates = QTensor(change, jnp.zeros_like(q.scale), 16)
    after = optax.apply_updates({"w": q}, {"w": updates})["w"]
    assert after.qvalue.dtype == jnp.int16
    assert after.bits == 16
    assert after.scale == q.scale
    expected = np.asarray(q.qvalue, np.int64) + np.asarray(change, np.int64)
    np.testing.assert_array_equal(after.qvalue, expected)


def test_dequantize_maps_every_qtensor_of_a_pytree():
    params = {"a": make_qtensor(8, -1), "b": (make_qtensor(16), jnp.arange(3))}
    got = fixed_point.dequantize(params)
    is_qtensor = functools.partial(jax.tree.leaves, is_leaf=fixed_point.is_qtensor)
    assert not any(fixed_point.is_qtensor(leaf) for leaf in is_qtensor(got))
    np.testing.assert_array_equal(got["a"], params["a"].dequantize())
    np.testing.assert_array_equal(got["b"][0], params["b"][0].dequantize())
    assert got["b"][1] is params["b"][1]


@pytest.mark.parametrize(
    "function",
    [getattr(operator, n) for n in ("add", "sub", "mul", "truediv", "matmul", "pow")],
)
@pytest.mark.parametrize("kind", ["jax", "numpy", "qtensor", "scalar"])
def test_arithmetic_is_that_of_the_value(function, kind):
    q = fixed_point.quantize(jnp.array([[1.0, 2.0], [0.5, 3.0]]))
    other = {
        "jax": jnp.array([[2.0, 3.0], [1.0, 4.0]]),
        "numpy": np.array([[2.0, 3.0], [1.0, 4.0]], np.float32),
        "qtensor": fixed_point.quantize(jnp.array([[2.0, 3.0], [1.0, 4.0]])),
        "scalar": 2.0,
    }[kind]
    if kind == "scalar" and function is operator.matmul:
        return
    value = other.dequantize() if kind == "qtensor" else other
    got, expected = function(q, other), function(q.dequantize(), value)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    if function is not operator.pow:
        got, expected = function(other, q), function(value, q.dequantize())
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_part_of_a_qtensor_is_that_of_its_value():
    q = fixed_point.quantize(jnp.array([[1.0, 2.0], [0.5, 3.0]]))
    np.testing.assert_array_equal(q[1, :], q.dequantize()[1, :])
    np.testing.assert_array_equal(-q, -q.dequantize())


def test_constants_of_a_jitted_function_are_quantized():
    w = jnp.array([0.5, -1.0])
    quantize = jax.jit(lambda: fixed_point.quantize(w, bits=8, headroom=1.0))
    np.testing.assert_array_equal(quantize().qvalue, [64, -127])
    bad = jnp.array([0.5, jnp.nan])
    with pytest.raises(ValueError, match="NaN"):
        jax.jit(lambda: fixed_point.quantize(bad))()
