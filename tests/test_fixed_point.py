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
from hypothesis.extra import numpy as hnp

from fgrad import fixed_point
from fgrad.fixed_point import QTensor

Fraction = fractions.Fraction

# Arrays keep one length, so that hypothesis does not recompile at every example.
LENGTH = 32
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1

Z_STEPS = [2**-5, 3.5 / 127, 1.0]
DYADIC_Z_STEPS = [2**-6, 2**-5, 1.0]  # the ends of the range and the default


def integers(low, high):
    """Integer arrays that visit the ends of the range, powers of two and zero often."""
    edges = {low, low + 1, high - 1, high, 0, 1, -1}
    edges |= {s * 2**k + d for k in range(31) for s in (1, -1) for d in (-1, 0, 1)}
    element = st.integers(low, high) | st.sampled_from(
        sorted(e for e in edges if low <= e <= high)
    )
    return hnp.arrays(np.int64, LENGTH, elements=element)


def clip(value, bits):
    limit = 2 ** (bits - 1) - 1
    return max(-limit, min(limit, value))


def requantize_reference(acc, multiplier, shift, bits):
    # round() of a Fraction is exact and takes ties to the even integer.
    return [
        clip(round(Fraction(int(a) * int(m), 2 ** int(s))), bits)
        for a, m, s in np.broadcast(acc, multiplier, shift)
    ]


def random_array(seed, shape, exponent=0):
    x = np.random.default_rng(seed).normal(size=shape) * 2.0**exponent
    return x.astype(np.float32)


def f64(x):
    return np.asarray(x).astype(np.float64)


# ------------------------------------------------------------------------ requantize

requantize_arrays = jax.jit(fixed_point.requantize, static_argnums=3)


@settings(max_examples=150, deadline=None)
@given(
    acc=integers(INT32_MIN, INT32_MAX),
    multiplier=integers(0, INT32_MAX),
    shift=integers(0, 63),
    bits=st.sampled_from([2, 8, 16, 32]),  # each is compiled
)
def test_requantize_equals_python_integers(acc, multiplier, shift, bits):
    got = requantize_arrays(
        jnp.array(acc, jnp.int32),
        jnp.array(multiplier, jnp.int32),
        jnp.array(shift, jnp.int32),
        bits,
    )
    assert got.dtype == jnp.int32
    expected = requantize_reference(acc, multiplier, shift, bits)
    assert np.asarray(got).tolist() == expected


@settings(max_examples=20, deadline=None)
@given(
    acc=integers(INT32_MIN, INT32_MAX),
    multiplier=st.just(1) | st.integers(0, INT32_MAX),
    shift=st.integers(0, 63),
    bits=st.integers(2, 32),
)
def test_requantize_takes_python_numbers(acc, multiplier, shift, bits):
    got = fixed_point.requantize(jnp.array(acc, jnp.int32), multiplier, shift, bits)
    assert got.dtype == jnp.int32
    expected = requantize_reference(acc, multiplier, shift, bits)
    assert np.asarray(got).tolist() == expected


@pytest.mark.parametrize("bits", [2, 16, 32])
def test_requantize_by_every_shift_alone_equals_python_integers(bits):
    small = np.arange(-40, 41)
    acc = np.concatenate([small, small * 2**24, small + 2**30, small - 2**31 + 40])
    for shift in range(64):
        got = fixed_point.requantize(jnp.array(acc, jnp.int32), 1, shift, bits)
        assert got.dtype == jnp.int32
        expected = requantize_reference(acc, 1, shift, bits)
        assert np.asarray(got).tolist() == expected, shift


def test_requantize_takes_ties_to_even_for_all_small_numbers():
    acc = np.arange(-48, 49)[:, None, None]
    multiplier = np.arange(9)[None, :, None]
    shift = np.arange(7)[None, None, :]
    got = requantize_arrays(
        jnp.array(acc, jnp.int32), jnp.array(multiplier), jnp.array(shift), 6
    )
    expected = requantize_reference(acc, multiplier, shift, 6)
    assert np.asarray(got).ravel().tolist() == expected


@settings(max_examples=50, deadline=None)
@given(
    odd=hnp.arrays(np.int64, LENGTH, elements=st.integers(-(2**14), 2**14 - 1)),
    acc_power=st.integers(0, 15),
    multiplier_power=st.integers(0, 30),
)
def test_requantize_takes_ties_to_even_at_every_bit_position(
    odd, acc_power, multiplier_power
):
    acc = (2 * odd + 1) * 2**acc_power
    shift = acc_power + multiplier_power + 1  # leaves exactly odd + 1/2
    got = fixed_point.requantize(
        jnp.array(acc, jnp.int32), 2**multiplier_power, shift, 32
    )
    even = odd + (odd % 2)  # of odd and odd + 1, the one that is even
    np.testing.assert_array_equal(got, even)


@pytest.mark.parametrize("bits", [2, 8, 16, 31, 32])
def test_requantize_saturates_symmetrically(bits):
    acc = jnp.array([INT32_MIN, INT32_MIN + 1, INT32_MAX], jnp.int32)
    limit = 2 ** (bits - 1) - 1
    got = fixed_point.requantize(acc, 2**31 - 1, 0, bits)
    assert got.tolist() == [-limit, -limit, limit]


def test_requantize_under_jit_and_vmap_equals_python_integers():
    rng = np.random.default_rng(0)
    acc = rng.integers(INT32_MIN, INT32_MAX, (5, 40), endpoint=True)
    multiplier = rng.integers(0, 2**31, (5, 1))
    shift = rng.integers(0, 64, 40)
    expected = requantize_reference(acc, multiplier, shift, 12)
    operands = [jnp.array(a, jnp.int32) for a in (acc, multiplier, shift)]
    assert np.asarray(requantize_arrays(*operands, 12)).ravel().tolist() == expected
    mapped = jax.vmap(
        lambda a, m, s: requantize_arrays(a, m, s, 12), in_axes=(0, 0, None)
    )(*operands)
    assert np.asarray(mapped).ravel().tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((-1, 0, 32), "multiplier"),
        ((2**31, 0, 32), "multiplier"),
        ((1, -1, 32), "shift"),
        ((1, 64, 32), "shift"),
        ((1, 0, 1), "bits"),
        ((1, 0, 33), "bits"),
    ],
)
def test_requantize_raises_out_of_range(arguments, name):
    with pytest.raises(ValueError, match=f"{name} must lie in"):
        fixed_point.requantize(jnp.array([1], jnp.int32), *arguments)


# ----------------------------------------------------------------- fixed_point_ratio


@settings(max_examples=500, deadline=None)
@given(
    st.floats(2.0**-32, 2.0**30, exclude_min=True)
    | st.builds(math.ldexp, st.floats(0.5, 1, exclude_max=True), st.integers(-30, 30))
)
def test_fixed_point_ratio_has_a_relative_error_below_2_to_minus_31(ratio):
    multiplier, shift = fixed_point.fixed_point_ratio(ratio)
    assert 0 < multiplier < 2**31
    assert 0 <= shift <= 63
    exact = Fraction(ratio)
    assert abs(Fraction(multiplier, 2**shift) / exact - 1) <= Fraction(1, 2**31)


@pytest.mark.parametrize("power", [30, 29, 0, -31])
def test_fixed_point_ratio_just_below_a_power_of_two_fits_requantize(power):
    # The mantissa rounds up to 2**31, which a shift must be left to halve.
    ratio = math.nextafter(2.0**power, 0)
    multiplier, shift = fixed_point.fixed_point_ratio(ratio)
    assert 0 < multiplier < 2**31
    assert 0 <= shift <= 63
    assert Fraction(multiplier, 2**shift) == Fraction(2) ** power


@pytest.mark.parametrize(
    ("odd", "power"),
    [
        (odd, power)
        for odd in (1, 3, 5, 127, 2**30 - 1, 2**31 - 1)
        for power in (-31, -5, -1, 0)
        if odd * 2.0**power <= 2.0**30
    ],
)
def test_fixed_point_ratio_is_exact_and_in_lowest_terms_for_dyadic_ratios(odd, power):
    multiplier, shift = fixed_point.fixed_point_ratio(odd * 2.0**power)
    assert (multiplier, shift) == (odd, -power)


@pytest.mark.parametrize("power", [0, 1, 7, 30])
def test_fixed_point_ratio_is_exact_for_powers_of_two_from_one_up(power):
    multiplier, shift = fixed_point.fixed_point_ratio(2.0**power)
    assert Fraction(multiplier, 2**shift) == 2**power


@pytest.mark.parametrize(
    "ratio",
    [
        0.0,
        -1.0,
        2.0**-32,
        math.nextafter(2.0**30, math.inf),
        2.0**31,
        math.inf,
        -math.inf,
        math.nan,
    ],
)
def test_fixed_point_ratio_raises_out_of_range(ratio):
    with pytest.raises(ValueError, match="ratio must lie in"):
        fixed_point.fixed_point_ratio(ratio)


# -------------------------------------------------------------------- perturb_qvalue

perturb = jax.jit(fixed_point.perturb_qvalue, static_argnums=(3, 4))


def weights_strategy(bits):
    limit = 2 ** (bits - 1) - 1
    return integers(-limit, limit)


def perturb_exactly(q, z, epsilon_q, z_step):
    """Δ_z (1_q w_q + ε_q z_q) as a Fraction, before rounding and clipping."""
    one_q = round(1 / z_step)
    return z_step * (one_q * int(q) + int(epsilon_q) * int(z))


@pytest.mark.parametrize("z_step", DYADIC_Z_STEPS)
@pytest.mark.parametrize("bits", [8, 16])
def test_perturb_qvalue_equals_equation_6_for_a_power_of_two(z_step, bits):
    @settings(max_examples=25, deadline=None)
    @given(
        q=weights_strategy(bits),
        z=integers(-127, 127),
        epsilon_q=integers(-(2**30), 2**30),
    )
    def check(q, z, epsilon_q):
        got = perturb(
            jnp.array(q, fixed_point.storage_dtype(bits)),
            jnp.array(z, jnp.int8),
            jnp.array(epsilon_q, jnp.int32),
            z_step,
            bits,
        )
        expected = [
            clip(round(perturb_exactly(*each, Fraction(z_step))), bits)
            for each in zip(q, z, epsilon_q, strict=True)
        ]
        assert np.asarray(got).tolist() == expected

    check()


@pytest.mark.parametrize("bits", [8, 16])
def test_perturb_qvalue_equals_equation_6_for_the_step_of_the_paper(bits):
    z_step = 3.5 / 127

    @settings(max_examples=50, deadline=None)
    @given(
        q=weights_strategy(bits),
        z=integers(-127, 127),
        # Small values too: their sums are often ties or near ties.
        epsilon_q=integers(-(2**30), 2**30) | integers(-300, 300),
    )
    def check(q, z, epsilon_q):
        got = perturb(
            jnp.array(q, fixed_point.storage_dtype(bits)),
            jnp.array(z, jnp.int8),
            jnp.array(epsilon_q, jnp.int32),
            z_step,
            bits,
        )
        for value, *each in zip(np.asarray(got).tolist(), q, z, epsilon_q, strict=True):
            exact = clip(perturb_exactly(*each, Fraction(7, 254)), bits)
            # The fixed-point multiplier is within 2**-31 of Δ_z, relatively, so a
            # value within 2**-31 |exact| of a tie may go either way.
            distance = abs(value - exact)
            assert distance <= Fraction(1, 2) + abs(exact) / 2**30

    check()


@pytest.mark.parametrize("z_step", Z_STEPS)
def test_perturb_qvalue_treats_plus_and_minus_alike(z_step):
    rng = np.random.default_rng(1)
    q = jnp.array(rng.integers(-32767, 32768, 4096), jnp.int16)
    z = jnp.array(rng.integers(-127, 128, 4096), jnp.int8)
    for epsilon_q in (1, 3, 50, 1000, 2**20):
        minus = perturb(q, z, jnp.int32(-epsilon_q), z_step, 16)
        swapped = perturb(q, -z, jnp.int32(epsilon_q), z_step, 16)
        np.testing.assert_array_equal(minus, swapped)
        mirrored = perturb(-q, z, jnp.int32(epsilon_q), z_step, 16)
        np.testing.assert_array_equal(minus, -mirrored)


@pytest.mark.parametrize("z_step", Z_STEPS)
@pytest.mark.parametrize("bits", [2, 16])
def test_perturb_qvalue_stays_on_the_grid(z_step, bits):
    limit = 2 ** (bits - 1) - 1
    rng = np.random.default_rng(2)
    q = jnp.array(rng.integers(-limit, limit + 1, 1024), jnp.int16)
    z = jnp.array(rng.integers(-127, 128, 1024), jnp.int8)
    for epsilon_q in (0, 1, limit, INT32_MAX, INT32_MIN):
        got = perturb(q, z, jnp.array(epsilon_q, jnp.int32), z_step, bits)
        assert np.abs(np.asarray(got, np.int64)).max() <= limit


@pytest.mark.parametrize("z_step", [2**-5, 3.5 / 127])
def test_perturb_qvalue_agrees_bit_for_bit_between_storage_dtypes(z_step):
    rng = np.random.default_rng(3)
    z = jnp.array(rng.integers(-127, 128, 2048), jnp.int8)
    for bits, dtypes in {
        8: (jnp.int8, jnp.int16, jnp.float32),
        16: (jnp.int16, jnp.float32),
    }.items():
        limit = 2 ** (bits - 1) - 1
        q = rng.integers(-limit, limit + 1, 2048)
        for epsilon_q in (1, 7, 300):
            results = [
                perturb(jnp.array(q, dtype), z, jnp.int32(epsilon_q), z_step, bits)
                for dtype in dtypes
            ]
            assert [r.dtype for r in results] == [jnp.dtype(d) for d in dtypes]
            for result in results[1:]:
                np.testing.assert_array_equal(f64(result), f64(results[0]))


@pytest.mark.parametrize("z_step", DYADIC_Z_STEPS)
def test_perturb_qvalue_keeps_the_weights_exact_where_nothing_is_added(z_step):
    q = jnp.arange(-32767, 32768, dtype=jnp.int16)
    got = perturb(q, jnp.zeros_like(q, jnp.int8), jnp.int32(1000), z_step, 16)
    np.testing.assert_array_equal(got, q)


@pytest.mark.parametrize(
    "z_step", [2.0, math.nextafter(1, 2), math.nextafter(2**-6, 0), 0.0, -0.5, math.nan]
)
def test_perturb_qvalue_raises_for_a_step_out_of_range(z_step):
    q = jnp.array([-300, 0, 1000], jnp.int16)
    with pytest.raises(ValueError, match="z_step must lie in"):
        fixed_point.perturb_qvalue(
            q, jnp.zeros(3, jnp.int8), jnp.int32(1), z_step, bits=16
        )


# --------------------------------------------------------------------- update_qvalue


@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int16, jnp.float32])
def test_update_qvalue_equals_python_integers_over_the_whole_int32_range(bits, dtype):
    if bits == 16 and dtype == jnp.int8:
        pytest.skip("an int8 holds no 16-bit weight")

    @settings(max_examples=20, deadline=None)
    @given(q=weights_strategy(bits), update=integers(INT32_MIN, INT32_MAX))
    def check(q, update):
        got = fixed_point.update_qvalue(
            jnp.array(q, dtype), jnp.array(update, jnp.int32), bits
        )
        assert got.dtype == jnp.int32
        expected = [
            clip(int(a) + int(b), bits) - int(a) for a, b in zip(q, update, strict=True)
        ]
        assert np.asarray(got).tolist() == expected

    check()


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


# ----------------------------------------------------------------------- calibration


@pytest.mark.parametrize("axes", [(0, 1), (0,), (1,)])
def test_abs_max_is_the_largest_magnitude(axes):
    x = random_array(7, (9, 6))
    got = fixed_point.abs_max(jnp.array(x), axes, 8)
    np.testing.assert_array_equal(got, np.abs(x).max(axis=axes, keepdims=True))


@pytest.mark.parametrize("q", [0.5, 50, 99, 100])
@pytest.mark.parametrize("axes", [(0, 1), (0,)])
def test_percentile_equals_numpy(q, axes):
    x = random_array(8, (101, 7))
    got = fixed_point.percentile(q)(jnp.array(x), axes, 8)
    expected = np.percentile(np.abs(f64(x)), q, axis=axes, keepdims=True)
    # Interpolation in float32 between values below 5.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_percentile_clips_outliers():
    x = np.append(random_array(9, 999), np.float32(100.0))
    q = fixed_point.quantize(
        jnp.array(x), 8, calibration=fixed_point.percentile(99), headroom=1.0
    )
    assert q.qvalue[-1] == 127
    bound = np.percentile(np.abs(x), 99)
    np.testing.assert_allclose(q.dequantize()[-1], bound, rtol=1e-5)
    inside = np.abs(x) <= bound
    error = np.abs(f64(q.dequantize()) - f64(x))[inside]
    # The bulk is as fine as if the outlier were not there.
    assert error.max() <= bound / 127 * (0.5 + 1e-4)


@pytest.mark.parametrize("q", [0, -1, 100.5, math.nan])
def test_percentile_raises_out_of_range(q):
    with pytest.raises(ValueError, match="percentile must lie in"):
        fixed_point.percentile(q)


def quantization_mse(x, bound, bits, axes):
    limit = 2 ** (bits - 1) - 1
    scale = bound / limit
    rounded = np.clip(np.rint(x / scale), -limit, limit) * scale
    return np.mean((x - rounded) ** 2, axis=axes, keepdims=True)


@pytest.mark.parametrize(
    ("bits", "num_candidates", "axes"),
    [(2, 64, (0, 1)), (4, 64, (0, 1)), (8, 64, (0, 1)), (4, 10, (0,))],
)
def test_mse_optimal_finds_the_best_of_its_candidates(bits, num_candidates, axes):
    # Heavy tails: the best bound is far below the largest value.
    x = f64(random_array(10, (300, 4)) ** 3)
    bound = fixed_point.mse_optimal(num_candidates)(jnp.array(x), axes, bits)
    largest = np.abs(x).max(axis=axes, keepdims=True)
    assert bound.shape == largest.shape
    errors = [
        quantization_mse(x, largest * i / num_candidates, bits, axes)
        for i in range(1, num_candidates + 1)
    ]
    got = quantization_mse(x, f64(bound), bits, axes)
    # The search compares float32 means: errors of 1e-2 or more between values of up to
    # 30 with 2**-24 of rounding, so candidates within 1e-3 of each other are the same.
    assert (got <= np.min(errors, axis=0) * (1 + 1e-3)).all()
    assert (got <= quantization_mse(x, largest, bits, axes) * (1 + 1e-3)).all()


def test_mse_optimal_raises_without_candidates():
    with pytest.raises(ValueError, match="num_candidates must be positive"):
        fixed_point.mse_optimal(0)


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
