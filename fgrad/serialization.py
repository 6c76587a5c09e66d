"""Parameters with their grids in one safetensors file, checked on the way back."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from fgrad._trees import is_here
from fgrad.fixed_point import is_qtensor, restored

# Version 2 differs by an entry of names; a file that needs none stays one of version 1.
_VERSION, _VERSION_WITH_NAMES = 1, 2
_FORMAT, _GRIDS, _DIGEST = "fgrad_version", "fgrad_bits", "fgrad_sha256"
_NAMES = "fgrad_names"
_QVALUE, _SCALE = ":qvalue", ":scale"
_RESERVED = "__metadata__"  # where the header keeps the entries above
_DEEPEST = 100  # dictionaries inside each other

_DTYPES: dict[str, Any] = {
    "BF16": ml_dtypes.bfloat16,
    "BOOL": np.bool_,
    "C64": np.complex64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "I8": np.int8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "U8": np.uint8,
}

_Keys = tuple[str | int, ...]
_deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]]
_deserialize = safetensors.deserialize


def save(path: str | os.PathLike[str], params: Any) -> None:
    """Writes parameters to a safetensors file.

    A float leaf is one tensor, named by its keys joined with "/"; a `QTensor` leaf two,
    "name:qvalue" and "name:scale", and its bits in the header. The header also has the
    format's version, a SHA-256 of everything, and the keys of each leaf that its name
    does not tell: those with a "/" or ":" in them, as Haiku's, and integers, as in
    ``nnx.to_pure_dict``. Any reader of safetensors sees the tensors.

    The file appears whole or not at all. It has the mode of the file that it replaces,
    or the one that the umask gives to new files; a symbolic link stays, and the file
    that it points to is replaced.

    Args:
      path: of the file; one that exists is replaced.
      params: nested dictionaries with string or integer keys, of arrays and `QTensor`
        leaves; for a calibrated model all its variables.

    Raises:
      TypeError: if something in ``params`` is no dictionary, array or `QTensor`, or has
        a dtype that safetensors does not know, such as int4 or complex128.
      ValueError: for a key that is neither a string nor an integer, an empty
        dictionary, which the file could not tell from none, or one that holds itself;
        and for an array of which other processes have a part.

    Example:
      >>> import tempfile, fgrad
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> fgrad.save(path, fgrad.quantize({"w": jnp.ones((2, 2))}, bits=8))
      >>> fgrad.load(path)["w"].bits
      8
    """
    tensors: dict[str, np.ndarray] = {}
    bits: dict[str, int] = {}
    unusual: dict[str, list[str | int]] = {}
    taken = {"", _RESERVED}
    # Plain names first, so that no unusual one takes theirs.
    for leaf in sorted(_flat(params, ()), key=lambda leaf: not leaf.plain):
        parts, name = _parts(leaf), leaf.name
        if not leaf.plain:
            while taken & {name, *(name + end for end in parts)}:
                name += "'"
            unusual[name] = list(leaf.keys)
        if is_qtensor(leaf.value):
            bits[name] = leaf.value.bits
        found = {name + end: array for end, array in parts.items()}
        taken |= {name, *found}
        tensors |= found
    grids = json.dumps(bits, sort_keys=True)
    names = json.dumps(unusual, sort_keys=True) if unusual else ""
    metadata = {
        _FORMAT: str(_VERSION_WITH_NAMES if unusual else _VERSION),
        _GRIDS: grids,
        _DIGEST: _digest(tensors, grids + names),
    }
    if unusual:
        metadata[_NAMES] = names
    _write(pathlib.Path(path), _content(tensors, metadata))


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save` wrote, bit for bit. Nothing in the file is run.

    Args:
      path: of the file.

    Returns:
      Nested dictionaries of jax arrays and `QTensor` leaves.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged (by its SHA-256), is of a later version, was
        not written by `save`, holds a QTensor that cannot be (a scale that is not
        positive, integers beyond their bits), or 64-bit numbers that JAX is not set to
        keep.
    """
    path = pathlib.Path(path)
    content = path.read_bytes()
    try:
        found = _deserialize(content)
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size]).get(_RESERVED) or {}
        tensors = {name: _tensor(name, fields) for name, fields in found}
    except Exception as error:  # the reader's, NumPy's: whatever the damage leads to
        raise ValueError(f"{path} is no valid safetensors file: {error}") from error
    if _FORMAT not in metadata:
        raise ValueError(
            f"{path} is a safetensors file that fgrad.save did not write; read it with "
            "safetensors, and quantize its tensors with fgrad.quantize."
        )
    version = metadata[_FORMAT]
    if version not in (str(_VERSION), str(_VERSION_WITH_NAMES)):
        raise ValueError(
            f"{path} has version {version!r} of the format, and this fgrad reads "
            f"{_VERSION} and {_VERSION_WITH_NAMES}: use the fgrad that wrote it, or a "
            "later one."
        )
    grids, names = metadata.get(_GRIDS, ""), metadata.get(_NAMES, "")
    if metadata.get(_DIGEST) != _digest(tensors, grids + names):
        raise ValueError(
            f"{path} is damaged: its content does not have the SHA-256 in its header. "
            "Take another copy."
        )
    try:
        return _tree(tensors, grids, names)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


class _Leaf(NamedTuple):
    """A leaf of a tree, and whether its name tells its keys."""

    keys: _Keys
    value: Any
    plain: bool

    @property
    def name(self) -> str:
        return "/".join(map(str, self.keys))


def _flat(tree: Any, keys: _Keys) -> Iterator[_Leaf]:
    where = "/".join(map(str, keys)) or "params"
    if not isinstance(tree, Mapping):
        if not (
            is_qtensor(tree) or isinstance(tree, (jax.Array, np.ndarray, np.generic))
        ):
            raise TypeError(
                f"{where} is a {type(tree).__name__}; save takes nested dictionaries "
                "of arrays and QTensors (of an NNX state, nnx.to_pure_dict's)."
            )
        if not keys:
            raise TypeError("params must be a dictionary of arrays, got one array.")
        plain = keys != (_RESERVED,) and all(
            isinstance(key, str) and key and not {"/", ":"} & set(key) for key in keys
        )
        yield _Leaf(keys, tree, plain)
        return
    if not tree:
        raise ValueError(f"{where} is an empty dictionary; leave it out.")
    if len(keys) == _DEEPEST:
        raise ValueError(
            f"params has dictionaries inside each other, more than {_DEEPEST} deep, "
            f"from {'/'.join(map(str, keys[:3]))} on: does one hold itself?"
        )
    for key, value in tree.items():
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise ValueError(f"the key {key!r} in {where} must be a string or integer.")
        if isinstance(key, str) and any("\ud800" <= c <= "\udfff" for c in key):
            raise ValueError(f"the key {key!r} in {where} is no text of Unicode.")
        yield from _flat(value, (*keys, key))


def _parts(leaf: _Leaf) -> dict[str, np.ndarray]:
    """The tensors of a leaf, by what their names end with."""
    if not is_qtensor(leaf.value):
        return {"": _writable(leaf.value, leaf.name)}
    return {
        end: _writable(value, leaf.name)
        for end, value in ((_QVALUE, leaf.value.qvalue), (_SCALE, leaf.value.scale))
    }


def _writable(array: Any, name: str) -> np.ndarray:
    """A contiguous array of the machine's byte order."""
    if not is_here(array):
        raise ValueError(
            f"{name} is sharded over several processes, and save writes what one has: "
            "save such parameters by orbax, or give each process all of them first, by "
            "jax.experimental.multihost_utils.process_allgather(params, tiled=True)."
        )
    found = np.asarray(array, order="C")
    native = found.dtype.newbyteorder("=")
    if native not in _DTYPES.values():
        raise TypeError(
            f"{name} has dtype {found.dtype}, which safetensors does not know: convert "
            "it, such as int4 to int8 and complex128 to complex64."
        )
    return found.astype(native, copy=False)


def _content(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """A safetensors file; equal parameters make equal ones.

    The library writes the entries of the metadata in an order that changes from call to
    call, so the header is written again, with these in order.
    """
    content = bytes(safetensors_numpy.save(tensors, metadata))
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header[_RESERVED] = dict(sorted(header[_RESERVED].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _write(path: pathlib.Path, content: bytes) -> None:
    """Replaces a file, or the one that a link points to, at once."""
    target = pathlib.Path(os.path.realpath(path))
    mode = None
    if target.exists():
        mode = target.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ValueError(f"{path} is no regular file; save replaces only those.")
    temporary = target.with_name(f".fgrad-{secrets.token_hex(8)}")
    try:
        # Not tempfile's, whose mode is 0600 whatever the umask.
        with temporary.open("xb") as file:
            file.write(content)
        if mode is not None:
            temporary.chmod(stat.S_IMODE(mode))
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _tensor(name: str, fields: Mapping[str, Any]) -> np.ndarray:
    dtype = _DTYPES.get(fields["dtype"])
    if dtype is None:
        raise ValueError(f"{name} is of the unknown dtype {fields['dtype']}.")
    return np.frombuffer(fields["data"], dtype).reshape(fields["shape"])


def _tree(tensors: dict[str, np.ndarray], grids: str, names: str) -> dict[str, Any]:
    """Puts the leaves where their keys say, if all of it can be."""
    bits, unusual = json.loads(grids), json.loads(names or "{}")
    for entry, kind in ((bits, int), (unusual, list)):
        if not isinstance(entry, dict) or not all(
            isinstance(value, kind) for value in entry.values()
        ):
            raise ValueError("an entry of its header is none that fgrad.save writes.")
    params: dict[str, Any] = {}
    for name, width in bits.items():
        qvalue, scale = (_array(tensors, name + end) for end in (_QVALUE, _SCALE))
        _insert(params, name, unusual, restored(qvalue, scale, width, name))
    for name in sorted(tensors):  # a leaf before what its keys would put inside it
        _insert(params, name, unusual, _array(tensors, name))
    if unusual:
        raise ValueError(f"its header names {next(iter(unusual))}, which it lacks.")
    return params


def _array(tensors: dict[str, np.ndarray], name: str) -> jax.Array:
    if name not in tensors:
        raise ValueError(f"it lacks the tensor {name}.")
    tensor = tensors.pop(name)
    array = jnp.asarray(tensor)
    if array.dtype != tensor.dtype:
        raise ValueError(
            f"{name} has dtype {tensor.dtype}, which JAX would make {array.dtype}: "
            'set jax.config.update("jax_enable_x64", True) before loading.'
        )
    return array


def _insert(
    params: dict[str, Any], name: str, unusual: dict[str, Any], leaf: Any
) -> None:
    keys = unusual.pop(name, None)
    if keys is None:
        keys = name.split("/")
    if not 0 < len(keys) <= _DEEPEST or not all(
        isinstance(key, (str, int)) and not isinstance(key, bool) for key in keys
    ):
        raise ValueError(f"the keys of {name[:100]} are none that fgrad.save writes.")
    *parents, last = keys
    for key in parents:
        params = params.setdefault(key, {})
        if not isinstance(params, dict):
            raise ValueError(f"{name[:100]} lies inside another leaf.")
    if last in params:
        raise ValueError(f"two leaves have the keys of {name[:100]}.")
    params[last] = leaf


def _digest(tensors: Mapping[str, np.ndarray], texts: str) -> str:
    digest = hashlib.sha256(texts.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(head.encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()
