"""Quantized tensors: an array of integers and the value of their step.

A weight is an integer on a symmetric grid, ``w = scale * qvalue`` with
``|qvalue| <= 2**(bits - 1) - 1``. This module has the type of such a tensor and moves
pytrees onto the grid and off it.
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

from fgrad import _checks
from fgrad._trees import is_concrete, path_str
from fgrad.fixed_point.array_like import ArrayLike
from fgrad.fixed_point.calibration import (
    Calibration,
    abs_max,
    calibrate_scale,
    largest_value,
    round_to_grid,
)
from fgrad.fixed_point.integers import max_qvalue, storage_dtype

# The name scope of equations that may read the parts of a `QTensor` inside a loss.
READ_ON_PURPOSE = "fgrad_reads_integers"


# What may not stand in the place of a scale. Placeholders may, such as shardings, and
# the None of an axis that `jax.vmap` does not map over.
_NO_SCALES = (bool, bytes, complex, dict, list, str, tuple)


@dataclasses.dataclass(frozen=True, eq=False)
class QTensor(ArrayLike):
    """A tensor on a symmetric fixed-point grid: ``value = scale * qvalue``.

    To JAX's transformations, optax and checkpoints it is a pytree node with two leaves.
    To all that asks for an array it is its dequantized value: Python's operators,
    comparisons, iteration and ``len``, ``numpy`` and ``jax.numpy``, and the methods of
    ``jax.Array`` that are about values, such as ``.T``, ``.sum`` and ``.at``. They
    return plain arrays.

    Functions of ``jax.lax`` take arrays only and raise an error: give them
    ``jnp.asarray(q)``. What walks over ``jax.tree.leaves`` meets the parts,
    not the value; inside a loss that this library evaluates, reading a part as if it
    were the value raises a TypeError. Use ``fgrad.dequantize(params)`` there.

    To stack tensors for ``vmap`` or ``scan``, map over their parts,
    ``jax.tree.map(lambda *x: jnp.stack(x), *qs)``: neither the stack, whose scale has
    only the new axis, nor what tree maps make of it is checked.

    Attributes:
      qvalue: integers in ``[-max_qvalue, max_qvalue]``; int8 up to 8 bits, int16 above.
        A float array that holds integers is read as well (simulated quantization) and
        follows the same trajectory.
      scale: float32 weight step Δ_w, in units of the value per grid step; a scalar, or
        an array with as many axes as ``qvalue``, of length 1 where a scale is shared.
      bits: width of the grid, 2 to 16; inferred from an int8 or int16 ``qvalue``.

    Raises:
      TypeError, ValueError: for ``bits`` out of range or too many for the dtype of
        ``qvalue``, and for a scale of integers or of a shape that does not fit. The
        numbers in the arrays are looked at by `check_values`.

    Example:
      >>> q = QTensor(jnp.array([-2, 0, 3], jnp.int16), jnp.float32(0.5))
      >>> q.bits, q.max_qvalue
      (16, 32767)
      >>> jnp.asarray(q)
      Array([-1. ,  0. ,  1.5], dtype=float32)
      >>> q > 0, float(q.sum())
      (Array([False, False,  True], dtype=bool), 0.5)
    """

    qvalue: Any
    scale: Any
    bits: int = 0

    def __post_init__(self) -> None:
        number = isinstance(self.scale, int | float)
        if number and not isinstance(self.scale, bool):
            # Whether it is positive is a question of check_values.
            if _checks.LARGEST < abs(self.scale) != math.inf:
                raise ValueError(f"float32 holds no scale of {self.scale}.")
            object.__setattr__(self, "scale", np.float32(self.scale))
        elif callable(self.scale) or isinstance(self.scale, _NO_SCALES):
            raise TypeError(
                f"the scale of a QTensor is a float array, got {self.scale!r}; use "
                "jnp.float32(scale)."
            )
        dtype = getattr(self.qvalue, "dtype", None)
        if _is_zero(self.bits):
            if dtype not in (jnp.int8, jnp.int16):
                raise TypeError(
                    f"QTensor cannot infer its bits from a qvalue of dtype {dtype}; "
                    "pass bits= or use an int8 or int16 qvalue."
                )
            object.__setattr__(self, "bits", jnp.iinfo(dtype).bits)
        _check_storage(dtype, self.bits)
        object.__setattr__(self, "bits", int(self.bits))
        _check_scale(self.qvalue, self.scale)

    @property
    def max_qvalue(self) -> int:
        """Largest integer of the grid, ``2**(bits - 1) - 1``."""
        return max_qvalue(self.bits)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        shape: tuple[int, ...] = self.qvalue.shape
        return shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        ndim: int = self.qvalue.ndim
        return ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        size: int = self.qvalue.size
        return size

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the dequantized value."""
        dtype: np.dtype = self.scale.dtype
        return dtype

    def dequantize(self) -> jax.Array:
        """The value ``scale * qvalue`` in the dtype of ``scale``."""
        values: jax.Array = jnp.asarray(self.qvalue).astype(self.dtype) * self.scale
        return values

    def to_aqt(self) -> aqt_tensor.QTensor:
        """The same tensor as AQT's type, for AQT's own products."""
        return aqt_tensor.QTensor(
            qvalue=self.qvalue,
            scale=[jnp.broadcast_to(self.scale, _scale_shape(self))],
            scale_t=None,
            bias=[],
            dequant_dtype=self.scale.dtype,
        )


def _is_zero(bits: Any) -> bool:
    whole = isinstance(bits, int | np.integer) and not isinstance(bits, bool)
    return whole and not bits


def _flatten(q: QTensor) -> tuple[tuple[Any, Any], int]:
    return (q.qvalue, q.scale), q.bits


def _flatten_with_keys(q: QTensor) -> tuple[tuple[tuple[Any, Any], ...], int]:
    key = jax.tree_util.GetAttrKey
    return ((key("qvalue"), q.qvalue), (key("scale"), q.scale)), q.bits


def _unflatten(kind: type[QTensor], bits: int, parts: Any) -> QTensor:
    # Tree maps put anything in the place of the parts, so nothing is checked here.
    q = object.__new__(kind)
    for name, part in zip(("qvalue", "scale", "bits"), (*parts, bits), strict=True):
        object.__setattr__(q, name, part)
    return q


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QGradient(QTensor):
    """The gradient of a `QTensor`, or an update of it that is not on the grid yet.

    Its ``qvalue`` is a float array in units of the value, not of grid steps, and its
    ``scale`` is zero. Optax's links that map over gradients alone take it as it is. It
    is a pytree node of its own, which does not fit beside a `QTensor`: what adds it to
    the parameters raises an error, where integers would be cut off in silence.
    `fgrad.quantized_update` makes an update of it that fits.
    """

    def __repr__(self) -> str:
        return (
            "a gradient that is not on the weight grid. Let fgrad.quantized_update() "
            "be the last link of the chain; an optimizer with moments or weight decay "
            "goes inside fgrad.on_values(...)"
        )


for _kind in (QTensor, QGradient):
    jax.tree_util.register_pytree_with_keys(
        _kind, _flatten_with_keys, functools.partial(_unflatten, _kind), _flatten
    )


def restored(qvalue: Any, scale: Any, bits: int, name: str) -> QTensor:
    """A `QTensor` of parts that come from a file, after `check_values`.

    Args:
      qvalue: integers of the grid.
      scale: float32 grid step.
      bits: width of the grid; it is not inferred.
      name: what messages call the tensor.

    Raises:
      ValueError: if the three are no tensor on a grid.

    Example:
      >>> restored(jnp.array([3], jnp.int8), jnp.float32(0.5), 1, "w")
      Traceback (most recent call last):
      ...
      ValueError: leaf 'w' is no tensor on a grid: bits must lie in [2, 16], got 1.
    """
    q = _unflatten(QTensor, bits, (qvalue, scale))
    check_values(q, name)
    return q


def check_values(q: QTensor, name: str) -> None:
    """Raises if a `QTensor` is not one that arithmetic can work with.

    Tree maps and ``dataclasses.replace`` make tensors of any parts, and the constructor
    looks at no numbers. A tensor that fails here would not raise later: int8 storage
    of a 16-bit grid wraps 127 to -127, and a scale that is negative, zero or NaN makes
    other weights of them. Traced arrays, and those of other processes, have no numbers
    here: of them only dtype and shape are looked at.

    Args:
      q: the tensor.
      name: what messages call it, such as the path of the leaf.

    Raises:
      ValueError: for bits that are no integer from 2 to 16; a ``qvalue`` of another
        dtype than the grid's storage and floats, or that is no integer of the grid;
        a scale of integers or of a shape that does not fit, or that is not positive
        and finite.

    Example:
      >>> check_values(QTensor(jnp.array([3], jnp.int8), jnp.float32(-1)), "w")
      Traceback (most recent call last):
      ...
      ValueError: the scale of leaf 'w' must be positive and finite, got -1.0.
    """
    try:
        for part in ("qvalue", "scale"):
            _check_is_array(getattr(q, part), part)
        _check_storage(q.qvalue.dtype, q.bits)
        _check_scale(q.qvalue, q.scale)
        _check_is_stored(q.qvalue.dtype, q.bits)
    except (TypeError, ValueError) as error:
        raise ValueError(f"leaf {name!r} is no tensor on a grid: {error}") from error
    _check_scale_values(q.scale, name)
    _check_integers(q, name)


def _check_storage(dtype: Any, bits: int) -> None:
    """Raises if a grid of ``bits`` bits does not fit into a dtype; None is any."""
    limit = max_qvalue(bits)
    if dtype is None or jnp.issubdtype(dtype, jnp.floating):
        return
    if not jnp.issubdtype(dtype, jnp.signedinteger):
        raise TypeError(
            f"the qvalue of a QTensor holds signed integers, got dtype {dtype}; use "
            "int8 up to 8 bits and int16 above."
        )
    if jnp.iinfo(dtype).max < limit:
        raise ValueError(
            f"a grid of {bits} bits holds integers up to {limit}, which do not fit "
            f"into a qvalue of dtype {dtype}; use "
            f"{jnp.dtype(storage_dtype(bits))} or fewer bits."
        )


def _check_is_stored(dtype: Any, bits: int) -> None:
    """Raises if weights are kept in wider integers than theirs, as updates may be."""
    storage = jnp.dtype(storage_dtype(bits))
    if dtype != storage and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"weights of {bits} bits are kept in {storage}, and its qvalue is {dtype}; "
            f"convert it with qvalue.astype({str(storage)!r})."
        )


def _check_is_array(part: Any, name: str) -> None:
    """Raises for a placeholder, which the constructor takes."""
    if not hasattr(part, "dtype") or not hasattr(part, "shape"):
        raise TypeError(f"its {name} must be an array, got a {type(part).__name__}.")


def _check_scale(qvalue: Any, scale: Any) -> None:
    """Raises if a scale cannot belong to a qvalue; placeholders may be anything."""
    dtype = getattr(scale, "dtype", None)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"the scale of a QTensor is a float array, got dtype {dtype}; use "
            "jnp.float32(scale)."
        )
    shape, of = getattr(scale, "shape", None), getattr(qvalue, "shape", None)
    if not shape or of is None:
        return
    if len(shape) != len(of) or any(
        n not in (1, m) for n, m in zip(shape, of, strict=True)
    ):
        raise ValueError(
            f"the scale of a QTensor of shape {of} is a scalar or has as many axes, "
            f"each of length 1 or that of the tensor; got shape {shape}."
        )


def _check_scale_values(scale: Any, name: str) -> None:
    """Raises if a scale is not positive and finite, where its numbers are here."""
    if not _is_readable(scale):
        return
    values = np.asarray(scale, np.float64).reshape(-1)
    bad = values[~(np.isfinite(values) & (values > 0))]
    if bad.size:
        raise ValueError(
            f"the scale of leaf {name!r} must be positive and finite, got {bad[0]}."
        )


def _check_integers(q: QTensor, name: str) -> None:
    """Raises if a qvalue is none of the grid, where its numbers are here."""
    if not _is_readable(q.qvalue) or not q.size:
        return
    with jax.ensure_compile_time_eval():  # of a constant of a jitted function as well
        low, high, whole = map(float, _summary(q.qvalue))
    for end in (low, high):
        if not abs(end) <= q.max_qvalue:  # NaN as well
            raise ValueError(
                f"the qvalue of leaf {name!r} holds {end:g}, outside the grid of "
                f"{q.bits} bits, [-{q.max_qvalue}, {q.max_qvalue}]. Clip it, or give "
                "the bits that it was made with."
            )
    if not whole:
        raise ValueError(
            f"the qvalue of leaf {name!r} holds fractions; it counts steps of the "
            "scale. Make it with fgrad.quantize or round it."
        )


@jax.jit
def _summary(array: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Smallest and largest number, and whether all are integers, in one pass."""
    whole = jnp.array(True)
    if jnp.issubdtype(array.dtype, jnp.floating):
        whole = jnp.all(array == jnp.round(array))
    return jnp.min(array), jnp.max(array), whole


def _is_readable(x: Any) -> bool:
    """Whether it is an array whose numbers are here, and not traced or elsewhere."""
    if isinstance(x, np.ndarray | np.generic):
        return True
    return isinstance(x, jax.Array) and is_concrete(x) and x.is_fully_addressable


def integers_of(q: QTensor) -> jax.Array:
    """The ``qvalue`` of a tensor, for a loss that means to read integers.

    Inside a loss, arithmetic on ``q.qvalue`` raises a TypeError, because it is nearly
    always a mistake. On what this function returns any arithmetic is allowed.

    Args:
      q: a tensor of the params that the loss was given.

    Returns:
      The integers, in their dtype.

    Example:
      >>> q = QTensor(jnp.array([3, -4], jnp.int8), jnp.float32(0.5))
      >>> integers_of(q) % 2
      Array([1, 0], dtype=int8)
    """
    with jax.named_scope(READ_ON_PURPOSE):
        return jnp.copy(jnp.asarray(q.qvalue))


def scale_of(q: QTensor) -> jax.Array:
    """The ``scale`` of a tensor, for a loss that means to read it: see `integers_of`.

    Example:
      >>> scale_of(QTensor(jnp.array([3, -4], jnp.int8), jnp.float32(0.5)))
      Array(0.5, dtype=float32)
    """
    with jax.named_scope(READ_ON_PURPOSE):
        return jnp.copy(jnp.asarray(q.scale))


def is_qtensor(x: Any) -> bool:
    """Whether ``x`` is a `QTensor`; the ``is_leaf`` of this library's tree maps."""
    return isinstance(x, QTensor)


def stored(leaf: Any) -> jax.Array:
    """The array in which a leaf stores its values: integers of a `QTensor`."""
    if is_qtensor(leaf):
        qvalue: jax.Array = leaf.qvalue
        return qvalue
    return jnp.asarray(leaf, jnp.result_type(leaf))


def with_stored(leaf: Any, array: jax.Array) -> Any:
    """A leaf like another one that stores this array."""
    return dataclasses.replace(leaf, qvalue=array) if is_qtensor(leaf) else array


def as_gradient(leaf: Any, value: jax.Array) -> Any:
    """The gradient of a leaf: in the leaf's dtype, or of a `QTensor` a `QGradient`.

    Args:
      leaf: float array or `QTensor`.
      value: in the shape of the leaf, in loss per unit of the leaf's value.
    """
    if not is_qtensor(leaf):
        return value.astype(jnp.result_type(leaf))
    return QGradient(value, jnp.zeros_like(leaf.scale), leaf.bits)


def as_update(leaf: Any, change: jax.Array) -> Any:
    """An update that ``optax.apply_updates`` adds to a leaf.

    Args:
      leaf: float array or `QTensor`.
      change: in the shape of the leaf; of a `QTensor` an int32 number of grid steps.

    Returns:
      For a float leaf the change itself. For a `QTensor` a `QTensor` with the change as
      its ``qvalue`` and a ``scale`` of zero, which leaves that of the leaf as it is.
    """
    if not is_qtensor(leaf):
        return change
    return dataclasses.replace(leaf, qvalue=change, scale=jnp.zeros_like(leaf.scale))


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
      params: pytree of arrays, of any shape. Leaves that are not floating point
        (integers, complex numbers, functions, strings), and leaves that are already a
        `QTensor`, are left as they are, so mixed widths take one call each, with
        ``where``.
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
      TypeError: if ``bits`` is no integer, or ``calibration`` no function.
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
    if where is not None:
        _checks.function("where", where, "path", "leaf")

    def leaf_fn(path: tuple[Any, ...], leaf: Any) -> Any:
        if is_qtensor(leaf) or not _is_float(leaf):
            return leaf
        name = path_str(path)
        if where is not None and not _chosen(where(name, leaf), name):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"leaf {name!r} is a ShapeDtypeStruct, which has no values to find a "
                "grid for; give the arrays, or use jax.eval_shape(fgrad.quantize, ...)."
            )
        leaf = jnp.asarray(leaf, jnp.float32)
        if is_concrete(leaf):
            _check_has_grid(leaf, name, bits)
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
    if np.ndim(scale) == 0 and not hasattr(scale, "dtype"):
        _checks.positive("scale", scale)
    _check_scale(x, scale)
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
        rounded: jax.Array = numerics.vjp_fwd(v, None)[0]
        return rounded

    # AQT would cut the gradient at the limit itself, where x / scale of the largest
    # value often lands one rounding error outside.
    clip_and_round.defvjp(
        lambda v: (clip_and_round(v), v),
        lambda v, g: (jnp.where(jnp.abs(v) <= limit + 0.5, g, 0),),
    )
    scale = jax.lax.stop_gradient(scale)
    return (clip_and_round(x / scale) * scale).astype(x.dtype)


def _chosen(answer: Any, name: str) -> bool:
    """What ``where`` said of a leaf."""
    if not isinstance(answer, bool | np.bool_):
        raise TypeError(
            f"where must return True or False, got {answer!r} for leaf {name!r}"
            + (": it has no return." if answer is None else ".")
        )
    return bool(answer)


def _is_float(leaf: Any) -> bool:
    """Whether a leaf is a floating-point array or number."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, float)
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _check_has_grid(leaf: jax.Array, name: str, bits: int) -> None:
    with jax.ensure_compile_time_eval():  # of a constant of a jitted function as well
        largest = float(jnp.max(jnp.abs(leaf), initial=0))
    if not math.isfinite(largest):
        raise ValueError(
            f"leaf {name!r} holds NaN or infinity, or a value beyond float32; it has "
            "no grid."
        )
    if largest > largest_value(bits):
        raise ValueError(
            f"leaf {name!r} holds a value of magnitude {largest:g}, but a grid of "
            f"{bits} bits ends at {largest_value(bits):g} in float32; use more bits "
            "or scale the leaf down."
        )


def _scale_shape(q: QTensor) -> tuple[int, ...]:
    return q.scale.shape if q.scale.ndim == q.ndim else (1,) * q.ndim
