"""What number types a compiled program has, as its StableHLO says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

_ELEMENT = re.compile(r"(?:x|<)((?:u|s)?i\d+|bf16|[tf]\w*\d\w*|complex<\w+>)>$")


def number_types(function: Callable[..., Any], *args: Any) -> frozenset[str]:
    """The element types of all values in the StableHLO of a function.

    Args:
      function: any JAX function.
      *args: arrays, or shapes and types.

    Returns:
      Names such as ``"i32"``; ``"i1"`` are bools, ``"ui8"`` unsigned.

    Example:
      >>> import jax.numpy as jnp
      >>> sorted(number_types(lambda x: x / 2 > 1, jnp.int8(3)))
      ['f32', 'i1', 'i8']
    """
    module: Any = jax.jit(function).lower(*args).compiler_ir("stablehlo")
    return frozenset(_types(module.operation))


def check(function: Callable[..., Any], *args: Any) -> frozenset[str]:
    """Checks that a program has neither floats nor 64-bit numbers.

    Args:
      function: any JAX function.
      *args: arrays, or shapes and types.

    Returns:
      Its `number_types`.

    Raises:
      ValueError: if it has; with the types.
    """
    found = number_types(function, *args)
    bad = sorted(t for t in found if "f" in t or "complex" in t or t.endswith("64"))
    if bad:
        raise ValueError(
            f"the program has values of types {', '.join(bad)}: keep floats out of its "
            "arguments, and leave jax_enable_x64 off."
        )
    return found


def _types(operation: Any) -> Iterator[str]:
    for region in operation.regions:
        for block in region.blocks:
            for argument in block.arguments:
                yield from _element(argument.type)
            for inner in block.operations:
                for result in inner.results:
                    yield from _element(result.type)
                yield from _types(inner.operation)


def _element(kind: Any) -> Iterator[str]:
    if match := _ELEMENT.search(str(kind)):
        yield match.group(1)
