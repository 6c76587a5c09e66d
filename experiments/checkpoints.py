"""Tensors of PyTorch and safetensors files as NumPy arrays, without running their code.

A PyTorch file is a pickle, and a pickle is a program. Here it may only say where its
tensors lie: every global but those that rebuild a tensor is refused, and those stand
for plain descriptions. The arrays are made afterwards, from checked descriptions, and
what they take is bounded by the size of the file.
"""

from __future__ import annotations

import io
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
from safetensors import numpy as safetensors_numpy

from experiments.data import archives, array_pickles, pickles

# What a legacy file begins with: a pickle of the number PyTorch chose for it.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_START = pickle.dumps(_LEGACY_MAGIC, protocol=2)
_ZIP_START = b"PK\x03\x04"

# Longer names, joined of nested mappings' keys, could fill the memory.
_LONGEST_NAME = 1000
# A tensor of stride 0 has more elements than memory. It may have as many bytes as the
# file, or as this; all tensors together, eight times as many.
_SMALL = 1 << 20
_MOST_AXES = 32
_SHARED = 8

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
        run); a tensor that reaches beyond its storage; tensors that are much larger
        than the file; two of one name; a truncated or unknown file.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> safetensors_numpy.save_file({"w": np.arange(3)}, path)
      >>> load(path)
      {'w': array([0, 1, 2])}
    """
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    with archives.BoundedFile(path) as file:
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
            return _arrays(content, storages, os.fstat(file.fileno()).st_size)
        except MemoryError:
            raise
        except Exception as error:  # zipfile's and NumPy's: whatever damage leads to
            raise ValueError(f"cannot read {path}: {error}") from error


def _load_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        tensors: dict[str, np.ndarray] = safetensors_numpy.load_file(path)
        for tensor in tensors.values():
            array_pickles.check_values(tensor)
    except (FileNotFoundError, IsADirectoryError, PermissionError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{path} is no valid safetensors file: {error}") from error
    return tensors


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


def _rebuild_tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any = False,
    backward_hooks: Any = None,
    metadata: Any = None,
) -> _Tensor:
    """Stands for ``torch._utils._rebuild_tensor_v2``."""
    del requires_grad, backward_hooks
    if metadata:
        raise ValueError("a tensor with metadata is not supported.")
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(
    data: Any, requires_grad: Any = True, backward_hooks: Any = None
) -> Any:
    """Stands for ``torch._utils._rebuild_parameter``: its tensor."""
    del requires_grad, backward_hooks
    return data


def _unpickle(source: pickles.Source) -> tuple[Any, dict[str, _Storage]]:
    """The next pickle of a file, and the storages that it names."""
    storages: dict[str, _Storage] = {}

    def storage(pid: Any) -> _Storage:
        """That which ``("storage", type, key, location, size, ...)`` names."""
        match pid:
            case ("storage", pickles.Name(dtype), str(key), _, int(size), *view) if (
                dtype in _DTYPES and size >= 0 and view in ([], [None])
            ):
                found = storages.setdefault(key, _Storage(key, dtype, size))
                if found != (key, dtype, size):
                    raise ValueError(
                        f"the storage {pickles.shown(key)} is {found.size} elements of "
                        f"{found.dtype} and {size} of {dtype}."
                    )
                return found
        raise pickles.RefusedError(
            f"the storage {pickles.shown(pid)} is of no supported kind."
        )

    vocabulary: dict[str, pickles.Name | pickles.Function] = {
        "collections.OrderedDict": pickles.ordered(source),
        "torch._utils._rebuild_tensor_v2": pickles.Function(_rebuild_tensor),
        "torch._utils._rebuild_parameter": pickles.Function(_rebuild_parameter),
        **{name: pickles.Name(name) for name in _DTYPES},
    }
    content = pickles.read(
        source,
        vocabulary,
        persistent=storage,
        refusal="which no tensor needs, and which was not run. Save tensors only: "
        "torch.save(model.state_dict(), ...), or use safetensors.",
    )
    return content, storages


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
    left = os.fstat(file.fileno()).st_size

    def member(name: str) -> bytes:
        nonlocal left
        try:
            info = archive.getinfo(root + name)
        except KeyError as error:
            raise ValueError(f"the archive has no {(root + name)[:200]}.") from error
        # PyTorch never compresses; a few compressed bytes could fill the memory.
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"the member {info.filename[:200]} is compressed.")
        # Nor may many members be of the same bytes.
        left -= info.file_size
        if left < 0:
            raise ValueError("the archive's members are larger than the file.")
        return archive.read(info)

    if f"{root}byteorder" in archive.namelist() and member("byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine.")
    content, _ = _unpickle(pickles.Source(io.BytesIO(member("data.pkl"))))
    data: dict[str, bytes] = {}

    def storages(storage: _Storage) -> bytes:
        if storage.key not in data:
            data[storage.key] = member(f"data/{storage.key}")
        return data[storage.key]

    return content, storages


def _read_legacy(file: IO[bytes]) -> tuple[Any, Callable[[_Storage], bytes]]:
    """What ``torch.save`` wrote before 1.6: five pickles, and the storages."""
    source = pickles.Source(file)
    for _ in ("magic number", "version", "sizes of C's integers"):
        _unpickle(source)
    content, named = _unpickle(source)
    keys, _ = _unpickle(source)
    data: dict[str, bytes] = {}
    for key in keys if isinstance(keys, list) else [keys]:
        if not isinstance(key, str) or key not in named:
            raise ValueError(f"storage {pickles.shown(key)} belongs to no tensor.")
        (count,) = struct.unpack("<q", _exactly(file, 8))
        itemsize = np.dtype(_DTYPES[named[key].dtype]).itemsize
        data[key] = _exactly(file, count * itemsize)

    def storages(storage: _Storage) -> bytes:
        if storage.key not in data:
            raise ValueError(f"it lacks the storage {pickles.shown(storage.key)}.")
        return data[storage.key]

    return content, storages


def _exactly(file: IO[bytes], size: int) -> bytes:
    left = os.fstat(file.fileno()).st_size - file.tell()
    if not 0 <= size <= left:
        raise ValueError(f"it is truncated: {size} bytes are to come, {left} are left.")
    return file.read(size)


def _arrays(
    content: Any, storages: Callable[[_Storage], bytes], file_size: int
) -> dict[str, np.ndarray]:
    """All arrays, whose names differ and which are not much larger than the file."""
    most = max(file_size, _SMALL)
    arrays: dict[str, np.ndarray] = {}
    total = 0
    for name, tensor in _tensors(content):
        if name in arrays:
            raise ValueError(f"two of its tensors have the name {pickles.shown(name)}.")
        array = arrays[name] = _array(tensor, storages)
        total += array.nbytes
        if array.nbytes > most or total > _SHARED * most:
            raise ValueError(
                f"its tensors are much larger than it: {pickles.shown(name)} has the "
                f"shape {array.shape}, of repeated elements."
            )
    return arrays


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
            for key, inner in reversed(value.items()):
                if not isinstance(inner, (_Tensor, dict)):
                    continue
                if len(joined := _joined(prefix, key)) > _LONGEST_NAME:
                    raise ValueError(f"the name {joined[:60]!r}... is too long.")
                waiting.append((joined, inner))


def _joined(prefix: str, key: Any) -> str:
    """A name, of which no more is made than is needed to see that it is too long."""
    if not isinstance(key, (str, int)):
        raise ValueError(f"a tensor has the name {pickles.shown(key)}.")
    return prefix + str(key)[: _LONGEST_NAME + 1]


def _array(tensor: _Tensor, storages: Callable[[_Storage], bytes]) -> np.ndarray:
    """The read-only view that a description asks for, if it stays in its storage."""
    storage, offset, shape, strides = tensor
    if not isinstance(storage, _Storage):
        raise ValueError(
            f"a tensor lies in {pickles.shown(storage)}, which is no storage."
        )
    if not (
        isinstance(shape, tuple)
        and isinstance(strides, tuple)
        and len(shape) == len(strides) <= _MOST_AXES
        and all(type(n) is int and 0 <= n < 2**62 for n in (offset, *shape, *strides))
    ):
        raise ValueError(
            f"a tensor has offset {pickles.shown(offset)}, shape "
            f"{pickles.shown(shape)}, strides {pickles.shown(strides)}."
        )
    dtype = np.dtype(_DTYPES[storage.dtype])
    data = storages(storage)
    if len(data) != storage.size * dtype.itemsize:
        raise ValueError(
            f"the storage {pickles.shown(storage.key)} has {len(data)} bytes and not "
            f"{pickles.shown(storage.size)} elements of {dtype.name}."
        )
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if last >= storage.size:
        raise ValueError(
            f"a tensor of shape {shape}, strides {strides} and offset {offset} reaches "
            f"element {last} of a storage of {storage.size}."
        )
    elements = np.frombuffer(data, dtype)
    array_pickles.check_values(elements)
    return np.lib.stride_tricks.as_strided(
        elements[offset:],
        shape,
        [stride * dtype.itemsize for stride in strides],
        writeable=False,
    )
