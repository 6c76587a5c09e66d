"""Fixed-point numbers: scales, quantized tensors and exact integer arithmetic.

A weight is an integer on a symmetric grid, ``w = scale * qvalue`` with
``|qvalue| <= 2**(bits - 1) - 1``. This module calibrates the grid, moves pytrees
onto it and off it, and holds the integer equations of the paper: perturb (6),
update (8) and requantize (Appendix A). No function here needs a 64-bit type.

Every rounding is to the nearest integer with ties to even. It is symmetric in the
sign, so ``w + εz`` and ``w - εz`` are treated alike, and it is what ``jnp.round`` and
AQT do, so that integers and floats on the same grid agree bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from aqt.jax.v2 import aqt_tensor
from aqt.jax.v2.numerics import int_numerics

MIN_BITS, MAX_BITS = 2, 16

# calibration(x, axes, bits) -> bound: the largest magnitude to be represented, shared
# over `axes`, which are kept with length 1.
Calibration = Callable[[jax.Array, tuple[int, ...], int], jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("qvalue", "scale"),
    meta_fields=("bits",),
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A tensor on a symmetric fixed-point grid: ``value = scale * qvalue``.

    A pytree node with two leaves, so that it passes through ``jax.jit``, optax and
    checkpoints. Wherever JAX takes an array it stands for its dequantized value, so
    a layer that knows nothing of fixed point can still read it.

    Attributes:
      qvalue: integers in ``[-max_qvalue, max_qvalue]``; int8 up to 8 bits, int16 above.
        A float array that holds integers is read as well (simulated quantization) and
        follows the same trajectory.
      scale: float32 weight step Δ_w, in units of the value per grid step; a scalar, or
        an array with as many axes as ``qvalue``, of length 1 where a scale is shared.
      bits: width of the grid, 2 to 16; inferred from an int8 or int16 ``qvalue``.

    Example:
      >>> q = QTensor(jnp.array([-2, 0, 3], jnp.int16), jnp.float32(0.5))
      >>> q.bits, q.max_qvalue
      (16, 32767)
      >>> jnp.asarray(q)
      Array([-1. ,  0. ,  1.5], dtype=float32)
    """

    qvalue: Any
    scale: Any
    bits: int = 0

    def __post_init__(self) -> None:
        if self.bits:
            return
        dtype = getattr(self.qvalue, "dtype", None)
        if dtype not in (jnp.int8, jnp.int16):
            raise TypeError(
                f"QTensor cannot infer its bits from a qvalue of dtype {dtype}; "
                "pass bits= or use an int8 or int16 qvalue."
            )
        object.__setattr__(self, "bits", jnp.iinfo(dtype).bits)

    @property
    def max_qvalue(self) -> int:
        """Largest integer of the grid, ``2**(bits - 1) - 1``."""
        return max_qvalue(self.bits)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.qvalue.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.qvalue.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.qvalue.size

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the dequantized value."""
        return self.scale.dtype

    def dequantize(self) -> jax.Array:
        """The value ``scale * qvalue`` in the dtype of ``scale``."""
        return self.qvalue.astype(self.scale.dtype) * self.scale

    def __jax_array__(self) -> jax.Array:
        return self.dequantize()

    # Arithmetic is that of the value. NumPy is told to leave it to us.
    __array_ufunc__ = None

    def __add__(self, other: Any) -> jax.Array:
        return self.dequantize() + other

    def __radd__(self, other: Any) -> jax.Array:
        return other + self.dequantize()

    def __sub__(self, other: Any) -> jax.Array:
        return self.dequantize() - other

    def __rsub__(self, other: Any) -> jax.Array:
        return other - self.dequantize()

    def __mul__(self, other: Any) -> jax.Array:
        return self.dequantize() * other

    def __rmul__(self, other: Any) -> jax.Array:
        return other * self.dequantize()

    def __truediv__(self, other: Any) -> jax.Array:
        return self.dequantize() / other

    def __rtruediv__(self, other: Any) -> jax.Array:
        return other / self.dequantize()

    def __matmul__(self, other: Any) -> jax.Array:
        return self.dequantize() @ other

    def __rmatmul__(self, other: Any) -> jax.Array:
        return other @ self.dequantize()

    def __pow__(self, other: Any) -> jax.Array:
        return self.dequantize() ** other

    def __neg__(self) -> jax.Array:
        return -self.dequantize()

    def __getitem__(self, index: Any) -> jax.Array:
        return self.dequantize()[index]

    def reshape(self, *shape: Any) -> jax.Array:
        """The dequantized value, reshaped (Flax's norms ask for it)."""
        return self.dequantize().reshape(*shape)

    def to_aqt(self) -> aqt_tensor.QTensor:
        """The same tensor as AQT's type, for AQT's own products."""
        return aqt_tensor.QTensor(
            qvalue=self.qvalue,
            scale=[jnp.broadcast_to(self.scale, _scale_shape(self))],
            scale_t=None,
            bias=[],
            dequant_dtype=self.scale.dtype,
        )


def is_qtensor(x: Any) -> bool:
    """Whether ``x`` is a `QTensor`; the ``is_leaf`` of this library's tree maps."""
    return isinstance(x, QTensor)


def path_str(path: tuple[Any, ...]) -> str:
    """A leaf's key path as text, ``params/conv/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_concrete(x: Any) -> bool:
    """Whether ``x`` holds values now, rather than being traced."""
    return not isinstance(x, jax.core.Tracer)


def max_qvalue(bits: int) -> int:
    """Largest integer of the symmetric b-bit grid, ``2**(bits - 1) - 1``."""
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer):
        raise TypeError(f"bits must be an integer, got {bits!r}.")
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must lie in [{MIN_BITS}, {MAX_BITS}], got {bits}.")
    return 2 ** (int(bits) - 1) - 1


def storage_dtype(bits: int) -> Any:
    """Smallest of int8 and int16 that holds the b-bit grid."""
    return jnp.int8 if max_qvalue(bits) <= 127 else jnp.int16


# --------------------------------------------------------------------- calibration


def abs_max(x: jax.Array, axes: tuple[int, ...], bits: int) -> jax.Array:
    """Bound = ``max|x|``: nothing is clipped. Equation (5)."""
    del bits
    return jnp.max(jnp.abs(x), axis=axes, keepdims=True)


def percentile(q: float) -> Calibration:
    """Bound = the q-th percentile of ``|x|``: outliers are clipped.

    Args:
      q: percentile in (0, 100].

    Returns:
      A calibration for `quantize` or for the layers' activations.
    """
    if not 0 < q <= 100:
        raise ValueError(f"percentile must lie in (0, 100], got {q}.")

    def calibrate(x: jax.Array, axes: tuple[int, ...], bits: int) -> jax.Array:
        del bits
        return jnp.percentile(jnp.abs(x), q, axis=axes, keepdims=True)

    return calibrate


def mse_optimal(num_candidates: int = 64) -> Calibration:
    """Bound that minimises the mean squared quantization error on the b-bit grid.

    ``argmin_c mean((x - quantize(x, bound=c))**2)`` over ``num_candidates`` bounds
    that divide ``(0, max|x|]`` evenly.

    Args:
      num_candidates: resolution of the search.

    Returns:
      A calibration for `quantize` or for the layers' activations.
    """
    if num_candidates < 1:
        raise ValueError(f"num_candidates must be positive, got {num_candidates}.")

    def calibrate(x: jax.Array, axes: tuple[int, ...], bits: int) -> jax.Array:
        largest = abs_max(x, axes, bits)

        def error(fraction: jax.Array) -> jax.Array:
            bound = largest * fraction
            scale = jnp.where(bound > 0, bound, 1.0) / max_qvalue(bits)
            rounded = round_to_grid(x, scale, bits) * scale
            return jnp.mean((x - rounded) ** 2, axis=axes, keepdims=True)

        fractions = jnp.arange(1, num_candidates + 1) / num_candidates
        best = jnp.argmin(jax.lax.map(error, fractions), axis=0)
        return largest * fractions[best]

    return calibrate


# ---------------------------------------------------------- quantize and dequantize


def round_to_grid(x: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
    """``clip(⌊x / scale⌉)`` on the b-bit grid, still as floats."""
    limit = max_qvalue(bits)
    return jnp.clip(jnp.round(x / scale), -limit, limit)


def quantize_to_scale(x: jax.Array, scale: jax.Array, bits: int) -> QTensor:
    """Puts an array on a given grid: ``qvalue = clip(⌊x / scale⌉)``.

    Args:
      x: float array.
      scale: float32 grid step that broadcasts against ``x``.
      bits: width of the grid, 2 to 16.

    Returns:
      A `QTensor` with int8 (up to 8 bits) or int16 storage.
    """
    qvalue = round_to_grid(x, scale, bits).astype(storage_dtype(bits))
    return QTensor(qvalue, scale, bits)


def fake_quantize(x: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
    """Value of `quantize_to_scale` with a straight-through gradient.

    The rounding (AQT's ``IntSymmetric`` numerics) has the gradient of the identity,
    values that are clipped by more than half a step have none. For training a network
    that will run in fixed point.

    Args:
      x: float array.
      scale: grid step that broadcasts against ``x``; no gradient flows to it.
      bits: width of the grid, 2 to 16.

    Returns:
      ``scale * clip(⌊x / scale⌉)`` in the dtype of ``x``.
    """
    limit = max_qvalue(bits)
    numerics = int_numerics.IntSymmetric(
        bits=bits,
        preserve_zero=True,
        preserve_max_val=True,
        clip=True,
        clip_gradient=False,
        round=True,
        noise_fn=None,
    )

    @jax.custom_vjp
    def clip_and_round(v: jax.Array) -> jax.Array:
        return numerics.vjp_fwd(v, None)[0]

    # AQT would cut the gradient at the limit itself, where x / scale of the largest
    # value often lands one rounding error outside.
    clip_and_round.defvjp(
        lambda v: (clip_and_round(v), v),
        lambda v, g: (jnp.where(jnp.abs(v) <= limit + 0.5, g, 0),),
    )
    scale = jax.lax.stop_gradient(scale)
    return (clip_and_round(x / scale) * scale).astype(x.dtype)


def calibrate_scale(
    x: jax.Array,
    bits: int,
    *,
    channel_axis: int | None = None,
    calibration: Calibration = abs_max,
    headroom: float = 1.0,
    zero_bound: float = 1.0,
) -> jax.Array:
    """Grid step of an array: ``headroom * bound / (2**(bits - 1) - 1)``.

    Args:
      x: float array.
      bits: width of the grid, 2 to 16.
      channel_axis: axis with a scale per entry; None for one scale per tensor.
      calibration: gives the bound; `abs_max`, `percentile` or `mse_optimal`.
      headroom: room for the weights to grow, as a multiple of the bound.
      zero_bound: the bound where ``x`` is all zeros.

    Returns:
      float32 scale; a scalar per tensor, or ``x.ndim`` axes with one entry per channel.
    """
    limit = max_qvalue(bits)
    if not headroom > 0:
        raise ValueError(f"headroom must be positive, got {headroom}.")
    if not zero_bound > 0:
        raise ValueError(f"zero_bound must be positive, got {zero_bound}.")
    x = jnp.asarray(x, jnp.float32)
    axes = tuple(range(x.ndim))
    if channel_axis is not None:
        axes = tuple(a for a in axes if a != range(x.ndim)[channel_axis])
    bound = calibration(x, axes, bits)
    # A percentile of a sparse tensor can be 0 where the tensor is not.
    bound = jnp.where(bound == 0, abs_max(x, axes, bits), bound)
    bound = jnp.where(bound == 0, zero_bound, bound)
    if channel_axis is None:
        bound = bound.reshape(())
    scale = (bound * headroom / limit).astype(jnp.float32)
    return jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)


def quantize(
    params: Any,
    bits: int = 16,
    *,
    channel_axis: int | None = None,
    calibration: Calibration = abs_max,
    headroom: float = 1.5,
    zero_bound: float = 0.05,
    where: Callable[[str, jax.Array], bool] | None = None,
) -> Any:
    r"""Moves the floating-point leaves of a pytree onto a fixed-point grid.

    .. math:: w_q = \lfloor w / Δ_w \rceil, \quad
      Δ_w = \text{headroom} \cdot w_{max} / (2^{b-1} - 1)

    Args:
      params: pytree of arrays, of any shape. Leaves that are not floating point, and
        leaves that are already a `QTensor`, are left as they are, so mixed widths
        take one call each, with ``where``.
      bits: width b of the grid, 2 to 16.
      channel_axis: None for one scale per tensor; an axis (-1: a Flax kernel's output
        channels) for one scale per channel. Leaves with fewer than two axes keep one
        scale.
      calibration: what w_max is; `abs_max`, `percentile(q)` or `mse_optimal()`.
      headroom: weights may grow to this multiple of w_max before they are clipped.
      zero_bound: w_max of a tensor or channel that is all zeros (a fresh bias or
        head), which would otherwise have no grid to move on.
      where: ``where(path, leaf) -> bool`` picks the leaves, for example
        ``lambda path, leaf: path.endswith("kernel")``; all by default.

    Returns:
      The same pytree with `QTensor` in the place of the chosen leaves: int8 qvalue up
      to 8 bits and int16 above, float32 scale.

    Raises:
      TypeError: if ``bits`` is no integer.
      ValueError: if ``bits``, ``headroom`` or ``zero_bound`` is out of range, or a
        leaf holds NaN or infinity.

    Example:
      >>> params = {"w": jnp.array([[0.5, -1.0]]), "step": jnp.array(7)}
      >>> q = quantize(params, bits=8, headroom=1.0)
      >>> q["w"].qvalue, q["step"]
      (Array([[  64, -127]], dtype=int8), Array(7, dtype=int32, weak_type=True))

    Reference:
      Equation (5) of Feng et al., "Stepping Forward on the Last Mile", NeurIPS 2024.
    """
    max_qvalue(bits)

    def leaf_fn(path: tuple[Any, ...], leaf: Any) -> Any:
        if is_qtensor(leaf) or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return leaf
        name = path_str(path)
        if where is not None and not where(name, leaf):
            return leaf
        leaf = jnp.asarray(leaf, jnp.float32)
        if is_concrete(leaf) and not _is_finite(leaf):
            raise ValueError(f"leaf {name!r} holds NaN or infinity; it has no grid.")
        scale = calibrate_scale(
            leaf,
            bits,
            channel_axis=channel_axis if leaf.ndim > 1 else None,
            calibration=calibration,
            headroom=headroom,
            zero_bound=zero_bound,
        )
        return quantize_to_scale(leaf, scale, bits)

    return jax.tree_util.tree_map_with_path(leaf_fn, params, is_leaf=is_qtensor)


def dequantize(params: Any) -> Any:
    """Every `QTensor` of a pytree as its float value; other leaves untouched.

    Example:
      >>> dequantize({"w": QTensor(jnp.array([3], jnp.int8), jnp.float32(0.5))})
      {'w': Array([1.5], dtype=float32)}
    """
    return jax.tree.map(
        lambda x: x.dequantize() if is_qtensor(x) else x, params, is_leaf=is_qtensor
    )


# ---------------------------------------------------------------- integer arithmetic


def requantize(
    acc: jax.Array,
    multiplier: jax.Array | int,
    shift: jax.Array | int,
    bits: int = 32,
) -> jax.Array:
    r"""Multiplies by an integer and shifts right, rounding, without 64-bit types.

    .. math:: clip(\lfloor acc \cdot multiplier / 2^{shift} \rceil), \pm(2^{bits-1}-1))

    Ties go to the even integer. The 63-bit product is held in two 32-bit words.

    Args:
      acc: int32 accumulator, any value of the type.
      multiplier: int32 in [0, 2**31); broadcasts against ``acc``.
      shift: in [0, 63]; broadcasts against ``acc``.
      bits: the result saturates to this width, 2 to 32.

    Returns:
      int32 array.

    Example:
      >>> requantize(jnp.array([5, 6, -7]), 1, 1)  # ties to even
      Array([ 2,  3, -4], dtype=int32)

    Reference:
      Appendix A of Feng et al. 2024; Jacob et al. 2018 (arXiv 1712.05877).
    """
    if not MIN_BITS <= bits <= 32:
        raise ValueError(f"bits must lie in [{MIN_BITS}, 32], got {bits}.")
    _check_range("multiplier", multiplier, 0, 2**31 - 1)
    _check_range("shift", shift, 0, 63)
    acc = jnp.asarray(acc, jnp.int32)
    limit = 2 ** (bits - 1) - 1
    if isinstance(multiplier, int) and multiplier == 1 and isinstance(shift, int):
        return jnp.clip(_rounding_shift(acc, shift), -limit, limit)
    high, low = multiply_u32(_magnitude(acc), jnp.asarray(multiplier, jnp.uint32))
    shift = jnp.asarray(shift, jnp.uint32)
    high_q, low_q = _shift_right(high, low, shift)
    # The bit below the result decides, and whether anything is set below that bit.
    below = jnp.maximum(shift, 1) - 1
    half = jnp.where(shift > 0, _shift_right(high, low, below)[1] & 1, 0)
    mask_high, mask_low = _low_mask(below)
    sticky = ((high & mask_high) | (low & mask_low)) != 0
    round_up = (half == 1) & (sticky | ((low_q & 1) == 1))
    limit = jnp.uint32(limit)
    # low_q + 1 cannot wrap where it is used: it is used only below the limit.
    saturated = (high_q != 0) | (low_q >= limit)
    magnitude = jnp.where(saturated, limit, low_q + round_up).astype(jnp.int32)
    return jnp.where(acc < 0, -magnitude, magnitude)


def fixed_point_ratio(ratio: float) -> tuple[int, int]:
    """Integers ``(multiplier, shift)`` with ``multiplier / 2**shift ≈ ratio``.

    The multiplier has up to 31 bits, so the relative error is at most 2**-31; a
    dyadic ratio, such as the default perturbation step 2**-5, is exact and small.

    Args:
      ratio: positive and finite, in (2**-32, 2**30].

    Returns:
      Python integers for `requantize`.

    Example:
      >>> fixed_point_ratio(2**-5), fixed_point_ratio(0.75)
      ((1, 5), (3, 2))
    """
    if not 2.0**-32 < ratio <= 2.0**30:
        raise ValueError(f"ratio must lie in (2**-32, 2**30], got {ratio}.")
    mantissa, exponent = math.frexp(ratio)
    multiplier, shift = round(mantissa * 2**31), 31 - exponent
    while multiplier % 2 == 0 and shift > 0:
        multiplier, shift = multiplier // 2, shift - 1
    return multiplier, shift


def perturb_qvalue(
    qvalue: jax.Array,
    z: jax.Array,
    epsilon_q: jax.Array,
    z_step: float,
    bits: int,
) -> jax.Array:
    r"""Adds ``ε z`` to a weight in integers, with a 32-bit accumulator.

    .. math:: w_q' = clip(\lfloor Δ_z (1_q w_q + ε_q z_q) \rceil),
      \quad 1_q = \lfloor 1/Δ_z \rceil

    Args:
      qvalue: weights w_q on the b-bit grid; int8, int16, or floats holding integers.
      z: int8 perturbation z_q, with the sign of the evaluation applied or not.
      epsilon_q: int32 ``⌊ε/Δ_w⌉``, negative for ``w - εz``; broadcasts.
      z_step: Δ_z in [1/64, 1]. A power of two makes ``1_q Δ_z = 1`` exact and the
        division a shift.
      bits: width b of the weight grid.

    Returns:
      The perturbed integers in the dtype of ``qvalue``.

    Raises:
      ValueError: if ``z_step`` is out of range.

    Reference:
      Equation (6) of Feng et al. 2024.
    """
    if not 1 / 64 <= z_step <= 1:
        raise ValueError(f"z_step must lie in [1/64, 1], got {z_step}.")
    one_q = round(1 / z_step)
    # Beyond this a single unit of z crosses the whole grid: the result is clipped
    # anyway, and the accumulator stays inside int32.
    largest = 2**22
    acc = qvalue.astype(jnp.int32) * one_q
    acc += jnp.clip(epsilon_q, -largest, largest) * z.astype(jnp.int32)
    multiplier, shift = fixed_point_ratio(z_step)
    return requantize(acc, multiplier, shift, bits).astype(qvalue.dtype)


def update_qvalue(qvalue: jax.Array, update_q: jax.Array, bits: int) -> jax.Array:
    r"""Integer change of a weight that stays on its grid.

    .. math:: clip(w_q + \bar w_q) - w_q

    Args:
      qvalue: weights w_q on the b-bit grid; int8, int16, or floats holding integers.
      update_q: int32 change in grid steps, any value of the type.
      bits: width b of the weight grid.

    Returns:
      int32 array: the change after clipping, so ``qvalue + result`` is on the grid.

    Reference:
      Equation (8) of Feng et al. 2024.
    """
    limit = max_qvalue(bits)
    qvalue = qvalue.astype(jnp.int32)
    # Clipping the change first keeps the sum inside int32.
    update_q = jnp.clip(update_q, -2 * limit, 2 * limit)
    return jnp.clip(qvalue + update_q, -limit, limit) - qvalue


def _is_finite(x: jax.Array) -> bool:
    with jax.ensure_compile_time_eval():  # of a constant of a jitted function as well
        return bool(jnp.isfinite(x).all())


def _scale_shape(q: QTensor) -> tuple[int, ...]:
    return q.scale.shape if q.scale.ndim == q.ndim else (1,) * q.ndim


def _check_range(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, int) and not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value}.")


def _rounding_shift(x: jax.Array, shift: int) -> jax.Array:
    """``⌊x / 2**shift⌉`` of int32, ties to even, in a handful of instructions."""
    if shift == 0:
        return x
    if shift > 31:
        return jnp.zeros_like(x)  # |x| / 2**shift is at most one half, and 0 is even
    floor = x >> shift
    remainder = (x & (2**shift - 1)).astype(jnp.uint32)
    half = jnp.uint32(2 ** (shift - 1))
    up = (remainder > half) | ((remainder == half) & ((floor & 1) == 1))
    return floor + up


def _magnitude(x: jax.Array) -> jax.Array:
    """``|x|`` of int32 as uint32, right for -2**31 too."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(x < 0, ~bits + 1, bits)


def multiply_u32(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The 64-bit product of two uint32, as (high, low) words."""
    a_high, a_low = a >> 16, a & 0xFFFF
    b_high, b_low = b >> 16, b & 0xFFFF
    middle = a_high * b_low + (a_low * b_low >> 16)  # < 2**32
    middle_low = (middle & 0xFFFF) + a_low * b_high  # < 2**32
    high = a_high * b_high + (middle >> 16) + (middle_low >> 16)
    return high, a * b


def _shift_right(
    high: jax.Array, low: jax.Array, shift: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``(high, low) >> shift`` for shift in [0, 63]; XLA gives 0 for shifts >= 32."""
    carried = jnp.where(shift < 32, _left(high, 32 - shift), high >> _over(shift))
    return _right(high, shift), _right(low, shift) | carried


def _low_mask(count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(high, low) words whose lowest ``count`` bits are set, count in [0, 62]."""
    ones = jnp.uint32(0xFFFFFFFF)
    mask_low = jnp.where(count < 32, _left(jnp.uint32(1), count) - 1, ones)
    mask_high = jnp.where(count > 32, _left(jnp.uint32(1), _over(count)) - 1, 0)
    return mask_high.astype(jnp.uint32), mask_low


def _over(shift: jax.Array) -> jax.Array:
    return jnp.where(shift >= 32, shift - 32, 0)


def _right(x: jax.Array, shift: jax.Array) -> jax.Array:
    return jnp.where(shift < 32, x >> jnp.minimum(shift, 31), 0)


def _left(x: jax.Array, shift: jax.Array) -> jax.Array:
    return jnp.where(shift < 32, x << jnp.minimum(shift, 31), 0)
