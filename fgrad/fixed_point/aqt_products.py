"""Products that are configured by AQT: its numerics and calibration on our integers.

AQT 0.9 multiplies int8 by int8. It keeps weights of more than 8 bits in float, and runs
convolutions in float32 on the integers. So activations and float kernels are quantized
by AQT, as its configuration says; the product is AQT's own where it is one of integers
and `fgrad.fixed_point.products` where it is not.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from aqt.jax.v2 import aqt_dot_general, transpose
from aqt.jax.v2 import config as aqt_config
from aqt.jax.v2.numerics import int_numerics, no_numerics
from jax import lax

from fgrad.fixed_point import products
from fgrad.fixed_point.qtensor import QTensor


def check_config(config: Any) -> None:
    """Raises unless the products of this module can follow a configuration of AQT.

    Args:
      config: an ``aqt.jax.v2.config.DotGeneral``.

    Raises:
      TypeError: for something else, such as the ``DotGeneralRaw`` inside of one.
      ValueError: for activations of more than 8 bits, in floats of 8 bits, or on a grid
        without a zero, for quantization "in the middle", and for operands that are
        dequantized before the product.

    Example:
      >>> check_config(aqt_config.config_v4(fwd_bits=8))
    """
    if not isinstance(config, aqt_dot_general.DotGeneral):
        raise TypeError(
            "aqt must be an AQT configuration, such as aqt.jax.v2.config.config_v4(), "
            f"got a {type(config).__name__}."
        )
    quantizer = config.fwd.dg_quantizer
    if not isinstance(quantizer, aqt_dot_general.DefaultDotGeneralQuantizer):
        raise ValueError(f"aqt has a quantizer of its own, {type(quantizer).__name__}.")
    if (quantizer.lhs_mid_alpha, quantizer.rhs_mid_alpha) != (None, None):
        raise ValueError("aqt must not quantize in the middle (fwd_mid_alpha_both).")
    for name, side in (("lhs", config.fwd.lhs), ("rhs", config.fwd.rhs)):
        if side.dequant_mode != aqt_config.DequantMode.OUTPUT:
            raise ValueError(
                f"aqt must dequantize the output of a product, and {name} has "
                f"{side.dequant_mode}."
            )
    for name in ("lhs", "rhs"):
        numerics = getattr(quantizer, name).numerics
        if _bits(numerics) and not numerics.preserve_zero:
            raise ValueError(f"the grid that aqt gives {name} must have a zero.")
    if _bits(quantizer.lhs.numerics) > 8:
        raise ValueError(
            "activations have at most 8 bits, and aqt gives them "
            f"{_bits(quantizer.lhs.numerics)}."
        )


def dot_general(
    config: Any,
    lhs: jax.Array,
    rhs: jax.Array | QTensor,
    dimension_numbers: Any,
    *,
    key: jax.Array | None = None,
) -> jax.Array:
    """``lax.dot_general`` of an activation and a kernel, as AQT's configuration says.

    Args:
      config: an ``aqt.jax.v2.config.DotGeneral``; see `check_config`.
      lhs: activations.
      rhs: a kernel; of a float one AQT's product is taken, which quantizes it.
      dimension_numbers: as for ``jax.lax.dot_general``.
      key: for rounding at random, which AQT does in backward passes.

    Returns:
      The product in the dtype of ``lhs``.

    Raises:
      ValueError: if the kernel has another width than the configuration.

    Example:
      >>> config = aqt_config.config_v4(fwd_bits=8)
      >>> kernel = QTensor(jnp.array([[127], [-127]], jnp.int8), jnp.float32(1))
      >>> numbers = (((1,), (0,)), ((), ()))
      >>> dot_general(config, jnp.array([[127.5, 0.0]]), kernel, numbers)
      Array([[16129.]], dtype=float32)
    """
    operands = config.fwd.dg_quantizer
    if not isinstance(rhs, QTensor):
        return _aqt_dot_general(
            config, lhs, rhs.astype(lhs.dtype), None, dimension_numbers, key
        )
    if not _is_integer_product(operands, rhs):
        x = fake_quantize(operands.lhs, lhs, dimension_numbers[0][0])
        return lax.dot_general(x, rhs.dequantize().astype(x.dtype), dimension_numbers)
    if rhs.bits <= 8 and operands.lhs.numerics.get_dtype() == jnp.int8:
        # AQT calibrates its operands before it looks at what it was given.
        unused = jnp.zeros(rhs.shape, lhs.dtype)
        return _aqt_dot_general(
            config, lhs, unused, rhs.to_aqt(), dimension_numbers, key
        )
    x, scale = _quantized(operands.lhs, lhs, dimension_numbers[0][0])
    out = products.dot_general(x, rhs, dimension_numbers)
    of_output = transpose.lhs_scale_transpose_to_output(
        scale, dimension_numbers, lhs.shape, rhs.shape
    )
    scaled: jax.Array = out * of_output
    return scaled.astype(lhs.dtype)


def activation_dot_general(
    config: Any,
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    *,
    key: jax.Array | None = None,
) -> jax.Array:
    """`dot_general` of two activations, both quantized as the configuration's lhs.

    Example:
      >>> x, numbers = jnp.array([[1.0, 0.5]]), (((1,), (1,)), ((), ()))
      >>> activation_dot_general(aqt_config.config_v4(fwd_bits=8), x, x, numbers).shape
      (1, 1)
    """
    config = copy.deepcopy(config)
    of_lhs = config.fwd.dg_quantizer.lhs
    config.fwd.dg_quantizer.rhs = copy.deepcopy(of_lhs)
    aqt_config.set_numerics(config.fwd, of_lhs.numerics, of_lhs.numerics)
    return _aqt_dot_general(config, lhs, rhs, None, dimension_numbers, key)


def conv_general_dilated(
    config: Any, lhs: jax.Array, rhs: jax.Array | QTensor, *arguments: Any
) -> jax.Array:
    """``lax.conv_general_dilated``, with operands as AQT's configuration says.

    AQT shares a scale over all of an image, and over all of a kernel but its output
    channels. A float kernel is convolved in float on the grid, with a straight-through
    gradient; of a `QTensor` the product is one of integers.

    Args:
      config: as for `dot_general`.
      lhs: activations in Flax's layout, the batch first and the features last.
      rhs: kernel in Flax's layout, the output features last.
      *arguments: as for ``fgrad.fixed_point.products.conv_general_dilated``.

    Returns:
      The convolution in the dtype of ``lhs``.

    Raises:
      ValueError: as `dot_general`.
    """
    operands = config.fwd.dg_quantizer
    of_image = range(1, lhs.ndim)
    if isinstance(rhs, QTensor):
        if _is_integer_product(operands, rhs):
            x, scale = _quantized(operands.lhs, lhs, of_image)
            out = products.conv_general_dilated(x, rhs, *arguments)
            return (out * scale).astype(lhs.dtype)
        kernel = rhs.dequantize().astype(lhs.dtype)
    else:
        kernel = fake_quantize(operands.rhs, rhs, range(rhs.ndim - 1))
    x = fake_quantize(operands.lhs, lhs, of_image)
    return products.float_conv_general_dilated(x, kernel, *arguments)


def fake_quantize(quantizer: Any, x: jax.Array, shared: Sequence[int]) -> jax.Array:
    """The value of an array on AQT's grid, with a straight-through gradient.

    Args:
      quantizer: one side of AQT's configuration, ``config.fwd.dg_quantizer.rhs``.
      x: float array.
      shared: axes that share a scale.

    Returns:
      An array like ``x``.

    Example:
      >>> quantizer = aqt_config.config_v4(fwd_bits=4).fwd.dg_quantizer.rhs
      >>> fake_quantize(quantizer, jnp.array([7.5, 2.2]), (0,))
      Array([7., 2.], dtype=float32)
    """
    if not _bits(quantizer.numerics):
        return x

    @jax.custom_vjp
    def on_grid(x: jax.Array) -> jax.Array:
        value: jax.Array = _quant(quantizer, x, shared).dequant()
        return value

    on_grid.defvjp(lambda x: (on_grid(x), None), lambda _, g: (g,))
    return on_grid(x)


def _is_integer_product(operands: Any, kernel: QTensor) -> bool:
    """Whether both operands are integers; raises if the kernel's are of other bits."""
    bits = _bits(operands.rhs.numerics)
    if bits not in (0, kernel.bits):
        raise ValueError(
            f"aqt gives kernels {bits} bits and this one has {kernel.bits}; use "
            f"fgrad.quantize(params, bits={bits}) or set_bits of AQT's configuration."
        )
    return bool(bits and _bits(operands.lhs.numerics))


def _bits(numerics: Any) -> int:
    """Bits of AQT's integers; 0 for operands that stay floats."""
    if isinstance(numerics, no_numerics.NoNumerics):
        return 0
    if not isinstance(numerics, int_numerics.IntSymmetric):
        raise ValueError(
            f"aqt must quantize to integers, and has {type(numerics).__name__}."
        )
    bits: int = numerics.bits
    return bits


def _aqt_dot_general(
    config: Any,
    lhs: jax.Array,
    rhs: jax.Array,
    rhs_qt: Any,
    dimension_numbers: Any,
    key: jax.Array | None,
) -> jax.Array:
    # The context is set on a copy, which AQT changes when it is called.
    config = aqt_config.set_context(config, key, train_step=None)
    out: jax.Array
    out, _ = config.dg_core(lhs, rhs, None, rhs_qt, dimension_numbers)
    return out


def _quant(quantizer: Any, x: jax.Array, shared: Sequence[int]) -> Any:
    """AQT's quantized tensor of an array, with one scale."""
    quantizer = copy.deepcopy(quantizer)
    if quantizer._calibrator is None:
        quantizer.init_calibration()
    found, _ = quantizer.quant(x, calibration_axes=list(shared))
    if found.bias or found.sparsity_mask is not None:
        raise ValueError("aqt must calibrate without a bias or a mask of sparsity.")
    return found


def _quantized(
    quantizer: Any, x: jax.Array, shared: Sequence[int]
) -> tuple[QTensor, jax.Array]:
    """An activation's integers as a `QTensor` of scale 1, and AQT's scale."""
    found = _quant(quantizer, x, shared)
    integers = found.qvalue.astype(jnp.int8)
    bits = _bits(quantizer.numerics)
    return QTensor(integers, jnp.float32(1), bits), found.scale[0]
