"""One static array for all temporary buffers; what lives at other times shares it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

_ALIGNMENT = 4


@dataclasses.dataclass(eq=False)
class Lifetime:
    """Memory that is needed for a while.

    Attributes:
      size: bytes.
      first: the step that writes it.
      last: the last step that reads it.
    """

    size: int
    first: int
    last: int


def place(lifetimes: Iterable[Lifetime]) -> tuple[dict[Lifetime, int], int]:
    """Offsets in an arena, largest buffers first, each as low as its time allows.

    Args:
      lifetimes: of the buffers.

    Returns:
      The offset in bytes of each, and the size of the arena.

    Example:
      >>> a, b, c = Lifetime(8, 0, 1), Lifetime(6, 1, 2), Lifetime(4, 2, 3)
      >>> offsets, size = place([a, b, c])
      >>> [offsets[x] for x in (a, b, c)], size
      ([0, 8, 0], 16)
    """
    offsets: dict[Lifetime, int] = {}
    total = 0
    for one in sorted(lifetimes, key=lambda x: (-x.size, x.first)):
        size = _rounded(one.size)
        start = 0
        others = [
            (offsets[x], offsets[x] + _rounded(x.size))
            for x in offsets
            if x.first <= one.last and one.first <= x.last
        ]
        for begin, end in sorted(others):
            if start + size <= begin:
                break
            start = max(start, end)
        offsets[one] = start
        total = max(total, start + size)
    return offsets, total


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
