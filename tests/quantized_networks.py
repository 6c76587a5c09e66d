"""Networks that AQT and Qwix quantize by their own interfaces, for tests.

Scales are constant powers of two, so that scaling rounds nothing, and a loss depends on
no order of evaluation.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aqt.jax.v2 import config as aqt_config
from aqt.jax.v2.aqt_dot_general import DotGeneralRaw
from aqt.jax.v2.flax import aqt_flax
from aqt.jax.v2.utils import QuantMode

import fgrad

# The steps of the grids of weights and of activations.
WEIGHT_STEP, ACTIVATION_STEP = 2.0**-6, 2.0**-4


class Net(nn.Module):
    """A convolution, attention where asked for, and a dense layer."""

    dot: type[nn.Module] | None = None
    conv: type[nn.Module] | None = None
    attention: bool = False

    @nn.compact
    def __call__(self, x):
        """``[n, height, width, features]`` to 3 logits."""
        x = nn.relu(nn.Conv(4, (3, 3), conv_general_dilated_cls=self.conv)(x))
        x = x.reshape(len(x), -1, 4)
        if self.attention:
            attention = nn.MultiHeadDotProductAttention(
                2, qkv_dot_general_cls=self.dot, out_dot_general_cls=self.dot
            )
            x = x + attention(x)
        return nn.Dense(3, dot_general_cls=self.dot)(x.reshape(len(x), -1))


def set_steps(raw: DotGeneralRaw, bits: int) -> None:
    """Lets AQT calibrate both operands of a product by a constant."""
    few = bits < 8
    of_weights = WEIGHT_STEP if bits == 8 else 0.25 if few else 2.0**-14
    of_activations = 1.0 if few else ACTIVATION_STEP
    for side, step, width in (
        (raw.dg_quantizer.lhs, of_activations, min(bits, 8)),
        (raw.dg_quantizer.rhs, of_weights, bits),
    ):
        side.calibration = functools.partial(
            aqt_config.calibration.ConstantCalibration,
            bound=step * (2.0 ** (width - 1) - 0.5),
        )


def aqt_dot(bits: int) -> aqt_config.DotGeneral:
    """AQT's configuration of a product, activations of 8 bits or fewer."""
    config = aqt_config.config_v4(fwd_bits=8)
    aqt_config.set_bits(config, min(bits, 8), bits, None, None, None, None)
    set_steps(config.fwd, bits)
    return config


def aqt_conv(bits: int) -> aqt_config.DotGeneral:
    """The same of a convolution."""
    config = aqt_config.default_unquantized_config()
    config.fwd = aqt_config.conv_general_dilated_make(
        2, min(bits, 8), bits, initialize_calibration=False
    )
    set_steps(config.fwd, bits)
    config.fwd.dg_quantizer.init_calibration()
    return config


def aqt_net(
    bits: int,
    mode: QuantMode = QuantMode.TRAIN,
    *,
    attention: bool = False,
    legacy: bool = False,
) -> Net:
    """`Net` with AQT's products injected."""
    common = {
        "prng_name": None,
        "rhs_quant_mode": mode,
        "rhs_freeze_mode": aqt_flax.FreezerMode.CALIBRATION_AND_VALUE,
    }
    dot = functools.partial(
        aqt_flax.AqtDotGeneral, aqt_dot(bits), use_legacy_freezer=legacy, **common
    )
    conv = functools.partial(aqt_flax.AqtConvGeneralDilated, aqt_conv(bits), **common)
    return Net(dot, conv, attention)


def aqt_serving(bits, variables, x, **options):
    """The serving network, its weights as leaves, and ``apply(params, x)``."""
    convert = aqt_net(bits, QuantMode.CONVERT, **options)
    serve = aqt_net(bits, QuantMode.SERVE, **options)
    _, frozen = convert.apply(variables, x, mutable=["aqt"])
    params, restore = fgrad.from_served(frozen["aqt"])

    def apply(params, x):
        return serve.apply({**variables, "aqt": restore(params)}, x)

    return frozen["aqt"], params, apply


def qwix_rules(weights=jnp.int8):
    """Rules of Qwix for all layers; skips the test where Qwix is not installed."""
    qwix = pytest.importorskip("qwix", reason="needs Qwix: pip install 'fgrad[qwix]'")
    rule = qwix.QuantizationRule(
        module_path=".*",
        weight_qtype=weights,
        act_qtype=jnp.int8,
        weight_calibration_method=f"fixed,{127.5 * WEIGHT_STEP}",
        act_calibration_method=f"fixed,{127.5 * ACTIVATION_STEP}",
    )
    return qwix, [rule]


def qwix_training(**options):
    """``apply(params, x)`` of a network in Qwix's quantization-aware training."""
    qwix, rules = qwix_rules()
    net = qwix.quantize_model(Net(**options), qwix.QtProvider(rules))
    return lambda params, x: net.apply({"params": params}, x)


def qwix_serving(params, x, **options):
    """Qwix's quantized parameters, leaves made of them, and ``apply(params, x)``."""
    qwix, rules = qwix_rules()
    net = qwix.quantize_model(Net(**options), qwix.PtqProvider(rules))
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
    quantized = qwix.quantize_params(jax.tree.map(jnp.asarray, params), shapes)
    leaves, restore = fgrad.from_served(quantized)
    return quantized, leaves, lambda p, x: net.apply({"params": restore(p)}, x)


def images(seed: int = 1) -> np.ndarray:
    """Data: two small images of whole numbers."""
    rng = np.random.default_rng(seed)
    return rng.choice(np.array([-2, -1, 1, 2], np.float32), (2, 4, 4, 2))


def weights(x, span: int = 48, **options):
    """Weights of `Net` on the grid of 8 bits."""
    net = Net(**options)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(0)

    def draw(leaf):
        steps = rng.integers(-span, span + 1, leaf.shape)
        return (steps * WEIGHT_STEP).astype(np.float32)

    return jax.tree.map(draw, shapes)
