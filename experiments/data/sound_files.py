"""Whether a sound file is whole. libsndfile reads one that is cut, and says nothing."""

import struct
from collections.abc import Iterator


def check(content: bytes) -> None:
    r"""Makes sure that a wav or ogg file has the bytes that it says it has.

    Other formats are left to their decoder, which counts samples.

    Args:
      content: of the file.

    Raises:
      ValueError: if it is cut, or its lengths contradict each other.

    Example:
      >>> check(b"RIFF\x24\0\0\0WAVE")
      Traceback (most recent call last):
      ...
      ValueError: it is truncated: its header says 44 bytes, and it has 12.
    """
    if content.startswith(b"RIFF"):
        _check_wav(content)
    elif content.startswith(b"OggS"):
        _check_ogg(content)


def _check_wav(content: bytes) -> None:
    """A file is one chunk of chunks: a name, a length, and so many bytes."""
    if len(content) < 12:
        raise ValueError("it is truncated within its header.")
    end = 8 + struct.unpack("<I", content[4:8])[0]
    # The last byte may be one that only fills up, which some programs leave out.
    if end > len(content) + 1:
        raise ValueError(
            f"it is truncated: its header says {end} bytes, and it has {len(content)}."
        )
    names = []
    for name, start, size in _chunks(content, end):
        if start + size > min(end, len(content)):
            raise ValueError(
                f"it is truncated or damaged: its chunk {name!r} has {size} bytes, and "
                f"{min(end, len(content)) - start} are left."
            )
        names.append(name)
    if names.count(b"fmt ") != 1 or names.count(b"data") != 1:
        raise ValueError("it is damaged: it has no samples, or them twice.")


def _chunks(content: bytes, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and length of each chunk."""
    place = 12
    while place + 8 <= end:
        name, size = struct.unpack("<4sI", content[place : place + 8].ljust(8, b"\0"))
        if not all(32 <= letter < 127 for letter in name):
            raise ValueError(f"it is damaged: it has a chunk called {name!r}.")
        yield name, place + 8, size
        place += 8 + size + size % 2
    if place < end - 1:
        raise ValueError(f"it is damaged: {end - place} bytes are no chunk.")


def _check_ogg(content: bytes) -> None:
    """A file is pages, whole ones.

    The last of a stream should say that it is, but in 548 of the 1,836 files of
    Debian's klettres-data it does not, so a file that is cut between pages passes.
    """
    place = 0
    while place < len(content):
        header = content[place : place + 27]
        if len(header) < 27 or not header.startswith(b"OggS\0"):
            raise ValueError("it is truncated or damaged between two of its pages.")
        count = header[26]
        lengths = content[place + 27 : place + 27 + count]
        place += 27 + count + sum(lengths)
        if len(lengths) < count or place > len(content):
            raise ValueError("it is truncated within a page.")
