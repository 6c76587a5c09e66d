"""Quantized networks from TFLite files, against Python's integers and LiteRT."""

import functools
import importlib
import itertools
import math
import os
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import record_tflite
from lanes import some

import fgrad
from experiments.data import tflite
from experiments.models import int8_network

pytest.importorskip("flatbuffers", reason="writes TFLite files, as fgrad[export] can")
tflite_files = importlib.import_module("tflite_files")

RNG = np.random.default_rng(0)


def int8(*shape, low=-127):
    return RNG.integers(low, 128, shape).astype(np.int8)


def activation(shape, scale, zero_point):
    return {"shape": shape, "dtype": "int8", "scale": scale, "zero_point": zero_point}


def kernel(*shape, axis=0):
    """A kernel with a scale for each output."""
    scale = RNG.uniform(0.001, 0.01, shape[axis]).astype(np.float32)
    return {
        "shape": shape,
        "dtype": "int8",
        "data": int8(*shape),
        "scale": scale,
        "axis": axis,
    }


def bias(n):
    data = RNG.integers(-3000, 3000, n).astype(np.int32)
    return {"shape": (n,), "dtype": "int32", "data": data}


STRIDES = {"stride_w": 2, "stride_h": 1}
# A convolution, one for each channel with its edges padded and negative values cut off,
# and a dense layer with one scale.
TENSORS = [
    activation((1, 5, 4, 3), 0.05, -7),
    kernel(6, 3, 2, 3),
    bias(6),
    activation((1, 3, 2, 6), 0.08, 4),
    kernel(1, 2, 3, 6, axis=3),
    bias(6),
    activation((1, 3, 1, 6), 0.03, -128),
    {"shape": (2, 18), "dtype": "int8", "data": int8(2, 18), "scale": 0.004},
    bias(2),
    activation((1, 2), 0.11, 9),
]
OPERATIONS = [
    ("CONV_2D", [0, 1, 2], [3], {"padding": 1, **STRIDES}),
    ("DEPTHWISE_CONV_2D", [3, 4, 5], [6], {**STRIDES, "activation": 1}),
    ("FULLY_CONNECTED", [6, 7, 8], [9], {}),
]
FILE = tflite_files.write(TENSORS, OPERATIONS, [0], [9])


def network(content=FILE):
    return int8_network.of_graphs(tflite.parse(content))


# ---------------------------------------------------------------- in Python's integers


def half_away(x):
    """A fraction to the nearest integer; a half goes away from zero."""
    return int(math.copysign(math.floor(abs(x) + Fraction(1, 2)), x))


def times(total, factor):
    """A sum times a factor, as TFLite rounds: the factor first, then twice."""
    mantissa, shift = math.frexp(factor)
    multiplier = math.floor(mantissa * 2**31 + 0.5)
    doubled = Fraction(total * 2 ** max(shift, 0) * multiplier, 2**31)
    # Nearest, a half towards larger numbers; then nearest, a half away from zero.
    high = math.floor(doubled + Fraction(1, 2))
    return half_away(Fraction(high, 2 ** max(-shift, 0)))


def in_pythons_integers(x):
    """What the network of `FILE` computes for one image, tensor by tensor."""
    computed, image = [], x.astype(int).tolist()
    for operation, inputs, (out,), options in OPERATIONS:
        given, weights, offsets = (TENSORS[i] for i in inputs)
        zero, target = given["zero_point"], TENSORS[out]
        shape, data = target["shape"], weights["data"].astype(int)
        scale = np.broadcast_to(np.float32(weights["scale"]), offsets["shape"])

        def result(channel, total, given=given, target=target, scale=scale):
            steps = np.float64(np.float32(given["scale"])) * np.float64(scale[channel])
            if scale.strides == (0,):  # one scale: the product is rounded to float32
                steps = np.float64(np.float32(given["scale"]) * scale[channel])
            factor = float(steps / np.float64(np.float32(target["scale"])))
            return times(total, factor) + target["zero_point"]

        least = target["zero_point"] if options.get("activation") else -128
        y = np.zeros(shape, int)
        for place in itertools.product(*map(range, shape)):
            total = int(offsets["data"][place[-1]])
            for w, value in terms(operation, data, image, zero, place):
                total += w * (value - zero)
            y[place] = min(max(result(place[-1], total), least), 127)
        computed.append(y)
        image = y.tolist()
    return computed


def terms(operation, data, image, zero, place):
    """The weights that an output sums over, each with its input."""
    if operation == "FULLY_CONNECTED":
        return zip(data[place[1]].tolist(), np.ravel(image).tolist(), strict=True)
    _, row, column, channel = place
    grid = np.array(image)
    if operation == "DEPTHWISE_CONV_2D":  # SAME: one row below, one column at each side
        grid = np.pad(grid, [(0, 0), (0, 1), (0, 1), (0, 0)], constant_values=zero)
        window = grid[0, row : row + 2, 2 * column : 2 * column + 3, channel]
        return zip(data[0, ..., channel].ravel(), window.ravel(), strict=True)
    window = grid[0, row : row + 3, 2 * column : 2 * column + 2]
    return zip(data[channel].ravel(), window.ravel(), strict=True)


def test_every_layer_computes_the_integers_of_tflites_arithmetic():
    net = network()
    call = jax.jit(net.__call__)
    for _ in range(3):
        x = int8(1, 5, 4, 3, low=-128)
        found, state = call(net.params, net.initial_state(), x)
        assert state == {}
        for y, expected in zip(found, in_pythons_integers(x), strict=True):
            assert y.dtype == jnp.int8
            np.testing.assert_array_equal(y, expected)


@pytest.mark.slow
def test_a_batch_is_what_its_examples_are():
    net = network()
    x = int8(3, 5, 4, 3)
    together, _ = net(net.params, {}, x)
    for i in range(3):
        alone, _ = net(net.params, {}, x[i : i + 1])
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a[0], b[i])


def test_factors_that_fill_their_bits_and_that_are_tiny():
    grid = functools.partial(tflite.Tensor, "", (1,), np.dtype(np.int8), None)

    def factors(real):
        def one(scale):
            return grid(np.float32([scale]), np.int64([0]), 0)

        return int8_network._factors(one(1.0), one(real), one(1.0), "CONV_2D")

    multiplier, shift = factors(np.nextafter(np.float32(1), np.float32(0)))
    assert abs(multiplier[0]) < 2**31
    assert shift[0] == 0
    assert factors(1.0) == (2**30, 1)
    assert factors(2.0**-40) == (0, 0)
    assert factors(3.0)[1] == 2


# ----------------------------------------------------------------------- real networks


@pytest.mark.parametrize("name", some(record_tflite.NETWORKS, ["alexa"]))
def test_a_keyword_network_computes_what_litert_computes(name):
    path = record_tflite.path(name)
    if path is None:
        pytest.skip("needs the networks of fgrad[keywords]")
    expected = np.load(record_tflite.REFERENCES)[name]
    net = int8_network.load(path)
    call, state = jax.jit(net.__call__), net.initial_state()
    assert state  # it is a streaming network
    for x, recorded in zip(record_tflite.inputs(), expected, strict=True):
        computed, state = call(net.params, state, x)
        found = np.concatenate([np.ravel(y) for y in computed[:-1]])
        np.testing.assert_array_equal(found, recorded)


@pytest.mark.slow
def test_litert_still_says_what_was_recorded():
    pytest.importorskip("ai_edge_litert", reason="needs LiteRT's interpreter")
    if record_tflite.path("alexa") is None:
        pytest.skip("needs the networks of fgrad[keywords]")
    numbers = int8_network.load(record_tflite.path("alexa")).numbers[:-1]
    expected = np.load(record_tflite.REFERENCES)["alexa"]
    np.testing.assert_array_equal(record_tflite.computed("alexa", numbers), expected)


# ---------------------------------------------------------------------------- training


@pytest.mark.slow
def test_forward_gradients_train_the_integers():
    net = network()
    x, labels = int8(16, 5, 4, 3), np.arange(16) % 2

    def loss_fn(params, x, labels):
        computed, _ = net(params, {}, x)
        logits = computed[-1].astype(jnp.float32) / 8
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    tx = fgrad.qzo_ff(1.0, jax.random.key(0), num_perturbations=8)
    state, params = tx.init(net.params), net.params
    update = jax.jit(functools.partial(tx.update, value_fn=loss_fn))
    for _ in range(150):
        updates, state = update(params, state, params, x=x, labels=labels)
        params = optax.apply_updates(params, updates)
    assert loss_fn(params, x, labels) < 0.6 * loss_fn(net.params, x, labels)
    assert all(leaf.qvalue.dtype == jnp.int8 for leaf in params.values())


# ------------------------------------------------------------------------ bad networks


def changed(number, **fields):
    tensors = [dict(tensor) for tensor in TENSORS]
    tensors[number].update(fields)
    return tflite_files.write(tensors, OPERATIONS, [0], [9])


REFUSED = {
    "int8 is read here": changed(7, dtype="uint8"),
    "no zero point": changed(7, zero_point=3),
    "beyond a symmetric grid": changed(7, data=np.full((2, 18), -128, np.int8)),
    "bytes in the place of": changed(7, shape=(3, 18)),
    "the bias of": changed(8, data=np.zeros(2, np.float32), dtype="float32"),
    "not positive and finite": changed(7, scale=np.nan),
    "scales and": changed(1, scale=np.ones(5, np.float32)),
    "one scale each": changed(3, scale=np.ones(3, np.float32), axis=1),
    "there are 10 tensors": tflite_files.write(TENSORS, OPERATIONS, [0], [77]),
    "the activation 2": tflite_files.write(
        TENSORS, [("FULLY_CONNECTED", [6, 7, 8], [9], {"activation": 2})], [6], [9]
    ),
    "does not have the mark": b"PK\3\4" + FILE[4:4] + b"nothing",
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_followed_is_refused(message):
    with pytest.raises(ValueError, match=message):
        network(REFUSED[message])


def test_an_unknown_operation_is_named(monkeypatch):
    monkeypatch.setitem(tflite_files.CODES, "QUANTIZE", (99, 0))
    operations = [("QUANTIZE", [0], [3], {})]
    with pytest.raises(ValueError, match="operation 99 of TFLite's schema"):
        network(tflite_files.write(TENSORS, operations, [0], [3]))


def test_a_damaged_file_raises_a_value_error_or_reads_as_another():
    rng = np.random.default_rng(1)
    rounds = 3000 if os.environ.get("FGRAD_FUZZ") else 300
    outcomes = set()
    for i in range(rounds):
        content = bytearray(FILE)
        if i % 3:
            for at in rng.integers(0, len(FILE), 1 + i % 4):
                content[at] = rng.integers(256)
        else:
            content = content[: rng.integers(len(FILE))]
        try:
            network(bytes(content))
        except ValueError:
            outcomes.add("refused")
        else:
            outcomes.add("read")
    assert outcomes == {"refused", "read"}
