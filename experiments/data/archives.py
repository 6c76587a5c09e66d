"""Files that others publish: folders or zips of them, and arrays in their pickles.

Whatever is wrong with such a file ends in a ValueError that names it: no other error,
no endless loop, and no more memory than a file of its size can honestly ask for.
"""

import contextlib
import csv
import hashlib
import io
import os
import pathlib
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np

from experiments.data import array_pickles, pickles

_LONGEST_HEADER = 10_000  # bytes of an npy file's; NumPy reads no longer one
# What is compressed may have so many bytes, or so many times those that it takes.
# Nothing that is read here comes near: sounds and pictures do not compress well.
_UNPACKED, _TIMES = 64 << 20, 20
# Python's zipfile makes a name of every folder above a member.
_LONGEST_NAME, _MOST_FOLDERS = 1000, 16


class BoundedFile(io.BufferedReader):
    """A file that takes no more memory than it has bytes.

    Python's reserves what it is asked for, and zipfile asks for what a header says.
    """

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """At most so many of the next bytes; all of them by default."""
        if size is not None and size >= 0:
            size = min(size, max(0, self._size - self.tell()))
        return super().read(size)


def root(folder: pathlib.Path, name: str, instructions: str) -> Any:
    """What an archive unpacks to: a folder, or the zip that holds it.

    Args:
      folder: where the archive is.
      name: of the folder inside; the zip is called after it.
      instructions: how to get it.

    Returns:
      A ``pathlib.Path`` or ``zipfile.Path``, which are read alike.

    Raises:
      FileNotFoundError: if neither is there.
      ValueError: if the zip is damaged, or has names that lead out of it.
    """
    if (folder / name).is_dir():
        return folder / name
    packed = folder / f"{name}.zip"
    if packed.is_file():
        with naming(packed), BoundedFile(packed) as file:
            for member in zipfile.ZipFile(file).namelist():
                if (
                    len(member) > _LONGEST_NAME
                    or member.count("/") > _MOST_FOLDERS
                    or "//" in member
                ):
                    raise ValueError(f"it has a member called {member[:60]!r}.")
                check_inside(member)
            return zipfile.Path(packed) / name
    raise FileNotFoundError(
        f"{folder} has neither {name}/ nor {name}.zip. {instructions}"
    )


def verify(path: pathlib.Path, checksums: Mapping[str, str]) -> None:
    """Makes sure that a file is the published one, if its checksum is known.

    Args:
      path: of the file.
      checksums: SHA-256 in hexadecimal digits by file name. A file of another name,
        such as a later version, is not checked. (Zips have checksums of their own
        inside, which are checked as they are read.)

    Raises:
      ValueError: if the file has other bytes.

    Example:
      >>> path = pathlib.Path(__file__)
      >>> verify(path, {})
      >>> verify(path, {"archives.py": "0" * 64})
      Traceback (most recent call last):
      ...
      ValueError: ...archives.py is damaged: its SHA-256 is ...
    """
    if (expected := checksums.get(path.name)) is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{path} is damaged: its SHA-256 is {found} instead of {expected}; "
            "download it again."
        )


def unpacked_limit(packed: int) -> int:
    """How many bytes may be made of so many compressed ones."""
    return max(_UNPACKED, _TIMES * packed)


def content(path: Any) -> bytes:
    """The bytes of a file in a folder or in a zip.

    Args:
      path: a ``pathlib.Path`` or ``zipfile.Path``, as of `root`.

    Raises:
      ValueError: if there is no such file, or if the zip is damaged or would unpack to
        much more than it is.

    Example:
      >>> content(pathlib.Path(__file__))[3:8]
      b'Files'
    """
    with opened(path) as file:
        return file.read()


@contextlib.contextmanager
def opened(path: Any) -> Iterator[IO[bytes]]:
    """A file in a folder or in a zip, to be read in parts; otherwise as `content`."""
    with naming(path):
        if not path.is_file():
            raise ValueError("there is no such file; unpack or download it again.")
        if isinstance(path, zipfile.Path):
            archive = path.root
            info = archive.getinfo(path.at)
            packed = info.compress_size
            if packed > os.path.getsize(str(archive.filename)):
                raise ValueError(f"it has {packed} bytes, more than its zip.")
            if info.file_size > unpacked_limit(packed):
                raise ValueError(
                    f"{packed} bytes of the zip would unpack to {info.file_size}, more "
                    "than sounds, pictures or tables do."
                )
        with path.open("rb") as file:
            yield file


def inside(folder: Any, name: str, source: object) -> Any:
    """The file of a name that a file gives, if it is inside a folder.

    Args:
      folder: a ``pathlib.Path`` or ``zipfile.Path``.
      name: of the file, relative to the folder.
      source: what gives the name, for the message.

    Returns:
      Its path.

    Raises:
      ValueError: if the name leads out of the folder.

    Example:
      >>> inside(pathlib.PurePosixPath("images"), "cat/1.png", "labels.csv")
      PurePosixPath('images/cat/1.png')
      >>> inside(pathlib.PurePosixPath("images"), "../secret", "a.csv")
      Traceback (most recent call last):
      ...
      ValueError: cannot read a.csv: the name '../secret' leads out of its folder.
    """
    with naming(source):
        check_inside(name)
    return folder.joinpath(*pathlib.PurePosixPath(name).parts)


def check_inside(name: str) -> None:
    """Makes sure that a relative name leads to no place above it.

    Raises:
      ValueError: if it does, or is none.
    """
    # Windows' paths know both slashes and the letters of drives.
    path = pathlib.PureWindowsPath(name)
    if path.anchor or ".." in path.parts or not path.parts or "\0" in name:
        raise ValueError(f"the name {name[:60]!r} leads out of its folder.")


def table(path: Any, *columns: str) -> list[tuple[str, ...]]:
    r"""Columns of a csv file whose first row names them.

    Args:
      path: a ``pathlib.Path`` or ``zipfile.Path``.
      *columns: wanted. The first names a file, each in one row only.

    Returns:
      The fields of each row, in the order of the columns.

    Raises:
      ValueError: if the file is no such table, lacks a column or a field, or names a
        file twice.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "table.csv"
      >>> _ = path.write_text("file,size,label\n1.png,3,cat\n")
      >>> table(path, "file", "label")
      [('1.png', 'cat')]
    """
    text = content(path)
    with naming(path):
        reader = csv.DictReader(io.StringIO(text.decode(), newline=""))
        if missing := [
            name for name in columns if name not in (reader.fieldnames or ())
        ]:
            raise ValueError(f"it has no column called {missing[0]}.")
        rows: list[tuple[str, ...]] = []
        seen: set[str] = set()
        for row in reader:
            fields = tuple(row[name] for name in columns)
            if not all(fields) or None in row:
                raise ValueError(
                    f"its line {reader.line_num} has not one field for each column."
                )
            if fields[0] in seen:
                raise ValueError(f"it names {fields[0][:60]!r} twice.")
            seen.add(fields[0])
            rows.append(fields)
        if not rows:
            raise ValueError("it has no rows.")
        return rows


@contextlib.contextmanager
def naming(name: object) -> Iterator[None]:
    """Makes a ValueError that names the file of whatever its damage leads to.

    Args:
      name: of the file.

    Raises:
      ValueError: for any error within, but those of memory and of files that are
        missing or may not be read.

    Example:
      >>> with naming("labels.csv"):
      ...     int("three")
      Traceback (most recent call last):
      ...
      ValueError: cannot read labels.csv: invalid literal for int() with base 10: ...
    """
    try:
        yield
    except (MemoryError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(name) in str(error):
            raise
        raise ValueError(f"cannot read {name}: {error}") from error


def load_pickle(file: IO[bytes]) -> Any:
    """Arrays, texts, numbers, lists and mappings of a pickle; no code is run.

    Args:
      file: of Python 2 or 3.

    Returns:
      What it holds; arrays are read-only unless they hold objects.

    Raises:
      ValueError: if the pickle asks for anything else, or is damaged.

    Example:
      >>> import pickle
      >>> file = io.BytesIO(pickle.dumps({"labels": np.arange(3)}))
      >>> load_pickle(file)
      {'labels': array([0, 1, 2])}
      >>> load_pickle(io.BytesIO(pickle.dumps(print)))
      Traceback (most recent call last):
      ...
      ValueError: cannot read an unnamed file: its pickle asks for builtins.print, ...
    """
    with naming(_name(file)):
        return _arrays(file)


def load_objects(file: IO[bytes]) -> np.ndarray:
    """An npy file of objects, such as texts of any length; no code is run.

    Args:
      file: as ``numpy.save`` writes it.

    Returns:
      The array.

    Raises:
      ValueError: as `load_pickle`, and if it is no npy file.

    Example:
      >>> file = io.BytesIO()
      >>> np.save(file, np.array([["dog"], ["cat", "cow"]], object))
      >>> _ = file.seek(0)
      >>> load_objects(file)
      array([list(['dog']), list(['cat', 'cow'])], dtype=object)
    """
    with naming(_name(file)):
        shape, fortran, dtype = _header(file)
        array_pickles.checked(dtype)
        if dtype.hasobject:
            array = _arrays(file)
            if not isinstance(array, np.ndarray) or not array.dtype.hasobject:
                raise ValueError("its pickle is of no array of objects.")
        else:
            source = pickles.Source(file)
            words = array_pickles.Words(source)
            content = source.take(array_pickles.size(shape, dtype))
            array = words.array(shape, dtype, content, fortran)
        if array.shape != shape:
            raise ValueError(
                f"its header says {shape}, and its array is {array.shape}."
            )
        if file.read(1):
            raise ValueError("it has more bytes than its array.")
        return array


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype of an npy file."""
    source = pickles.Source(file)
    major, minor = np.lib.format.read_magic(io.BytesIO(source.take(8)))
    if minor or major not in (1, 2):
        raise ValueError(f"it has the version {major}.{minor} of the npy format.")
    length = source.take(2 * major)
    if (count := int.from_bytes(length, "little")) > _LONGEST_HEADER:
        raise ValueError(f"it has a header of {count} bytes.")
    header = io.BytesIO(length + source.take(count))
    if major == 1:
        return np.lib.format.read_array_header_1_0(header)
    return np.lib.format.read_array_header_2_0(header)


def _arrays(file: IO[bytes]) -> Any:
    source = pickles.Source(file)
    return pickles.read(
        source,
        array_pickles.Words(source).vocabulary,
        refusal="which no array needs, and which was not run: get the file from where "
        "it was published.",
    )


def _name(file: IO[bytes]) -> str:
    return str(getattr(file, "name", "an unnamed file"))
