"""Arrays in pickles, made of checked descriptions.

NumPy's own functions trust a pickle: its dtype takes a state with which an array of
integers passes for one of objects, so that its bytes are used as pointers. Here a dtype
is made of its name, and an array only if its bytes are there and are as many as its
shape and dtype say.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from experiments.data import pickles

_DTYPES = re.compile(r"b1|\?|[iu][1248]|f[248]|c8|c16|O[48]?|[SU]\d{1,9}")
_MODULES = ("numpy.core", "numpy._core")  # the former in old files
_MOST_AXES = 32
# Arrays of objects directly in each other. NumPy frees them by recursion.
_DEEPEST = 8


class Words:
    """The vocabulary of one pickle that holds arrays."""

    def __init__(self, source: pickles.Source) -> None:
        self._source = source
        # How deep an array of objects holds others, by id; the array keeps the id.
        self._depths: dict[int, tuple[np.ndarray, int]] = {}
        self.vocabulary: dict[str, pickles.Name | pickles.Function] = {
            "numpy.ndarray": _NDARRAY,
            "numpy.dtype": pickles.Function(_dtype),
            "_codecs.encode": pickles.Function(self._encode),
            "__builtin__.bytes": pickles.Function(_no_bytes),
            "builtins.bytes": pickles.Function(_no_bytes),
            "collections.OrderedDict": pickles.ordered(source),
        }
        for module in _MODULES:
            self.vocabulary |= {
                f"{module}.multiarray._reconstruct": pickles.Function(self._empty),
                f"{module}.multiarray.scalar": pickles.Function(self._scalar),
                f"{module}.numeric._frombuffer": pickles.Function(self._of_buffer),
            }

    def array(
        self, shape: Any, dtype: Any, data: Any, fortran: Any = False
    ) -> np.ndarray:
        """An array of its description, read-only unless it holds objects.

        Args:
          shape: of it.
          dtype: of numbers, texts or objects.
          data: bytes, or a text that Python 2 meant as such; a list of objects.
          fortran: whether the first axis is the fastest.

        Raises:
          ValueError: if the description is none of an array, or has not as many bytes
            or objects as an array of its shape.
        """
        count = _checked_count(shape)
        if not isinstance(dtype, np.dtype):
            raise ValueError(f"the dtype of an array is {pickles.shown(dtype)}.")
        order: Any = "F" if fortran else "C"
        if dtype.hasobject:
            objects, depth = self._objects(data, count)
            found = objects.reshape(shape, order=order)
            self._depths[id(found)] = found, depth
            return found
        content = _content(data, count * dtype.itemsize)
        if not count:
            return np.zeros(shape, dtype, order)
        if not dtype.itemsize:
            raise ValueError(f"an array of shape {shape} has elements of no bytes.")
        self._source.spend(len(content))
        found = np.frombuffer(content, dtype)
        check_values(found)
        return found.reshape(shape, order=order)

    def _objects(self, data: Any, count: int) -> tuple[np.ndarray, int]:
        """The objects, and how deep they hold arrays of objects."""
        if not isinstance(data, list) or len(data) != count:
            raise ValueError(
                f"an array of {count} objects is made of {pickles.shown(data)}."
            )
        self._source.spend(8 * count)
        found = np.empty(count, object)
        depth = 1
        for index, value in enumerate(data):
            found[index] = value
            if isinstance(value, np.ndarray):
                _, inner = self._depths.get(id(value), (value, 0))
                depth = max(depth, 1 + inner)
        if depth > _DEEPEST:
            raise ValueError(
                f"it has arrays of objects in each other, more than {_DEEPEST} deep."
            )
        return found, depth

    def _empty(self, kind: Any, shape: Any, typecode: Any) -> pickles.Unfinished:
        del shape, typecode  # always (0,) and "b"; the state says what it is
        if kind is not _NDARRAY:
            raise ValueError(f"it makes an array of {pickles.shown(kind)}.")
        return _Array(self)

    def _scalar(self, dtype: Any, data: Any) -> Any:
        if not isinstance(dtype, np.dtype) or dtype.hasobject:
            raise ValueError(f"a scalar is of dtype {pickles.shown(dtype)}.")
        return self.array((), dtype, data)[()]

    def _of_buffer(self, data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        return self.array(shape, dtype, data, order == "F")

    def _encode(self, text: Any, encoding: Any) -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise ValueError(f"it encodes {pickles.shown(text)}.")
        self._source.spend(len(text))
        return text.encode("latin1")


class _Array(pickles.Unfinished):
    """Stands for an empty array that a pickle will give a state."""

    __slots__ = ("_words",)

    def __init__(self, words: Words) -> None:
        super().__init__()
        self._words = words

    def finish(self, state: Any) -> np.ndarray:
        """The array of (version, shape, dtype, whether Fortran's, data)."""
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise ValueError("the state of an array is none.")
        shape, dtype, fortran, data = state[-4:]
        return self._words.array(shape, dtype, data, fortran)


class _Dtype(pickles.Unfinished):
    """Stands for a dtype without its byte order."""

    __slots__ = ("_dtype",)

    def __init__(self, dtype: np.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def finish(self, state: Any) -> np.dtype:
        """The dtype of (version, byte order, and what structured ones have)."""
        if not isinstance(state, tuple) or len(state) not in (8, 9):
            raise ValueError("the state of a dtype is none.")
        order, *structure = state[1:5]
        if order not in ("<", ">", "|", "=") or structure != [None] * 3 or state[8:]:
            raise ValueError("it has a structured dtype, which is not read.")
        return self._dtype.newbyteorder(order)


_NDARRAY = pickles.Name("numpy.ndarray")


def _dtype(name: Any, align: Any = False, copy: Any = True) -> _Dtype:
    del align, copy
    if not isinstance(name, str) or not _DTYPES.fullmatch(name):
        raise ValueError(f"arrays of dtype {pickles.shown(name)} are not read.")
    return _Dtype(np.dtype(name if name[0] != "O" else "O"))


def _no_bytes() -> bytes:
    """What old protocols write of bytes of which there are none."""
    return b""


def checked(dtype: np.dtype) -> np.dtype:
    """A dtype, if it is of numbers, texts or objects.

    Raises:
      ValueError: if it is another, such as a structured one.
    """
    name = dtype.str.lstrip("<>|=")
    if dtype.names or dtype.subdtype or not _DTYPES.fullmatch(name):
        raise ValueError(f"arrays of dtype {str(dtype)[:60]} are not read.")
    return dtype


def size(shape: Any, dtype: np.dtype) -> int:
    """How many bytes an array has.

    Raises:
      ValueError: if the shape is none.
    """
    return _checked_count(shape) * dtype.itemsize


def check_values(array: np.ndarray) -> None:
    """Makes sure that bytes are values of the array's dtype.

    Raises:
      ValueError: if truth values are none, or a text has what is no character.
    """
    if array.dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
        raise ValueError("an array of truth values has others than 0 and 1.")
    if array.dtype.kind == "U" and array.size:
        letters = array.view(np.dtype(np.uint32).newbyteorder(array.dtype.byteorder))
        if letters.max() > 0x10FFFF:
            raise ValueError("an array of texts has what is no character.")


def _checked_count(shape: Any) -> int:
    """How many elements a shape has."""
    if (
        not isinstance(shape, tuple)
        or len(shape) > _MOST_AXES
        or not all(type(n) is int and 0 <= n < 2**62 for n in shape)
    ):
        raise ValueError(f"the shape of an array is {pickles.shown(shape)}.")
    return math.prod(shape)


def _content(data: Any, size: int) -> bytes:
    """The bytes of an array, if they are so many."""
    if not isinstance(data, (bytes, str)) or len(data) != size:
        length = f" of {len(data)}" if isinstance(data, (bytes, str)) else ""
        raise ValueError(
            f"an array of {size} bytes is made of {pickles.shown(data)}{length}."
        )
    return data.encode("latin1") if isinstance(data, str) else data
