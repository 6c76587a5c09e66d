"""Files that others publish: folders or zips of them, and arrays in their pickles."""

import contextlib
import hashlib
import io
import pathlib
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np

from experiments.data import array_pickles, pickles

_LONGEST_HEADER = 10_000  # bytes of an npy file's; NumPy reads no longer one


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
    """
    if (folder / name).is_dir():
        return folder / name
    if (folder / f"{name}.zip").is_file():
        return zipfile.Path(folder / f"{name}.zip") / name
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
      ValueError: cannot read the file: its pickle asks for builtins.print, which no ...
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
    return str(getattr(file, "name", "the file"))
