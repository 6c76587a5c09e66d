"""Parameters with their grids in one safetensors file, checked on the way back."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from fgrad.fixed_point import QTensor, is_qtensor

_VERSION = 1
_FORMAT, _GRIDS, _DIGEST = "fgrad_version", "fgrad_bits", "fgrad_sha256"
_QVALUE, _SCALE = ":qvalue", ":scale"


def save(path: str | os.PathLike[str], params: Any) -> None:
    """Writes parameters to a safetensors file.

    A float leaf is one tensor, named by its keys joined with "/"; a `QTensor` leaf two,
    "name:qvalue" and "name:scale", and its bits in the header. The header also has the
    format's version and a SHA-256 of everything. Any reader of safetensors sees the
    tensors. The file appears whole or not at all.

    Args:
      path: of the file; one that exists is replaced.
      params: nested dictionaries with string keys, of arrays and `QTensor` leaves;
        for a calibrated model all its variables.

    Raises:
      TypeError: if something in ``params`` is no dictionary, array or `QTensor`.
      ValueError: for a key that is empty or has "/" or ":" in it, or an empty
        dictionary, which the file could not tell from none.

    Example:
      >>> import fgrad
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> fgrad.save(path, fgrad.quantize({"w": jnp.ones((2, 2))}, bits=8))
      >>> fgrad.load(path)["w"].bits
      8
    """
    tensors: dict[str, np.ndarray] = {}
    bits: dict[str, int] = {}
    for name, leaf in _flat(params, ()):
        if is_qtensor(leaf):
            bits[name] = leaf.bits
            tensors[name + _QVALUE] = np.asarray(leaf.qvalue, order="C")
            tensors[name + _SCALE] = np.asarray(leaf.scale, order="C")
        else:
            tensors[name] = np.asarray(leaf, order="C")
    grids = json.dumps(bits, sort_keys=True)
    metadata = {
        _FORMAT: str(_VERSION),
        _GRIDS: grids,
        _DIGEST: _digest(tensors, grids),
    }
    path = pathlib.Path(path)
    content = safetensors_numpy.save(tensors, metadata)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save` wrote, bit for bit. Nothing in the file is run.

    Args:
      path: of the file.

    Returns:
      Nested dictionaries of jax arrays and `QTensor` leaves.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged (by its SHA-256), is of a later version, was
        not written by `save`, or holds 64-bit numbers that JAX is not set to keep.
    """
    path = pathlib.Path(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except Exception as error:  # the reader's, NumPy's: whatever the damage leads to
        raise ValueError(f"{path} is no valid safetensors file: {error}") from error
    if _FORMAT not in metadata:
        raise ValueError(
            f"{path} is a safetensors file that fgrad.save did not write; read it with "
            "safetensors, and quantize its tensors with fgrad.quantize."
        )
    if metadata[_FORMAT] != str(_VERSION):
        raise ValueError(
            f"{path} has version {metadata[_FORMAT]!r} of the format, and this fgrad "
            f"reads {_VERSION}: use the fgrad that wrote it, or a later one."
        )
    grids = metadata.get(_GRIDS, "")
    if metadata.get(_DIGEST) != _digest(tensors, grids):
        raise ValueError(
            f"{path} is damaged: its content does not have the SHA-256 in its header. "
            "Take another copy."
        )
    params: dict[str, Any] = {}
    bits: Mapping[str, int] = json.loads(grids)
    for name, width in bits.items():
        qvalue, scale = (_array(tensors, name + end) for end in (_QVALUE, _SCALE))
        _insert(params, name, QTensor(qvalue, scale, width))
    for name in list(tensors):
        _insert(params, name, _array(tensors, name))
    return params


def _flat(tree: Any, path: tuple[str, ...]) -> list[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        if is_qtensor(tree) or isinstance(tree, (jax.Array, np.ndarray, np.generic)):
            if not path:
                raise TypeError("params must be a dictionary of arrays, got one array.")
            return [("/".join(path), tree)]
        raise TypeError(
            f"{'/'.join(path) or 'params'} is a {type(tree).__name__}; save takes "
            "nested dictionaries of arrays and QTensors (of an NNX state, "
            "nnx.to_pure_dict's)."
        )
    if not tree:
        raise ValueError(
            f"{'/'.join(path) or 'params'} is an empty dictionary; leave it out."
        )
    leaves = []
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "/" in key or ":" in key:
            raise ValueError(
                f"the key {key!r} in {'/'.join(path) or 'params'} must be a string "
                'that is not empty and has no "/" or ":".'
            )
        leaves += _flat(value, (*path, key))
    return leaves


def _array(tensors: dict[str, np.ndarray], name: str) -> jax.Array:
    tensor = tensors.pop(name)
    array = jnp.asarray(tensor)
    if array.dtype != tensor.dtype:
        raise ValueError(
            f"{name} has dtype {tensor.dtype}, which JAX would make {array.dtype}: "
            'set jax.config.update("jax_enable_x64", True) before loading.'
        )
    return array


def _insert(params: dict[str, Any], name: str, leaf: Any) -> None:
    *parents, last = name.split("/")
    for key in parents:
        params = params.setdefault(key, {})
    params[last] = leaf


def _digest(tensors: Mapping[str, np.ndarray], grids: str) -> str:
    digest = hashlib.sha256(grids.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(head.encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()
