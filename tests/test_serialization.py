import json
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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
        ({"a/b": jnp.ones(2)}, ValueError, "'a/b' in params"),
        ({"a": {"b:scale": jnp.ones(2)}}, ValueError, "'b:scale' in a"),
        ({3: jnp.ones(2)}, ValueError, "the key 3"),
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
