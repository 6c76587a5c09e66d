"""An object that answers as an array does, with a value that it computes when asked."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

# Methods and attributes of `jax.Array` that are about the values in it.
_OF_THE_VALUE = """
T all any argmax argmin argpartition argsort astype at byteswap choose clip compress
conj conjugate copy cumprod cumsum diagonal dot flatten imag item mT max mean min
nonzero prod ptp ravel real repeat reshape round searchsorted sort squeeze std sum
swapaxes take tobytes tolist trace transpose var view
"""
# Those that are about memory. The value has none: only its parts are stored.
_OF_MEMORY = """
addressable_data addressable_shards block_until_ready committed copy_to_host_async
delete device devices format global_shards is_deleted is_fully_addressable
is_fully_replicated is_ready itemsize nbytes on_device_size_in_bytes sharding to_device
unsafe_buffer_pointer
"""
OF_THE_VALUE = frozenset(_OF_THE_VALUE.split())
OF_MEMORY = frozenset(_OF_MEMORY.split())


def _value(x: Any) -> Any:
    return x.dequantize() if isinstance(x, ArrayLike) else x


def _unary(function: Callable[[Any], Any]) -> Callable[[ArrayLike], Any]:
    def method(self: ArrayLike) -> Any:
        return function(self.dequantize())

    return method


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[ArrayLike, Any], Any]:
    def method(self: ArrayLike, other: Any) -> Any:
        return function(self.dequantize(), _value(other))

    return method


def _reflected(function: Callable[[Any, Any], Any]) -> Callable[[ArrayLike, Any], Any]:
    def method(self: ArrayLike, other: Any) -> Any:
        return function(_value(other), self.dequantize())

    return method


class ArrayLike:
    """Base of a type that stands for the value which its ``dequantize`` computes.

    Operators, conversions, iteration and the methods of `jax.Array` that are about
    values are those of the value, and return plain arrays. A subclass has ``shape``
    and ``dequantize``.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        raise NotImplementedError

    def dequantize(self) -> jax.Array:
        """The value."""
        raise NotImplementedError

    # Comparisons are elementwise, so there is no hash, as for arrays.
    __eq__ = _binary(operator.eq)
    __ne__ = _binary(operator.ne)
    __lt__ = _binary(operator.lt)
    __le__ = _binary(operator.le)
    __gt__ = _binary(operator.gt)
    __ge__ = _binary(operator.ge)

    __neg__ = _unary(operator.neg)
    __pos__ = _unary(operator.pos)
    __abs__ = _unary(abs)

    __add__, __radd__ = _binary(operator.add), _reflected(operator.add)
    __sub__, __rsub__ = _binary(operator.sub), _reflected(operator.sub)
    __mul__, __rmul__ = _binary(operator.mul), _reflected(operator.mul)
    __matmul__, __rmatmul__ = _binary(operator.matmul), _reflected(operator.matmul)
    __truediv__, __rtruediv__ = _binary(operator.truediv), _reflected(operator.truediv)
    __floordiv__ = _binary(operator.floordiv)
    __rfloordiv__ = _reflected(operator.floordiv)
    __mod__, __rmod__ = _binary(operator.mod), _reflected(operator.mod)
    __divmod__, __rdivmod__ = _binary(divmod), _reflected(divmod)
    __pow__, __rpow__ = _binary(operator.pow), _reflected(operator.pow)

    __bool__ = _unary(bool)
    __int__ = _unary(int)
    __float__ = _unary(float)
    __complex__ = _unary(complex)
    __index__ = _unary(operator.index)

    def __round__(self, ndigits: int | None = None) -> Any:
        return round(self.dequantize(), ndigits)

    def __getitem__(self, index: Any) -> jax.Array:
        return self.dequantize()[index]

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a tensor without axes")
        return int(self.shape[0])

    def __iter__(self) -> Iterator[jax.Array]:
        return iter(self.dequantize())

    def __contains__(self, item: Any) -> bool:
        return bool((self == item).any())

    def __format__(self, spec: str) -> str:
        return format(self.dequantize(), spec) if spec else str(self)

    # NumPy leaves operators with its own arrays to us, as it does for JAX's.
    __array_priority__ = 100

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(
                f"the value of a {type(self).__name__} is computed when it is asked "
                "for, so that it cannot be read without a copy; leave out copy=False."
            )
        value = self.dequantize()
        return np.array(value, dtype) if copy else np.asarray(value, dtype)

    def __jax_array__(self) -> jax.Array:
        return self.dequantize()

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        return self.dequantize().__array_namespace__(api_version=api_version)

    def __dlpack__(self, **options: Any) -> Any:
        return self.dequantize().__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        values: Any = self.dequantize()
        return values.__dlpack_device__()

    def __getattr__(self, name: str) -> Any:
        if name in OF_THE_VALUE:
            return getattr(self.dequantize(), name)
        kind = type(self).__name__
        if name in OF_MEMORY:
            raise AttributeError(
                f"a {kind} has no {name!r}: its value is not stored. Ask its parts, "
                f"as in q.qvalue.{name}, or use jax.device_put, "
                "jax.block_until_ready and jax.tree.map, which reach all parts."
            )
        if name.startswith("__"):
            raise AttributeError(f"{kind!r} object has no attribute {name!r}")
        raise AttributeError(
            f"a {kind} has no attribute {name!r}. If it is one of arrays, ask the "
            f"value: q.dequantize().{name}"
        )

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *OF_THE_VALUE})
