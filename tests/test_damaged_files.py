"""Files that are damaged or hostile end in a ValueError that names them.

Each is read in another process that may take 400 MiB more than after its imports, and
ten seconds; one that is killed, or raises anything else, fails the test.
"""

import io
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import zipfile

import hostile_files
import jax.numpy as jnp
import numpy as np
import pytest
import test_checkpoints
from safetensors import numpy as safetensors_numpy

import fgrad

# More of it, and of every kind: FGRAD_FUZZ=1.
LONG = bool(os.environ.get("FGRAD_FUZZ"))
TRIALS = 5000 if LONG else 150


def outcomes(tasks, mebibytes=400, seconds=10):
    """What becomes of each file: "" if it is read, or the error."""
    script = pathlib.Path(__file__).with_name("read_files.py")
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script, str(mebibytes), str(seconds)],
        input=json.dumps([[reader, str(path)] for reader, path in tasks]),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        timeout=600 if not LONG else 3600,
        check=False,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    if len(found) < len(tasks):
        pytest.fail(
            f"{tasks[len(found)]} ended the process with {done.returncode}: "
            f"{done.stderr[-2000:]}"
        )
    return found


@pytest.mark.parametrize("reader", hostile_files.CASES)
def test_a_hostile_file_is_refused_and_named(reader, tmp_path):
    if reader == "sound":
        pytest.importorskip("soundfile")
    suffix, cases = hostile_files.CASES[reader]
    tasks = []
    for name, (content, _) in cases.items():
        folder = tmp_path / re.sub(r"\W", "_", name)
        folder.mkdir()
        path = folder / f"{reader}.{suffix}"
        path.write_bytes(content)
        tasks.append((reader, path))
    wrong = []
    for (name, (_, message)), (_, path), found in zip(
        cases.items(), tasks, outcomes(tasks), strict=True
    ):
        if message is None:
            right = found == ""
        else:
            right = (
                found.startswith("ValueError: ")
                and str(path) in found
                and re.search(message, found)
            )
        if not right:
            wrong.append((name, message, found[:300]))
    assert not wrong


def objects():
    found = np.empty(3, object)
    found[:] = [["dog", "cat"], np.array(["cow", "bell"]), ["wind"]]
    return found


def npy_of(value):
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


def honest_checkpoint(folder, write):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    content = {"a": test_checkpoints.whole("0", array), "b": {"c": 3}}
    write(folder / "x", content, [test_checkpoints.Storage("0", array)])
    return (folder / "x").read_bytes()


def honest_zip():
    members = {"zipped/table.csv": "file,label\na.wav,x\nb/c.wav,y\n"}
    members |= {"zipped/a.wav": "a" * 99, "zipped/b/c.wav": "b" * 99}
    return hostile_files.zip_of(members, zipfile.ZIP_DEFLATED)


def honest_sound(form):
    soundfile = pytest.importorskip("soundfile")
    file = io.BytesIO()
    samples = np.sin(np.arange(600) / 9)
    soundfile.write(file, samples, 8000, format=form)
    return file.getvalue()


def honest_save(folder):
    params = {"w": fgrad.quantize({"w": jnp.ones((2, 3))}, bits=4), "a/b": jnp.ones(2)}
    fgrad.save(folder / "y", params)
    return (folder / "y").read_bytes()


def honest_safetensors():
    return safetensors_numpy.save({"a": np.ones((2, 3), np.float16), "b": np.arange(3)})


def honest_package():
    names = ["usr/share/a.wav", "usr/share/b.ogg"]
    infos = [hostile_files.named(name, name.encode() * 99) for name in names]
    return hostile_files.tar(*infos)


# Reader, end of the name, and the files that are damaged.
HONEST = {
    "pickle 2": ("pickled", "pkl", lambda _: pickle.dumps({"x": np.arange(9)}, 2)),
    "pickle 4": (
        "pickled",
        "pkl",
        lambda _: pickle.dumps([objects(), np.float32(2), {"a": (1, 2.5)}, b"x"], 4),
    ),
    "pickle 5": ("pickled", "pkl", lambda _: pickle.dumps([np.ones((2, 3))], 5)),
    "pickle 0": ("pickled", "pkl", lambda _: pickle.dumps([np.arange(9), "a"], 0)),
    "objects": ("npy", "npy", lambda _: npy_of(objects())),
    "texts": ("npy", "npy", lambda _: npy_of(np.array([["dog", "cat"], ["a", "b"]]))),
    "zip": (
        "checkpoint",
        "pth",
        lambda folder: honest_checkpoint(folder, test_checkpoints.write_zip),
    ),
    "legacy": (
        "checkpoint",
        "pth",
        lambda folder: honest_checkpoint(folder, test_checkpoints.write_legacy),
    ),
    "safetensors": ("checkpoint", "safetensors", lambda _: honest_safetensors()),
    "saved": ("saved", "x", honest_save),
    "wav": ("sound", "wav", lambda _: honest_sound("wav")),
    "flac": ("sound", "flac", lambda _: honest_sound("flac")),
    "ogg": ("sound", "ogg", lambda _: honest_sound("ogg")),
    "tar": (
        "package",
        "deb",
        lambda _: hostile_files.package(honest_package(), "data.tar"),
    ),
    "xz": (
        "package",
        "deb",
        lambda _: hostile_files.package(
            hostile_files.lzma.compress(honest_package()), "data.tar.xz"
        ),
    ),
    "archive": ("zipped", "zip", lambda _: honest_zip()),
    "table": ("table", "csv", lambda _: b"file,label\na.wav,x\nb/c.wav,y\n"),
    "png": ("picture", "png", lambda _: hostile_files.picture("png")),
    "jpeg": ("picture", "png", lambda _: hostile_files.picture("jpeg")),
}


def damaged(content, rng):
    """One of six ways in which files are damaged, most often the structure's."""
    found = bytearray(content)
    kind, place = rng.integers(6), rng.integers(len(found))
    if kind == 0:  # some bytes
        for at in rng.integers(len(found), size=rng.integers(1, 4)):
            found[at] = rng.integers(256)
    elif kind == 1:  # a bit
        found[place] ^= 1 << rng.integers(8)
    elif kind == 2:  # an end that is missing
        del found[place:]
    elif kind == 3:  # a stretch that is missing, or there twice
        stretch = found[place : place + rng.integers(1, 20)]
        if rng.integers(2):
            found[place:place] = stretch
        else:
            del found[place : place + len(stretch)]
    elif kind == 4:  # a number that is large
        size = [1, 2, 4, 8][rng.integers(4)]
        high = rng.choice([0, 127, 128, 255])
        found[place : place + size] = bytes([255] * (size - 1) + [high])
    else:  # a stretch of elsewhere
        other = rng.integers(len(found))
        found[place : place + 8] = found[other : other + 8]
    return bytes(found)


@pytest.mark.parametrize("kind", HONEST)
def test_a_damaged_file_is_read_or_refused_and_named(kind, tmp_path):
    reader, suffix, make = HONEST[kind]
    (tmp_path / "made").mkdir()
    content = make(tmp_path / "made")
    rng = np.random.default_rng(0)
    tasks = []
    for trial in range(TRIALS):
        folder = tmp_path / f"{trial}"
        folder.mkdir()
        path = folder / f"{reader}.{suffix}"
        path.write_bytes(content if trial == 0 else damaged(content, rng))
        tasks.append((reader, path))
    found = outcomes(tasks)
    assert found[0] == ""
    for (_, path), outcome in zip(tasks, found, strict=True):
        assert not outcome or (
            outcome.startswith("ValueError: ") and str(path) in outcome
        ), path
    # Of a wav file most bytes are samples, which may be any.
    assert sum(map(bool, found)) > TRIALS // 10
