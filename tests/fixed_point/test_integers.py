"""Requantization, perturbation and update against Python integers."""

import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fgrad import fixed_point

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


def f64(x):
    return np.asarray(x).astype(np.float64)


def requantize_reference(acc, multiplier, shift, bits):
    # round() of a Fraction is exact and takes ties to the even integer.
    return [
        clip(round(Fraction(int(a) * int(m), 2 ** int(s))), bits)
        for a, m, s in np.broadcast(acc, multiplier, shift)
    ]


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
