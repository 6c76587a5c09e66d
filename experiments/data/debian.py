"""Packages of Debian, read in memory; nothing of them is run."""

import bz2
import io
import lzma
import pathlib
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from experiments.data import archives

_START = b"!<arch>\n"
_MEMORY = 256 << 20  # of an xz decompressor, whose file says how much it wants
_BLOCK = 512  # bytes, of which tar files are made
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gz": lambda: zlib.decompressobj(31),
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY),
    "lzma": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_MEMORY),
    "bz2": bz2.BZ2Decompressor,
}
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_TYPES = (*_PLAIN, *_LONG_NAMES, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)


def files(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """The files that a Debian package installs; nothing of it is run.

    Args:
      path: of the package.

    Yields:
      Name, such as "usr/share/klettres/de/alpha/a.ogg", and content.

    Raises:
      ValueError: if the file is no Debian package, or a damaged one; if it unpacks to
        much more than it is; or if names in it lead out of a folder.
    """
    with path.open("rb") as archive:
        start = archive.read(len(_START))
    if start != _START:
        raise ValueError(f"{path} is no Debian package; download it again.")
    with archives.naming(path):
        name, packed = _data(path)
        content = _unpacked(packed, name.removeprefix("data.tar").removeprefix("."))
        yield from _members(content)


def _data(path: pathlib.Path) -> tuple[str, bytes]:
    """Name and bytes of the member with the files.

    A package is an ar archive; each member has a header of 60 bytes: its name, ..., its
    size in decimal digits, an end.
    """
    left = path.stat().st_size - len(_START)
    with path.open("rb") as archive:
        archive.seek(len(_START))
        while len(header := archive.read(60)) == 60:
            left -= 60
            name, digits = header[:16].decode().rstrip(" /"), header[48:58].strip()
            if header[58:] != b"`\n" or not digits.isdigit():
                raise ValueError("it has a broken header of a member.")
            if (size := int(digits)) > left:
                raise ValueError(
                    f"it is truncated: {name} has {size} bytes, and {left} are left."
                )
            if name.startswith("data.tar"):
                return name, archive.read(size)
            archive.seek(size + size % 2, io.SEEK_CUR)
            left -= size + size % 2
    raise ValueError(f"{path} has no data.tar, so it is no whole Debian package.")


def _unpacked(packed: bytes, kind: str) -> bytes:
    if not kind:
        return packed
    if kind not in _DECOMPRESSORS:
        raise ValueError(
            f"its files are compressed as {kind}, and {', '.join(_DECOMPRESSORS)} are "
            "read."
        )
    most = archives.unpacked_limit(len(packed))
    decompressor = _DECOMPRESSORS[kind]()
    content: bytes = decompressor.decompress(packed, most + 1)
    if len(content) > most:
        raise ValueError(f"its {len(packed)} bytes would unpack to more than {most}.")
    if not decompressor.eof or decompressor.unused_data:
        raise ValueError("its compressed files are truncated, or more follows them.")
    return content


class _Member(tarfile.TarInfo):
    """A header as dpkg writes it.

    Those of pax and of sparse files are refused: Python has read some of them for ever.
    """

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> "_Member":
        """The header of a block."""
        found = super().frombuf(buf, encoding, errors)
        if found.type not in _TYPES or found.size < 0:
            raise ValueError(
                f"it has a member of type {found.type!r} and {found.size} bytes."
            )
        if found.type in _LONG_NAMES and found.size > 4096:
            raise ValueError(f"it has a name of {found.size} bytes.")
        return found


def _members(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file in a tar file."""
    end = 0
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:", tarinfo=_Member) as tar:
        for member in tar:
            if member.offset < end or member.offset_data + member.size > len(content):
                raise ValueError(f"its files are truncated within {member.name[:100]}.")
            end = member.offset_data + member.size
            if member.type in _PLAIN:
                name = member.name.removeprefix("./")
                archives.check_inside(name)
                yield name, content[member.offset_data : end]
        # Python ends at what it takes for no header, whatever that is.
        last = content[tar.offset : tar.offset + _BLOCK]
    if len(last) < _BLOCK or any(last):
        raise ValueError("its files are truncated, or damaged between two of them.")
