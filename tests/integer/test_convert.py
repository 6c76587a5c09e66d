"""Whole networks as integer programs, against the float networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from lanes import some

import fgrad
from fgrad.integer import ConversionError, audit, convert, integers
from tests.integer.conftest import TEST, TRAIN, function


def accuracy(logits, labels):
    return float(np.mean(np.argmax(logits, 1) == labels))


@pytest.mark.parametrize(("bits", "bar"), [((16, 8), 0.005), ((8, 8), 0.02)])
@pytest.mark.slow
def test_digits_are_read_as_well_as_in_float(digits, pretrained, bits, bar):
    images, _, labels = digits
    program = convert(function, pretrained, images[TRAIN], bits=bits)
    encoded = program.encode(images[TEST])
    found = jax.jit(program)(program.params, encoded)
    exact = jax.jit(function)(pretrained, images[TEST])
    assert accuracy(exact, labels[TEST]) > 0.9
    assert abs(accuracy(found, labels[TEST]) - accuracy(exact, labels[TEST])) <= bar
    agreement = np.mean(np.argmax(found, 1) == np.argmax(exact, 1))
    assert agreement > 0.985
    decoded = jax.jit(program.decode)(program.params, encoded)
    assert np.max(np.abs(decoded - exact)) < 0.05 * np.max(np.abs(exact))


def test_no_float_and_no_64_bit_type(digits, pretrained):
    images = digits[0]
    program = convert(function, pretrained, images[:64])
    weights = integers(program.params)
    types = audit.check(program, weights, program.encode(images[:4]))
    assert types <= {"i1", "i8", "i16", "i32", "ui32"}
    with pytest.raises(ValueError, match="types f32"):
        audit.check(function, pretrained, images[:4])


def test_the_batch_may_have_another_size(digits, pretrained):
    images = digits[0]
    program = convert(function, pretrained, images[:64])
    run = jax.jit(program)
    several = run(program.params, program.encode(images[:3]))
    one = run(program.params, program.encode(images[2:3]))
    np.testing.assert_array_equal(several[2], one[0])


def test_parameters_that_are_quantized_already_keep_their_scales():
    params = fgrad.quantize({"w": jnp.eye(3)}, bits=16, headroom=3.0)
    program = convert(lambda p, x: x @ jnp.asarray(p["w"]), params, jnp.ones((2, 3)))
    assert program.params["w"].scale == params["w"].scale


def unlike(shape, axis=-1):
    """Weights whose channels along an axis differ a thousandfold in size."""
    rng = np.random.default_rng(3)
    size = np.ones(len(shape), int)
    size[axis] = shape[axis]
    factors = np.geomspace(0.03, 30, shape[axis]).reshape(size)
    return (rng.normal(size=shape) * factors).astype(np.float32)


def of_channels(lhs, rhs, numbers):
    return jax.lax.dot_general(lhs, rhs, (numbers, ((), ())))


NHWC = ("NHWC", "HWIO", "NHWC")
IMAGES = np.random.default_rng(4).normal(size=(8, 6, 6, 3)).astype(np.float32)
ROWS = np.random.default_rng(5).normal(size=(8, 6)).astype(np.float32)
# Each output channel is to be as exact as all: function, weights, their axis, inputs.
CHANNELS = {
    "dot": (lambda w, x: x @ w, unlike((6, 5)), -1, ROWS),
    "rows": (
        lambda w, x: of_channels(x, w, ((1,), (1,))),
        unlike((5, 6), 0),
        0,
        ROWS,
    ),
    "left": (lambda w, x: (w @ x.T).T, unlike((5, 6), 0), 0, ROWS),
    "several_axes": (
        lambda w, x: jnp.einsum("bi,ihj->bhj", x, w).transpose(0, 2, 1).reshape(-1, 5),
        unlike((6, 5, 2), 1),
        1,
        ROWS,
    ),
    "convolution": (
        lambda w, x: lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=NHWC
        ),
        unlike((3, 3, 3, 5)),
        -1,
        IMAGES,
    ),
    "depthwise": (
        lambda w, x: lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=3
        ),
        unlike((3, 3, 1, 3)),
        -1,
        IMAGES,
    ),
    "channels_first": (
        lambda w, x: lax.conv_general_dilated(
            x.transpose(0, 3, 1, 2),
            w,
            (1, 1),
            "SAME",
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
        ).transpose(0, 2, 3, 1),
        unlike((5, 3, 3, 3), 0),
        0,
        IMAGES,
    ),
    "elementwise": (lambda w, x: x[:, :1] * w[0] + w[1], unlike((2, 5)), -1, ROWS),
    "read": (lambda w, x: w[jnp.array([0, 3])] * x[:2, :1], unlike((4, 5)), -1, ROWS),
}
# Of what these compute a value is rounded to the grid of all channels before the end.
_EARLY = ("elementwise",)


@pytest.mark.parametrize("bits", some([16, 8], [8]))
@pytest.mark.parametrize("name", some(CHANNELS, ["dot", "depthwise"]))
def test_a_scale_for_each_channel_holds_channels_that_differ(name, bits):
    function, weights, axis, x = CHANNELS[name]

    def sizes(params, x):  # brought to one size, which has a scale for all
        return function(params, x)

    program = convert(sizes, weights, x, bits=(bits, 8), channel_axis=axis, headroom=1)
    scales = program.params.scale
    assert scales.size == weights.shape[axis]
    found = np.asarray(program.decode(program.params, program.encode(x)))
    exact = np.asarray(function(weights, x))
    assert np.max(np.abs(found - exact)) < 0.03 * np.max(np.abs(exact))
    small = np.abs(exact[..., 0])
    # Of the least channel, a thousandth in size, 16 bits hold a hundredth at least.
    error = np.abs(found[..., 0] - exact[..., 0])
    unit = program.values(program.params, program.encode(x)).scale
    assert np.max(error) < 0.03 * np.max(small) + 1.5 * unit
    audit.check(program, integers(program.params), program.encode(x))
    whole = convert(sizes, weights, x, bits=(bits, 8), headroom=1)
    found = np.asarray(whole.decode(whole.params, whole.encode(x)))
    one = np.max(np.abs(found[..., 0] - exact[..., 0]))
    assert bits == 16 or one > 3 * np.max(error)


NHC = ("NHC", "HIO", "NHC")
K = np.random.default_rng(2).normal(size=(3, 1, 2)).astype(np.float32)
X = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(6, 6)).astype(np.float32)

# What models are made of, each on activations of a product.
PIECES = {
    "relu": jax.nn.relu,
    "leaky": lambda h: nn.leaky_relu(h, 0.1),
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "gelu": lambda h: nn.gelu(h, approximate=False),
    "gelu_tanh": nn.gelu,
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "logsumexp": lambda h: jax.nn.logsumexp(h, axis=-1, keepdims=True),
    "standardize": jax.nn.standardize,
    "softplus": jax.nn.softplus,
    "hard_swish": jax.nn.hard_swish,
    "relu6": jax.nn.relu6,
    "scaled": lambda h: -0.3 * h + 0.7,
    "product": lambda h: h * h[:, ::-1],
    "quotient": lambda h: h / (1 + jnp.abs(h)),
    "root": lambda h: jnp.sqrt(jnp.abs(h)),
    "power": lambda h: jnp.abs(h) ** 1.5,
    "cube": lambda h: h**3,
    "mean": lambda h: h.mean(axis=1, keepdims=True),
    "variance": lambda h: h.var(axis=0, keepdims=True),
    "extremes": lambda h: h.max(1, keepdims=True) - h.min(1, keepdims=True),
    "where": lambda h: jnp.where(h > h[:, :1], h, 0.5),
    "joined": lambda h: jnp.concatenate([h, 2 * h[:, :2], jnp.ones((16, 1))], 1),
    "padded": lambda h: jnp.pad(h, ((0, 0), (1, 2))),
    "clipped": lambda h: jnp.clip(h, -0.5, 1.0),
    "minimum": lambda h: jnp.minimum(h, h.T[:6].T),
    "attention": lambda h: jax.nn.softmax(h @ h.T) @ h,
    "max_pool": lambda h: nn.max_pool(h[..., None], (2,), (2,)),
    "avg_pool": lambda h: nn.avg_pool(h[..., None], (2,), (2,)),
    "comparison": lambda h: (h > 0).astype(jnp.float32) + h,
    "cosine": lambda h: jnp.cos(h) + jnp.sin(h),
    "running_sum": lambda h: jnp.cumsum(h, axis=1),
    "running_maximum": lambda h: lax.cummax(h, axis=0, reverse=True),
    "slice_at": lambda h: lax.dynamic_slice(h, (2, jnp.argmax(h[0])), (3, 2)),
    "update_at": lambda h: lax.dynamic_update_slice(
        h, 2 * h[:2, :3], (jnp.argmin(h[:, 0]), 1)
    ),
    "cut": lambda h: lax.pad(h, 0.5, ((-1, 2, 0), (1, -2, 1))),
    "transposed_conv": lambda h: lax.conv_transpose(
        h[..., None], K, (2,), "SAME", dimension_numbers=NHC
    ),
    "padded_1x1_conv": lambda h: lax.conv_general_dilated(
        h[..., None], K[:1], (1,), ((1, 2),), dimension_numbers=NHC
    ),
    "spread_pool": lambda h: lax.reduce_window(
        h, -np.inf, lax.max, (1, 2), (1, 1), ((0, 0), (1, 1)), (1, 2), (1, 3)
    ),
}


# Of those that move values about, the core lane has two.
_MOVES = ("running_maximum", "update_at", "cut", "transposed_conv", "padded_1x1_conv")


@pytest.mark.parametrize(
    "name", some(PIECES, [n for n in PIECES if n not in (*_MOVES, "spread_pool")])
)
def test_pieces_of_models(name):
    def piece(params, x):
        return PIECES[name](x @ params["w"])

    program = convert(piece, {"w": W}, X)
    encoded = program.encode(X)
    found = program.decode(program.params, encoded)
    exact = piece({"w": W}, X)
    assert found.shape == exact.shape
    error = np.abs(np.asarray(found) - exact)
    # The product of 8-bit inputs errs by about 1% of the largest activation.
    assert np.max(error) < 0.04 * np.max(np.abs(exact)) + 0.02, np.max(error)
    assert np.mean(error) < 0.01 * np.max(np.abs(exact)) + 0.002
    audit.check(program, integers(program.params), encoded)


def test_embeddings_are_read_in_their_own_width():
    table = np.linspace(-1, 1, 20, dtype=np.float32).reshape(10, 2)

    def embed(params, tokens):
        return params["table"][tokens]

    tokens = jnp.array([[3, 9], [0, 1]])
    program = convert(embed, {"table": table}, tokens)
    found = program.decode(program.params, program.encode(tokens))
    assert np.max(np.abs(found - table[tokens])) <= program.params["table"].scale


def unknown_sort(params, x):
    return jnp.sort(x @ params["w"])


def unknown_while(params, x):
    h = x @ params["w"]
    return jax.lax.while_loop(lambda v: v.sum() > 1, lambda v: v * 0.5, h)


def unknown_cond(params, x):
    return jax.lax.cond(x.sum() > 0, lambda v: v, lambda v: -v, x @ params["w"])


def unknown_fft(params, x):
    return jnp.fft.rfft(x @ params["w"])


def unknown_integers(params, x):
    return (x @ params["w"]).astype(jnp.int32)


@pytest.mark.parametrize(
    ("model", "primitive", "remedy"),
    [
        (unknown_sort, "sort", "sort what it returns"),
        (unknown_while, "while", "lax.scan"),
        (unknown_cond, "cond", "jnp.where"),
        (unknown_fft, "fft", "product with its matrix"),
        (unknown_integers, "int32", "integer arguments"),
    ],
)
def test_models_without_a_rule_say_what_to_do(model, primitive, remedy):
    with pytest.raises(ConversionError) as error:
        convert(model, {"w": W}, X)
    assert primitive in str(error.value)
    assert remedy in str(error.value)
    if primitive in ("while", "cond"):  # others are inside jax.numpy
        assert "test_convert.py:" in str(error.value)


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="from 2 to 8"):
        convert(lambda p, x: x @ p, W, X, bits=(16, 16))
    with pytest.raises(ValueError, match="headroom"):
        convert(lambda p, x: x @ p, W, X, headroom=0.5)


class LSTM(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RNN(nn.LSTMCell(8))(x)[:, -1])


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(y)
        y = nn.Dense(16)(nn.LayerNorm()(x))
        x = x + nn.Dense(8)(nn.gelu(y, approximate=False))
        return nn.Dense(3)(nn.LayerNorm()(x).mean(1))


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(LSTM(), id="lstm"),
        pytest.param(Transformer(), id="vit", marks=pytest.mark.slow),
    ],
)
def test_networks_with_recurrence_attention_and_normalisation(network):
    x = jax.random.normal(jax.random.key(0), (32, 7, 5))
    params = jax.jit(network.init)(jax.random.key(1), x)["params"]

    def logits(params, x):
        return network.apply({"params": params}, x)

    program = convert(logits, params, x)
    encoded = program.encode(x)
    found = jax.jit(program.decode)(program.params, encoded)
    exact = jax.jit(logits)(params, x)
    assert np.std(np.asarray(found - exact)) < 0.05 * np.std(np.asarray(exact))
    audit.check(program, integers(program.params), encoded)
