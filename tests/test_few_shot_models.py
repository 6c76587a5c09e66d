"""The networks of few-shot learning, beside those of files of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lanes import some
from light_keys import light_key

import fgrad
from experiments.learners import adapt
from experiments.models import ast, crnn, lstm, resnet, resnet12
from fgrad import layers

# Name: (network of two or more blocks, shape of an example).
NETWORKS = {
    "ast": (
        ast.AST(3, patch=4, strides=(3, 3), width=8, depth=2, num_heads=2, mlp_width=8),
        (10, 7, 1),
    ),
    "crnn": (crnn.CRNN(3, width=6, depth=3, pool=(2, 2)), (32, 8, 1)),
    "crnn_lstm": (crnn.CRNN(3, width=6, depth=3, pool=(2, 2), cell="lstm"), (32, 8, 1)),
    "resnet12": (resnet12.ResNet12(3, widths=(4, 5, 6)), (8, 8, 2)),
    "resnet18": (
        resnet.ResNet(3, width=4, stage_sizes=(1, 1), small_images=True),
        (8, 8, 2),
    ),
}


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def drawn(network, shape):
    """Parameters in the range of initial ones, and biases that are not zero."""
    rng = np.random.default_rng(0)
    x = jnp.zeros((1, *shape))
    shapes = jax.eval_shape(network.init, jax.random.key(0), x)["params"]
    return jax.tree.map(
        lambda leaf: rng.normal(
            0, 1 / np.sqrt(max(1, np.prod(leaf.shape[:-1]))), leaf.shape
        ).astype(np.float32),
        shapes,
    )


@pytest.fixture(scope="module")
def parameters():
    return {name: drawn(*network) for name, network in NETWORKS.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_follow_each_other(name, parameters):
    network, shape = NETWORKS[name]
    params, x = parameters[name], draw(1, 4, *shape)
    assert sorted(params) == sorted(n for stage in network.stages for n in stage)
    expected = jax.jit(network.apply)({"params": params}, x)
    assert expected.shape == (4, 3)

    @jax.jit
    def in_turn(params, x):
        seen = []
        for index, names in enumerate(network.stages):
            # A stage needs its own parameters only.
            own = {"params": {n: params[n] for n in names}}
            x = network.apply(own, x, start=index, stop=index + 1)
            seen.append(x)
        return seen

    *_, features, logits = in_turn(params, x)
    assert features.ndim == 2
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_ways_to_adapt_take_them(name, parameters):
    network, shape = NETWORKS[name]
    for way in (
        adapt.linear_probe(network, num_layers=2),
        adapt.last_blocks(network),
        adapt.adapter(network),
    ):
        pretrained = {k: v for k, v in parameters[name].items() if k != "Dense_0"}
        begin = functools.partial(way.begin, images=np.zeros((1, *shape), np.float32))
        params = jax.eval_shape(begin, pretrained, jax.random.key(1))
        trained, frozen = way.split(params)
        assert set(trained) >= {"Dense_0"}
        assert way.cut(trained) > 0
        assert frozen


@pytest.mark.parametrize("name", some(["ast", "crnn_lstm"], ["crnn_lstm"]))
def test_integers_are_evaluated_and_seeds_may_run_at_once(name, parameters):
    network, shape = NETWORKS[name]
    network = network.clone(bits=(16, 8), depth=1)
    x, y = draw(2, 5, *shape), jnp.array([0, 1, 2, 0, 1])
    params = {n: parameters[name][n] for stage in network.stages for n in stage}
    params = fgrad.quantize(params, bits=16, headroom=1.5)

    @jax.jit
    def differences(params):
        variables = layers.calibrate(network, {"params": params}, x)

        def loss_fn(params):
            logits = network.apply({**variables, "params": params}, x)
            return -jax.nn.log_softmax(logits)[jnp.arange(5), y].mean()

        found = []
        for vectorize in (1, 2):
            tx = fgrad.fixed_point_forward_grad(
                light_key(0, 1), epsilon=0.1, num_perturbations=2, vectorize=vectorize
            )
            state = tx.update(params, tx.init(params), params, value_fn=loss_fn)[1]
            found.append(optax.tree.get(state, "loss_differences"))
        return found

    one, both = differences(params)
    assert np.all(one != 0)
    np.testing.assert_allclose(both, one, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("bits", [None, (16, 8)])
def test_recurrence_costs_what_inference_costs(bits):
    """What a longer sequence adds to the temporaries, in bytes."""
    model = lstm.LSTM(num_classes=3, features=32, bits=bits)
    x = jnp.ones((4, 8, 8))
    params = model.clone(bits=None).init(jax.random.key(0), x)["params"]
    scales = {}
    if bits:
        params = fgrad.quantize(params, bits=16)
        variables = jax.jit(functools.partial(layers.calibrate, model))(
            {"params": params}, x
        )
        scales = {layers.SCALES: variables[layers.SCALES]}

    def loss_fn(params, x):
        return jnp.mean(model.apply({"params": params, **scales}, x) ** 2)

    def gradient(pairs):
        tx = fgrad.fixed_point_forward_grad(
            light_key(0, 1), epsilon=0.1, num_perturbations=pairs, vectorize=pairs
        )
        return lambda params, x: tx.update(
            params, tx.init(params), params, value_fn=loss_fn, x=x
        )

    def growth(function):
        short, long = (
            fgrad.analysis.memory_report(function, params, jnp.ones((4, steps, 8)))
            for steps in (32, 128)
        )
        return long.memory.temporaries - short.memory.temporaries

    inference = growth(loss_fn)
    assert growth(gradient(2)) <= 4 * inference
    if not bits:
        assert growth(gradient(1)) <= 1.1 * inference
        assert growth(jax.grad(loss_fn)) > 8 * inference


def convolved(x, layer):
    """Stride 1 and the same size, as a sum over the kernel's places."""
    kernel, bias = np.asarray(layer["kernel"], float), np.asarray(layer["bias"], float)
    height, width = x.shape[1:3]
    margin = kernel.shape[0] // 2
    padded = np.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    return bias + sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j]
        for i, j in np.ndindex(kernel.shape[:2])
    )


def pooled(x):
    """The maxima of 2x2 cells; what is left over at the end is dropped."""
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))


def test_resnet12_is_numpys():
    network, _ = NETWORKS["resnet12"]
    x = draw(3, 2, 11, 9, 2)  # odd sides, too
    params = drawn(network, x.shape[1:])

    def leaky(x):
        return np.where(x > 0, x, 0.1 * x)

    y = x.astype(float)
    for index in range(3):
        block = params[f"Block_{index}"]
        z = leaky(convolved(y, block["Conv_0"]))
        z = convolved(leaky(convolved(z, block["Conv_1"])), block["Conv_2"])
        y = pooled(leaky(z + convolved(y, block["Conv_3"])))
    features = y.mean((1, 2))
    found = jax.jit(functools.partial(network.apply, stop=-1))({"params": params}, x)
    np.testing.assert_allclose(found, features, rtol=1e-4, atol=1e-4)
    head = params["Dense_0"]
    expected = features @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    found = jax.jit(network.apply)({"params": params}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["crnn", "crnn_lstm"])
def test_crnn_is_numpys(name):
    network, _ = NETWORKS[name]
    x = draw(4, 2, 32, 17, 1)  # two mel bins are left
    params = drawn(network, x.shape[1:])

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    y = x.astype(float)
    for index in range(3):
        y = pooled(np.maximum(convolved(y, params[f"Conv_{index}"]), 0))
    assert y.shape == (2, 4, 2, 6)
    y = y.mean(2)
    cell = jax.tree.map(np.asarray, params["recurrent"])
    h = c = np.zeros((2, 6))
    for step in y.swapaxes(0, 1):
        if name == "crnn":
            h = np.tanh(
                step @ cell["i"]["kernel"] + cell["i"]["bias"] + h @ cell["h"]["kernel"]
            )
            continue
        i, f, g, o = (
            step @ cell[f"i{gate}"]["kernel"]
            + h @ cell[f"h{gate}"]["kernel"]
            + cell[f"h{gate}"]["bias"]
            for gate in "ifgo"
        )
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    found = jax.jit(functools.partial(network.apply, stop=-1))({"params": params}, x)
    np.testing.assert_allclose(found, h + step, rtol=1e-4, atol=1e-4)


def test_inputs_that_pooling_would_empty_are_refused():
    with pytest.raises(ValueError, match=r"block 2 cannot halve 1x1 .* need 8 a side"):
        jax.eval_shape(
            NETWORKS["resnet12"][0].init, jax.random.key(0), jnp.ones((1, 7, 7, 1))
        )
    with pytest.raises(ValueError, match=r"1 of 3 leaves 2 frames of 1 mel bins"):
        jax.eval_shape(
            NETWORKS["crnn"][0].init, jax.random.key(0), jnp.ones((1, 4, 2, 1))
        )
    with pytest.raises(ValueError, match="one of elman, lstm, got 'gru'"):
        crnn.CRNN(cell="gru").init(jax.random.key(0), jnp.ones((1, 81, 81, 1)))
