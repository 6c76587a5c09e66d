import base64
import hashlib
import json
import os
import pathlib
import stat
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export
from safetensors import numpy as safetensors_numpy

import fgrad
from fgrad import layers


def trees():
    kernel = jax.random.normal(jax.random.key(0), (5, 3))
    floats = {
        "Dense_0": {"kernel": kernel, "bias": jnp.zeros(3)},
        "scale": jnp.float32(2.5),
        "half": kernel.astype(jnp.bfloat16),
        "none": jnp.zeros((0, 4)),
        "mask": kernel > 0,
    }
    quantized = {
        f"bits_{bits}": fgrad.quantize({"w": kernel}, bits=bits, channel_axis=-1)
        for bits in (16, 12, 8, 4)
    }
    quantized["per_tensor"] = fgrad.quantize({"w": kernel}, bits=16)
    return {"floats": floats, "quantized": quantized, "both": floats | quantized}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("name", trees())
def test_a_round_trip_keeps_every_bit(name, tmp_path):
    params = trees()[name]
    fgrad.save(tmp_path / "x", params)
    found = fgrad.load(tmp_path / "x")
    same(found, params)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_training_goes_on_after_loading_as_if_nothing_happened(tmp_path):
    def loss_fn(params, x):
        return jnp.mean((x @ fgrad.dequantize(params["w"]) - 1.0) ** 2)

    x = jax.random.normal(jax.random.key(1), (8, 5))
    params = trees()["quantized"]["bits_16"]
    tx = fgrad.qzo_ff(1e-2, jax.random.key(2))

    def step(params):
        state = tx.init(params)
        updates, _ = tx.update(params, state, params, value_fn=loss_fn, x=x)
        return optax.apply_updates(params, updates)

    fgrad.save(tmp_path / "x", params)
    same(step(fgrad.load(tmp_path / "x")), step(params))


def test_other_readers_see_the_tensors(tmp_path):
    params = trees()["both"]
    fgrad.save(tmp_path / "x", params)
    tensors = safetensors_numpy.load_file(tmp_path / "x")
    np.testing.assert_array_equal(
        tensors["Dense_0/kernel"], params["Dense_0"]["kernel"]
    )
    leaf = params["bits_8"]["w"]
    value = tensors["bits_8/w:qvalue"] * tensors["bits_8/w:scale"]
    np.testing.assert_array_equal(value, fgrad.dequantize(leaf))


def test_a_damaged_file_is_refused_or_equal(tmp_path):
    params = {"w": fgrad.quantize({"k": jnp.ones((4, 3))}, bits=8), "b": jnp.ones(3)}
    path = tmp_path / "x"
    fgrad.save(path, params)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(1000):
        damaged = bytearray(content)
        kind = trial % 4
        if kind == 0:  # some bytes
            for place in rng.integers(len(content), size=rng.integers(1, 4)):
                damaged[place] = rng.integers(256)
        elif kind == 1:  # one bit
            damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        elif kind == 2:  # an end that is missing
            damaged = damaged[: rng.integers(len(content))]
        else:  # two stretches exchanged
            a, b = sorted(rng.integers(len(content) - 16, size=2))
            damaged[a : a + 16], damaged[b : b + 16] = (
                damaged[b : b + 16],
                damaged[a : a + 16],
            )
        path.write_bytes(damaged)
        try:
            found = fgrad.load(path)
        except ValueError:
            refused += 1
        else:
            same(found, params)
    assert refused > 900


def header(content):
    size = int.from_bytes(content[:8], "little")
    return size, json.loads(content[8 : 8 + size])


def test_a_file_of_another_version_says_so(tmp_path):
    path = tmp_path / "x"
    fgrad.save(path, {"w": jnp.ones(2)})
    size, fields = header(path.read_bytes())
    fields["__metadata__"]["fgrad_version"] = "7"
    text = json.dumps(fields).encode()
    path.write_bytes(
        len(text).to_bytes(8, "little") + text + path.read_bytes()[8 + size :]
    )
    with pytest.raises(ValueError, match=r"version '7'.*this fgrad reads 1"):
        fgrad.load(path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "x"
    safetensors_numpy.save_file({"w": np.ones(2)}, path)
    with pytest.raises(ValueError, match=r"fgrad.save did not write"):
        fgrad.load(path)
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="no valid safetensors file"):
        fgrad.load(path)
    with pytest.raises(FileNotFoundError):
        fgrad.load(tmp_path / "missing")


def test_numbers_that_jax_would_shorten_are_refused(tmp_path):
    fgrad.save(tmp_path / "x", {"w": np.ones(2, np.float64)})
    with pytest.raises(ValueError, match=r"float64.*jax_enable_x64"):
        fgrad.load(tmp_path / "x")


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"a": [jnp.ones(2)]}, TypeError, "a is a list"),
        ({"a": {"b": "text"}}, TypeError, "a/b is a str"),
        (jnp.ones(2), TypeError, "must be a dictionary"),
        ({"a": {}}, ValueError, "a is an empty dictionary"),
        ({"a": {2.5: jnp.ones(2)}}, ValueError, "the key 2.5 in a must be"),
        ({True: jnp.ones(2)}, ValueError, "the key True"),
        ({("a", "b"): jnp.ones(2)}, ValueError, r"the key \('a', 'b'\)"),
        ({"\ud800": jnp.ones(2)}, ValueError, "no text of Unicode"),
        ({"a": jnp.zeros(2, jnp.int4)}, TypeError, "a has dtype int4.*int4 to int8"),
        ({"a": np.zeros(2, complex)}, TypeError, "a has dtype complex128"),
        ({"a": np.array([None])}, TypeError, "a has dtype object"),
    ],
)
def test_what_cannot_be_saved(params, error, message, tmp_path):
    with pytest.raises(error, match=message):
        fgrad.save(tmp_path / "x", params)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    fgrad.save(path, {"w": jnp.ones(2)})

    def fail(*args):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        fgrad.save(path, {"w": jnp.zeros(2)})
    assert fgrad.load(path)["w"][0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = layers.Conv(4, (3, 3), bits=(16, 8))(x)
        x = nn.relu(x).mean(axis=(1, 2))
        return layers.Dense(3, bits=(16, 8))(x)


@pytest.mark.slow
@pytest.mark.optimized
def test_an_exported_forward_has_equal_bits_in_a_fresh_process(tmp_path):
    model, x = Network(), jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    params = fgrad.quantize(model.init(jax.random.key(1), x)["params"], bits=16)
    variables = layers.calibrate(model, {"params": params}, x)
    fgrad.save(tmp_path / "model.safetensors", variables)
    variables = fgrad.load(tmp_path / "model.safetensors")

    forward = jax.jit(lambda x: model.apply(variables, x))
    (tmp_path / "forward").write_bytes(export.export(forward)(x).serialize())
    np.save(tmp_path / "x.npy", x)
    code = """
import pathlib, sys
import numpy as np
from jax import export
where = pathlib.Path(sys.argv[1])
forward = export.deserialize((where / "forward").read_bytes())
np.save(where / "y.npy", forward.call(np.load(where / "x.npy")))
assert not {"fgrad", "flax", "optax"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    found = np.load(tmp_path / "y.npy")
    assert found.tobytes() == np.asarray(forward(x)).tobytes()
    # The integers are integers in what is handed over.
    text = export.export(forward)(x).mlir_module()
    assert "i8" in text
    assert pathlib.Path(tmp_path / "forward").stat().st_size > 0


# What the first version wrote of {"dense": {"kernel": a QTensor, "bias": float32},
# "half": bfloat16}.
WRITTEN_BEFORE = """
qAEAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJmZ3JhZF92ZXJzaW9uIjoiMSIsImZncmFkX2JpdHMiOiJ7XCJkZW5z
ZS9rZXJuZWxcIjogNH0iLCJmZ3JhZF9zaGEyNTYiOiIwYmFhMmZmZDFhMTgxODkwZDc4NTc0MzgzZmE4NTA3OGI1
NWY3MjhkMzEzYTE3ZDZkMjdlODMwYmFhYzQ3MzE1In0sImRlbnNlL2JpYXMiOnsiZHR5cGUiOiJGMzIiLCJzaGFw
ZSI6WzJdLCJkYXRhX29mZnNldHMiOlswLDhdfSwiZGVuc2Uva2VybmVsOnNjYWxlIjp7ImR0eXBlIjoiRjMyIiwi
c2hhcGUiOlsxLDJdLCJkYXRhX29mZnNldHMiOls4LDE2XX0sImhhbGYiOnsiZHR5cGUiOiJCRjE2Iiwic2hhcGUi
OltdLCJkYXRhX29mZnNldHMiOlsxNiwxOF19LCJkZW5zZS9rZXJuZWw6cXZhbHVlIjp7ImR0eXBlIjoiSTgiLCJz
aGFwZSI6WzIsMl0sImRhdGFfb2Zmc2V0cyI6WzE4LDIyXX19AADAPwAAAMAAAAA/AACAPkBAAfkDAA==
"""
BEFORE = {
    "dense": {
        "kernel": fgrad.QTensor(
            np.int8([[1, -7], [3, 0]]), np.float32([[0.5, 0.25]]), 4
        ),
        "bias": np.float32([1.5, -2]),
    },
    "half": jnp.bfloat16(3),
}


def test_files_written_before_are_read_and_written_alike(tmp_path):
    written = base64.b64decode(WRITTEN_BEFORE)
    path = tmp_path / "x"
    path.write_bytes(written)
    same(fgrad.load(path), BEFORE)
    fgrad.save(path, BEFORE)
    # The first version wrote the entries of the metadata in any order.
    assert header(path.read_bytes()) == header(written)
    assert path.read_bytes()[432:] == written[432:]
    # Now equal parameters make equal files.
    again = path.read_bytes()
    for _ in range(5):
        fgrad.save(path, BEFORE)
        assert path.read_bytes() == again


UNUSUAL = {
    "haiku": {"mlp/~/linear_0": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}},
    "integers": {"layers": {0: {"kernel": jnp.ones(2)}, 1: {"kernel": jnp.zeros(2)}}},
    "colons": {"a:qvalue": jnp.ones(2), "a": BEFORE["dense"]["kernel"]},
    "metadata": {"__metadata__": jnp.ones(2)},
    "quantized metadata": {"__metadata__": BEFORE["dense"]["kernel"]},
    "empty": {"": {"": jnp.ones(1)}, "x": jnp.zeros(1)},
    "one name": {"a/b": jnp.ones(1), "a": {"b": jnp.zeros(1), "b'": jnp.ones(3)}},
    "a name and an integer": {
        "text": {"0": BEFORE["dense"]["kernel"]},
        "number": {0: jnp.ones(1)},
    },
    "a grid's part": {"a": BEFORE["dense"]["kernel"], "": {"a:scale": jnp.ones(3)}},
    "quotes": {'say "x"/\n\u00e9': {-1: jnp.ones(1)}},
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_keys_that_a_name_cannot_tell_come_back(name, tmp_path):
    fgrad.save(tmp_path / "x", UNUSUAL[name])
    found = fgrad.load(tmp_path / "x")
    same(found, UNUSUAL[name])
    # An fgrad that would take the keys apart refuses the file.
    assert header((tmp_path / "x").read_bytes())[1]["__metadata__"][
        "fgrad_version"
    ] == ("2")


def test_an_integer_and_its_text_are_two_keys(tmp_path):
    quantized = BEFORE["dense"]["kernel"]
    for params in (
        {"a": {0: jnp.ones(1), "0": jnp.zeros(1)}},
        {"a": {0: jnp.ones(1), "0": quantized}},
        {"a": {0: quantized, "0": jnp.zeros(1)}},
    ):
        fgrad.save(tmp_path / "x", params)
        found = fgrad.load(tmp_path / "x")["a"]
        for key in (0, "0"):  # JAX does not sort such keys
            same(found[key], params["a"][key])


def test_other_readers_see_haikus_names(tmp_path):
    fgrad.save(tmp_path / "x", UNUSUAL["haiku"])
    assert set(safetensors_numpy.load_file(tmp_path / "x")) == {
        "mlp/~/linear_0/w",
        "mlp/~/linear_0/b",
    }


def test_the_state_of_an_nnx_model_is_saved_as_the_message_says(tmp_path):
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    with pytest.raises(TypeError, match=r"nnx\.to_pure_dict"):
        fgrad.save(tmp_path / "x", state)
    params = nnx.to_pure_dict(state)
    assert 0 in params["layers"]
    fgrad.save(tmp_path / "x", params)
    same(fgrad.load(tmp_path / "x"), params)


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
)
def test_float8_comes_back(dtype, tmp_path):
    array = jnp.array([1.5, -0.25, 0.0], jnp.dtype(dtype))
    fgrad.save(tmp_path / "x", {"a": array})
    same(fgrad.load(tmp_path / "x"), {"a": array})


@pytest.mark.parametrize("dtype", [">f4", ">i2", ">u4", ">c8"])
def test_arrays_of_the_other_byte_order_come_back(dtype, tmp_path):
    array = np.array([1, 2, 300], dtype)
    fgrad.save(tmp_path / "x", {"a": array})
    found = fgrad.load(tmp_path / "x")["a"]
    assert found.tolist() == [1, 2, 300]
    assert found.dtype == np.dtype(dtype).newbyteorder("=")


@pytest.mark.parametrize(
    ("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0, 0o666)]
)
def test_a_new_file_has_the_mode_of_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        fgrad.save(tmp_path / "x", {"a": jnp.ones(1)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    path = tmp_path / "x"
    path.touch()
    path.chmod(0o640)
    fgrad.save(path, {"a": jnp.ones(1)})
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "target"
    for link, aim in (("one", target), ("two", tmp_path / "one")):
        (tmp_path / link).symlink_to(aim)
    for params in ({"a": jnp.ones(1)}, {"a": jnp.zeros(1)}):  # a new one, an old one
        fgrad.save(tmp_path / "two", params)
        same(fgrad.load(target), params)
        assert (tmp_path / "one").is_symlink()
        assert (tmp_path / "two").is_symlink()
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "folder",
            "one",
            "two",
        ]
        assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe is no regular file"):
        fgrad.save(tmp_path / "pipe", {"a": jnp.ones(1)})
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(IsADirectoryError):
        fgrad.save(tmp_path, {"a": jnp.ones(1)})
    with pytest.raises(IsADirectoryError):
        fgrad.load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_dictionary_that_holds_itself_is_refused(tmp_path):
    params = {"a": jnp.ones(1)}
    params["b"] = {"c": params}
    with pytest.raises(ValueError, match="does one hold itself"):
        fgrad.save(tmp_path / "x", params)


def forged(tensors, bits, names=None):
    """A file of `save`'s with anything in it, and the SHA-256 that belongs to it."""
    grids, text = json.dumps(bits), json.dumps(names) if names is not None else ""
    metadata = {"fgrad_version": "2", "fgrad_bits": grids}
    metadata |= {"fgrad_names": text} if text else {}
    digest = hashlib.sha256((grids + text).encode())
    for name, array in sorted(tensors.items()):
        digest.update(
            json.dumps([name, str(array.dtype), list(array.shape)]).encode()
            + array.tobytes()
        )
    metadata["fgrad_sha256"] = digest.hexdigest()
    return safetensors_numpy.save(tensors, metadata)


QVALUE, ONE = np.int8([[1, 2], [-3, 4]]), np.float32(1)
IMPOSSIBLE = {
    "int8 for 16 bits": (QVALUE, ONE, 16, "16 bits, which are kept in int16"),
    "int16 for 8 bits": (QVALUE.astype(np.int16), ONE, 8, "kept in int8"),
    "int32": (QVALUE.astype(np.int32), ONE, 16, "its qvalue is int32"),
    "unsigned": (np.uint8([1]), ONE, 8, "its qvalue is uint8"),
    "1 bit": (QVALUE, ONE, 1, "from 2 to 16, got 1"),
    "17 bits": (QVALUE.astype(np.int16), ONE, 17, "from 2 to 16, got 17"),
    "no bits": (QVALUE, ONE, 0, "bits of w are 0"),
    "negative bits": (QVALUE, ONE, -8, "from 2 to 16, got -8"),
    "bits true": (QVALUE, ONE, True, "from 2 to 16, got True"),
    "beyond the grid": (QVALUE, ONE, 3, r"\[-3, 3\] for 3 bits, and are from -3 to 4"),
    "the lowest int8": (np.int8([-128]), ONE, 8, "are from -128"),
    "no integers": (np.float32([0.5]), ONE, 8, "must hold integers, and holds 0.5"),
    "NaN": (np.float32([np.nan]), ONE, 8, "are from nan"),
    "negative scale": (QVALUE, -ONE, 8, "positive and finite, and has -1.0"),
    "zero scale": (QVALUE, 0 * ONE, 8, "positive and finite, and has 0.0"),
    "NaN scale": (QVALUE, np.float32([[1, np.nan]]), 8, "finite, and has nan"),
    "infinite scale": (QVALUE, np.float32(np.inf), 8, "finite, and has inf"),
    "integer scale": (QVALUE, np.int32(1), 8, "must be float32, and is int32"),
    "axes of the scale": (QVALUE, np.ones(2, np.float32), 8, r"has shape \(2,\)"),
    "length of the scale": (QVALUE, np.ones((1, 3), np.float32), 8, r"\(1, 3\)"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_qtensor_that_cannot_be_is_refused(name, tmp_path):
    qvalue, scale, bits, message = IMPOSSIBLE[name]
    tensors = {"w:qvalue": qvalue, "w:scale": np.asarray(scale)}
    (tmp_path / "x").write_bytes(forged(tensors, {"w": bits}))
    with pytest.raises(ValueError, match=f"cannot read .*x: .*{message}"):
        fgrad.load(tmp_path / "x")


@pytest.mark.parametrize(
    ("tensors", "bits", "names", "message"),
    [
        ({}, {"w": 8}, None, "lacks the tensor w:qvalue"),
        ({"w": ONE}, {"w": "8"}, None, "an entry of its header"),
        ({"w": ONE}, ["w"], None, "an entry of its header"),
        ({"w": ONE, "w/a": ONE}, {}, None, "w/a lies inside another leaf"),
        ({"w": ONE}, {}, {"v": ["v"]}, "names v, which it lacks"),
        ({"w": ONE}, {}, {"w": []}, "the keys of w are none"),
        ({"w": ONE}, {}, {"w": [1.5]}, "the keys of w are none"),
        ({"w": ONE, "v": ONE}, {}, {"v": ["w"]}, "two leaves have the keys of"),
        ({"/".join("a" * 5000): ONE}, {}, None, "the keys of a/a/a"),
    ],
)
def test_forged_headers_are_refused(tensors, bits, names, message, tmp_path):
    tensors = {name: np.asarray(array) for name, array in tensors.items()}
    (tmp_path / "x").write_bytes(forged(tensors, bits, names))
    with pytest.raises(ValueError, match=f"cannot read .*x: .*{message}"):
        fgrad.load(tmp_path / "x")
