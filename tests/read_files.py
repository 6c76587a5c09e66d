"""Reads files in a process of its own, within bounds of memory and time.

    python read_files.py MEBIBYTES SECONDS < list of [reader, path]

prints for each what became of it: "" if it was read, or the error. A reader that ends
the process, or fills the memory, shows in what is printed.
"""

import contextlib
import json
import pathlib
import resource
import signal
import sys


def pickled(path):
    from experiments.data import archives

    with path.open("rb") as file:
        return archives.load_pickle(file)


def npy(path):
    from experiments.data import archives

    with path.open("rb") as file:
        return archives.load_objects(file)


def checkpoint(path):
    from experiments import checkpoints

    # A caller makes arrays of its own of them.
    return {name: array.copy() for name, array in checkpoints.load(path).items()}


def sound(path):
    from experiments import audio

    return audio.read(path)


def package(path):
    from experiments.data import debian

    return list(debian.files(path))


def zipped(path):
    """The table of an archive, and the files that it names."""
    from experiments.data import archives

    root = archives.root(path.parent, path.stem, "")
    rows = archives.table(root / "table.csv", "file", "label")
    return [archives.content(archives.inside(root, row[0], path)) for row in rows]


def table(path):
    from experiments.data import archives

    return [
        archives.inside(path.parent, row[0], path)
        for row in archives.table(path, "file", "label")
    ]


def picture(path):
    from experiments.data import pictures

    return pictures.square(path.read_bytes(), path, "RGB", 8)


def saved(path):
    import fgrad

    return fgrad.load(path)


READERS = {
    reader.__name__: reader
    for reader in (
        *(pickled, npy, checkpoint, sound, package, zipped, table, picture, saved),
    )
}


def too_long(*args):
    raise TimeoutError("it takes too long")


def main():
    mebibytes, seconds = map(int, sys.argv[1:])
    tasks = json.load(sys.stdin)
    # Imports first, and what is made once, as JAX's threads; then no more than this.
    for reader in {reader for reader, _ in tasks}:
        if reader == "saved":
            import jax.numpy as jnp

            jnp.asarray([1.0]).block_until_ready()
        with contextlib.suppress(Exception):
            READERS[reader](pathlib.Path("/dev/null"))
    now = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    most = now * resource.getpagesize() + (mebibytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGALRM, too_long)
    for reader, path in tasks:
        signal.alarm(seconds)
        try:
            READERS[reader](pathlib.Path(path))
            outcome = ""
        except BaseException as error:
            outcome = f"{type(error).__name__}: {str(error)[:2000]}"
        signal.alarm(0)
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
