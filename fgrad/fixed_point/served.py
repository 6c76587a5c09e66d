"""Quantized tensors of AQT and Qwix as leaves that train.

A network that one of these libraries has quantized keeps its weights as integers in a
type of that library, which the network asks for again when it is applied.
`from_served` puts a `QTensor` in the place of each and returns the way back, for use
inside the loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from aqt.jax.v2 import aqt_tensor

from fgrad._trees import is_concrete, path_str
from fgrad.fixed_point.integers import max_qvalue, storage_dtype
from fgrad.fixed_point.qtensor import QTensor, integers_of, is_qtensor, scale_of

# What a leaf of the served tree becomes inside the loss.
_Back = Callable[[QTensor], Any]

# The entries of a mapping that stands for one tensor: those of AQT's older freezer,
# and those of a QArray in the state of a Qwix model in NNX.
_AQT_FREEZER = frozenset({"value", "scale"})
_NNX_STATE = frozenset({"qvalue", "scale"})


def from_served(
    tree: Any, *, bits: int | None = None
) -> tuple[Any, Callable[[Any], Any]]:
    r"""Takes over the quantized tensors of AQT and Qwix as `QTensor` leaves.

    .. math:: w = \text{scale} \cdot \text{qvalue}

    A network of these libraries is applied to tensors of its own types. So the leaves
    train as `QTensor`, and the loss hands them back by ``restore``, which converts
    nothing but the type: the products of the network read the trained integers.

    Args:
      tree: what the library gave: the collection "aqt" that AQT's mode CONVERT made,
        by either freezer, or all variables; the parameters that
        ``qwix.quantize_params`` returned, or the state of a Qwix model in NNX. Leaves
        of other types are left as they are, and train unless a ``mask=`` freezes them.
      bits: width of the grids, for a configuration of 5 to 7 bits, which AQT keeps in
        int8; by default that of the integers, and 16 for integers kept in floats.

    Returns:
      ``(params, restore)``: the tree with `QTensor` leaves, and a function that makes
      of such a tree, with whatever integers, one that the network can be applied to.

    Raises:
      ValueError: for a tensor that no `QTensor` can stand for: with a zero point or
        bias, of a float format, with scales of tiles, with a mask of sparsity, or with
        integers beyond ``bits``.

    A symmetric grid ends at ±127. Qwix rounds the most negative weight of a channel to
    -128 where it lies halfway; it becomes -127, which is as near to it.

    Example:
      >>> from aqt.jax.v2 import aqt_tensor
      >>> frozen = {
      ...     "kernel": aqt_tensor.QTensor(
      ...         qvalue=jnp.array([[3, -7]], jnp.int8),
      ...         scale=[jnp.array([[0.5, 0.25]])],
      ...         scale_t=None,
      ...         bias=[],
      ...         dequant_dtype=jnp.float32,
      ...     )
      ... }
      >>> params, restore = from_served(frozen)
      >>> params["kernel"].dequantize()
      Array([[ 1.5 , -1.75]], dtype=float32)
      >>> type(restore(params)["kernel"]) is aqt_tensor.QTensor
      True

    Reference:
      AQT, https://github.com/google/aqt; Qwix, https://github.com/google/qwix.
    """
    treedef: Any
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: is_qtensor(x) or _reader_of(x) is not None
    )
    leaves, backs = [], []
    for path, leaf in with_paths:
        read = _reader_of(leaf)
        back: _Back | None = None
        if read is not None:
            leaf, back = read(leaf, path_str(path), bits)
        leaves.append(leaf)
        backs.append(back)

    def restore(params: Any) -> Any:
        found, structure = jax.tree.flatten(params, is_leaf=is_qtensor)
        if structure != treedef:
            raise ValueError(
                "restore takes a tree of the structure that from_served returned, got "
                f"{structure} in the place of {treedef}."
            )
        return treedef.unflatten(
            [
                leaf if back is None else back(leaf)
                for leaf, back in zip(found, backs, strict=True)
            ]
        )

    return treedef.unflatten(leaves), restore


_Reader = Callable[[Any, str, int | None], tuple[QTensor, _Back]]


def _reader_of(x: Any) -> _Reader | None:
    """The function that reads a tensor of another library; None for all else."""
    if isinstance(x, aqt_tensor.QTensor):
        # Without integers it holds the scale of an activation, which stays a float.
        return None if x.qvalue is None else _from_aqt
    if _is_qarray(x):
        return _from_qwix
    if not isinstance(x, Mapping):
        return None
    if x.keys() == _AQT_FREEZER and _holds_numbers(x["value"]):
        return _from_freezer
    if x.keys() == _NNX_STATE and _holds_numbers(_raw(x["qvalue"])):
        return _from_nnx_state
    return None


def _is_qarray(x: Any) -> TypeGuard[Any]:
    """Whether it is Qwix's type, told by its name: Qwix need not be installed."""
    kind = type(x)
    return kind.__name__ == "QArray" and kind.__module__.split(".")[0] == "qwix"


def _holds_numbers(x: Any) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "shape")


def _from_aqt(node: Any, name: str, bits: int | None) -> tuple[QTensor, _Back]:
    _refuse(name, "biases", bool(node.bias))
    _refuse(name, "a mask of sparsity", node.sparsity_mask is not None)
    scales = node.scale or []
    if len(scales) != 1:
        raise ValueError(
            f"leaf {name!r} has {len(scales)} scales in AQT's tensor, and one can be "
            "taken over. Convert with the general freezer, use_legacy_freezer=False, "
            "and without mid-quantization."
        )
    dtype = node.qvalue.dtype
    q = _grid(node.qvalue, scales[0], bits or _bits_of(dtype), name)
    empty = node.replace(qvalue=None, scale=None)
    shape = scales[0].shape

    def back(q: QTensor) -> Any:
        return empty.replace(qvalue=_integers(q, dtype), scale=[_scale(q, shape)])

    return q, back


def _from_qwix(node: Any, name: str, bits: int | None) -> tuple[QTensor, _Back]:
    _refuse(name, "a zero point", node.zero_point is not None)
    kind, dtype = str(node.qtype), node.qvalue.dtype
    if bits is None and kind.startswith("int") and kind[3:].isdigit():
        bits = int(kind[3:])
    q = _grid(node.qvalue, node.scale, bits or _bits_of(dtype), name)
    empty = dataclasses.replace(node, qvalue=None, scale=None)
    shape = node.scale.shape

    def back(q: QTensor) -> Any:
        parts = {"qvalue": _integers(q, dtype), "scale": _scale(q, shape)}
        return dataclasses.replace(empty, **parts)

    return q, back


def _from_freezer(node: Any, name: str, bits: int | None) -> tuple[QTensor, _Back]:
    """A tensor of AQT's older freezer, whose scale has the axes of the product."""
    value, scale = node["value"], node["scale"]
    shape, dtype = scale.shape, value.dtype
    # The axes of the output that are the kernel's come last, as its own do.
    aligned = (1,) * value.ndim + shape
    before, own = aligned[: len(shape)], aligned[len(shape) :]
    if math.prod(before) > 1 or any(
        n not in (1, m) for n, m in zip(own, value.shape, strict=True)
    ):
        raise ValueError(
            f"leaf {name!r} of shape {value.shape} has a scale of shape {shape} for "
            "the output of its product, which cannot be told apart into that of the "
            "kernel. Convert with AQT's general freezer, use_legacy_freezer=False."
        )
    q = _grid(value, scale.reshape(own), bits or _bits_of(dtype), name)
    kind = type(node)

    def back(q: QTensor) -> Any:
        scale = _scale(q, own).reshape(shape)
        parts = {"value": _integers(q, dtype), "scale": scale}
        return kind(parts)

    return q, back


def _from_nnx_state(node: Any, name: str, bits: int | None) -> tuple[QTensor, _Back]:
    """A QArray in NNX, of which only the arrays are left, each in a variable."""
    variables = dict(node)
    dtype, shape = _raw(node["qvalue"]).dtype, _raw(node["scale"]).shape
    q = _grid(_raw(node["qvalue"]), _raw(node["scale"]), bits or _bits_of(dtype), name)
    kind = type(node)
    empty = {k: _replaced(variable, None) for k, variable in variables.items()}

    def back(q: QTensor) -> Any:
        parts = {"qvalue": _integers(q, dtype), "scale": _scale(q, shape)}
        return kind({k: _replaced(empty[k], part) for k, part in parts.items()})

    return q, back


def _raw(variable: Any) -> Any:
    """The array in a variable of NNX, or the array itself."""
    read = getattr(variable, "get_raw_value", None)
    return variable if read is None else read()


def _replaced(variable: Any, array: Any) -> Any:
    """A variable of NNX that holds another array, or the array itself."""
    is_variable = hasattr(variable, "get_raw_value")
    return variable.replace(array) if is_variable else array


def _grid(qvalue: Any, scale: Any, bits: int, name: str) -> QTensor:
    """A `QTensor` of another library's integers and scale."""
    limit = max_qvalue(bits)
    tiled = scale.ndim != qvalue.ndim or any(
        n not in (1, m) for n, m in zip(scale.shape, qvalue.shape, strict=True)
    )
    if tiled:
        raise ValueError(
            f"leaf {name!r} of shape {qvalue.shape} has a scale of shape "
            f"{scale.shape}, one for each tile; a QTensor has one scale, or one for "
            "each entry of an axis. Quantize it without tiles (Qwix's tile_size)."
        )
    if is_concrete(qvalue) and qvalue.size:
        wide = np.asarray(qvalue, np.float64)
        low, high = float(wide.min()), float(wide.max())
        if not (-limit - 1 <= low and high <= limit) or np.any(wide % 1):
            raise ValueError(
                f"leaf {name!r} holds values from {low:g} to {high:g}, which are not "
                f"integers of {bits} bits; give from_served the bits= of the "
                "configuration."
            )
    integers = jnp.asarray(qvalue).astype(jnp.int32)
    stored = jnp.clip(integers, -limit, limit).astype(storage_dtype(bits))
    return QTensor(stored, jnp.asarray(scale), bits)


def _bits_of(dtype: Any) -> int:
    """Bits of the integers in which a library keeps a tensor."""
    if dtype.name.startswith("int"):
        return min(16, int(dtype.name[3:]))
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 32:
        return 16
    raise ValueError(
        f"a tensor of {dtype} cannot be taken over: it is no grid of signed integers. "
        "Quantize it with int4 or int8."
    )


def _integers(q: QTensor, dtype: Any) -> jax.Array:
    """The integers of a leaf in the dtype in which its library keeps them."""
    if not is_qtensor(q):
        raise TypeError(
            "restore takes the QTensor leaves of from_served, got a "
            f"{type(q).__name__} in the place of one."
        )
    return integers_of(q).astype(dtype)


def _scale(q: QTensor, shape: tuple[int, ...]) -> jax.Array:
    """The scale of a leaf in the shape in which its library keeps it."""
    return jnp.broadcast_to(scale_of(q), shape)


def _refuse(name: str, what: str, it_has: bool) -> None:
    if it_has:
        raise ValueError(
            f"leaf {name!r} has {what}, and a QTensor has none: its grid is symmetric. "
            "Quantize it symmetrically (Qwix's weight_calibration_method='absmax')."
        )
