"""Whether a quantized tensor can be: its width, storage, integers and scale."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

_MIN_BITS, _MAX_BITS = 2, 16


class Quantized(Protocol):
    """What is checked: `fgrad.QTensor`, or anything with its three attributes."""

    @property
    def qvalue(self) -> Any:
        """Integers of the grid."""

    @property
    def scale(self) -> Any:
        """Step of the grid."""

    @property
    def bits(self) -> Any:
        """Width of the grid."""


def check_qtensor(q: Quantized, name: str) -> None:
    """Makes sure that a quantized tensor is one that arithmetic can work with.

    A tensor that fails would not raise later: int8 storage of a 16-bit grid wraps 127
    to -127, and a scale that is negative, zero or NaN makes other weights of them.

    Args:
      q: the tensor, of arrays or of what has their shape and dtype only (tracers and
        ``jax.ShapeDtypeStruct``), whose values are then not looked at.
      name: of the leaf, for the message.

    Raises:
      ValueError: if the bits are no integer from 2 to 16; if ``qvalue`` is neither of
        the grid's storage (int8 up to 8 bits, int16 above) nor a float array that holds
        integers; if an integer lies beyond the grid; if the scale is no float array,
        does not fit the shape of ``qvalue``, or is not positive and finite.

    Example:
      >>> import fgrad
      >>> check_qtensor(fgrad.QTensor(jnp.int8([1, 2]), jnp.float32(0.5)), "w")
      >>> check_qtensor(fgrad.QTensor(jnp.int8([1, 2]), jnp.float32(-0.5)), "w")
      Traceback (most recent call last):
      ...
      ValueError: the scale of w must be positive and finite, and has -0.5.
    """
    bits = q.bits
    if (
        not isinstance(bits, (int, np.integer))
        or bits is True
        or not _MIN_BITS <= bits <= _MAX_BITS
    ):
        raise ValueError(
            f"the bits of {name} must be an integer from {_MIN_BITS} to {_MAX_BITS}, "
            f"got {bits!r}."
        )
    for part in ("qvalue", "scale"):
        value = getattr(q, part)
        if not hasattr(value, "dtype") or not hasattr(value, "shape"):
            raise ValueError(
                f"the {part} of {name} must be an array, got a {type(value).__name__}."
            )
    _check_integers(q.qvalue, int(bits), name)
    _check_scale(q.scale, tuple(q.qvalue.shape), name)


def _check_integers(qvalue: Any, bits: int, name: str) -> None:
    storage = np.dtype(np.int8 if bits <= 8 else np.int16)
    simulated = jnp.issubdtype(qvalue.dtype, jnp.floating)
    if qvalue.dtype != storage and not simulated:
        raise ValueError(
            f"{name} has {bits} bits, which are kept in {storage} (or as integers in a "
            f"float array), and its qvalue is {qvalue.dtype}: quantize it again."
        )
    limit = 2 ** (bits - 1) - 1
    if not _has_values(qvalue) or not np.size(qvalue):
        return
    values = np.asarray(qvalue)
    low, high = values.min(), values.max()
    # Also false for NaN.
    if not (-limit <= low and high <= limit):
        raise ValueError(
            f"the integers of {name} must lie in [-{limit}, {limit}] for {bits} bits, "
            f"and are from {low} to {high}."
        )
    if simulated and (values != np.rint(values)).any():
        raise ValueError(
            f"the qvalue of {name} is a float array that must hold integers, and holds "
            f"{values[values != np.rint(values)].flat[0]}."
        )


def _check_scale(scale: Any, shape: tuple[int, ...], name: str) -> None:
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        raise ValueError(f"the scale of {name} must be float32, and is {scale.dtype}.")
    fits = scale.shape == () or (
        len(scale.shape) == len(shape)
        and all(
            own in (1, other) for own, other in zip(scale.shape, shape, strict=True)
        )
    )
    if not fits:
        raise ValueError(
            f"the scale of {name} has shape {tuple(scale.shape)}, and its qvalue "
            f"{shape}: a scale is a scalar, or has as many axes, of length 1 where it "
            "is shared."
        )
    if not _has_values(scale):
        return
    values = np.asarray(scale).ravel()
    wrong = values[~((values > 0) & np.isfinite(values))]
    if wrong.size:
        raise ValueError(
            f"the scale of {name} must be positive and finite, and has {wrong[0]}."
        )


def _has_values(array: Any) -> bool:
    return isinstance(array, (np.ndarray, np.generic)) or (
        isinstance(array, jax.Array)
        and not isinstance(array, jax.core.Tracer)
        and array.is_fully_addressable
    )
