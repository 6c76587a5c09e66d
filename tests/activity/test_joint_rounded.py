"""Joint pairs where activations are rounded: as in the network that rounds nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fgrad
from fgrad import activity, fixed_point
from fgrad.activity import joint_sites, joint_structure
from fgrad.fixed_point import products

KEY = jax.random.key(0)
EXAMPLES, WIDTH, CLASSES = 8, 6, 3
# Bits of weights, whether scales are found for each batch, and where the stream ends.
ROUNDED = [
    (16, False, "at the head"),
    (8, True, "at the head"),
    (8, True, "at a normalisation"),
    (16, False, "at a normalisation"),
    (16, False, "rounded between blocks"),
]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def problem(end, bits=None):
    """Two blocks: parameters, those that are kernels in fixed point, and data."""
    params = {
        "embedding": normal(1, 4, WIDTH) / 2,
        **{f"up_{i}": normal(2 + i, WIDTH, 7) / 2 for i in range(2)},
        **{f"bias_{i}": normal(4 + i, 7) / 4 for i in range(2)},
        **{f"down_{i}": normal(6 + i, 7, WIDTH) / 3 for i in range(2)},
        "head": normal(8, WIDTH, CLASSES),
    }
    if bits:
        params = fgrad.quantize(
            params, bits=bits, where=lambda name, _: not name.startswith("bias")
        )
    tokens = (3,) if end == "at a normalisation" else ()
    x = normal(0, EXAMPLES, *tokens, 4)
    return params, {"x": x, "y": jnp.arange(EXAMPLES) % CLASSES}


def in_floats(h, weight):
    return h @ fgrad.dequantize(weight)


def step_of(h, dynamic):
    largest = jax.lax.stop_gradient(jnp.abs(h).max()) if dynamic else 3.0
    return jnp.asarray(largest / 127, jnp.float32)


def in_integers(dynamic, h, weight):
    h = fixed_point.quantize_to_scale(h, step_of(h, dynamic), 8)
    return products.dot_general(h, weight, (((h.ndim - 1,), (0,)), ((), ())))


def simulated(dynamic, h, weight):
    return in_floats(fixed_point.fake_quantize(h, step_of(h, dynamic), 8), weight)


def losses_of(product, end, held=False):
    """``held``: what blocks add does not change with the stream."""
    hold = jax.lax.stop_gradient if held else (lambda h: h)

    def losses(params, x, y):
        h = product(x, params["embedding"])
        for i in range(2):
            inner = product(hold(h), params[f"up_{i}"]) + params[f"bias_{i}"]
            h = h + product(jax.nn.silu(inner), params[f"down_{i}"])
            if end == "rounded between blocks" and product is not in_floats:
                h = fixed_point.fake_quantize(h, jnp.float32(0.03), 8)
        if end == "at a normalisation":
            h = h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-3)
            h = h.mean(1)
        logits = product(h, params["head"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    return losses


def structure(losses, params, data, **options):
    """The head, and each activation's leaves, where its gradient comes from, gate."""
    head, sites = joint_structure.find_head(losses, params, data)
    found = []

    def collect(params, data):
        hidden, exact = activity.Site(*sites), joint_structure.as_head(head)
        traced = joint_structure._losses(losses, params, [hidden, exact], data)
        for site in joint_sites.joint_sites(traced, hidden, exact, **options):
            gate = site.nonlinearity and set(site.nonlinearity.path) - {"div"}
            found.append((set(site.layers), site.feedback, gate))

    jax.eval_shape(collect, params, data)
    return head, joint_structure.has_stream(losses, params, head, sites, data), found


@pytest.mark.parametrize(("bits", "dynamic", "end"), ROUNDED)
def test_the_structure_is_that_of_the_network_in_floats(bits, dynamic, end):
    """The head, layers with their biases, gates, the stream, what reads it last."""
    rounded = losses_of(functools.partial(in_integers, dynamic), end)
    for residual in (True, False):
        options = {"residual": residual, "transposed_head": not residual}
        found = structure(rounded, *problem(end, bits), **options)
        wanted = structure(losses_of(in_floats, end), *problem(end), **options)
        assert found == wanted
        assert wanted[:2] == (["head"], True)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "dynamic", "end"), ROUNDED[:3:2])
def test_the_stream_has_the_gradient_of_the_simulated_network(bits, dynamic, end):
    """Backpropagation straight through roundings, with blocks held.

    Values at the limit of the grid, as the largest of a batch is with a scale of its
    own, have a gradient. The gradients of integer layers are rounded to 8 bits.
    """
    params, data = problem(end, bits)
    losses = losses_of(functools.partial(in_integers, dynamic), end)
    tx = activity.joint_forward_grad(KEY, "head", residual=True, on_the_way=dynamic)
    update = jax.jit(functools.partial(tx.update, value_fn=losses))
    found, state = update(params, tx.init(params), params, **data)
    held = losses_of(functools.partial(simulated, dynamic), end, held=True)
    floats = fgrad.dequantize(params)
    mean, wanted = jax.jit(
        jax.value_and_grad(lambda params: held(params, **data).mean())
    )(floats)
    np.testing.assert_allclose(state.loss, mean, rtol=1e-4)
    for name, expected in wanted.items():
        got = found[name]
        got = got.qvalue if fixed_point.is_qtensor(params[name]) else got
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got / scale, expected / scale, atol=0.02)


@pytest.mark.slow
def test_pairs_on_the_way_are_the_same_in_integers():
    """What they teach; gradients but for 8 bits, to which each part rounds its own."""
    params, data = problem("at the head", 16)
    losses = losses_of(functools.partial(in_integers, False), "at the head")
    found = []
    for on_the_way in (False, True):
        tx = activity.joint_forward_grad(KEY, "head", every=1, on_the_way=on_the_way)
        update = jax.jit(functools.partial(tx.update, value_fn=losses))
        found.append(update(params, tx.init(params), params, **data))
    (gradient, state), (on_way, other) = found
    for name, taught in state.jacobians.items():
        assert np.any(taught) == (not name.startswith("up")), "a bias holds both"
        np.testing.assert_allclose(taught, other.jacobians[name], rtol=1e-3, atol=1e-4)
    for a, b in zip(*map(jax.tree.leaves, (gradient, on_way)), strict=True):
        scale = np.abs(a).max() or 1
        np.testing.assert_allclose(a / scale, b / scale, atol=0.02)
