"""Files that others publish: folders or zips of them, and arrays in their pickles."""

import hashlib
import io
import pathlib
import pickle
import zipfile
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

# What a pickle of arrays asks for; numpy.core is the name in old ones. None of these
# runs what the pickle says.
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
    ("__builtin__", "bytes"): bytes,
    ("builtins", "bytes"): bytes,
}
_OF_ARRAYS = ("numpy.core.multiarray", "numpy._core.multiarray")


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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _OF_ARRAYS and name in ("_reconstruct", "scalar"):
            return getattr(np._core.multiarray, name)  # type: ignore[attr-defined]
        found = _ALLOWED.get((module, name))
        if found is None:
            raise ValueError(
                f"the file's pickle asks for {module}.{name}, which no array needs, "
                "and which was not run: get the file from where it was published."
            )
        return found


def load_pickle(file: IO[bytes]) -> Any:
    """Arrays, texts, numbers, lists and mappings of a pickle; no code is run.

    Args:
      file: of Python 2 or 3.

    Returns:
      What it holds.

    Raises:
      ValueError: if the pickle asks for anything else.

    Example:
      >>> file = io.BytesIO(pickle.dumps({"labels": np.arange(3)}))
      >>> load_pickle(file)
      {'labels': array([0, 1, 2])}
      >>> load_pickle(io.BytesIO(pickle.dumps(print)))
      Traceback (most recent call last):
      ...
      ValueError: the file's pickle asks for builtins.print, which no array needs, ...
    """
    return _Unpickler(file, encoding="latin1").load()


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
    start = io.BytesIO(file.read())
    version = np.lib.format.read_magic(start)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, _, dtype = read[version](start)
    if not dtype.hasobject:
        start.seek(0)
        return np.load(start, allow_pickle=False)
    return np.asarray(load_pickle(start)).reshape(shape)
