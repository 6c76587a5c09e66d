import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import product_equations
from lanes import every, every_row

import fgrad
from fgrad import fixed_point, layers
from fgrad.fixed_point import QTensor

SCALES = "activation_scales"


class Case(NamedTuple):
    """One layer: a new layer is tested by being listed in `CASES`."""

    # make(library, **settings): `library` is fgrad.layers or flax.linen.
    make: Callable[..., nn.Module]
    # Shapes of the arrays that it is called on; a tuple of ints is drawn from N(0, 1).
    shapes: tuple[tuple[int, ...], ...]
    # For layers that are one product: product(x, w) in numpy, linear in both.
    product: Callable[[Any, Any], Any] | None = None
    kwargs: dict[str, Any] = {}  # noqa: RUF012  # never changed
    tokens: int = 0  # the input holds integers below this number
    channel_axis: int = -1  # output channels of the kernel


def dense(x, w):
    return np.tensordot(x, w, 1)


def conv(strides=1, padding="SAME", dilation=1, groups=1):
    """Convolution of [N, ..., C] and [..., C / groups, O] by loops, in float64."""

    def product(x, w):
        window, axes = w.shape[:-2], range(x.ndim - 2)
        reach = [(k - 1) * dilation + 1 for k in window]
        pads = [(0, 0)] * len(window)
        if padding == "SAME":
            total = [
                max(
                    (-(-x.shape[a + 1] // strides) - 1) * strides + r - x.shape[a + 1],
                    0,
                )
                for a, r in zip(axes, reach, strict=True)
            ]
            pads = [(t // 2, t - t // 2) for t in total]
        x = np.pad(x, [(0, 0), *pads, (0, 0)])
        out = [(x.shape[a + 1] - reach[a]) // strides + 1 for a in axes]
        y = np.zeros((x.shape[0], *out, w.shape[-1]), x.dtype)
        for tap in np.ndindex(*window):
            ends = [
                slice(t * dilation, t * dilation + (n - 1) * strides + 1, strides)
                for t, n in zip(tap, out, strict=True)
            ]
            values = np.split(x[(slice(None), *ends)], groups, axis=-1)
            kernels = np.split(w[tap], groups, axis=-1)
            y += np.concatenate(
                [v @ k for v, k in zip(values, kernels, strict=True)], axis=-1
            )
        return y

    return product


def conv_case(shape, window, features=6, **options):
    names = {
        "strides": "strides",
        "padding": "padding",
        "dilation": "kernel_dilation",
        "groups": "feature_group_count",
    }
    flax_options = {names[name]: value for name, value in options.items()}
    return Case(
        lambda lib, **s: lib.Conv(features, window, **flax_options, **s),
        (shape,),
        conv(**options),
    )


CAUSAL = jnp.tril(jnp.ones((1, 1, 5, 5), bool))

CASES = {
    "dense": Case(lambda lib, **s: lib.Dense(5, **s), ((3, 2, 7),), dense),
    "dense_general": Case(
        lambda lib, **s: lib.DenseGeneral((2, 3), **s), ((4, 7),), dense
    ),
    "dense_general_two_axes": Case(
        lambda lib, **s: lib.DenseGeneral(4, axis=(-2, -1), **s),
        ((5, 2, 3),),
        lambda x, w: np.tensordot(x, w, 2),
    ),
    "dense_general_batch": Case(
        lambda lib, **s: lib.DenseGeneral(3, batch_dims=(0,), use_bias=False, **s),
        ((2, 4, 5),),
        lambda x, w: np.einsum("bni,bio->bno", x, w),
    ),
    "conv": conv_case((2, 6, 5, 4), (3, 2)),
    "conv_strided": conv_case((2, 7, 6, 4), (3, 3), strides=2),
    "conv_grouped": conv_case((2, 5, 4, 4), (3, 3), groups=2),
    "conv_depthwise": conv_case((2, 6, 5, 3), (3, 3), groups=3),
    "conv_dilated": conv_case((2, 7, 7, 4), (3, 3), dilation=2),
    "conv_no_batch": conv_case((9, 4), (3,), padding="VALID")._replace(product=None),
    "embed": Case(lambda lib, **s: lib.Embed(10, 6, **s), ((2, 5),), tokens=10),
    "embed_attend": Case(
        lambda lib, **s: lib.Embed(10, 6, **s),
        ((2, 5, 6),),
        lambda x, w: x @ w.T,
        {"method": "attend"},
        channel_axis=0,
    ),
    "attention": Case(
        lambda lib, **s: lib.MultiHeadDotProductAttention(2, **s), ((3, 5, 8),)
    ),
    "attention_masked": Case(
        lambda lib, **s: lib.MultiHeadDotProductAttention(2, **s),
        ((2, 5, 8),),
        kwargs={"mask": CAUSAL},
    ),
    "attention_cross": Case(
        lambda lib, **s: lib.MultiHeadDotProductAttention(
            2, qkv_features=4, out_features=3, **s
        ),
        ((3, 5, 8), (3, 7, 6), (3, 7, 4)),
    ),
    "attention_no_batch": Case(
        lambda lib, **s: lib.MultiHeadDotProductAttention(4, use_bias=False, **s),
        ((5, 8), (6, 8)),
    ),
    "lstm": Case(lambda lib, **s: lib.RNN(lib.LSTMCell(4, **s)), ((3, 6, 5),)),
    "lstm_reverse": Case(
        lambda lib, **s: lib.RNN(
            lib.LSTMCell(4, **s), reverse=True, keep_order=True, time_major=True
        ),
        ((6, 3, 5),),
    ),
}
PRODUCTS = [name for name, case in CASES.items() if case.product]
every_case = pytest.mark.parametrize("name", every(2, CASES))
every_mode = pytest.mark.parametrize("mode", ["static", "dynamic"])


@functools.cache
def inputs_of(name):
    case, rng = CASES[name], np.random.default_rng(4)
    if case.tokens:
        return tuple(rng.integers(0, case.tokens, shape) for shape in case.shapes)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in case.shapes)


@functools.cache
def params_of(name):
    """Flax's parameters; biases are random too, where Flax starts them at zero."""
    case, rng = CASES[name], np.random.default_rng(1)
    params = jax.eval_shape(
        lambda: case.make(nn).init(jax.random.key(0), *inputs_of(name), **case.kwargs)
    )["params"]
    return jax.tree.map(
        lambda p: (rng.normal(size=p.shape) / 2).astype(np.float32), params
    )


@functools.cache
def quantized_params(name, bits, per_channel=False, headroom=1.5):
    """The parameters on a grid, in numpy: equation (5)."""
    channel_axis = CASES[name].channel_axis if per_channel else None
    limit = 2 ** (bits - 1) - 1

    def quantize(p):
        axes = None
        if channel_axis is not None and p.ndim > 1:
            axes = tuple(a for a in range(p.ndim) if a != channel_axis % p.ndim)
        scale = np.abs(p).max(axes, keepdims=axes is not None) * headroom / limit
        scale = np.asarray(scale, np.float32)
        qvalue = np.clip(np.rint(p / scale), -limit, limit)
        return QTensor(qvalue.astype(np.int8 if bits <= 8 else np.int16), scale, bits)

    return jax.tree.map(quantize, params_of(name))


# Nearly all the time of these tests is compilation, so the compiler may take it easy.
compiled = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@functools.cache
def flax_fn(name):
    """The float layer as a compiled function of (params, inputs)."""
    case = CASES[name]
    model = case.make(nn)
    return compiled(
        lambda params, inputs: model.apply({"params": params}, *inputs, **case.kwargs)
    )


@functools.cache
def layer_fn(name, **settings):
    """The layer as a compiled function of (variables, inputs)."""
    case = CASES[name]
    model = case.make(layers, **settings)
    return compiled(
        lambda variables, inputs: model.apply(variables, *inputs, **case.kwargs)
    )


@functools.cache
def static_scales(name, activation_bits):
    """Scales calibrated on the case's own inputs and float parameters."""
    case = CASES[name]
    model = case.make(layers, bits=(16, activation_bits))

    @compiled
    def calibrate(params, inputs):
        return layers.calibrate(model, {"params": params}, *inputs, **case.kwargs)

    return calibrate(params_of(name), inputs_of(name))[SCALES]


def scales_of(name, mode, activation_bits=8):
    """The collection of scales that a layer needs besides its parameters."""
    if mode == "dynamic" or CASES[name].tokens:
        return {}
    return {SCALES: static_scales(name, activation_bits)}


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {fixed_point.path_str(path): leaf for path, leaf in leaves}


def f64(x):
    return np.asarray(x).astype(np.float64)


def relative_error(got, expected):
    got, expected = f64(got), f64(expected)
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


# --------------------------------------------------------------------- float kernels


@every_case
def test_parameters_have_the_names_and_shapes_of_flax(name):
    case = CASES[name]

    def shapes(library):
        def init():
            return case.make(library).init(
                jax.random.key(0), *inputs_of(name), **case.kwargs
            )

        return {path: x.shape for path, x in flat(jax.eval_shape(init)).items()}

    assert shapes(layers) == shapes(nn)


@every_case
def test_without_bits_a_layer_equals_flax(name):
    got = layer_fn(name)({"params": params_of(name)}, inputs_of(name))
    expected = flax_fn(name)(params_of(name), inputs_of(name))
    assert got.dtype == expected.dtype
    # The same operations, which XLA may fuse and so round differently.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@every_case
def test_without_activation_bits_a_quantized_kernel_acts_as_its_value(name):
    params = quantized_params(name, 16, True)
    expected = flax_fn(name)(fgrad.dequantize(params), inputs_of(name))
    got = layer_fn(name, bits=(16, None))({"params": params}, inputs_of(name))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dense", "conv", "embed", "embed_attend"])
def test_without_bits_a_quantized_kernel_acts_as_its_value(name):
    params = quantized_params(name, 8)
    expected = flax_fn(name)(fgrad.dequantize(params), inputs_of(name))
    got = layer_fn(name)({"params": params}, inputs_of(name))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------- fixed-point kernels


def split_params(params):
    """(kernel, bias or None) of a layer that is one product."""
    kernel = params["embedding"] if "embedding" in params else params["kernel"]
    return kernel, params.get("bias")


def rounded(x, scale, bits):
    """The integers of an activation; float32 as in the layer, so ties agree."""
    limit = 2 ** (bits - 1) - 1
    integers = np.rint(np.asarray(x, np.float32) / np.float32(scale))
    return np.clip(integers, -limit, limit).astype(np.float64)


@functools.cache
def fixed_point_result(name, bits, mode, per_channel):
    variables = {"params": quantized_params(name, bits[0], per_channel)}
    variables |= scales_of(name, mode, bits[1])
    fn = layer_fn(name, bits=bits, activation_scale=mode)
    return f64(fn(variables, inputs_of(name)))


SETTINGS = [
    ((16, 8), "static", False),
    ((16, 8), "dynamic", True),
    ((8, 8), "static", True),
    ((8, 8), "dynamic", False),
]
every_setting = pytest.mark.parametrize(
    ("bits", "mode", "per_channel"), every_row(2, SETTINGS)
)
# All settings of the four products, two of the same products at other shapes.
every_product = pytest.mark.parametrize(
    ("name", "bits", "mode", "per_channel"),
    every_row(
        3,
        [
            (name, *setting)
            for name in PRODUCTS
            for setting in (
                SETTINGS
                if name in ("dense", "conv", "conv_depthwise", "embed_attend")
                else SETTINGS[1:3]
            )
        ],
    ),
)


@every_product
def test_fixed_point_equals_the_product_of_its_integers(name, bits, mode, per_channel):
    check_against_integers(name, bits, mode, per_channel)


@pytest.mark.parametrize("name", ["dense", "conv", "conv_depthwise"])
@pytest.mark.parametrize("bits", [(12, 4)])
def test_narrow_operands_equal_the_product_of_their_integers(name, bits):
    check_against_integers(name, bits, "static", True)


def check_against_integers(name, bits, mode, per_channel):
    case = CASES[name]
    (x,) = inputs_of(name)
    limit = 2 ** (bits[1] - 1) - 1
    x_scale = np.float32(np.abs(x).max()) / np.float32(limit)
    if mode == "static":
        (stored,) = jax.tree.leaves(static_scales(name, bits[1]))
        # abs-max over the data; one float32 rounding.
        np.testing.assert_allclose(stored, x_scale, rtol=2.0**-22)
        x_scale = np.float32(stored)
    kernel, bias = split_params(quantized_params(name, bits[0], per_channel))
    x_q, w = rounded(x, x_scale, bits[1]), f64(kernel.qvalue) * f64(kernel.scale)
    expected = np.float64(x_scale) * case.product(x_q, w)
    # Products are exact to 2**-24 Σ|x|(5|q| + 766), in units of the scales; the bias
    # has a rounding of its own and one of the sum.
    size = 6 * np.abs(w) + 766 * f64(kernel.scale)
    bound = np.float64(x_scale) * case.product(np.abs(x_q), size)
    if bias is not None:
        expected = expected + f64(bias.dequantize())
        bound = bound + 2 * np.abs(f64(bias.dequantize()))
    error = np.abs(fixed_point_result(name, bits, mode, per_channel) - expected)
    assert (error <= 2.0**-24 * bound).all()


@every_product
def test_fixed_point_is_within_the_rounding_of_its_operands(
    name, bits, mode, per_channel
):
    case = CASES[name]
    (x,) = map(f64, inputs_of(name))
    kernel, bias = split_params(params_of(name))
    kernel_q, bias_q = split_params(quantized_params(name, bits[0], per_channel))
    w = f64(kernel)
    expected = case.product(x, w)
    # Rounding moves x by dx/2 and w by dw/2 at most: the product moves by
    # Σ |x| dw/2 + |w| dx/2 + dx dw/4. Nothing is clipped, since x is calibrated on
    # itself and the weights have headroom.
    dw = np.broadcast_to(f64(kernel_q.scale), w.shape)
    dx = np.full(x.shape, np.abs(x).max() / 127)
    bound = case.product(np.abs(x), dw / 2)
    bound = bound + case.product(dx / 2, np.abs(w)) + case.product(dx / 2, dw / 2)
    magnitude = case.product(np.abs(x), np.abs(w))
    if bias is not None:
        expected = expected + f64(bias)
        bound = bound + f64(bias_q.scale) / 2
        magnitude = magnitude + np.abs(f64(bias))
    error = np.abs(fixed_point_result(name, bits, mode, per_channel) - expected)
    # Float32 rounding of the result and, at half a step, of the operands.
    assert (error <= bound + 2.0**-20 * magnitude).all()
    # And the bound says something: it is a small part of the size of the sum.
    assert bound.max() < 0.1 * magnitude.max()


@pytest.mark.parametrize("channel_axis", every(3, [None, 0, -1]))
@pytest.mark.parametrize("bits", [8, 16])
def test_embed_looks_up_dequantized_rows(channel_axis, bits):
    params = fgrad.quantize(
        jax.tree.map(jnp.array, params_of("embed")), bits, channel_axis=channel_axis
    )
    got = layer_fn("embed", bits=(bits, 8))({"params": params}, inputs_of("embed"))
    rows = np.asarray(params["embedding"].dequantize())[inputs_of("embed")[0]]
    np.testing.assert_array_equal(got, rows)


# The oracles below quantize in the same places as the layer and are otherwise written
# anew in float64. They agree to float32 rounding, as long as no activation lies so near
# a tie that it decides.
SAME_ROUNDINGS = 2e-5
NEAREST_TIE = 5e-5  # of a grid step; float32 rounds 127 steps to 1e-5


class Oracle:
    """Fixed-point products in float64, with static or dynamic scales."""

    def __init__(self, params, scales):
        self.params, self.scales = params, flat(scales)

    def quantize(self, x, name):
        scale = self.scales.get(name)
        if scale is None:
            scale = np.float32(np.abs(x).max() or 1.0) / np.float32(127)
        steps = x / np.float64(scale)
        from_tie = np.abs(steps - np.floor(steps) - 0.5).min()
        assert from_tie > NEAREST_TIE, f"a tie in {name}: take another seed"
        return np.clip(np.rint(steps), -127, 127) * np.float64(scale)

    def dense(self, x, name):
        leaf, axes = self.params[name], 2 if name == "out" else 1
        x = self.quantize(x, f"{name}/DotGeneral_0/lhs_scale")
        y = np.tensordot(x, f64(jnp.asarray(leaf["kernel"])), axes)
        return y + (f64(jnp.asarray(leaf["bias"])) if "bias" in leaf else 0)


def attention_oracle(oracle, x, mask):
    query, key, value = (oracle.dense(x, n) for n in ("query", "key", "value"))
    query = query / np.sqrt(query.shape[-1])
    query = oracle.quantize(query, "scores/lhs_scale")
    key = oracle.quantize(key, "scores/rhs_scale")
    scores = np.einsum("bqhd,bkhd->bhqk", query, key)
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    weights = oracle.quantize(weights, "mixed/lhs_scale")
    value = oracle.quantize(value, "mixed/rhs_scale")
    return oracle.dense(np.einsum("bhqk,bkhd->bqhd", weights, value), "out")


def lstm_oracle(oracle, x):
    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    c = h = np.zeros((x.shape[0], oracle.params["hi"]["bias"].shape[0]))
    outputs = []
    for t in range(x.shape[1]):

        def gate(name, t=t, h=h):
            return oracle.dense(x[:, t], f"i{name}") + oracle.dense(h, f"h{name}")

        c = sigmoid(gate("f")) * c + sigmoid(gate("i")) * np.tanh(gate("g"))
        h = sigmoid(gate("o")) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs, axis=1)


# A rounding of an activation to 8 bits is uniform in half a step: max|x| / 127 /
# sqrt(12), 0.7% of the standard deviation for a usual maximum of three of them. The
# paths below have four to ten such roundings of activations and weights, which add in
# quadrature to 2%; twice that is the bound.
NEAR_FLOAT = 0.04


@every_setting
def test_fixed_point_attention_equals_its_oracle_and_is_near_float(
    bits, mode, per_channel
):
    check_attention("attention", bits, mode, per_channel)


@every_mode
def test_fixed_point_attention_with_a_mask_equals_its_oracle(mode):
    check_attention("attention_masked", (16, 8), mode, mode == "dynamic")


def check_attention(name, bits, mode, per_channel):
    case = CASES[name]
    got = fixed_point_result(name, bits, mode, per_channel)
    oracle = Oracle(
        quantized_params(name, bits[0], per_channel),
        scales_of(name, mode).get(SCALES, {}),
    )
    mask = np.asarray(case.kwargs.get("mask", True))
    expected = attention_oracle(oracle, f64(inputs_of(name)[0]), mask)
    assert relative_error(got, expected) < SAME_ROUNDINGS
    floats = flax_fn(name)(params_of(name), inputs_of(name))
    assert 1e-4 < relative_error(got, floats) < NEAR_FLOAT


@every_setting
def test_fixed_point_lstm_equals_its_oracle_and_is_near_float(bits, mode, per_channel):
    got = fixed_point_result("lstm", bits, mode, per_channel)
    scales = scales_of("lstm", mode).get(SCALES, {"cell": {}})
    params = quantized_params("lstm", bits[0], per_channel)
    oracle = Oracle(params["cell"], scales["cell"])
    expected = lstm_oracle(oracle, f64(inputs_of("lstm")[0]))
    assert relative_error(got, expected) < SAME_ROUNDINGS
    floats = flax_fn("lstm")(params_of("lstm"), inputs_of("lstm"))
    assert 1e-4 < relative_error(got, floats) < NEAR_FLOAT


@pytest.mark.parametrize("name", ["attention_cross", "attention_no_batch"])
def test_fixed_point_attention_over_other_shapes_is_near_float(name):
    got = fixed_point_result(name, (16, 8), "static", False)
    floats = flax_fn(name)(params_of(name), inputs_of(name))
    assert 1e-4 < relative_error(got, floats) < NEAR_FLOAT


def test_fixed_point_without_jit_equals_the_compiled_function():
    name, case = "dense", CASES["dense"]
    model = case.make(layers, bits=(16, 8))
    variables = {"params": quantized_params(name, 16, True)}
    variables |= scales_of(name, "static")
    eager = model.apply(variables, *inputs_of(name))
    compiled = fixed_point_result(name, (16, 8), "static", True)
    assert relative_error(eager, compiled) < SAME_ROUNDINGS


# ------------------------------------------------- float kernels with bits: training


# The others compute what one of these computes, at other shapes.
TRAINED = [
    name
    for name in CASES
    if name
    not in (
        "dense_general",
        "conv_strided",
        "conv_no_batch",
        "attention_no_batch",
        "lstm_reverse",
    )
]
every_trained_case = pytest.mark.parametrize("name", every(4, TRAINED))


class Trained(NamedTuple):
    """A float layer and the straight-through one, at weights on the grid."""

    value: Any  # of the straight-through layer
    fixed: Any  # value with quantized kernels
    gradients: list[
        tuple[str, Any, Any]
    ]  # (path, of the float layer, straight-through)


@functools.cache
def trained(name):
    quantized = quantized_params(name, 16, headroom=1.0)
    params, inputs = fgrad.dequantize(quantized), inputs_of(name)
    scales = scales_of(name, "static")
    layer = layer_fn(name, bits=(16, 8), activation_scale="static")
    fixed = layer({"params": quantized, **scales}, inputs)
    cotangent = np.random.default_rng(2).normal(size=fixed.shape).astype(np.float32)

    def projected(fn):
        def project(p):
            value = fn(p)
            return jnp.sum(value * cotangent), value

        return jax.grad(project, has_aux=True)

    def straight_through(p):
        return layer.__wrapped__({"params": p, **scales}, inputs)

    @compiled
    def both(p):
        expected, _ = projected(lambda q: flax_fn(name).__wrapped__(q, inputs))(p)
        return expected, *projected(straight_through)(p)

    expected, got, value = both(params)
    expected, got = flat(expected), flat(got)
    assert got.keys() == expected.keys()
    # A key's bias shifts all scores of a query alike, so it has no gradient at all.
    without = {path for path, g in expected.items() if np.linalg.norm(g) < 1e-4}
    assert without <= {"key/bias"}
    gradients = [
        (path, f64(expected[path]), f64(got[path]))
        for path in expected.keys() - without
    ]
    return Trained(value, fixed, gradients)


@every_trained_case
def test_float_kernels_on_the_grid_give_the_value_of_the_quantized_kernels(name):
    assert relative_error(trained(name).value, trained(name).fixed) < SAME_ROUNDINGS


@every_trained_case
def test_straight_through_gradients_are_near_those_of_the_float_layer(name):
    for path, expected, got in trained(name).gradients:
        # The largest element has one too, and so has the largest activation.
        lost = (got == 0) & (np.abs(expected) > 1e-3)
        assert not lost.any(), path
        # Gradients at rounded activations and weights, see NEAR_FLOAT; that of a
        # softmax is a difference, which loses some of the digits that are left.
        assert relative_error(got, expected) < 3 * NEAR_FLOAT, path


# ------------------------------------------------------------------------- calibration


def quantized_init(model, x, bits=16):
    """Fresh variables on the grid, compiled in one go."""
    return compiled(lambda: fgrad.quantize(model.init(jax.random.key(0), x), bits))()


@pytest.mark.parametrize("headroom", [1.0, 1.5])
@pytest.mark.parametrize("bits", [4, 8])
def test_calibrate_divides_the_largest_input_by_the_largest_integer(bits, headroom):
    model = layers.Dense(2, bits=(16, bits))
    x = jnp.array([[0.5, -2.0, 1.0, 0.0]] * 3)
    variables = quantized_init(model, x)
    got = layers.calibrate(model, variables, x, headroom=headroom)
    limit = 2 ** (bits - 1) - 1
    # float32 rounding of two operations.
    expected = pytest.approx(2.0 * headroom / limit, rel=2.0**-22)
    (scale,) = jax.tree.leaves(got[SCALES])
    assert scale == expected
    assert scale.dtype == jnp.float32
    assert jax.tree.structure(got["params"]) == jax.tree.structure(variables["params"])


def test_calibrate_keeps_other_collections_and_replaces_old_scales():
    model = layers.Dense(2, bits=(16, 8))
    x = jnp.ones((3, 4))
    variables = {**model.init(jax.random.key(0), x), "batch_stats": {"mean": x}}
    first = layers.calibrate(model, variables, 100 * x)
    second = layers.calibrate(model, first, x)
    assert second["batch_stats"]["mean"] is x
    (scale,) = jax.tree.leaves(second[SCALES])
    assert scale == pytest.approx(1 / 127, rel=2.0**-22)


def test_calibrate_under_jit_gives_the_same_scales_on_every_call():
    model = layers.Dense(2, bits=(16, 8))
    x = jax.random.normal(jax.random.key(0), (4, 3))
    variables = {"params": nn.Dense(2).init(jax.random.key(1), x)["params"]}
    calibrate = jax.jit(functools.partial(layers.calibrate, model))
    expected = layers.calibrate(model, variables, x)[layers.SCALES]
    for _ in range(2):
        jax.tree.map(
            np.testing.assert_array_equal,
            calibrate(variables, x)[layers.SCALES],
            expected,
        )


def test_calibrate_of_a_layer_that_is_called_twice_keeps_the_larger_scale():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = layers.Dense(2, bits=(16, 8))
            return dense(x) + dense(-3 * x) + dense(x)

    x = jnp.array([[1.0, 0.5, 0.0, -0.5]] * 3)
    variables = Twice().init(jax.random.key(0), x)
    (scale,) = jax.tree.leaves(layers.calibrate(Twice(), variables, x)[SCALES])
    assert scale == pytest.approx(3 / 127, rel=2.0**-22)


def test_calibrate_sees_the_activations_of_the_quantized_weights():
    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(layers.Dense(8, bits=(4, 8), name="first")(x))
            return layers.Dense(2, bits=(4, 8), name="second")(x)

    x = jax.random.normal(jax.random.key(0), (20, 5))
    params = quantized_init(Mlp(), x, 4)["params"]
    scales = flat(layers.calibrate(Mlp(), {"params": params}, x)[SCALES])
    first = fgrad.dequantize(params["first"])
    hidden = np.maximum(f64(x) @ f64(first["kernel"]) + f64(first["bias"]), 0)
    # A float32 dot product of five terms.
    assert scales["second/DotGeneral_0/lhs_scale"] == pytest.approx(
        hidden.max() / 127, rel=1e-5
    )
    assert scales["first/DotGeneral_0/lhs_scale"] == pytest.approx(
        np.abs(x).max() / 127, rel=1e-5
    )


def test_calibrate_in_a_scan_takes_the_largest_hidden_state_not_the_first():
    params = quantized_params("lstm", 16)
    (x,) = inputs_of("lstm")
    model = CASES["lstm"].make(layers, bits=(16, 8))
    scales = layers.calibrate(model, {"params": params}, x)[SCALES]["cell"]
    outputs = f64(flax_fn("lstm")(fgrad.dequantize(params), (x,)))
    # The input of the first step is zeros, which have the scale 1/127; the last output
    # is the input of no step.
    largest = np.abs(outputs[:, :-1]).max()
    assert largest < 0.99
    for gate in "ifgo":
        for name, expected in {
            f"i{gate}": np.abs(x).max(),
            f"h{gate}": largest,
        }.items():
            (scale,) = jax.tree.leaves(scales[name])
            # Float32 rounding of five recurrent steps.
            assert scale == pytest.approx(expected / 127, rel=1e-5), name


def test_calibrate_of_zeros_gives_a_scale_that_works():
    model = layers.Dense(2, bits=(16, 8))
    zeros = jnp.zeros((3, 4))
    params = quantized_init(model, zeros)["params"]
    variables = layers.calibrate(model, {"params": params}, zeros)
    (scale,) = jax.tree.leaves(variables[SCALES])
    assert jnp.isfinite(scale)
    assert scale > 0
    np.testing.assert_array_equal(model.apply(variables, zeros), jnp.zeros((3, 2)))


def test_a_dynamic_scale_of_zeros_gives_zeros():
    model = layers.Dense(2, bits=(16, 8), activation_scale="dynamic")
    zeros = jnp.zeros((3, 4))
    variables = quantized_init(model, zeros)
    np.testing.assert_array_equal(model.apply(variables, zeros), jnp.zeros((3, 2)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_calibrate_raises_for_activations_that_are_not_finite(bad):
    model = layers.Dense(2, bits=(16, 8))
    x = jnp.ones((3, 4)).at[0, 0].set(bad)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"'DotGeneral_0/lhs_scale' hold NaN"):
        layers.calibrate(model, variables, x)


@pytest.mark.parametrize("settings", [{}, {"bits": (16, None)}, {"bits": None}])
def test_calibrate_raises_for_a_model_without_activation_bits(settings):
    check_nothing_to_calibrate(layers.Dense(2, **settings))


def test_calibrate_raises_for_a_model_with_dynamic_scales():
    check_nothing_to_calibrate(
        layers.Dense(2, bits=(16, 8), activation_scale="dynamic")
    )


def check_nothing_to_calibrate(model):
    x = jnp.ones((3, 4))
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="no static activation scales"):
        layers.calibrate(model, variables, x)


@pytest.mark.parametrize("headroom", [0.0, -1.0, np.nan])
def test_calibrate_raises_for_a_headroom_that_is_not_positive(headroom):
    with pytest.raises(ValueError, match="headroom must be positive"):
        layers.calibrate(
            layers.Dense(2, bits=(16, 8)), {}, jnp.ones((1, 2)), headroom=headroom
        )


def test_a_missing_static_scale_raises_and_names_the_remedy():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layers.Dense(2, bits=(16, 8), name="head")(x)

    x = jnp.ones((3, 4))
    variables = Net().init(jax.random.key(0), x)
    for params in (variables, quantized_init(Net(), x)):
        with pytest.raises(ValueError, match=r"head/.*no static") as error:
            Net().apply(params, x)
        assert "fgrad.layers.calibrate(model, variables, x)" in str(error.value)
        assert 'activation_scale="dynamic"' in str(error.value)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_custom_calibration_is_honoured(mode):
    x = np.random.default_rng(5).normal(size=(40, 3)).astype(np.float32)
    x[0, 0] = 50.0
    model = layers.Dense(
        2, bits=(16, 8), activation_scale=mode, calibration=fixed_point.percentile(90)
    )
    variables = quantized_init(model, x)
    bound = np.percentile(np.abs(x), 90)
    if mode == "static":
        variables = layers.calibrate(model, variables, x)
        (scale,) = jax.tree.leaves(variables[SCALES])
        assert scale == pytest.approx(bound / 127, rel=1e-5)
    clipped = np.clip(f64(x), -bound, bound)
    kernel = f64(variables["params"]["kernel"].dequantize())
    error = np.abs(f64(compiled(model.apply)(variables, x)) - clipped @ kernel)
    # Half a step of each activation, which the outlier does not make coarser.
    assert (error <= bound / 127 * 0.501 * np.abs(kernel).sum(axis=0)).all()


# ------------------------------------------------------------------------------ errors

every_kind = pytest.mark.parametrize(
    "name", ["dense", "dense_general", "conv", "embed_attend", "attention", "lstm"]
)


@every_kind
def test_impossible_settings_raise_when_the_layer_is_constructed(name):
    make = functools.partial(CASES[name].make, layers)
    for bits in (16, (16,), [16, 8, 8], "16"):
        with pytest.raises(ValueError, match="bits must be None or"):
            make(bits=bits)
    for bits in ((17, 8), (1, 8)):
        with pytest.raises(ValueError, match="bits must lie in"):
            make(bits=bits)
    with pytest.raises(ValueError, match="activations have at most 8 bits"):
        make(bits=(16, 9))
    with pytest.raises(ValueError, match=r"activation_scale must be .* got 'foo'"):
        make(bits=(16, 8), activation_scale="foo")


def test_bits_may_be_a_list():
    variables = {"params": quantized_params("dense", 16)} | scales_of("dense", "static")
    got = layers.Dense(5, bits=[16, 8]).apply(variables, *inputs_of("dense"))
    expected = layers.Dense(5, bits=(16, 8)).apply(variables, *inputs_of("dense"))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("bits", [(16, 8.0), (True, 8)])
def test_bits_that_are_no_integers_raise(bits):
    with pytest.raises(TypeError, match="bits must be an integer"):
        layers.Dense(3, bits=bits)


@pytest.mark.parametrize(
    "name", ["dense", "dense_general", "conv", "embed", "embed_attend", "attention"]
)
def test_a_kernel_of_other_bits_raises(name):
    case = CASES[name]
    model = case.make(layers, bits=(8, 8), activation_scale="dynamic")
    variables = {"params": quantized_params(name, 16)}
    with pytest.raises(ValueError, match=r"takes bits=\(8, 8\) but its .* 16 bits"):
        jax.eval_shape(
            lambda v: model.apply(v, *inputs_of(name), **case.kwargs), variables
        )


def test_attention_raises_for_features_that_do_not_divide_into_heads():
    model = layers.MultiHeadDotProductAttention(3, qkv_features=8)
    with pytest.raises(
        ValueError, match="qkv_features=8 is no multiple of num_heads=3"
    ):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 4, 8))))


def test_embed_raises_to_attend_with_a_scale_for_each_feature():
    case = CASES["embed_attend"]
    model = case.make(layers, bits=(8, 8), activation_scale="dynamic")
    params = fgrad.quantize(
        jax.tree.map(jnp.array, params_of("embed_attend")), 8, channel_axis=-1
    )
    with pytest.raises(ValueError, match="varies along contracted axes"):
        model.apply({"params": params}, *inputs_of("embed_attend"), **case.kwargs)


# ---------------------------------------------------------------- the arithmetic used


class Cnn(nn.Module):
    settings: dict[str, Any]

    @nn.compact
    def __call__(self, x):
        for features, groups in ((8, 1), (8, 8), (16, 2), (16, 1)):
            x = layers.Conv(
                features, (3, 3), 2, feature_group_count=groups, **self.settings
            )(x)
            x = nn.relu(nn.LayerNorm()(x))
        return layers.Dense(10, **self.settings)(x.mean(axis=(1, 2)))


def products_of(net, x):
    """Operand and result dtypes of each product of the forward pass."""
    variables = jax.eval_shape(
        lambda: fgrad.quantize(
            net.init(jax.random.key(0), x), where=lambda p, _: p.endswith("kernel")
        )
    )
    jaxpr = jax.make_jaxpr(jax.jit(net.apply))(variables, x).jaxpr
    return [
        (*(v.aval.dtype.name for v in e.invars), e.outvars[0].aval.dtype.name)
        for e in product_equations(jaxpr)
    ]


INTEGER = ("int8", "int8", "int32")
FLOAT = ("float32", "float32", "float32")


def test_a_fixed_point_cnn_multiplies_int8_only():
    x = jnp.ones((2, 16, 16, 3))
    settings = {"bits": (16, 8), "activation_scale": "dynamic"}
    fixed_point_cnn = Cnn(settings=settings)
    # One for each limb of three convolutions and of the dense layer. The depthwise
    # convolution needs no product at all.
    assert products_of(fixed_point_cnn, x) == [INTEGER] * 8
    # The walk would see the floats.
    assert products_of(Cnn(settings={}), x) == [FLOAT] * 4


@pytest.mark.parametrize("name", ["attention", "attention_cross"])
def test_fixed_point_attention_multiplies_int8_only(name):
    model = CASES[name].make(layers, bits=(16, 8), activation_scale="dynamic")
    variables = {"params": quantized_params(name, 16)}
    jaxpr = jax.make_jaxpr(model.apply)(variables, *inputs_of(name)).jaxpr
    equations = product_equations(jaxpr)
    for equation in equations:
        assert [v.aval.dtype for v in equation.invars] == [jnp.int8, jnp.int8]
    # One for each limb of four kernels, and two products of activations.
    assert len(equations) == 2 * 4 + 2


def test_a_fixed_point_lstm_multiplies_int8_only_in_its_scan():
    model = CASES["lstm"].make(layers, bits=(16, 8), activation_scale="dynamic")
    variables = {"params": quantized_params("lstm", 16)}
    jaxpr = jax.make_jaxpr(model.apply)(variables, *inputs_of("lstm")).jaxpr
    equations = product_equations(jaxpr)
    for equation in equations:
        assert [v.aval.dtype for v in equation.invars] == [jnp.int8, jnp.int8]
    assert len(equations) == 2 * 8


def test_an_embedding_look_up_gathers_integers():
    variables = {"params": quantized_params("embed", 16)}
    model = CASES["embed"].make(layers, bits=(16, 8))
    jaxpr = jax.make_jaxpr(model.apply)(variables, *inputs_of("embed"))
    # The table of ten rows is never dequantized; only what was gathered is.
    assert "f32[10,6]" not in str(jaxpr)
    assert "i16[10,6]" in str(jaxpr)
