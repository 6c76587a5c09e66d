"""Quantized tensors in the files of others: ``jax.export`` and Flax's serialization.

Importing this module registers `fgrad.QTensor` with both, once. A function of quantized
parameters can then be exported and serialized, and ``flax.serialization.to_bytes`` and
``from_bytes`` take trees with such leaves.
"""

from __future__ import annotations

import json
from typing import Any

from flax import serialization
from jax import export

from fgrad import _validation
from fgrad.fixed_point import QTensor

# Part of files; it must stay as it is wherever the class moves.
_NAME = "fgrad.QTensor"


def _bits_to_bytes(auxiliary: tuple[int, ...]) -> bytes:
    return json.dumps({"bits": auxiliary[0]}).encode()


def _bits_from_bytes(content: bytes) -> tuple[int, ...]:
    return (json.loads(content)["bits"],)


def _to_state(q: QTensor) -> dict[str, Any]:
    return {"qvalue": q.qvalue, "scale": q.scale, "bits": q.bits}


def _from_state(target: QTensor, state: dict[str, Any]) -> QTensor:
    """What the state says; the target must have the same bits and shape.

    Raises:
      ValueError: if the state lacks a part, is of other bits or shapes than the target,
        or is no tensor on a grid.
    """
    if not isinstance(state, dict) or set(state) != {"qvalue", "scale", "bits"}:
        found = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            "the state of a QTensor has qvalue, scale and bits, got "
            f"{found}: it is of a leaf that was not quantized."
        )
    q = QTensor(state["qvalue"], state["scale"], state["bits"])
    _validation.check_qtensor(q, "the restored QTensor")
    if q.bits != target.bits or q.shape != target.shape:
        raise ValueError(
            f"a QTensor of {q.bits} bits and shape {q.shape} cannot be restored to one "
            f"of {target.bits} bits and shape {target.shape}: make the target with the "
            "settings of the file."
        )
    return q


def register() -> None:
    """Tells ``jax.export`` and Flax how a `QTensor` is written and read.

    Example:
      >>> import jax, jax.numpy as jnp, fgrad
      >>> params = fgrad.quantize({"w": jnp.ones(3)}, bits=8)
      >>> content = serialization.to_bytes(params)
      >>> serialization.from_bytes(params, content)["w"].bits
      8
    """
    export.register_pytree_node_serialization(
        QTensor,
        serialized_name=_NAME,
        serialize_auxdata=_bits_to_bytes,
        deserialize_auxdata=_bits_from_bytes,
    )
    serialization.register_serialization_state(QTensor, _to_state, _from_state)
