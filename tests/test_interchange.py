"""QTensor in the files of others: jax.export, and Flax's serialization."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from jax import export

import fgrad
from fgrad import fixed_point

W = np.arange(-3, 3, dtype=np.float32).reshape(2, 3)


def tree():
    return {
        "w": fgrad.quantize({"w": W}, bits=8, channel_axis=-1)["w"],
        "wide": {"w": fgrad.quantize({"w": W}, bits=16)["w"]},
        "b": jnp.zeros(3),
    }


def forward(params, x):
    h = jnp.asarray(x) @ jnp.asarray(params["w"]) + params["b"]
    return {"h": h, "params": params}


@pytest.mark.slow
def test_a_function_of_quantized_parameters_is_exported(tmp_path):
    params, x = tree(), jnp.ones((4, 2))
    content = export.export(jax.jit(forward))(params, x).serialize()
    (tmp_path / "forward").write_bytes(content)
    (tmp_path / "params").write_bytes(serialization.to_bytes(params))
    code = """
import pathlib, sys
import jax.numpy as jnp, numpy as np
from flax import serialization
from jax import export
import fgrad
where = pathlib.Path(sys.argv[1])
w = jnp.zeros((2, 3))
target = {
    "w": fgrad.quantize({"w": w}, bits=8, channel_axis=-1)["w"],
    "wide": fgrad.quantize({"w": w}, bits=16),
    "b": jnp.zeros(3),
}
params = serialization.from_bytes(target, (where / "params").read_bytes())
function = export.deserialize((where / "forward").read_bytes())
found = function.call(params, jnp.ones((4, 2)))
assert isinstance(found["params"]["w"], fgrad.QTensor)
assert found["params"]["wide"]["w"].bits == 16
np.save(where / "h.npy", found["h"])
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    scale, qvalue = np.asarray(params["w"].scale), np.asarray(params["w"].qvalue)
    expected = np.ones((4, 2), np.float32) @ (scale * qvalue.astype(np.float32))
    np.testing.assert_allclose(np.load(tmp_path / "h.npy"), expected, rtol=1e-6)


def test_other_bits_are_another_function():
    function = export.export(jax.jit(forward))(tree(), jnp.ones((4, 2)))
    function = export.deserialize(function.serialize())
    other = tree()
    other["w"] = fgrad.QTensor(other["w"].qvalue, other["w"].scale, 7)
    with pytest.raises(ValueError, match="structure"):
        function.call(other, jnp.ones((4, 2)))


def test_flax_writes_and_reads_every_bit():
    params = tree()
    found = serialization.from_bytes(
        jax.tree.map(jnp.zeros_like, params), serialization.to_bytes(params)
    )
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    state = serialization.to_state_dict(params)["w"]
    assert set(state) == {"qvalue", "scale", "bits"}


def test_flax_refuses_what_does_not_fit():
    params = tree()["wide"]
    state = serialization.to_state_dict(params)
    plain = {"w": jnp.zeros((2, 3))}
    with pytest.raises(ValueError, match="of a leaf that was not quantized"):
        serialization.from_state_dict(params, serialization.to_state_dict(plain))
    with pytest.raises(ValueError, match=r"16 bits and shape .* one of 8 bits"):
        serialization.from_state_dict(fgrad.quantize(plain, bits=8), state)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) cannot .* shape \(1, 3\)"):
        serialization.from_state_dict(fgrad.quantize({"w": W[:1]}), state)
    state["w"]["scale"] = -state["w"]["scale"]
    with pytest.raises(ValueError, match="must be positive"):
        serialization.from_state_dict(params, state)


def test_a_gradient_of_quantized_parameters_is_exported():
    params, x = {"w": tree()["w"]}, jnp.ones((4, 2))
    tx = fgrad.fixed_point_forward_grad(jax.random.key(0), epsilon=0.1)
    state = tx.init(params)

    def gradient(params, x):
        def loss_fn(p):
            return jnp.sum((x @ jnp.asarray(p["w"])) ** 2)

        return tx.update(params, state, params, value_fn=loss_fn)[0]

    content = export.export(jax.jit(gradient))(params, x).serialize()
    found = export.deserialize(content).call(params, x)["w"]
    assert isinstance(found, fixed_point.QGradient)
    assert found.bits == 8
    expected = jax.jit(gradient)(params, x)["w"].qvalue
    np.testing.assert_array_equal(found.qvalue, expected)
    assert np.asarray(expected).any()
