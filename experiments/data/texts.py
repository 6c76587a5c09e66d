"""Texts that installed packages carry, cut into pieces of whole lines.

Nothing is downloaded and nothing of a package runs. All licences permit use and
copies:

==============  ==================================================  ==================
domain          texts                                               licence
==============  ==================================================  ==================
``prose``       the language reference, ``pydoc_data.topics``       PSF
``python``      modules of Python's standard library                PSF
``c``           the headers of NumPy                                BSD 3-clause
``javascript``  the web backend of Matplotlib                       Matplotlib (PSF)
==============  ==================================================  ==================

They differ a little between the versions of these packages.
"""

import ast
import hashlib
import importlib.util
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

# Modules of the standard library whose source is long, and has been there for long.
_MODULES = (
    *("argparse", "calendar", "configparser", "difflib", "doctest", "ftplib"),
    *("gettext", "imaplib", "inspect", "mailbox", "optparse", "pickletools"),
    *("shutil", "smtplib", "socketserver", "statistics", "tarfile", "zipfile"),
)
DOMAINS = ("prose", "python", "c", "javascript")
SPLITS = ("train", "validation", "test")


def read(domain: str) -> str:
    """The whole text of a domain, in ASCII; other characters become question marks.

    Args:
      domain: one of `DOMAINS`.

    Raises:
      ValueError: for another domain.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain must be one of {DOMAINS}, got {domain!r}.")
    text = "\n".join(_texts(domain))
    return text.encode("ascii", "replace").decode()


def _texts(domain: str) -> Iterator[str]:
    if domain == "prose":
        module = ast.parse(_source("pydoc_data.topics"))
        table = next(node for node in module.body if isinstance(node, ast.Assign))
        yield from ast.literal_eval(table.value).values()
    elif domain == "python":
        yield from (_source(name) for name in _MODULES)
    elif domain == "c":
        yield from _files("numpy", "_core/include/numpy", "*.h")
    else:
        yield from _files("matplotlib", "backends/web_backend", "*.js")


def _source(name: str) -> str:
    return _origin(name).read_text(encoding="utf-8")


def _files(package: str, folder: str, pattern: str) -> Iterator[str]:
    root = _origin(package).parent / folder
    for path in sorted(root.rglob(pattern)):
        yield path.read_text(encoding="utf-8")


def _origin(name: str) -> pathlib.Path:
    """The file of a module, or the first one of a package. It is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the module {name} has no source file here.")
    return pathlib.Path(spec.origin)


def pieces(text: str, longest: int) -> list[bytes]:
    r"""Cuts a text into pieces of as many whole lines as fit.

    Args:
      text: in ASCII.
      longest: bytes of a piece at most. A longer line is cut.

    Returns:
      The pieces in order; all together are the text without its blank lines.

    Example:
      >>> pieces("one\ntwo\n\nthree", 8)
      [b'one\ntwo\n', b'three\n']
    """
    found, piece = [], b""
    for line in text.encode("ascii").splitlines():
        if not line.strip():
            continue
        rest = line.rstrip() + b"\n"
        if len(piece) + len(rest) > longest and piece:
            found.append(piece)
            piece = b""
        while len(rest) > longest:
            found.append(rest[:longest])
            rest = rest[longest:]
        piece += rest
    return [*found, piece] if piece else found


def divided(found: Sequence[bytes]) -> dict[str, list[bytes]]:
    """Splits pieces: of each ten in a row one is for validation, and one for test.

    Pieces that occur twice, such as licences, are left out but for the first.

    Args:
      found: pieces in order.
    """
    once = list(dict.fromkeys(found))
    splits: dict[str, list[bytes]] = {name: [] for name in SPLITS}
    for index, piece in enumerate(once):
        name = {8: "validation", 9: "test"}.get(index % 10, "train")
        splits[name].append(piece)
    return splits


def digest(text: str) -> str:
    """The beginning of a text's SHA-256, which tells versions of a package apart.

    Example:
      >>> digest("a text")
      '734194ede5b0'
    """
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def lines(text: str, shortest: int, longest: int) -> list[bytes]:
    """The different lines of a text that are not too short and not too long.

    Args:
      text: in ASCII.
      shortest: bytes at least, without the spaces at both ends.
      longest: bytes at most.
    """
    found = (line.strip() for line in text.encode("ascii").splitlines())
    return list(dict.fromkeys(x for x in found if shortest <= len(x) <= longest))


def padded(found: Sequence[bytes], buckets: Sequence[int]) -> np.ndarray:
    """Puts pieces into one array, filled up to the smallest bucket that holds all.

    A program is compiled for each shape of its arguments, and there are as many shapes
    as buckets. The padding is of zeros, which are in no text.

    Args:
      found: pieces.
      buckets: lengths that there may be.

    Returns:
      uint8 [pieces, bucket].

    Raises:
      ValueError: if a piece is longer than all buckets.

    Example:
      >>> padded([b"ab", b"abc"], [2, 4, 8])
      array([[97, 98,  0,  0],
             [97, 98, 99,  0]], dtype=uint8)
    """
    length = bucket(max(map(len, found)), buckets)
    out = np.zeros((len(found), length), np.uint8)
    for row, piece in zip(out, found, strict=True):
        row[: len(piece)] = np.frombuffer(piece, np.uint8)
    return out


def bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds so many bytes.

    Args:
      length: in bytes.
      buckets: to choose from.

    Raises:
      ValueError: if it is longer than all of them.
    """
    fitting = [one for one in buckets if one >= length]
    if not fitting:
        raise ValueError(
            f"a piece of {length} bytes does not fit into buckets of {tuple(buckets)} "
            "bytes; cut it, or add a longer bucket."
        )
    return min(fitting)
