"""Quantized tensors: an array of integers and the value of their step.

A weight is an integer on a symmetric grid, ``w = scale * qvalue`` with
``|qvalue| <= 2**(bits - 1) - 1``. This module has the type of such a tensor and moves
pytrees onto the grid and off it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from aqt.jax.v2 import aqt_tensor
from aqt.jax.v2.numerics import int_numerics

from fgrad._trees import is_concrete, path_str
from fgrad.fixed_point.calibration import (
    Calibration,
    abs_max,
    calibrate_scale,
    round_to_grid,
)
from fgrad.fixed_point.integers import max_qvalue, storage_dtype


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


def stored(leaf: Any) -> jax.Array:
    """The array in which a leaf stores its values: integers of a `QTensor`."""
    if is_qtensor(leaf):
        return leaf.qvalue
    return jnp.asarray(leaf, jnp.result_type(leaf))


def with_stored(leaf: Any, array: jax.Array) -> Any:
    """A leaf like another one that stores this array."""
    return dataclasses.replace(leaf, qvalue=array) if is_qtensor(leaf) else array


def as_gradient(leaf: Any, value: jax.Array) -> Any:
    """A gradient or an update in the form that optax expects for a leaf.

    Args:
      leaf: float array or `QTensor`.
      value: in the shape of the leaf.

    Returns:
      For a float leaf the value in the leaf's dtype. For a `QTensor` a `QTensor` that
      holds the value in its ``qvalue``, in its own dtype, and a ``scale`` of zero: what
      is added to a scale leaves it as it is.
    """
    if not is_qtensor(leaf):
        return value.astype(jnp.result_type(leaf))
    return dataclasses.replace(leaf, qvalue=value, scale=jnp.zeros_like(leaf.scale))


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


def _is_finite(x: jax.Array) -> bool:
    with jax.ensure_compile_time_eval():  # of a constant of a jitted function as well
        return bool(jnp.isfinite(x).all())


def _scale_shape(q: QTensor) -> tuple[int, ...]:
    return q.scale.shape if q.scale.ndim == q.ndim else (1,) * q.ndim
