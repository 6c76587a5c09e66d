"""Products that AQT configures, against AQT's own network layers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantized_networks
from aqt.jax.v2 import config as aqt_config
from aqt.jax.v2.flax import aqt_flax
from compiling import fast_jit
from jaxprs import product_equations
from lanes import every_row

import fgrad
from fgrad import layers
from fgrad.fixed_point import QTensor, aqt_products

KEY = jax.random.key(0)


def config_of(activations, weights):
    """AQT's configuration with its calibration by the largest magnitude."""
    config = aqt_config.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None)
    none = (None,) * 4
    return aqt_config.set_bits(config, activations, weights, *none)


def conv_config_of(activations, weights):
    config = aqt_config.default_unquantized_config()
    config.fwd = aqt_config.conv_general_dilated_make(2, activations, weights)
    return config


def kernels_on_aqts_grid(params, bits):
    """The kernels on the grids that AQT itself gives them: a scale for each output."""

    def quantize(path, leaf):
        if "kernel" not in jax.tree_util.keystr(path):
            return leaf
        axes = tuple(range(leaf.ndim - 1))
        scale = jnp.max(jnp.abs(leaf), axes, keepdims=True) / (2 ** (bits - 1) - 0.5)
        return fgrad.fixed_point.quantize_to_scale(leaf, scale, bits)

    return jax.tree_util.tree_map_with_path(quantize, params)


def layer_and_oracle(kind, activations, weights):
    """A layer of ours, AQT's, and data."""
    config = config_of(activations, weights)
    options = {"prng_name": None}
    if kind == "dense":
        dot = functools.partial(aqt_flax.AqtDotGeneral, config, **options)
        oracle = nn.Dense(4, dot_general_cls=dot)
        return layers.Dense(4, aqt=config), oracle, jax.random.normal(KEY, (3, 5, 6))
    conv = functools.partial(
        aqt_flax.AqtConvGeneralDilated, conv_config_of(activations, weights), **options
    )
    oracle = nn.Conv(4, (3, 3), 2, conv_general_dilated_cls=conv)
    ours = layers.Conv(4, (3, 3), 2, aqt=config)
    return ours, oracle, jax.random.normal(KEY, (3, 5, 5, 2))


@pytest.mark.parametrize(
    ("kind", "activations", "weights"),
    every_row(
        5,
        [
            ("dense", 8, 8),
            ("dense", 8, 16),
            ("dense", 4, 4),
            ("conv", 8, 8),
            ("conv", 8, 16),
            ("conv", 4, 4),
            ("dense", 8, None),
            ("dense", None, 8),
            ("conv", None, None),
        ],
    ),
)
def test_a_layer_computes_what_aqt_computes(kind, activations, weights):
    layer, oracle, x = layer_and_oracle(kind, activations, weights)
    params = oracle.init(KEY, x)
    expected = np.asarray(oracle.apply(params, x))
    # AQT's sums are exact up to 16 bits of float32, and ours are joined in it.
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    close(layer.apply(params, x), expected)
    quantized = kernels_on_aqts_grid(params, weights or 16)
    if weights is None:
        params = fgrad.dequantize(quantized)
        expected = np.asarray(oracle.apply(params, x))
    close(layer.apply(quantized, x), expected)


@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("weights", [8, 16])
def test_the_products_of_kernels_on_a_grid_are_of_int8(kind, weights):
    layer, oracle, x = layer_and_oracle(kind, 8, weights)
    params = kernels_on_aqts_grid(oracle.init(KEY, x), weights)
    jaxpr = jax.make_jaxpr(layer.apply)(params, x).jaxpr
    for equation in product_equations(jaxpr):
        assert {v.aval.dtype for v in equation.invars} == {jnp.dtype("int8")}
        assert equation.outvars[0].aval.dtype == jnp.int32


NETWORKS = {
    "attention": lambda config: layers.MultiHeadDotProductAttention(2, aqt=config),
    "lstm": lambda config: layers.RNN(layers.LSTMCell(3, aqt=config)),
    "tied embedding": lambda config: Tied(config),
}


class Tied(nn.Module):
    """An embedding whose table is also the last layer."""

    config: object

    @nn.compact
    def __call__(self, x):
        embed = layers.Embed(7, 4, aqt=self.config)
        return embed.attend(embed((x[..., 0] > 0).astype(jnp.int32)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_grid_of_16_bits_is_near_the_float(name):
    x = jax.random.normal(KEY, (2, 3, 4))
    model = NETWORKS[name](config_of(8, 16))
    params = fast_jit(model.init)(KEY, x)
    apply = fast_jit(model.apply)
    expected = np.asarray(apply(params, x))
    found = np.asarray(apply(fgrad.quantize(params), x))
    # A step of the 8-bit grid of an activation here and there.
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
    assert not np.array_equal(found, expected)


@pytest.mark.slow
def test_float_kernels_have_a_straight_through_gradient():
    for kind in ("dense", "conv"):
        layer, _, x = layer_and_oracle(kind, 8, 8)
        params = layer.init(KEY, x)

        def loss(params, apply, x=x):
            return jnp.mean(apply(params, x) ** 2)

        plain = nn.Dense(4) if kind == "dense" else nn.Conv(4, (3, 3), 2)
        for found, near in zip(
            jax.tree.leaves(jax.grad(loss)(params, layer.apply)),
            jax.tree.leaves(jax.grad(loss)(params, plain.apply)),
            strict=True,
        ):
            assert np.linalg.norm(found - near) < 0.05 * np.linalg.norm(near)


def refused_configs():
    good = config_of(8, 8)
    middle = aqt_config.config_v4(fwd_bits=8, fwd_mid_alpha_both=0.5)
    asymmetric = config_of(8, 8)
    aqt_config.set_int_numerics_preserve_zero(asymmetric, False)
    inputs = config_of(8, 8)
    inputs.fwd.lhs.dequant_mode = aqt_config.DequantMode.THIS_INPUT
    return {
        "must be an AQT configuration": good.fwd,
        "at most 8 bits": config_of(16, 8),
        "quantize to integers": aqt_config.config_fwd_fp8(),
        "in the middle": middle,
        "must have a zero": asymmetric,
        "dequantize the output": inputs,
    }


def test_configurations_that_no_integer_product_follows_are_refused():
    for message, config in refused_configs().items():
        with pytest.raises((TypeError, ValueError), match=message):
            aqt_products.check_config(config)
    with pytest.raises(ValueError, match="has both"):
        layers.Dense(3, bits=(8, 8), aqt=config_of(8, 8))


def test_a_kernel_of_other_bits_is_refused():
    layer, _, x = layer_and_oracle("dense", 8, 8)
    params = fgrad.quantize(layer.init(KEY, x), bits=16)
    with pytest.raises(ValueError, match="aqt gives kernels 8 bits"):
        layer.apply(params, x)


def test_a_constant_calibration_is_a_static_scale():
    """The integers of the input do not depend on the rest of the batch."""
    config = quantized_networks.aqt_dot(8)
    kernel = QTensor(jnp.array([[64]], jnp.int8), jnp.float32(2.0**-6))
    numbers = (((1,), (0,)), ((), ()))
    x = jnp.array([[0.1], [100.0]])
    y = aqt_products.dot_general(config, x, kernel, numbers)
    step = quantized_networks.ACTIVATION_STEP
    np.testing.assert_array_equal(y, [[step * 2], [step * 127]])
