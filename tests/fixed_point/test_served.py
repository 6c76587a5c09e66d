"""Tensors of AQT and Qwix as leaves: the networks that own them are the oracle."""

import dataclasses

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantized_networks
from aqt.jax.v2 import aqt_tensor
from flax import nnx
from lanes import every, every_row

import fgrad
from fgrad.fixed_point import QTensor, is_qtensor

X = quantized_networks.images()


def aqt_leaf(qvalue, **fields):
    """A tensor of AQT's with one scale."""
    parts = {
        "qvalue": jnp.asarray(qvalue),
        "scale": [jnp.array([[0.5, 0.25]])],
        "scale_t": None,
        "bias": [],
        "dequant_dtype": jnp.float32,
    }
    return aqt_tensor.QTensor(**{**parts, **fields})


@pytest.mark.parametrize(
    ("bits", "legacy"), every_row(4, [(8, False), (4, False), (4, True), (16, False)])
)
def test_an_aqt_network_serves_what_was_taken_over(bits, legacy):
    variables = {"params": quantized_networks.weights(X, span=30)}
    frozen, params, apply = quantized_networks.aqt_serving(
        bits, variables, X, legacy=legacy
    )
    leaves = jax.tree.leaves(params, is_leaf=is_qtensor)
    assert [leaf.bits for leaf in leaves] == [bits, bits]
    assert all(
        leaf.qvalue.dtype == (jnp.int16 if bits > 8 else jnp.int8) for leaf in leaves
    )

    served = quantized_networks.aqt_net(
        bits, quantized_networks.QuantMode.SERVE, legacy=legacy
    )
    expected = served.apply({**variables, "aqt": frozen}, X)
    np.testing.assert_array_equal(apply(params, X), expected)
    # The integers are read, not the float kernels that lie beside them.
    moved = jax.tree.map(
        lambda q: dataclasses.replace(q, qvalue=-q.qvalue), params, is_leaf=is_qtensor
    )
    assert np.any(np.asarray(apply(moved, X)) != expected)


def test_restored_tensors_are_what_was_adopted():
    tree = {
        "new": aqt_leaf(np.int8([[3, -7]])),
        "int4": aqt_leaf(jnp.array([[3, -7]], jnp.int4)),
        "old": {"value": jnp.int8([[3, -7]]), "scale": jnp.array([[[0.5, 0.25]]])},
        "frozen": flax.core.freeze({"bias": jnp.ones(2)}),
        "nothing": None,
        "ours": fgrad.quantize(jnp.ones(3)),
    }
    params, restore = fgrad.from_served(tree)
    assert [params[name].bits for name in ("new", "int4", "old", "ours")] == [
        8,
        4,
        8,
        16,
    ]
    back = restore(params)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for found, given in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert found.dtype == given.dtype
        np.testing.assert_array_equal(found, given)


def test_the_scale_of_an_activation_stays_a_float():
    tree = {"qlhs": aqt_leaf([0]).replace(qvalue=None)}
    params, restore = fgrad.from_served(tree)
    assert type(params["qlhs"]) is aqt_tensor.QTensor
    np.testing.assert_array_equal(params["qlhs"].scale[0], tree["qlhs"].scale[0])
    assert restore(params)["qlhs"].qvalue is None


REFUSED = {
    "bias": aqt_leaf(np.int8([[1, 2]]), bias=[jnp.ones(2)]),
    "sparsity": aqt_leaf(np.int8([[1, 2]]), sparsity_mask=jnp.ones((1, 2))),
    "two scales": aqt_leaf(np.int8([[1, 2]]), scale=[jnp.ones((1, 2))] * 2),
    "scales of tiles": aqt_leaf(np.int8([[1, 2, 3, 4]])),
    "fractions": aqt_leaf(np.float32([[1.5, 2]])),
    "integers beyond": aqt_leaf(np.float32([[40000, 2]])),
    "float8": aqt_leaf(jnp.ones((1, 2), jnp.float8_e4m3fn)),
    "cannot be told apart": {
        "value": jnp.int8([[3, -7]]),
        "scale": jnp.ones((2, 1, 1)),
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_grid_stands_for_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"leaf '.*kernel'|float8"):
        fgrad.from_served({"kernel": REFUSED[name]})


def test_bits_of_the_configuration():
    tree = {"w": aqt_leaf(np.int8([[15, -15]]))}
    params, _ = fgrad.from_served(tree, bits=5)
    assert params["w"].max_qvalue == 15
    with pytest.raises(ValueError, match="not integers of 4 bits"):
        fgrad.from_served(tree, bits=4)


def test_another_tree_cannot_be_restored():
    params, restore = fgrad.from_served({"w": aqt_leaf(np.int8([[1, 2]]))})
    with pytest.raises(ValueError, match="structure"):
        restore({"v": params["w"]})
    with pytest.raises(TypeError, match="QTensor leaves"):
        restore(fgrad.dequantize(params))


# ------------------------------------------------------------------------------- Qwix


def test_a_qwix_network_serves_what_was_taken_over():
    params = jax.tree.map(jnp.asarray, quantized_networks.weights(X))
    quantized, leaves, apply = quantized_networks.qwix_serving(params, X)
    train = quantized_networks.qwix_training()
    np.testing.assert_array_equal(apply(leaves, X), train(params, X))
    kernel = leaves["Dense_0"]["kernel"].array
    assert isinstance(kernel, QTensor)
    given = quantized["Dense_0"]["kernel"].array
    np.testing.assert_array_equal(kernel.qvalue, given.qvalue)


@pytest.mark.parametrize("qtype", every(3, ["int8", "int4", "int3"]))
def test_the_most_negative_integer_of_qwix_moves_to_the_grid(qtype):
    qwix = pytest.importorskip("qwix", reason="needs Qwix: pip install 'fgrad[qwix]'")
    bits = int(qtype[3:])
    # Qwix divides by half a step more than the largest integer: that is a scale of 1.
    w = jnp.array([[0.5 - 2.0 ** (bits - 1), 0.5], [0.25, 0.75]])
    array = qwix.quantize(w, qtype, channelwise_axes=(1,))
    leaves, restore = fgrad.from_served({"w": array})
    assert leaves["w"].bits == bits
    assert int(array.qvalue[0, 0]) == -(2 ** (bits - 1))  # half a step beyond w
    expected = np.maximum(np.asarray(array.qvalue, np.int32), 1 - 2 ** (bits - 1))
    np.testing.assert_array_equal(leaves["w"].qvalue, expected)
    # As near to the weight as before.
    before = np.abs(np.asarray(qwix.dequantize(array) - w))
    after = np.abs(np.asarray(qwix.dequantize(restore(leaves)["w"]) - w))
    np.testing.assert_allclose(after, before, rtol=1e-5)


@pytest.mark.slow
def test_what_qwix_keeps_elsewhere_is_refused():
    qwix = pytest.importorskip("qwix", reason="needs Qwix: pip install 'fgrad[qwix]'")
    w = jnp.linspace(-1, 2, 8).reshape(4, 2)
    shifted = qwix.quantize(w, jnp.int8, calibration_method="minmax")
    with pytest.raises(ValueError, match="zero point"):
        fgrad.from_served({"w": shifted})
    tiled = qwix.quantize(w, jnp.int8, tiled_axes={0: 2})
    with pytest.raises(ValueError, match="one for each tile"):
        fgrad.from_served({"w": tiled})
    with pytest.raises(ValueError, match="no grid of signed integers"):
        fgrad.from_served({"w": qwix.quantize(w, jnp.float8_e4m3fn)})


@pytest.mark.slow
def test_the_state_of_a_qwix_model_in_nnx():
    qwix, rules = quantized_networks.qwix_rules()
    x = jnp.ones((2, 3))
    model = qwix.quantize_model(
        nnx.Linear(3, 2, rngs=nnx.Rngs(0)), qwix.PtqProvider(rules), x
    )
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    params, restore = fgrad.from_served(state)
    leaves = jax.tree.leaves(params, is_leaf=is_qtensor)
    assert [is_qtensor(leaf) for leaf in leaves] == [False, True]
    again = nnx.merge(graph, restore(params), rest)
    np.testing.assert_array_equal(again(x), model(x))
