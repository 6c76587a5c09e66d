import jax
import jax.numpy as jnp
import pytest

import fgrad
from experiments.models import lstm, vit
from fgrad.analysis import device_budget


def shapes(**sizes):
    return {
        name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()
    }


def mlp(params, x):
    x = jax.nn.relu(x @ params["first"])
    x = jax.nn.relu(x @ params["second"])
    return x @ params["head"]


MLP = shapes(first=(64, 128), second=(128, 32), head=(32, 10))
X = jax.ShapeDtypeStruct((2, 64), jnp.float32)


def test_inference_holds_an_input_and_an_output():
    budget = device_budget(mlp, MLP, X, method="inference")
    # Of the three products the first has the most: 64 values in, 128 out.
    assert budget.activations == 2 * 2 * (64 + 128)
    assert budget.layer == (2, 128)
    assert budget.weights == 2 * (64 * 128 + 128 * 32 + 32 * 10)
    assert budget.gradients == budget.state == 0


def test_a_residual_stays_until_it_is_added():
    def block(params, x):
        return x + jax.nn.gelu(x @ params["up"]) @ params["down"]

    params = shapes(up=(64, 256), down=(256, 64))
    budget = device_budget(block, params, X, method="inference")
    # Its input, the hidden values and the output, over which the sum is written.
    assert budget.activations == 2 * 2 * (64 + 256 + 64)


def test_a_step_forward_adds_a_gradient_and_a_step_backward_what_it_stores():
    forward = device_budget(mlp, MLP, X)
    inference = device_budget(mlp, MLP, X, method="inference")
    backward = device_budget(mlp, MLP, X, method="backward")
    size = 64 * 128 + 128 * 32 + 32 * 10
    assert forward.activations == inference.activations
    assert forward.gradients == backward.gradients == 2 * size
    # The inputs of the three products; a relu's derivative reads its output. Then the
    # gradients at the widest layer.
    assert backward.activations == 2 * 2 * ((64 + 128 + 32) + (64 + 128))
    assert backward.scratch == backward.activations + backward.gradients
    assert backward.total == backward.scratch + backward.weights


def test_below_what_trains_nothing_is_stored():
    budget = device_budget(
        mlp, MLP, X, method="backward", trains=lambda name: name == "head"
    )
    # The forward pass needs the most.
    inference = device_budget(mlp, MLP, X, method="inference")
    assert budget.activations == inference.activations
    assert budget.gradients == 2 * 320


def test_what_is_stored_stays_while_the_forward_pass_goes_on():
    def narrow(params, x):
        x = jax.nn.relu(x @ params["first"])  # 64 values, 128
        return x @ params["frozen"] @ params["wide"]  # 8, 512

    params = shapes(first=(64, 128), frozen=(128, 8), wide=(8, 512))
    settings = {"trains": lambda name: name == "first", "method": "backward"}
    budget = device_budget(narrow, params, X, **settings)
    # The input and the relu's result stay beside the last product.
    assert budget.activations == 2 * 2 * (64 + 128 + 8 + 512)


def test_a_product_of_activations_needs_both():
    def attend(params, x):
        return (x @ params["a"]) @ (x @ params["b"]).T

    params = shapes(a=(64, 16), b=(64, 16))
    budget = device_budget(attend, params, X, method="backward")
    assert budget.activations == 2 * (2 * (64 + 16 + 16) + 2 * (64 + 16))
    # With "b" frozen only its product is needed, and the input for the gradient of "a".
    one = device_budget(
        attend, params, X, method="backward", trains=lambda name: name == "a"
    )
    assert one.activations == 2 * (2 * (64 + 16) + 2 * (64 + 16))


def test_what_stop_gradient_hides_is_not_stored():
    def loss(params, x):
        weight = jax.lax.stop_gradient(jnp.exp(x @ params["gate"]))
        return (x @ params["w"]) * weight

    params = shapes(gate=(64, 64), w=(64, 64))
    budget = device_budget(loss, params, X, method="backward")
    # x for the gradient of w, and the weights, on which the exp's input was written.
    assert budget.activations == 2 * 2 * (64 + 64) + 2 * 2 * (64 + 64)


@pytest.mark.parametrize("length", [3, 12])
def test_a_loop_holds_one_iteration_and_stores_all(length):
    def run(params, x):
        def cell(h, x):
            h = jnp.tanh(x @ params["input"] + h @ params["hidden"])
            return h, None

        return jax.lax.scan(cell, jnp.zeros((2, 16)), x)[0]

    params = shapes(input=(8, 16), hidden=(16, 16))
    x = jax.ShapeDtypeStruct((length, 2, 8), jnp.float32)
    forward = device_budget(run, params, x)
    backward = device_budget(run, params, x, method="backward")
    # The sequence, the state that comes out, and of an iteration most at the second
    # product, after its input was used: the state and both products.
    inside = 16 + 16 + 16
    assert forward.activations == 2 * 2 * (8 * length + 16 + inside)
    # Of each iteration the input, the state, and tanh's result.
    stored = length * (8 + 16 + 16)
    assert backward.activations >= 2 * 2 * stored
    assert backward.activations <= 2 * 2 * (stored + 8 * length + 16)


def test_a_recurrent_network_is_followed():
    model, x = lstm.LSTM(), jnp.ones((2, 28, 28))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]

    def apply(params, x):
        return model.apply({"params": params}, x)

    forward = device_budget(apply, params, x)
    backward = device_budget(apply, params, x, method="backward")
    assert backward.activations > 5 * forward.activations


def test_bits_density_and_slots():
    full = device_budget(mlp, MLP, X)
    small = device_budget(mlp, MLP, X, bits=(16, 8))
    assert small.activations * 2 == full.activations
    assert small.gradients * 2 == full.gradients
    assert small.weights == full.weights
    sparse = device_budget(mlp, MLP, X, density=0.1, slots=1)
    kept = 820 + 410 + 32  # a tenth of each leaf, rounded up
    assert sparse.gradients == 2 * kept
    assert sparse.state == 2 * kept
    leafwise = device_budget(mlp, MLP, X, whole_gradient=False)
    assert leafwise.gradients == 2 * 64 * 128
    assert device_budget(mlp, MLP, X, bits=(4, 8), gradient_bits=16).weights == 6304


def test_integer_weights_count_with_their_own_bits():
    params = jax.tree.map(lambda x: jnp.ones(x.shape), MLP)
    params = {**params, "first": fgrad.quantize({"w": params["first"]}, bits=8)["w"]}
    budget = device_budget(mlp, params, X, bits=(16, 8))
    assert budget.weights == 64 * 128 + 2 * (128 * 32 + 320)


# ViT-tiny's scratch when all weights train, in MB: the paper, and what is assumed.
PAPER = {
    "backward": (31.64, {"method": "backward"}),
    "forward": (11.43, {"method": "forward"}),
    # A sparse gradient of all weights, a tenth of 5.5 M bytes, would be more.
    "leaf by leaf": (0.40, {"bits": (16, 8), "whole_gradient": False}),
}


@pytest.mark.parametrize("row", PAPER)
def test_the_papers_figures_for_vit_tiny(row):
    model, x = vit.ViT(num_classes=5), jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    said, settings = PAPER[row]

    def apply(params, x):
        return model.apply({"params": params}, x)

    found = device_budget(apply, params, x, **settings).scratch / 1e6
    assert found == pytest.approx(said, rel=0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "backprop"}, "method must be .*, got .backprop"),
        ({"bits": (0, 8)}, "each of bits must be an integer from 1 to 64, got 0"),
        ({"gradient_bits": 65}, "got 65"),
        ({"density": 0.0}, "density must be in"),
        ({"trains": lambda name: False}, r"no leaf trains.*first"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        device_budget(mlp, MLP, X, **settings)
