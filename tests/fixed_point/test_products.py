import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import lax
from jaxprs import all_equations, product_equations
from lanes import every

from fgrad import products
from fgrad.fixed_point import QTensor

# Where the int8 limbs q = 256 h + l + 128 are at their ends: (h, l) is (127, 127),
# (127, 0), (127, -128), (-128, -127), (-128, -128) and around zero.
EXTREMES = [32767, 32640, 32512, -32767, -32768, 0, 1, -1, 127, -128, -129, 255, 256]

MATRIX = (((1,), (0,)), ((), ()))


def activations(rng, shape):
    return rng.integers(-127, 128, shape).astype(np.int8)


def weights(rng, shape, bits):
    limit = 2 ** (bits - 1) - 1
    dtype = np.int8 if bits <= 8 else np.int16
    return rng.integers(-limit, limit + 1, shape).astype(dtype)


def scale_of(rng, shape, channel_axes):
    """Random steps in (2**-9, 2**-7): a scalar, or one entry for each channel."""
    if channel_axes is None:
        return np.float32(rng.uniform(2**-9, 2**-7))
    kept = [n if a in channel_axes else 1 for a, n in enumerate(shape)]
    return rng.uniform(2**-9, 2**-7, kept).astype(np.float32)


def unit(qvalue):
    return QTensor(jnp.array(qvalue), jnp.float32(1))


def stated_error(product, x, w):
    """The docstring's bound, ``2**-24 Σ|x|(5|q| + 766)``; the sum is `product`'s."""
    return 2.0**-24 * product(np.abs(x.astype(int)), 5 * np.abs(w.astype(int)) + 766)


def assert_within(got, exact, bound):
    assert got.dtype == jnp.float32
    assert got.shape == exact.shape
    error = np.abs(np.asarray(got).astype(np.float64) - exact)
    assert (error <= bound).all()


# ----------------------------------------------------------------------- dot_general

LETTERS = "abcdefgh"


def dot_reference(x, w, dimension_numbers, dtype=np.int64):
    """``lax.dot_general`` of integers in int64, which holds every sum exactly."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    lhs, rhs = list(LETTERS[: x.ndim]), list(LETTERS.upper()[: w.ndim])
    for i, j in zip(
        (*lhs_contract, *lhs_batch), (*rhs_contract, *rhs_batch), strict=True
    ):
        rhs[j] = lhs[i]
    out = [lhs[i] for i in lhs_batch]
    out += [c for i, c in enumerate(lhs) if i not in (*lhs_contract, *lhs_batch)]
    out += [c for j, c in enumerate(rhs) if j not in (*rhs_contract, *rhs_batch)]
    formula = f"{''.join(lhs)},{''.join(rhs)}->{''.join(out)}"
    return np.einsum(formula, x.astype(dtype), w.astype(dtype))


# lhs shape, rhs shape, dimension numbers, axes of the rhs that may have channels
DOTS = {
    "matrix": ((6, 40), (40, 5), MATRIX, (1,)),
    "vector": ((40,), (40,), (((0,), (0,)), ((), ())), ()),
    "transposed": ((6, 40), (5, 40), (((1,), (1,)), ((), ())), (0,)),
    "leading_axes": ((2, 3, 7), (7, 5), (((2,), (0,)), ((), ())), (1,)),
    "several_contracted": ((4, 3, 7), (3, 7, 5), (((1, 2), (0, 1)), ((), ())), (2,)),
    "crossed_contracted": ((3, 4, 7), (7, 5, 3), (((0, 2), (2, 0)), ((), ())), (1,)),
    "several_features": ((4, 7), (7, 2, 3), (((1,), (0,)), ((), ())), (1, 2)),
    "one_of_two_features": ((4, 7), (7, 2, 3), (((1,), (0,)), ((), ())), (2,)),
    "batch": ((3, 4, 7), (3, 7, 5), (((2,), (1,)), ((0,), (0,))), (0, 2)),
    "batch_out_of_order": (
        (2, 4, 7, 3),
        (7, 3, 5, 2),
        (((2,), (0,)), ((3, 0), (1, 3))),
        (1, 2, 3),
    ),
    "outer": ((3,), (4,), (((), ()), ((), ())), (0,)),
    "nothing_to_contract": ((3, 2), (4, 3), (((), ()), ((0,), (1,))), (0, 1)),
}


@functools.partial(jax.jit, static_argnums=2)
def dot(lhs, rhs, dimension_numbers):
    return products.dot_general(lhs, rhs, dimension_numbers)


@pytest.mark.parametrize(("bits", "per_channel"), [(16, True), (8, False)])
@pytest.mark.parametrize("case", every(3, DOTS))
def test_dot_general_equals_integers(case, bits, per_channel):
    lhs_shape, rhs_shape, numbers, channels = DOTS[case]
    rng = np.random.default_rng(0)
    x, w = activations(rng, lhs_shape), weights(rng, rhs_shape, bits)
    lhs_scale = scale_of(rng, lhs_shape, None)
    rhs_scale = scale_of(rng, rhs_shape, channels if per_channel else None)
    got = dot(
        QTensor(jnp.array(x), jnp.array(lhs_scale)),
        QTensor(jnp.array(w), jnp.array(rhs_scale)),
        numbers,
    )
    # The scale in the layout of the result: the mean of it over the terms.
    steps = np.broadcast_to(rhs_scale, rhs_shape)
    terms = max(1, math.prod(rhs_shape[a] for a in numbers[0][1]))
    ones = np.ones(lhs_shape)
    scale = lhs_scale * dot_reference(ones, steps, numbers, np.float64) / terms
    integers = dot_reference(x, w, numbers)
    bound = stated_error(lambda a, b: dot_reference(a, b, numbers), x, w)
    assert_within(got, integers * scale, bound * scale)


@settings(max_examples=100, deadline=None)
@given(
    x=hnp.arrays(
        np.int8, (3, 4), elements=st.integers(-127, 127) | st.sampled_from([127, -127])
    ),
    w=hnp.arrays(
        np.int16,
        (4, 5),
        elements=st.integers(-32767, 32767) | st.sampled_from(EXTREMES),
    ),
)
def test_dot_general_is_exact_below_2_to_24(x, w):
    # Four terms of 127 * 32768 stay below 2**24: float32 joins them without rounding.
    got = dot(unit(x), unit(w), MATRIX)
    np.testing.assert_array_equal(got, dot_reference(x, w, MATRIX))


@pytest.mark.parametrize("value", EXTREMES)
def test_dot_general_is_exact_for_every_end_of_the_limbs(value):
    x = np.array([[127, 127, 127], [-127, 127, -127], [-128, 0, 1]], np.int8)
    w = np.full((3, 2), value, np.int16)
    got = dot(unit(x), unit(w), MATRIX)
    np.testing.assert_array_equal(got, dot_reference(x, w, MATRIX))


def test_dot_general_reads_every_16_bit_weight_exactly():
    w = np.arange(-(2**15), 2**15).astype(np.int16)
    got = dot(unit(np.array([[127]], np.int8)), unit(w[None]), MATRIX)
    np.testing.assert_array_equal(got[0], 127 * w.astype(np.int64))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dot_general_of_narrow_weights_is_an_exact_int32_sum(bits):
    rng = np.random.default_rng(1)
    x = activations(rng, (4, 2000))
    w = weights(rng, (2000, 3), bits)
    w[:, 0] = 2 ** (bits - 1) - 1
    x[0] = 127
    got = dot(unit(x), QTensor(jnp.array(w), jnp.float32(1), bits), MATRIX)
    exact = dot_reference(x, w, MATRIX)
    # One conversion of the exact int32 sum, which rounds to nearest even as numpy does.
    np.testing.assert_array_equal(got, exact.astype(np.float32))


@pytest.mark.parametrize("value", [127, -127])
@pytest.mark.parametrize("q", EXTREMES)
def test_the_longest_contraction_does_not_overflow_with_16_bit_weights(value, q):
    terms = products.MAX_TERMS
    assert terms == 2**17
    x = jnp.full((1, terms), value, jnp.int8)
    got = dot(
        QTensor(x, jnp.float32(1)), unit(np.full((terms, 1), q, np.int16)), MATRIX
    )
    exact = value * q * terms  # a Python integer, up to 5.4e11
    # All sums are multiples of 2**17 with 15 bits or fewer of their own, except the
    # joined one, 23 bits: nothing is rounded, and a wrapped sum would be off by 2**32.
    assert int(got[0, 0]) == exact


@pytest.mark.parametrize("q", [127, -127])
def test_the_longest_contraction_does_not_overflow_with_8_bit_weights(q):
    terms = products.MAX_TERMS
    x = jnp.full((1, terms), -127, jnp.int8)
    got = dot(QTensor(x, jnp.float32(1)), unit(np.full((terms, 1), q, np.int8)), MATRIX)
    assert int(got[0, 0]) == -127 * q * terms


def test_a_long_contraction_of_random_integers_has_the_stated_error():
    rng = np.random.default_rng(2)
    x = activations(rng, (2, products.MAX_TERMS))
    w = weights(rng, (products.MAX_TERMS, 2), 16)
    x[1], w[:, 1] = np.abs(x[1]), np.abs(w[:, 1].astype(int))
    got = dot(unit(x), unit(w), MATRIX)
    bound = stated_error(lambda a, b: dot_reference(a, b, MATRIX), x, w)
    assert_within(got, dot_reference(x, w, MATRIX), bound)


def test_a_long_contraction_of_small_integers_has_the_stated_error():
    rng = np.random.default_rng(3)
    x = rng.integers(100, 128, (1, products.MAX_TERMS)).astype(np.int8)
    # Σ x·l and 128 Σ x are rounded at their own size, 128 times that of the result.
    w = np.ones((products.MAX_TERMS, 1), np.int16)
    got = dot(unit(x), unit(w), MATRIX)
    bound = stated_error(lambda a, b: dot_reference(a, b, MATRIX), x, w)
    assert_within(got, dot_reference(x, w, MATRIX), bound)


@pytest.mark.parametrize("bits", [8, 16])
def test_weights_stored_as_floats_give_the_same_product(bits):
    rng = np.random.default_rng(4)
    x, w = activations(rng, (5, 30)), weights(rng, (30, 4), bits)
    stored = dot(unit(x), unit(w), MATRIX)
    simulated = QTensor(jnp.array(w, jnp.float32), jnp.float32(1), bits)
    np.testing.assert_array_equal(dot(unit(x), simulated, MATRIX), stored)


def test_dot_general_under_vmap_equals_a_loop():
    rng = np.random.default_rng(5)
    x, w = activations(rng, (6, 9)), weights(rng, (4, 9, 3), 16)
    tensors = [QTensor(jnp.array(one), jnp.float32(1)) for one in w]
    rhs = jax.tree.map(lambda *parts: jnp.stack(parts), *tensors)
    mapped = jax.vmap(lambda r: products.dot_general(unit(x), r, MATRIX))(rhs)
    for i in range(4):
        np.testing.assert_array_equal(mapped[i], dot_reference(x, w[i], MATRIX))


# -------------------------------------------------------------- conv_general_dilated


def conv_reference(x, w, strides, pads, lhs_dilation, rhs_dilation, groups):
    """Convolution of int64 arrays [N, C, ...] and [O, C / groups, ...] by loops."""
    x, w = x.astype(np.int64), w.astype(np.int64)
    spatial = x.shape[2:]
    sizes = [(n - 1) * d + 1 for n, d in zip(spatial, lhs_dilation, strict=True)]
    dilated = np.zeros((*x.shape[:2], *sizes), np.int64)
    dilated[(..., *(slice(None, None, d) for d in lhs_dilation))] = x
    padded = np.pad(dilated, [(0, 0), (0, 0), *pads])
    window = w.shape[2:]
    out_shape = [
        (n - (k - 1) * d - 1) // s + 1
        for n, k, d, s in zip(
            padded.shape[2:], window, rhs_dilation, strides, strict=True
        )
    ]
    y = np.zeros((x.shape[0], w.shape[0], *out_shape), np.int64)
    per_group = w.shape[0] // groups
    inputs = x.shape[1] // groups
    for position in np.ndindex(*out_shape):
        for channel in range(w.shape[0]):
            first = channel // per_group * inputs
            for tap in np.ndindex(*window):
                at = np.multiply(position, strides) + np.multiply(tap, rhs_dilation)
                values = padded[(slice(None), slice(first, first + inputs), *at)]
                kernel = w[(channel, slice(None), *tap)]
                y[(slice(None), channel, *position)] += values @ kernel
    return y


def same_padding(spatial, window, strides, rhs_dilation):
    """SAME of XLA: ceil(n / stride) outputs, the odd pad at the end."""
    pads = []
    for n, k, s, d in zip(spatial, window, strides, rhs_dilation, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pads.append((total // 2, total - total // 2))
    return pads


def conv_case(
    spatial,
    window,
    *,
    features=(4, 6),
    batch=2,
    strides=1,
    padding="VALID",
    lhs_dilation=1,
    rhs_dilation=1,
    groups=1,
    layout=None,
):
    """A convolution; single numbers stand for all spatial axes."""
    letters = "DHW"[-len(spatial) :]
    n = len(spatial)

    def each(value):
        return value if isinstance(value, tuple) else (value,) * n

    return {
        "spatial": spatial,
        "window": window,
        "features": features,
        "batch": batch,
        "strides": each(strides),
        "padding": padding,
        "lhs_dilation": each(lhs_dilation),
        "rhs_dilation": each(rhs_dilation),
        "groups": groups,
        "layout": layout or (f"N{letters}C", f"{letters}IO", f"N{letters}C"),
    }


NCHW = ("NCHW", "OIHW", "NCHW")
MIXED = ("NHWC", "OHWI", "CNHW")
GREY, DEPTHWISE = (1, 3), (4, 8)
UNEVEN = ((2, 0), (1, 3))

CONVS = {
    "valid": conv_case((6, 5), (3, 2)),
    "same": conv_case((6, 5), (3, 2), padding="SAME"),
    "same_lower": conv_case((6, 5), (2, 4), padding="SAME_LOWER"),
    "pointwise": conv_case((3, 3), (1, 1)),
    "strided_same": conv_case((7, 6), (3, 3), padding="SAME", strides=(2, 3)),
    "explicit_pads": conv_case((5, 4), (3, 3), padding=UNEVEN, strides=(1, 2)),
    "kernel_dilated": conv_case((7, 8), (3, 2), rhs_dilation=(2, 3), padding="SAME"),
    "input_dilated": conv_case(
        (3, 4), (3, 3), lhs_dilation=(2, 3), padding=((1, 2), (2, 2))
    ),
    "both_dilated_strided": conv_case(
        (4, 5),
        (2, 3),
        lhs_dilation=2,
        rhs_dilation=(3, 2),
        strides=(2, 1),
        padding=UNEVEN,
    ),
    "grouped": conv_case((5, 4), (3, 3), groups=2, padding="SAME"),
    "nchw": conv_case((5, 4), (3, 2), layout=NCHW, padding=UNEVEN, strides=(2, 1)),
    "nchw_grouped": conv_case((5, 4), (3, 2), layout=NCHW, groups=2, strides=2),
    "mixed_layout": conv_case((5, 4), (3, 2), layout=MIXED, rhs_dilation=(1, 2)),
    "one_dimension": conv_case((9,), (4,), padding="SAME", strides=2),
    "one_dimension_ncw": conv_case((9,), (3,), layout=("NCW", "OIW", "NCW"), groups=2),
    "three_dimensions": conv_case((3, 4, 3), (2, 2, 3), features=(2, 3)),
    "grey": conv_case((6, 5), (3, 2), features=GREY, padding="SAME", strides=2),
    "grey_nchw": conv_case((6, 5), (3, 2), features=GREY, layout=NCHW),
    "grey_large_window": conv_case((9, 10), (9, 8), features=(1, 2)),
    "depthwise": conv_case((6, 5), (3, 2), features=DEPTHWISE, groups=4),
    "depthwise_same": conv_case(
        (6, 5), (3, 4), features=(4, 4), groups=4, padding="SAME", strides=(2, 1)
    ),
    "depthwise_same_lower": conv_case(
        (6, 5), (2, 4), features=DEPTHWISE, groups=4, padding="SAME_LOWER"
    ),
    "depthwise_kernel_dilated": conv_case(
        (7, 8), (3, 2), features=DEPTHWISE, groups=4, rhs_dilation=(2, 3), strides=2
    ),
    "depthwise_input_dilated": conv_case(
        (3, 4),
        (3, 3),
        features=DEPTHWISE,
        groups=4,
        lhs_dilation=(2, 3),
        padding=UNEVEN,
    ),
    "depthwise_mixed_layout": conv_case(
        (6, 5), (3, 2), features=DEPTHWISE, groups=4, layout=MIXED, padding=UNEVEN
    ),
    "depthwise_one_dimension": conv_case(
        (9,), (3,), features=DEPTHWISE, groups=4, padding="SAME"
    ),
    "depthwise_large_window": conv_case(
        (10, 9), (9, 8), features=(2, 4), groups=2, padding="SAME"
    ),
}


def conv_operands(case, bits, rng):
    """Integers in the canonical layout: [N, C, ...] and [O, C / groups, ...]."""
    inputs, outputs = case["features"]
    x = activations(rng, (case["batch"], inputs, *case["spatial"]))
    w = weights(rng, (outputs, inputs // case["groups"], *case["window"]), bits)
    return x, w


def to_layout(array, canonical, layout):
    return jnp.array(array.transpose([canonical.index(letter) for letter in layout]))


def conv_layouts(case):
    """(canonical layouts of operands, those of the case)."""
    letters = "DHW"[-len(case["spatial"]) :]
    return (f"NC{letters}", f"OI{letters}"), case["layout"]


def run_conv(case, x, w, lhs_scale, rhs_scale, bits):
    """The product of `fgrad` in the canonical layout [N, O, ...]."""
    (lhs_letters, rhs_letters), layout = conv_layouts(case)
    rhs_scale = np.asarray(rhs_scale, np.float32)
    if rhs_scale.ndim:
        rhs_scale = to_layout(rhs_scale, rhs_letters, layout[1])

    # Nearly all the time is compilation, so the compiler may take it easy.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def conv(lhs, rhs):
        return products.conv_general_dilated(
            lhs,
            rhs,
            case["strides"],
            case["padding"],
            case["lhs_dilation"],
            case["rhs_dilation"],
            layout,
            case["groups"],
        )

    got = conv(
        QTensor(to_layout(x, lhs_letters, layout[0]), jnp.float32(lhs_scale)),
        QTensor(to_layout(w, rhs_letters, layout[1]), jnp.array(rhs_scale), bits),
    )
    return got.transpose([layout[2].index(letter) for letter in lhs_letters])


def exact_conv(case, x, w):
    pads = case["padding"]
    if pads == "VALID":
        pads = [(0, 0)] * len(case["spatial"])
    elif isinstance(pads, str):
        sizes = case["spatial"], case["window"], case["strides"], case["rhs_dilation"]
        pads = same_padding(*sizes)
        if case["padding"] == "SAME_LOWER":
            pads = [(high, low) for low, high in pads]
    return conv_reference(
        x,
        w,
        case["strides"],
        pads,
        case["lhs_dilation"],
        case["rhs_dilation"],
        case["groups"],
    )


@pytest.mark.parametrize("name", every(4, [c for c in CONVS if "depthwise" in c]))
def test_depthwise_convolutions_of_floats(name):
    case = CONVS[name]
    x, w = conv_operands(case, 8, np.random.default_rng(6))
    (letters, kernel_letters), layout = conv_layouts(case)

    def conv(function, x, w):
        return function(
            x,
            w,
            case["strides"],
            case["padding"],
            case["lhs_dilation"],
            case["rhs_dilation"],
            layout,
            case["groups"],
        )

    operands = (
        to_layout(x, letters, layout[0]).astype(jnp.float32),
        to_layout(w, kernel_letters, layout[1]).astype(jnp.float32),
    )
    ours = functools.partial(conv, products.float_conv_general_dilated)
    theirs = functools.partial(conv, lax.conv_general_dilated)
    got = jax.jit(ours)(*operands)
    # Sums of at most 72 products of 127 * 127 are exact in float32.
    got = got.transpose([layout[2].index(letter) for letter in letters])
    np.testing.assert_array_equal(got, exact_conv(case, x, w))
    equations = product_equations(jax.make_jaxpr(ours)(*operands).jaxpr)
    unrolled = not any(word in name for word in ("input_dilated", "large"))
    assert len(equations) == (0 if unrolled else 1)

    def gradients(function):
        return jax.jit(jax.grad(lambda *o: (function(*o) ** 2).sum(), (0, 1)))(
            *(operand / 128 for operand in operands)
        )

    # Sums of a few hundred products of numbers of order 1 to 10, in float32.
    for ours_i, theirs_i in zip(gradients(ours), gradients(theirs), strict=True):
        np.testing.assert_allclose(ours_i, theirs_i, rtol=1e-4, atol=1e-4)
    low = [operand.astype(jnp.bfloat16) for operand in operands]
    assert jax.eval_shape(ours, *low).dtype == jnp.bfloat16


@pytest.mark.parametrize(("bits", "per_channel"), [(16, True), (8, False)])
@pytest.mark.parametrize("name", every(4, CONVS))
def test_conv_general_dilated_equals_integers(name, bits, per_channel):
    case = CONVS[name]
    rng = np.random.default_rng(6)
    x, w = conv_operands(case, bits, rng)
    lhs_scale = scale_of(rng, x.shape, None)
    rhs_scale = scale_of(rng, w.shape, (0,) if per_channel else None)
    got = run_conv(case, x, w, lhs_scale, rhs_scale, bits)
    scale = np.float64(lhs_scale) * rhs_scale.astype(np.float64).squeeze()
    if per_channel:
        scale = scale.reshape(1, -1, *([1] * len(case["spatial"])))
    bound = stated_error(functools.partial(exact_conv, case), x, w)
    assert_within(got, exact_conv(case, x, w) * scale, bound * scale)


@pytest.mark.parametrize("name", ["valid", "grouped", "depthwise", "grey_nchw"])
def test_conv_general_dilated_is_exact_below_2_to_24(name):
    case = CONVS[name]
    rng = np.random.default_rng(7)
    x, w = conv_operands(case, 16, rng)
    x = np.sign(x) * 5  # at most 24 terms of 5 * 32768, less than 2**24
    w.ravel()[: len(EXTREMES)] = EXTREMES
    got = run_conv(case, x, w, 1.0, 1.0, 16)
    np.testing.assert_array_equal(got, exact_conv(case, x, w))


@pytest.mark.parametrize("name", ["valid", "grouped", "depthwise_same"])
def test_conv_general_dilated_at_the_extremes_has_the_stated_error(name):
    case = CONVS[name]
    rng = np.random.default_rng(8)
    x, w = conv_operands(case, 16, rng)
    x = rng.choice(np.array([127, -127], np.int8), x.shape)
    w = rng.choice(np.array(EXTREMES[:5], np.int16), w.shape)
    got = run_conv(case, x, w, 1.0, 1.0, 16)
    bound = stated_error(functools.partial(exact_conv, case), x, w)
    assert_within(got, exact_conv(case, x, w), bound)


def test_conv_general_dilated_of_narrow_weights_is_an_exact_int32_sum():
    case = conv_case((3, 3), (3, 3), features=(300, 2))
    rng = np.random.default_rng(9)
    x, w = conv_operands(case, 8, rng)
    x[0], w[0] = 127, 127
    got = run_conv(case, x, w, 1.0, 1.0, 8)
    exact = exact_conv(case, x, w)
    assert np.abs(exact).max() > 2**24
    np.testing.assert_array_equal(got, exact.astype(np.float32))


@pytest.mark.parametrize("q", [32767, 32640, -32767, -32768])
def test_the_longest_convolution_does_not_overflow(q):
    shape = (1, products.MAX_TERMS // 4, 4)
    lhs = QTensor(jnp.full(shape, 127, jnp.int8), jnp.float32(1))
    rhs = unit(np.full(shape, q, np.int16))
    layout = ("NCW", "OIW", "NCW")
    got = products.conv_general_dilated(
        lhs, rhs, (1,), "VALID", dimension_numbers=layout
    )
    assert got.shape == (1, 1, 1)
    # As for the dot product: every sum is a float32, a wrapped one is off by 2**32.
    assert int(got[0, 0, 0]) == 127 * q * products.MAX_TERMS


def test_the_largest_window_of_shifted_sums_does_not_overflow():
    side = math.isqrt(products.MAX_SHIFTS)
    case = conv_case((side, side), (side, side), features=(2, 2), groups=2, batch=1)
    x = np.full((1, 2, side, side), 127, np.int8)
    w = np.full((2, 1, side, side), -32767, np.int16)
    got = run_conv(case, x, w, 1.0, 1.0, 16)
    # One conversion of the exact int32 sum.
    exact = np.float32(127 * -32767 * side**2)
    np.testing.assert_array_equal(got, np.full((1, 2, 1, 1), exact))


@pytest.mark.parametrize("name", ["valid", "depthwise"])
def test_kernels_stored_as_floats_give_the_same_convolution(name):
    case = CONVS[name]
    x, w = conv_operands(case, 16, np.random.default_rng(10))
    stored = run_conv(case, x, w, 1.0, 1.0, 16)
    simulated = run_conv(case, x, w.astype(np.float32), 1.0, 1.0, 16)
    np.testing.assert_array_equal(simulated, stored)


def test_dilations_and_layout_default_to_those_of_lax():
    rng = np.random.default_rng(11)
    x, w = activations(rng, (2, 4, 6, 5)), weights(rng, (3, 4, 2, 3), 16)
    x = np.sign(x)
    got = products.conv_general_dilated(unit(x), unit(w), (1, 1), "VALID")
    expected = conv_reference(x, w, (1, 1), [(0, 0)] * 2, (1, 1), (1, 1), 1)
    np.testing.assert_array_equal(got, expected)


# ---------------------------------------------------------------------------- errors


def spec(shape, dtype, scale_shape=(), bits=0):
    """A `QTensor` without values, for errors that are raised while tracing."""
    return QTensor(
        jax.ShapeDtypeStruct(shape, dtype),
        jax.ShapeDtypeStruct(scale_shape, jnp.float32),
        bits,
    )


def trace_dot(lhs, rhs, numbers=MATRIX):
    return jax.eval_shape(lambda x, w: products.dot_general(x, w, numbers), lhs, rhs)


def trace_conv(lhs, rhs, groups=1):
    return jax.eval_shape(
        lambda x, w: products.conv_general_dilated(
            x, w, (1, 1), "VALID", None, None, None, groups
        ),
        lhs,
        rhs,
    )


def test_more_terms_than_the_accumulator_holds_raise():
    terms = products.MAX_TERMS
    for dtype in (jnp.int8, jnp.int16):
        at_limit = trace_dot(spec((2, terms), jnp.int8), spec((terms, 3), dtype))
        assert at_limit.shape == (2, 3)
        with pytest.raises(ValueError, match="131073 terms could overflow"):
            trace_dot(spec((2, terms + 1), jnp.int8), spec((terms + 1, 3), dtype))
        side = (2**9, 2**8)
        assert trace_conv(
            spec((1, 1, *side), jnp.int8), spec((1, 1, *side), dtype)
        ).shape == (1, 1, 1, 1)
        with pytest.raises(ValueError, match="262144 terms could overflow"):
            trace_conv(spec((1, 2, *side), jnp.int8), spec((1, 2, *side), dtype))


def test_terms_are_counted_over_all_contracted_axes():
    numbers = (((0, 1), (0, 1)), ((), ()))
    shape = (2**9, 2**8 + 1)
    with pytest.raises(ValueError, match=f"{math.prod(shape)} terms could overflow"):
        trace_dot(spec(shape, jnp.int8), spec((*shape, 2), jnp.int16), numbers)


def test_a_scale_that_varies_along_a_contracted_axis_raises():
    with pytest.raises(ValueError, match="varies along contracted axes"):
        trace_dot(spec((2, 3), jnp.int8), spec((3, 4), jnp.int16, (3, 1)))
    for scale_shape in ((1, 3, 1, 1), (1, 1, 2, 1), (5, 1, 1, 2)):
        with pytest.raises(ValueError, match="varies along contracted axes"):
            trace_conv(
                spec((1, 3, 4, 4), jnp.int8),
                spec((5, 3, 2, 2), jnp.int16, scale_shape),
            )


@pytest.mark.parametrize("bits", [9, 16])
def test_activations_over_8_bits_raise(bits):
    with pytest.raises(ValueError, match=f"left operand has {bits} bits"):
        trace_dot(spec((2, 3), jnp.int16, (), bits), spec((3, 4), jnp.int16))
    with pytest.raises(ValueError, match=f"left operand has {bits} bits"):
        trace_conv(
            spec((1, 3, 4, 4), jnp.int16, (), bits), spec((5, 3, 2, 2), jnp.int16)
        )


def test_activations_with_more_than_one_scale_raise():
    with pytest.raises(ValueError, match=r"one scale per tensor, got shape \(2, 1\)"):
        trace_dot(spec((2, 3), jnp.int8, (2, 1)), spec((3, 4), jnp.int16))
    with pytest.raises(ValueError, match="one scale per tensor"):
        trace_conv(
            spec((1, 3, 4, 4), jnp.int8, (1, 3, 1, 1)), spec((5, 3, 2, 2), "int16")
        )


@pytest.mark.parametrize("groups", [1, 4])
def test_named_padding_of_a_dilated_input_raises_as_in_lax(groups):
    lhs, rhs = spec((1, 4, 5, 5), jnp.int8), spec((4, 4 // groups, 3, 3), jnp.int16)
    with pytest.raises(ValueError, match="String padding is not implemented"):
        jax.eval_shape(
            lambda x, w: products.conv_general_dilated(
                x, w, (2, 2), "SAME", (2, 2), None, None, groups
            ),
            lhs,
            rhs,
        )


# ---------------------------------------------------------------- the arithmetic used


def assert_int8_products(fn, *operands, expected):
    jaxpr = jax.make_jaxpr(jax.jit(fn))(*operands).jaxpr
    equations = product_equations(jaxpr)
    for equation in equations:
        assert [v.aval.dtype for v in equation.invars] == [jnp.int8, jnp.int8]
        assert [v.aval.dtype for v in equation.outvars] == [jnp.int32]
    assert len(equations) == expected


@pytest.mark.parametrize(
    # One product for each limb.
    ("bits", "dtype", "expected"),
    [(16, jnp.int16, 2), (12, jnp.float32, 2), (8, jnp.int8, 1), (4, jnp.int8, 1)],
)
def test_dot_general_multiplies_int8_into_int32(bits, dtype, expected):
    lhs, rhs = spec((2, 3), jnp.int8), spec((3, 4), dtype, (1, 4), bits)
    assert_int8_products(
        lambda x, w: products.dot_general(x, w, MATRIX), lhs, rhs, expected=expected
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    # One for each limb; the activations are summed by a window.
    ("bits", "dtype", "expected"),
    [(16, jnp.int16, 2), (12, jnp.float32, 2), (8, jnp.int8, 1)],
)
def test_conv_general_dilated_multiplies_int8_into_int32(bits, dtype, expected, groups):
    lhs = spec((1, 4, 5, 5), jnp.int8)
    rhs = spec((6, 4 // groups, 3, 3), dtype, (), bits)
    assert_int8_products(
        lambda x, w: products.conv_general_dilated(
            x, w, (1, 1), "SAME", None, None, None, groups
        ),
        lhs,
        rhs,
        expected=expected,
    )


def test_a_depthwise_convolution_adds_up_int32_products_and_no_floats():
    lhs, rhs = spec((1, 4, 5, 5), jnp.int8), spec((4, 1, 3, 3), jnp.int16)
    jaxpr = jax.make_jaxpr(
        lambda x, w: products.conv_general_dilated(
            x, w, (1, 1), "SAME", None, None, None, 4
        )
    )(lhs, rhs).jaxpr
    assert not product_equations(jaxpr)
    multiplications = [e for e in all_equations(jaxpr) if e.primitive.name == "mul"]
    dtypes = [e.outvars[0].aval.dtype for e in multiplications]
    # Nine taps in integers; two scales in floats.
    assert dtypes.count(jnp.int32) == 9
    assert dtypes.count(jnp.float32) == 2
    assert len(dtypes) == 11


# ----------------------------------------------------------------------- primitives


def integer_primitives(fn, *operands):
    jaxpr = jax.make_jaxpr(fn)(*operands).jaxpr
    ours = (products.integer_dot_general_p, products.integer_conv_p)
    return [e.primitive for e in jaxpr.eqns if e.primitive in ours]


def test_a_program_that_reads_jaxprs_sees_one_product_of_activation_and_weight():
    lhs, rhs = spec((2, 3), jnp.int8), spec((3, 4), jnp.int16)
    found = integer_primitives(
        lambda x, w: products.dot_general(x, w, MATRIX), lhs, rhs
    )
    assert found == [products.integer_dot_general_p]
    lhs, rhs = spec((1, 4, 5, 5), jnp.int8), spec((6, 4, 3, 3), jnp.int16)
    found = integer_primitives(
        lambda x, w: products.conv_general_dilated(x, w, (1, 1), "SAME"), lhs, rhs
    )
    assert found == [products.integer_conv_p]


@pytest.mark.parametrize("in_axes", [(0, None), (1, None), (None, 0), (0, 0), (1, 2)])
def test_vmap_over_either_operand_equals_one_at_a_time(in_axes):
    rng = np.random.default_rng(0)

    def integers(shape, limit, dtype, axis):
        shape = list(shape)
        if axis is not None:
            shape.insert(axis, 3)
        return jnp.array(rng.integers(-limit, limit + 1, shape), dtype)

    def slices(array, axis):
        return [array if axis is None else jnp.take(array, i, axis) for i in range(3)]

    def dot(x, w):
        x, w = (QTensor(v, jnp.float32(1), b) for v, b in ((x, 8), (w, 16)))
        return products.dot_general(x, w, MATRIX)

    def conv(x, w):
        x, w = (QTensor(v, jnp.float32(1), b) for v, b in ((x, 8), (w, 16)))
        return products.conv_general_dilated(x, w, (2, 1), "SAME")

    for function, x_shape, w_shape in (
        (dot, (2, 3), (3, 4)),
        (conv, (1, 4, 5, 5), (6, 4, 3, 3)),
    ):
        x = integers(x_shape, 127, jnp.int8, in_axes[0])
        w = integers(w_shape, 32767, jnp.int16, in_axes[1])
        got = jax.vmap(function, in_axes)(x, w)
        pairs = zip(slices(x, in_axes[0]), slices(w, in_axes[1]), strict=True)
        np.testing.assert_array_equal(got, [function(*pair) for pair in pairs])
