"""Tensors of PyTorch and safetensors files as NumPy arrays, without running their code.

A PyTorch file is a pickle, and a pickle is a program. Here it may only say where its
tensors lie: every global but those that rebuild a tensor is refused, and those stand
for plain descriptions. The arrays are made afterwards, from checked descriptions.
"""

from __future__ import annotations

import collections
import math
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

# What a legacy file begins with: a pickle of the number PyTorch chose for it.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_START = pickle.dumps(_LEGACY_MAGIC, protocol=2)
_ZIP_START = b"PK\x03\x04"

# What zipfile and NumPy raise for what they cannot read.
_BROKEN = (ValueError, OverflowError, EOFError, RuntimeError, zipfile.BadZipFile)

_DTYPES: dict[str, Any] = {
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.BoolStorage": np.bool_,
    "torch.ByteStorage": np.uint8,
    "torch.CharStorage": np.int8,
    "torch.ComplexDoubleStorage": np.complex128,
    "torch.ComplexFloatStorage": np.complex64,
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.IntStorage": np.int32,
    "torch.LongStorage": np.int64,
    "torch.ShortStorage": np.int16,
}


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the tensors of a checkpoint.

    Args:
      path: a ``.safetensors`` file, or what ``torch.save`` wrote: the zip format or the
        legacy one, told apart by how the file begins.

    Returns:
      Name to array, in the order of the file. The names of nested mappings are joined
      with a dot; what is no tensor, such as an epoch, is left out. Arrays of PyTorch
      files are read-only, have the strides of the tensor, and share memory where
      tensors share a storage.

    Raises:
      ValueError: for a global that a tensor does not need (it is named, and not
        run); a tensor that reaches beyond its storage; a truncated or unknown file.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> safetensors_numpy.save_file({"w": np.arange(3)}, path)
      >>> load(path)
      {'w': array([0, 1, 2])}
    """
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        try:
            return safetensors_numpy.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is no valid safetensors file: {error}") from error
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_START))
        file.seek(0)
        if start.startswith(_ZIP_START):
            read = _read_zip
        elif start == _LEGACY_START:
            read = _read_legacy
        else:
            raise ValueError(
                f"{path} is neither a .safetensors file nor one that torch.save wrote."
            )
        try:
            content, storages = read(file)
            return {
                name: _array(tensor, storages) for name, tensor in _tensors(content)
            }
        except _BROKEN as error:
            raise ValueError(f"cannot read {path}: {error}") from error


class _Storage(NamedTuple):
    """A typed block of memory, by the key of its bytes."""

    key: str
    dtype: str  # a key of _DTYPES
    size: int  # in elements


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RebuildTensor:
    """Stands for ``torch._utils._rebuild_tensor_v2``.

    No slots, so that a pickle's BUILD can put nothing on it.
    """

    __slots__ = ()

    def __call__(
        self,
        storage: Any,
        offset: Any,
        shape: Any,
        strides: Any,
        requires_grad: Any = False,
        backward_hooks: Any = None,
        metadata: Any = None,
    ) -> _Tensor:
        del requires_grad, backward_hooks
        if metadata:
            raise ValueError(f"a tensor with metadata {metadata!r} is not supported.")
        return _Tensor(storage, offset, shape, strides)


class _RebuildParameter:
    """Stands for ``torch._utils._rebuild_parameter``: its tensor."""

    __slots__ = ()

    def __call__(
        self, data: Any, requires_grad: Any = True, backward_hooks: Any = None
    ) -> Any:
        del requires_grad, backward_hooks
        return data


_ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch._utils._rebuild_tensor_v2": _RebuildTensor(),
    "torch._utils._rebuild_parameter": _RebuildParameter(),
    # A string is looked up again: a pickle could have written any.
    **{name: name for name in _DTYPES},
}


class _Unpickler(pickle.Unpickler):
    """Makes mappings and `_Tensor` descriptions, and refuses every other global."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a global."""
        found = _ALLOWED.get(f"{module}.{name}")
        if found is None:
            raise ValueError(
                f"its pickle asks for {module}.{name}, which no tensor needs, and "
                "which was not run. Save tensors only: torch.save(model.state_dict(), "
                "...), or use safetensors."
            )
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that ``("storage", type, key, location, size, ...)`` names."""
        match pid:
            case ("storage", str(dtype), str(key), _, int(size), *view) if (
                dtype in _DTYPES and size >= 0 and view in ([], [None])
            ):
                return self.storages.setdefault(key, _Storage(key, dtype, size))
        raise ValueError(f"the storage {pid!r} is of no supported kind.")


def _unpickle(file: IO[bytes]) -> tuple[Any, dict[str, _Storage]]:
    """The next pickle of a file, and the storages that it names."""
    unpickler = _Unpickler(file)
    try:
        return unpickler.load(), unpickler.storages
    except ValueError:
        raise
    except Exception as error:  # a broken pickle raises anything
        raise ValueError(f"its pickle is broken or truncated: {error!r}") from error


def _read_zip(file: IO[bytes]) -> tuple[Any, Callable[[_Storage], bytes]]:
    """What ``torch.save`` writes: ``<root>/data.pkl``, and a member per storage."""
    archive = zipfile.ZipFile(file)
    roots = [
        name.removesuffix("data.pkl")
        for name in archive.namelist()
        if name.endswith("/data.pkl") and name.count("/") == 1
    ]
    if len(roots) != 1:
        raise ValueError("a PyTorch archive has one data.pkl in its folder.")
    [root] = roots

    def member(name: str) -> bytes:
        try:
            info = archive.getinfo(root + name)
        except KeyError as error:
            raise ValueError(f"the archive has no {root + name}.") from error
        # PyTorch never compresses; a few compressed bytes could fill the memory.
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"the member {info.filename} is compressed.")
        return archive.read(info)

    if f"{root}byteorder" in archive.namelist() and member("byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine.")
    with archive.open(f"{root}data.pkl") as pickled:
        content, _ = _unpickle(pickled)
    data: dict[str, bytes] = {}

    def storages(storage: _Storage) -> bytes:
        if storage.key not in data:
            data[storage.key] = member(f"data/{storage.key}")
        return data[storage.key]

    return content, storages


def _read_legacy(file: IO[bytes]) -> tuple[Any, Callable[[_Storage], bytes]]:
    """What ``torch.save`` wrote before 1.6: five pickles, and the storages."""
    for _ in ("magic number", "version", "sizes of C's integers"):
        _unpickle(file)
    content, named = _unpickle(file)
    keys, _ = _unpickle(file)
    data: dict[str, bytes] = {}
    for key in keys if isinstance(keys, list) else [keys]:
        if not isinstance(key, str) or key not in named:
            raise ValueError(f"storage {key!r} belongs to no tensor.")
        (count,) = struct.unpack("<q", _exactly(file, 8))
        itemsize = np.dtype(_DTYPES[named[key].dtype]).itemsize
        data[key] = _exactly(file, count * itemsize)

    def storages(storage: _Storage) -> bytes:
        if storage.key not in data:
            raise ValueError(f"it lacks the storage {storage.key}.")
        return data[storage.key]

    return content, storages


def _exactly(file: IO[bytes], size: int) -> bytes:
    left = os.fstat(file.fileno()).st_size - file.tell()
    if not 0 <= size <= left:
        raise ValueError(f"it is truncated: {size} bytes are to come, {left} are left.")
    return file.read(size)


def _tensors(content: Any) -> Iterator[tuple[str, _Tensor]]:
    """All tensors in a mapping and in those that it holds, with their joined names."""
    if not isinstance(content, dict):
        raise ValueError(
            f"it holds a {type(content).__name__} and not a mapping of names to "
            "tensors."
        )
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, _Tensor):
            yield name, value
        elif isinstance(value, dict):
            # A few mappings that hold each other could have endless names.
            if id(value) in seen:
                raise ValueError(f"the mapping {name!r} occurs twice in it.")
            seen.add(id(value))
            prefix = f"{name}." if name else ""
            # Not value.items(), which a pickle can hide behind an attribute.
            for key in reversed(dict.keys(value)):
                waiting.append((f"{prefix}{key}", dict.__getitem__(value, key)))


def _array(tensor: _Tensor, storages: Callable[[_Storage], bytes]) -> np.ndarray:
    """The read-only view that a description asks for, if it stays in its storage."""
    storage, offset, shape, strides = tensor
    if not isinstance(storage, _Storage):
        raise ValueError(f"a tensor lies in {storage!r}, which is no storage.")
    if not (
        isinstance(shape, tuple)
        and isinstance(strides, tuple)
        and len(shape) == len(strides)
        and all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *strides))
    ):
        raise ValueError(
            f"a tensor has offset {offset!r}, shape {shape!r}, strides {strides!r}."
        )
    dtype = np.dtype(_DTYPES[storage.dtype])
    data = storages(storage)
    if len(data) != storage.size * dtype.itemsize:
        raise ValueError(
            f"the storage {storage.key} has {len(data)} bytes and not {storage.size} "
            f"elements of {dtype.name}."
        )
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if last >= storage.size:
        raise ValueError(
            f"a tensor of shape {shape}, strides {strides} and offset {offset} reaches "
            f"element {last} of a storage of {storage.size}."
        )
    return np.lib.stride_tricks.as_strided(
        np.frombuffer(data, dtype)[offset:],
        shape,
        [stride * dtype.itemsize for stride in strides],
        writeable=False,
    )
