"""Joint pairs on models as they are: of Flax, NNX, Haiku, Equinox, and in a scan."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from lanes import some

import fgrad
from fgrad import activity
from fgrad.tracing import graph, primitives, unrolled

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (12, 5))
Y = jnp.arange(12) % 3
WIDTHS = (5, 6, 4, 3)
LAYERS = [
    (
        jax.random.normal(jax.random.key(10 + i), WIDTHS[i : i + 2]) / 2,
        jax.random.normal(jax.random.key(20 + i), WIDTHS[i + 1 : i + 2]),
    )
    for i in range(3)
]


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


# Each gives the losses, the parameters, the head's name, and what makes kernels and
# biases of a tree of the parameters' structure.


def plain():
    def losses(params, x, y):
        (a, b), (c, d), (e, f) = params
        return cross_entropy(nn.relu(nn.gelu(x @ a + b) @ c + d) @ e + f, y)

    return losses, LAYERS, "2", lambda tree: tree


def flax():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.gelu(nn.Dense(6, name="a")(x))
            return nn.Dense(3, name="c")(nn.relu(nn.Dense(4, name="b")(x)))

    def losses(params, x, y):
        return cross_entropy(Network().apply({"params": params}, x), y)

    named = zip("abc", LAYERS, strict=True)
    params = {name: {"kernel": w, "bias": b} for name, (w, b) in named}
    return losses, params, "c", of_dict("kernel", "bias")


def of_nnx():
    class Network(nnx.Module):
        def __init__(self):
            for i, name in enumerate("abc"):
                layer = nnx.Linear(*WIDTHS[i : i + 2], rngs=nnx.Rngs(0))
                layer.kernel[...], layer.bias[...] = LAYERS[i]
                setattr(self, name, layer)

        def __call__(self, x):
            return self.c(nn.relu(self.b(nn.gelu(self.a(x)))))

    definition, state = nnx.split(Network())

    def losses(params, x, y):
        return cross_entropy(nnx.merge(definition, params)(x), y)

    def layers_of(tree):
        return of_dict("kernel", "bias")(nnx.to_pure_dict(tree))

    return losses, state, "c", layers_of


def haiku():
    hk = pytest.importorskip("haiku")

    def network(x):
        x = nn.gelu(hk.Linear(6, name="a")(x))
        return hk.Linear(3, name="c")(nn.relu(hk.Linear(4, name="b")(x)))

    apply = hk.without_apply_rng(hk.transform(network)).apply
    named = zip("abc", LAYERS, strict=True)
    params = {name: {"w": w, "b": b} for name, (w, b) in named}

    def losses(params, x, y):
        return cross_entropy(apply(params, x), y)

    return losses, params, "c", of_dict("w", "b")


def equinox():
    eqx = pytest.importorskip("equinox")
    gelu, relu = map(eqx.nn.Lambda, (nn.gelu, nn.relu))

    modules = [
        eqx.tree_at(
            lambda m: (m.weight, m.bias),
            eqx.nn.Linear(*WIDTHS[i : i + 2], key=KEY),
            (kernel.T, bias),
        )
        for i, (kernel, bias) in enumerate(LAYERS)
    ]
    a, b, c = modules
    model = eqx.nn.Sequential([a, gelu, b, relu, c])
    params, static = eqx.partition(model, eqx.is_array)

    def losses(params, x, y):
        return cross_entropy(jax.vmap(eqx.combine(params, static))(x), y)

    def layers_of(tree):
        return [(layer.weight.T, layer.bias) for layer in tree.layers[::2]]

    return losses, params, "layers/4", layers_of


def of_dict(kernel, bias):
    return lambda tree: [(tree[name][kernel], tree[name][bias]) for name in "abc"]


def step_of(losses, params, head, **options):
    """The gradient of a step that perturbs, and its state."""
    told = activity.explain_joint(losses, params, head, x=X, y=Y)
    tx = activity.joint_forward_grad(KEY, head, activations=told, **options)
    update = jax.jit(functools.partial(tx.update, value_fn=losses))
    return update(params, tx.init(params), params, x=X, y=Y)


@functools.cache
def expected():
    losses, params, _, _ = plain()
    return jax.grad(lambda params: losses(params, X, Y).mean())(params)


@pytest.mark.slow
@pytest.mark.parametrize("make", [flax, of_nnx, haiku, equinox])
def test_the_layers_of_a_network_of_a_library_are_found(make):
    """Its last two have the exact gradient, and the first one is taught."""
    losses, params, head, layers_of = make()
    gradient, state = step_of(losses, params, head, transposed_head=True)
    for found, wanted in zip(layers_of(gradient)[1:], expected()[1:], strict=True):
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)
    assert [x.shape for x in state.jacobians.values() if np.any(x)] == [(3, 6)]


def blocks(quantized=False):
    """Residual blocks in a scan, and the same ones written out."""
    normal = jax.random.normal
    stacked = {
        "up": normal(jax.random.key(3), (3, 5, 4)) / 2,
        "bias": normal(jax.random.key(4), (3, 4)),
        "down": normal(jax.random.key(5), (3, 4, 5)) / 3,
    }
    rest = {
        "embedding": normal(jax.random.key(6), (5, 5)) / 2,
        "head": normal(jax.random.key(7), (5, 3)),
    }
    if quantized:
        stacked["up"] = fgrad.quantize(stacked["up"])
    rows = {
        f"block_{i}": jax.tree.map(lambda x, i=i: x[i], fgrad.dequantize(stacked))
        for i in range(3)
    }

    def block(h, p):
        return h + nn.silu(h @ p["up"] + p["bias"]) @ p["down"], None

    def in_scan(params, x, y):
        params = fgrad.dequantize(params)
        h, _ = lax.scan(block, x @ params["embedding"], params["blocks"])
        return cross_entropy(h @ params["head"], y)

    def written_out(params, x, y):
        h = x @ params["embedding"]
        for i in range(3):
            h, _ = block(h, params[f"block_{i}"])
        return cross_entropy(h @ params["head"], y)

    return (in_scan, {**rest, "blocks": stacked}), (written_out, {**rest, **rows})


@pytest.mark.slow
@pytest.mark.parametrize("on_the_way", some([False, True], [True]))
@pytest.mark.parametrize("quantized", some([False, True], [False]))
def test_layers_in_a_scan_have_the_gradients_of_those_written_out(
    quantized, on_the_way
):
    scanned, written_out = blocks(quantized)
    options = {"residual": True, "on_the_way": on_the_way}
    found, _ = step_of(scanned[0], scanned[1], "head", **options)
    is_qtensor = fgrad.fixed_point.is_qtensor
    found = jax.tree.map(
        lambda x: x.qvalue if is_qtensor(x) else x, found, is_leaf=is_qtensor
    )
    wanted, _ = step_of(written_out[0], written_out[1], "head", **options)
    for name in ("embedding", "head"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-3, atol=1e-4)
    for name, rows in found["blocks"].items():
        expected = np.stack([wanted[f"block_{i}"][name] for i in range(3)])
        assert np.any(expected)
        np.testing.assert_allclose(rows, expected, rtol=1e-3, atol=1e-4)


def test_layers_in_a_scan_are_taught_by_one_pair():
    """Each has an activation of its own, and more of them cost no more evaluations."""
    work, width = [], 64
    x = jnp.ones((12, width))
    for depth in (2, 5):
        params = {
            "blocks": jnp.stack([jnp.eye(width)] * depth),
            "head": jnp.ones((width, 3)),
        }

        def losses(params, x, y):
            h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["blocks"])
            return cross_entropy(h @ params["head"], y)

        told = activity.explain_joint(losses, params, "head", x=x, y=Y)
        names = [line.leaves for line in told]
        assert names == [*((f"blocks/{i}",) for i in range(depth)), ("head",)]
        tx = activity.joint_forward_grad(KEY, "head", activations=told)
        update = functools.partial(tx.update, value_fn=losses)
        state = tx.init(params)
        step = jax.make_jaxpr(update)(params, state, params, x=x, y=Y)
        once = jax.make_jaxpr(losses)(params, x, Y)
        work.append(
            primitives.multiply_adds(step.jaxpr.eqns)
            / primitives.multiply_adds(once.jaxpr.eqns)
        )
    assert 2.5 < work[0] < work[1] < 4.2, "3 evaluations, products of weights: 1"


def test_a_scan_over_time_stays():
    def over_time(w, x):  # [time, examples, features]
        return lax.scan(lambda h, x: (jnp.tanh(h + x @ w), None), jnp.zeros(5), x)[0]

    program = jax.make_jaxpr(over_time)(jnp.eye(5), X)
    assert unrolled.over_layers(program, 1) is program


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_written_out_is_the_same_function(reverse):
    def function(w, x):
        def body(h, rows):
            w, b = rows
            return jnp.tanh(h @ w + b), h.sum()

        return lax.scan(body, x, (w, jnp.arange(3.0)), reverse=reverse)

    w = jax.random.normal(KEY, (3, 5, 5))
    program = unrolled.over_layers(jax.make_jaxpr(function)(w, X), 1)
    assert all(node.name != "scan" for node in graph.of(program).nodes)
    found = jax.jit(jax.extend.core.jaxpr_as_fun(program))(w, X)
    for a, b in zip(found, jax.jit(function)(w, X), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.slow
def test_what_comes_beside_the_losses_is_in_the_state():
    losses, params, head, _ = plain()

    def with_aux(params, x, y):
        found = losses(params, x, y)
        return found, {"largest": found.max()}

    tx = activity.joint_forward_grad(
        KEY, head, has_aux=True, initial_aux={"largest": jnp.float32(0)}
    )
    state = tx.init(params)
    assert state.aux == {"largest": 0}
    update = jax.jit(functools.partial(tx.update, value_fn=with_aux))
    _, state = update(params, state, params, x=X, y=Y)
    np.testing.assert_allclose(state.aux["largest"], losses(params, X, Y).max(), 1e-6)
