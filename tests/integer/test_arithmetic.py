"""Every integer function against Python's integers or float64."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from lanes import some

from fgrad import perturbations
from fgrad.integer import (
    addresses,
    arithmetic,
    convolutions,
    primitives,
    products,
    ranges,
    stored,
    tables,
    training,
)
from fgrad.integer.ranges import Fixed
from fgrad.tracing import graph


def rounded(product, shift):
    return product if shift == 0 else (product + 2 ** (shift - 1)) >> shift


@settings(deadline=None, max_examples=60)
@given(
    q=st.lists(
        st.integers(-(2**31) + 2**15 + 1, 2**31 - 2**15 - 1), min_size=4, max_size=4
    ),
    multiplier=st.integers(1, 2**15 - 1),
    shift=st.integers(16, 46),
)
def test_wide_products_are_exact(q, multiplier, shift):
    exact = [rounded(v * multiplier, shift) for v in q]
    if max(map(abs, q)) * multiplier + 2 ** (shift - 1) >= 2**46 - 2**30:
        return
    found = arithmetic.multiply_shift_wide(jnp.array(q, jnp.int32), multiplier, shift)
    assert found.tolist() == exact


@settings(deadline=None, max_examples=100)
@given(
    q=st.lists(st.integers(-(2**30), 2**30), min_size=3, max_size=3),
    ratio=st.floats(2**-30, 2.0**20),
    bits=st.sampled_from([8, 16, 24]),
)
def test_rescaling_saturates_and_stays_within_its_bounds(q, ratio, bits):
    x = Fixed(jnp.array(q, jnp.int32), ratio, -(2**30), 2**30)
    found = ranges.rescale(x, 1.0, bits)
    limit = 2 ** (bits - 1) - 1
    multiplier, shift = ranges.ratio_of(ratio)
    exact = [min(max(rounded(v * multiplier, shift), -limit), limit) for v in q]
    assert found.q.tolist() == exact
    assert all(found.low <= v <= found.high for v in exact)
    assert -limit <= found.low <= found.high <= limit


@settings(deadline=None, max_examples=60)
@given(
    q=st.lists(st.integers(-(2**30), 2**30), min_size=3, max_size=3),
    ratio=st.floats(2**-30, 2.0**8),
    spread=st.lists(st.floats(2**-12, 1), min_size=3, max_size=3),
    bits=st.sampled_from([8, 16, 24]),
)
def test_each_channel_is_rescaled_as_if_it_were_alone(q, ratio, spread, bits):
    channels = np.array(spread)
    x = Fixed(jnp.array([q, q], jnp.int32), ratio, -(2**30), 2**30, channels=channels)
    found = ranges.rescale(x, 1.0, bits)
    assert found.channels is None
    for c, share in enumerate(spread):
        alone = Fixed(jnp.array(q[c], jnp.int32), ratio * share, -(2**30), 2**30)
        exact = int(ranges.rescale(alone, 1.0, bits).q)
        assert found.q[:, c].tolist() == [exact, exact]
        assert found.low <= exact <= found.high


@settings(deadline=None, max_examples=40)
@given(
    q=st.lists(st.integers(-(2**19), 2**19), min_size=3, max_size=3),
    rates=st.lists(st.floats(2**-20, 2.0**9), min_size=3, max_size=3),
    share=st.none() | st.integers(0, 2**15),
)
def test_a_share_of_each_channel_s_rate(q, rates, share):
    multipliers, shifts = ranges.ratios_of(np.array(rates))
    taken = None if share is None else jnp.int32(share)
    found = ranges.multiply_channels(
        jnp.array(q, jnp.int32), multipliers, shifts, 2**19, taken
    )
    exact = np.array(q) * rates * (1 if share is None else share / 2**15)
    # The multiplier has 15 bits, of which a share leaves the upper ones.
    allowed = 0.5 + np.abs(np.array(q) * rates) * 2.0**-14
    assert np.all(np.abs(np.asarray(found) - exact) <= allowed)


@pytest.mark.parametrize("ratio", [2**-16.01, 2**-17.01, 2**-24.5, 2**-31.01])
@pytest.mark.parametrize("channels", [None, np.array([1.0, 0.99])])
def test_the_largest_sums_are_rescaled_without_overflow(ratio, channels):
    ends = np.array([-ranges.INT32, ranges.INT32])
    x = Fixed(jnp.array(ends, jnp.int32), ratio, *map(int, ends), channels=channels)
    found = np.asarray(ranges.rescale(x, 1.0, 24).q)
    limit = 2**23 - 1
    exact = ends * ratio * (1 if channels is None else channels)
    assert np.all(np.abs(found - np.clip(exact, -limit, limit)) <= 1 + limit * 2**-14)


@given(ratio=st.floats(2**-40, 2.0**30))
def test_a_ratio_has_a_relative_error_below_2_to_the_minus_15(ratio):
    multiplier, shift = ranges.ratio_of(ratio)
    assert abs(multiplier / 2**shift / ratio - 1) <= 2**-15
    assert multiplier < 2**15 + 1 or shift == 0


@pytest.mark.parametrize("value", [2**31, -(2**31) - 5])
def test_what_int32_does_not_hold_is_an_error(value):
    with pytest.raises(ranges.ConversionError, match="int32 does not hold"):
        ranges.prove(min(value, 0), max(value, 0), "a sum")


def test_powers_of_two():
    t = np.unique(np.concatenate([np.arange(2**17), np.linspace(0, 31 * 2**16, 9999)]))
    t = t.astype(np.int32)
    found = np.asarray(arithmetic.exp2_negative(jnp.asarray(t)), np.float64)
    assert np.max(np.abs(found - 2.0 ** (22 - t / 2**16))) < 5


def test_short_powers_of_two():
    t = np.unique(np.concatenate([np.arange(2**17), np.linspace(0, 29 * 2**16, 9999)]))
    t = t.astype(np.int32)
    found = np.asarray(arithmetic.exp2_short(jnp.asarray(t)), np.float64)
    error = np.abs(found - 2.0 ** (15 - t / 2**16))
    assert np.max(error) < 0.9


def test_logarithms():
    rng = np.random.default_rng(0)
    x = np.concatenate([np.arange(1, 5000), 2 ** rng.uniform(0, 31, 5000)])
    x = np.minimum(x, 2**31 - 1).astype(np.int32)
    found = np.asarray(arithmetic.log2(jnp.asarray(x)), np.float64)
    assert np.max(np.abs(found / 2**16 - np.log2(x))) * 2**16 < 0.8


@settings(deadline=None, max_examples=20)
@given(
    a=st.lists(st.integers(-32767, 32767), min_size=4, max_size=4),
    d=st.integers(1, 32767),
)
def test_quotients_by_the_reciprocal_of_a_row(a, d):
    found = primitives._by_reciprocal(jnp.array([a], jnp.int32), jnp.array([[d]]))
    for dividend, quotient in zip(a, found[0].tolist(), strict=True):
        exact = Fraction(dividend * 2**15, d)
        assert abs(quotient - exact) <= Fraction(1, 2) + abs(exact) / 2**15


@pytest.mark.parametrize("count", [1, 32, 33, 50, 129])
def test_maxima_of_rows(count):
    x = np.random.default_rng(count).permutation(3 * count).reshape(3, count)
    x = (x - count).astype(np.int16)
    np.testing.assert_array_equal(arithmetic.max_of_rows(x), x.max(1))


def test_what_is_stored_is_the_same_and_comes_from_a_branch():
    x = jnp.arange(stored.FEW)
    program = jax.jit(lambda x: stored.stored(x) + 1).lower(x)
    assert "stablehlo.case" in program.as_text()
    np.testing.assert_array_equal(program.compile()(x), x + 1)
    few = jax.jit(lambda x: stored.stored(x) + 1).lower(x[1:])
    assert "stablehlo.case" not in few.as_text()
    rows = jax.vmap(stored.stored, 1, 1)(x.reshape(-1, 2))
    np.testing.assert_array_equal(rows, x.reshape(-1, 2))


@pytest.mark.parametrize(
    ("name", "low", "high", "bend"),
    [
        ("tanh", -6.0, 6.0, 0.77),
        ("logistic", -8.0, 8.0, 0.1),
        ("erf", -3.0, 3.0, 0.97),
        ("erfc", -3.0, 3.0, 0.97),
        ("sin", -4.0, 4.0, 1.0),
        ("expm1", -3.0, 1.0, 2.72),
    ],
)
def test_tables_of_all_16_bit_values(name, low, high, bend):
    q = np.arange(-32767, 32768, dtype=np.int32)
    scale, out = max(-low, high) / 32767, 2.0**-14
    found = tables.apply(
        Fixed(jnp.asarray(q), scale, -32767, 32767),
        tables.FUNCTIONS[name],
        low,
        high,
        out,
    )
    exact = tables.FUNCTIONS[name](np.clip(q * scale, low, high))
    # Up to 256 intervals, each a power of two wide.
    apart = 2 * (high - low) / 256
    error = np.max(np.abs(np.asarray(found.q) * out - exact))
    assert error < apart**2 * bend / 8 + 1.1 * out


def test_a_table_of_few_values_has_an_entry_for_each():
    q = np.arange(-127, 128, dtype=np.int8)
    x = Fixed(jnp.asarray(q), 0.05, -127, 127)
    found = tables.apply(x, np.tanh, -10.0, 10.0, 2.0**-15)
    exact = np.clip(np.rint(np.tanh(q * 0.05) * 2**15), -32767, 32767)
    np.testing.assert_array_equal(found.q, exact)


@pytest.mark.parametrize("exponent", [0.5, -0.5])
def test_roots(exponent):
    q = np.arange(1, 32768, dtype=np.int32)
    x = Fixed(jnp.asarray(q), 2.0**-11, 0, 32767)
    exact = (q * 2.0**-11) ** exponent
    scale = 2.0 ** np.ceil(np.log2(exact.max() / 32767))
    found = np.asarray(tables.power(x, exponent, scale).q) * scale
    assert np.max(np.abs(found - exact) - 3e-5 * exact) < scale


def test_exponentials_and_logarithms_of_grids():
    q = np.arange(-32767, 1, dtype=np.int32)
    x = Fixed(jnp.asarray(q), 2.0**-11, -32767, 0)
    found = np.asarray(tables.exponential(x, np.log2(np.e), 2.0**-14).q) * 2.0**-14
    assert np.max(np.abs(found - np.exp(q * 2.0**-11))) < 1.5 * 2.0**-14
    y = Fixed(jnp.asarray(-q[:-1]), 2.0**-11, 1, 32767)
    logs = tables.logarithm(y)
    error = np.asarray(logs.q) * logs.scale - np.log(-q[:-1] * 2.0**-11)
    assert np.max(np.abs(error)) < 2.0**-15


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), terms=st.sampled_from([1, 7, 300]))
def test_dots_of_int8_and_int16(seed, terms):
    rng = np.random.default_rng(seed)
    x = rng.integers(-127, 128, (3, terms, 2), dtype=np.int8)
    w = rng.integers(-32768, 32768, (2, 5, terms), dtype=np.int16)
    numbers = (((1,), (2,)), ((2,), (0,)))
    exact = np.einsum("bkg,gnk->gbn", x.astype(np.int64), w.astype(np.int64))
    found = arithmetic.exact_dot(x, w, dimension_numbers=numbers)
    np.testing.assert_array_equal(found, exact)
    coarse = arithmetic.coarse_dot(x, w, dimension_numbers=numbers)
    np.testing.assert_array_equal(coarse, (exact + 128) >> 8)


# Groups, and strides, padding, dilations of the image and of the kernel.
CONVOLUTIONS = {
    "plain": (1, (2, 1), ((1, 1), (0, 1)), (1, 1), (1, 1)),
    "channels_first": (1, (1, 1), ((1, 1), (0, 1)), (1, 1), (1, 1)),
    "grouped": (2, (2, 1), ((1, 1), (0, 1)), (1, 1), (1, 1)),
    "depthwise": (4, (1, 2), ((0, 2), (1, 1)), (1, 1), (2, 1)),
    "spread": (1, (1, 1), ((2, 1), (-1, 3)), (2, 3), (1, 2)),
    "spread_depthwise": (4, (1, 1), ((0, 0), (0, 0)), (2, 1), (1, 1)),
}


@pytest.mark.parametrize("name", some(CONVOLUTIONS, ["plain", "depthwise"]))
def test_convolutions_of_int8_and_int16(name):
    rng = np.random.default_rng(0)
    groups, *numbers = CONVOLUTIONS[name]
    x = rng.integers(-127, 128, (2, 6, 5, 4), dtype=np.int8)
    w = rng.integers(-32768, 32768, (3, 3, 4 // groups, 8), dtype=np.int16)
    layout = ("NHWC", "HWIO", "NHWC")
    if name == "channels_first":
        layout = ("NCHW", "OIHW", "NCHW")
        x, w = x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1)
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    options = {
        **dict(zip(names, numbers, strict=True)),
        "dimension_numbers": lax.conv_dimension_numbers(x.shape, w.shape, layout),
        "feature_group_count": groups,
        "batch_group_count": 1,
    }
    # Each is exact in float32.
    high, low = (
        np.asarray(lax.conv_general_dilated(np.float32(x), np.float32(part), **options))
        for part in (w // 256, w % 256)
    )
    exact = 256 * high.astype(np.int64) + low.astype(np.int64)
    pairs = tuple(options.items())
    found = convolutions.exact_conv_p.bind(x, w, options=pairs)
    np.testing.assert_array_equal(found, exact)
    found = convolutions.coarse_conv_p.bind(x, w, options=pairs)
    np.testing.assert_array_equal(found, (exact + 128) >> 8)
    found = convolutions.plain_conv_p.bind(x, (w >> 8).astype(np.int8), options=pairs)
    np.testing.assert_array_equal(found, high)


def test_sums_that_do_not_fit_are_kept_coarser():
    graph_node = _node(lambda x, w: x @ w, (1, 2000), (2000, 1))
    x = Fixed(jnp.full((1, 2000), 127, jnp.int8), 1.0, -127, 127)
    w = Fixed(jnp.full((2000, 1), 32767, jnp.int16), 1.0, -32767, 32767, weight=True)
    sums = products.product(graph_node, x, w)
    assert sums.scale == 256
    assert sums.q.item() == (2000 * 127 * 32767 + 128) >> 8
    assert sums.high < 2**31


def test_a_product_of_too_many_terms_is_an_error():
    node = _node(lambda x, w: x @ w, (1, 2**18), (2**18, 1))
    x = Fixed(jax.ShapeDtypeStruct((1, 2**18), jnp.int8), 1.0, -127, 127)
    w = Fixed(jax.ShapeDtypeStruct((2**18, 1), jnp.int16), 1.0, -32767, 32767)
    with pytest.raises(ranges.ConversionError, match="262144 terms"):
        products.product(node, x, w)


def test_z_is_that_of_the_float_library():
    key = jax.random.key(5)
    params = {"a": np.zeros((3, 7)), "b": {"c": np.zeros((130,))}}
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    words = jax.random.key_data(key)
    step = addresses.fold_in((words[0], words[1]), jnp.uint32(4))
    sample = addresses.fold_in(step, jnp.uint32(2))
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    theirs = perturbations.leaf_keys(perturbations.sample_key(key, 4, 2), names)
    source = perturbations.normal()
    for (path, leaf), name in zip(paths, names, strict=True):
        q = training.QTensor(jnp.asarray(leaf, jnp.int16), jnp.float32(1e-3))
        address = addresses.address_of(path, q)
        rule = training._rounded(name, address, q, 1.0, 1.0, None)
        z = rule.z(address.key(sample), None)
        np.testing.assert_array_equal(z, source.sample(theirs[name], leaf.shape))


@given(d=st.lists(st.integers(-(2**30), 2**30), min_size=1, max_size=16))
@settings(deadline=None, max_examples=40)
def test_normalized_coefficients(d):
    found = np.asarray(training.normalized(jnp.array(d, jnp.int32)), np.float64)
    if not any(d):
        assert not found.any()
        return
    exact = 64 * np.array(d) / np.sqrt(np.mean(np.square(np.array(d, np.float64))))
    # 12 bits hold a difference.
    assert np.max(np.abs(found - exact)) < 1 + 0.002 * np.max(np.abs(exact))


def _node(function, *shapes):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return graph.trace(function, *shapes).nodes[-1]
