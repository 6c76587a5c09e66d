"""New weights beside a model: the model with changed kernels is the oracle."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import fast_jit
from flax import nnx
from jaxprs import all_equations
from lanes import some

import fgrad
from fgrad import layers
from fgrad.fixed_point import is_qtensor

KEY = jax.random.key(0)
IMAGES = jax.random.normal(KEY, (2, 4, 4, 2))
VECTORS = jax.random.normal(KEY, (5, 3))


class Net(nn.Module):
    """A convolution, attention and a dense layer, of Flax or of `fgrad.layers`."""

    conv: type[nn.Module] = nn.Conv
    attention: type[nn.Module] = nn.MultiHeadDotProductAttention
    dense: type[nn.Module] = nn.Dense

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.conv(4, (3, 3), 2)(x)).reshape(len(x), -1, 4)
        return self.dense(3)(x + self.attention(2)(x))


def mean_square(apply):
    return lambda params, x: jnp.mean(apply(params, x) ** 2)


def linen():
    params = fast_jit(Net().init)(KEY, IMAGES)["params"]
    return mean_square(lambda p, x: Net().apply({"params": p}, x)), params, IMAGES


def fixed_point_layers():
    bits = {"bits": (16, 8), "activation_scale": "dynamic"}
    conv, attention, dense = (
        functools.partial(layer, **bits)
        for layer in (layers.Conv, layers.MultiHeadDotProductAttention, layers.Dense)
    )
    net = Net(conv, attention, dense)
    params = fgrad.quantize(fast_jit(net.init)(KEY, IMAGES)["params"], headroom=4.0)
    return mean_square(lambda p, x: net.apply({"params": p}, x)), params, IMAGES


def quantized(channel_axis):
    def make():
        loss, params, x = linen()
        return loss, fgrad.quantize(params, channel_axis=channel_axis, headroom=4.0), x

    return make


def flax_nnx():
    graph, state = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    return mean_square(lambda p, x: nnx.merge(graph, p)(x)), state, VECTORS


def equinox():
    eqx = pytest.importorskip("equinox", reason="needs Equinox")
    model = eqx.nn.MLP(3, 2, 4, 1, key=KEY)
    return mean_square(lambda p, x: jax.vmap(p)(x)), model, VECTORS


def transposed_and_scanned():
    """A tied kernel, a loop, and a kernel that is changed before its product."""
    shapes = {"tied": (3, 4), "loop": (4, 4), "squared": (4, 2)}
    params = {
        name: jax.random.normal(jax.random.key(i), shape)
        for i, (name, shape) in enumerate(shapes.items())
    }

    def apply(p, x):
        h = x @ p["tied"]
        h = jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["loop"]), None), h, length=2)[0]
        y = h @ (p["squared"] ** 2)
        return jnp.concatenate([y, h @ p["tied"].T], axis=1)

    # A kernel is adapted that some product reads, wherever else it is used.
    def with_products(p, x):
        return jnp.concatenate(
            [apply(p, x), x @ p["tied"] @ p["loop"] @ p["squared"]], 1
        )

    return mean_square(with_products), params, VECTORS


MODELS = {
    "linen": linen,
    "linen on a grid": quantized(None),
    "linen on a grid for each channel": quantized(-1),
    "layers of integers": fixed_point_layers,
    "nnx": flax_nnx,
    "equinox": equinox,
    "other uses": transposed_and_scanned,
}


def moved(adapters):
    """Adapters that do something."""
    leaves, treedef = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return treedef.unflatten(
        [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


@pytest.mark.parametrize("name", some(MODELS, ["nnx"]))
def test_lora_computes_what_the_merged_model_computes(name):
    loss, params, x = MODELS[name]()
    adapted = fgrad.lora(loss, params, KEY, rank=2, x=x)
    value_fn = fast_jit(lambda a, x: adapted.value_fn(a, base=params, x=x))
    base = fast_jit(loss)(params, x) if name != "equinox" else loss(params, x)
    np.testing.assert_allclose(value_fn(adapted.adapters, x), base, rtol=1e-5)

    adapters = moved(adapted.adapters)
    changed = value_fn(adapters, x)
    assert abs(changed - base) > 2e-3 * abs(base)
    # Activations of 8 bits fall into other steps when a sum is rounded otherwise, and
    # a change that stays beside an integer kernel is not rounded to its grid.
    rtol = 0.02 if name == "layers of integers" else 1e-4
    on_grid = adapted.merge(params, adapters)
    np.testing.assert_allclose(changed, loss(on_grid, x), rtol=rtol)
    kinds = jax.tree.map(
        lambda a, b: type(a) is type(b), params, on_grid, is_leaf=is_qtensor
    )
    assert all(jax.tree.leaves(kinds))


def test_axes_of_the_adapters_are_those_that_products_sum_over():
    loss, params, x = linen()
    adapters = fgrad.lora(
        loss, params, KEY, rank=2, where="query|Conv|out", x=x
    ).adapters
    attention = "MultiHeadDotProductAttention_0/"
    assert jax.tree.map(jnp.shape, adapters) == {
        "Conv_0/kernel": {"down": (2, 3, 3, 2, 1), "up": (2, 1, 1, 1, 4)},
        f"{attention}query/kernel": {"down": (2, 4, 1, 1), "up": (2, 1, 2, 2)},
        f"{attention}out/kernel": {"down": (2, 2, 2, 1), "up": (2, 1, 1, 4)},
    }
    # In Equinox the outputs come first.
    weight = {"weight": jnp.ones((5, 3))}
    found = fgrad.lora(
        lambda p, x: jnp.sum(p["weight"] @ x), weight, KEY, x=jnp.ones(3)
    )
    assert found.adapters["weight"]["down"].shape == (4, 1, 3)


def test_no_changed_kernel_is_made():
    params = fgrad.quantize({"w": jax.random.normal(KEY, (64, 48))})
    loss = mean_square(lambda p, x: x @ p["w"])
    x = jnp.ones((2, 64))
    adapted = fgrad.lora(loss, params, KEY, rank=2, x=x)

    def program(adapters, params, key, x):
        return fgrad.dual_forward(
            adapted.value_fn, adapters, key, 0.1, base=params, x=x
        )

    jaxpr = jax.make_jaxpr(program)(adapted.adapters, params, KEY, x).jaxpr
    as_large = [
        equation.primitive.name
        for equation in all_equations(jaxpr)
        for out in equation.outvars
        if out.aval.shape[-2:] == (64, 48)
    ]
    # The base is dequantized, and nothing is added to it.
    assert set(as_large) == {"convert_element_type", "mul"}


@pytest.mark.slow
def test_gradients_of_the_adapters_are_those_of_the_changed_kernel():
    loss, params, x = linen()
    adapted = fgrad.lora(loss, params, KEY, rank=2, where="Dense", x=x)
    adapters = moved(adapted.adapters)
    (name,) = adapters
    found = jax.grad(adapted.value_fn)(adapters, base=params, x=x)[name]
    kernel = jax.grad(loss)(adapted.merge(params, adapters), x)["Dense_0"]["kernel"]
    down, up = adapters[name]["down"], adapters[name]["up"]
    np.testing.assert_allclose(
        found["down"], (kernel * up).sum(2, keepdims=True), rtol=1e-4
    )
    np.testing.assert_allclose(
        found["up"], (kernel * down).sum(1, keepdims=True), rtol=1e-4
    )


def test_an_adapter_has_a_nonlinearity_inside():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)).astype(np.float32)}
    loss = mean_square(lambda p, x: x @ p["kernel"])
    adapted = fgrad.adapter(loss, params, KEY, width=4, x=VECTORS)
    adapters = moved(adapted.adapters)
    down, up = adapters["kernel"]["down"][..., 0], adapters["kernel"]["up"][:, 0]
    y = VECTORS @ params["kernel"] + np.maximum(VECTORS @ down.T, 0) @ up
    found = adapted.value_fn(adapters, base=params, x=VECTORS)
    np.testing.assert_allclose(found, np.mean(y**2), rtol=1e-5)
    with pytest.raises(ValueError, match="nonlinearity"):
        adapted.merge(params, adapters)


def test_adapters_are_saved_and_loaded_alone(tmp_path):
    params, x = {"inner": {"w": jnp.ones((3, 2))}}, VECTORS
    loss = mean_square(lambda p, x: x @ p["inner"]["w"])
    adapted = fgrad.lora(loss, params, KEY, x=x)
    adapters = moved(adapted.adapters)
    path = tmp_path / "adapters.safetensors"
    fgrad.save(path, adapters)
    loaded = fgrad.load(path)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    assert adapted.value_fn(loaded, base=params, x=x) == adapted.value_fn(
        adapters, base=params, x=x
    )


@pytest.mark.slow
def test_adapters_on_a_grid_train_and_merge():
    x, y = VECTORS, VECTORS @ jnp.array([[1.0], [-2.0], [0.5]])
    params = fgrad.quantize({"kernel": jnp.zeros((3, 1))}, zero_bound=4.0)

    def loss(params, x, y):
        return jnp.mean((x @ params["kernel"] - y) ** 2)

    adapted = fgrad.lora(loss, params, KEY, rank=2, x=x, y=y)
    adapters = fgrad.quantize(adapted.adapters, zero_bound=4.0, headroom=4.0)
    tx = fgrad.qzo_ff(3e-2, KEY, epsilon=1e-2, num_perturbations=4)
    state = tx.init(adapters)
    update = jax.jit(functools.partial(tx.update, value_fn=adapted.value_fn))
    for _ in range(200):
        updates, state = update(adapters, state, adapters, base=params, x=x, y=y)
        adapters = optax.apply_updates(adapters, updates)
    after = loss(adapted.merge(params, adapters), x, y)
    assert after < 0.05 * loss(params, x, y)
    np.testing.assert_allclose(
        after, adapted.value_fn(adapters, base=params, x=x, y=y), atol=1e-3
    )


def test_a_merge_that_leaves_the_grid_raises():
    params = fgrad.quantize({"w": jnp.ones((2, 2))}, headroom=1.0)
    adapted = fgrad.lora(lambda p: jnp.sum(jnp.ones(2) @ p["w"]), params, KEY)
    adapters = jax.tree.map(jnp.ones_like, adapted.adapters)
    with pytest.raises(ValueError, match="5 times as far as its grid"):
        adapted.merge(params, adapters)


def test_what_cannot_be_adapted_is_named():
    params = {"table": jnp.ones((5, 3)), "w": jnp.ones((3, 2)), "b": jnp.ones(2)}

    def loss(p, x):
        return jnp.sum(jnp.asarray(p["table"])[x] @ p["w"] + p["b"])

    x = jnp.array([1, 4])
    assert list(fgrad.lora(loss, params, KEY, x=x).adapters) == ["w"]
    for where in ("table", "nothing"):
        with pytest.raises(ValueError, match="multiplies no activation"):
            fgrad.lora(loss, params, KEY, where=where, x=x)
    with pytest.raises(ValueError, match="at least 1"):
        fgrad.lora(loss, params, KEY, rank=0, x=x)
    adapted = fgrad.lora(loss, params, KEY, x=x)
    for wrong in ({"v": adapted.adapters["w"]}, {"table": adapted.adapters["w"]}):
        with pytest.raises(ValueError, match="another model"):
            adapted.value_fn(wrong, base=params, x=x)
    squared = fgrad.adapter(
        lambda p, x: jnp.sum(p["w"] ** 2) + loss(p, x), params, KEY, x=x
    )
    with pytest.raises(ValueError, match="nothing can be added"):
        squared.value_fn(squared.adapters, base=params, x=x)


# ------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("channel_axis", some([None, 0], [0]))
def test_prompts_are_rows_of_the_table(channel_axis):
    params = {"embed": {"embedding": jax.random.normal(KEY, (6, 3))}, "w": jnp.ones(3)}
    quantized = fgrad.quantize(params, bits=8, channel_axis=channel_axis)

    def loss(p, tokens):
        return jnp.sum(jnp.asarray(p["embed"]["embedding"])[tokens] @ p["w"])

    tokens = jnp.array([5, 4, 0, 1])
    for tree in (params, quantized):
        adapted = fgrad.prompts(loss, tree, table="embed/embedding", tokens=[4, 5])
        rows = adapted.adapters
        assert adapted.value_fn(rows, base=tree, tokens=tokens) == loss(tree, tokens)
        table = np.array(fgrad.dequantize(tree)["embed"]["embedding"])
        changed = jax.tree.map(lambda x: x, rows)
        leaf = changed["embed/embedding"]
        new = (
            leaf[::-1]
            if not is_qtensor(leaf)
            else fgrad.QTensor(-leaf.qvalue, leaf.scale)
        )
        table[[4, 5]] = np.asarray(new)
        changed["embed/embedding"] = new
        merged = adapted.merge(tree, changed)
        np.testing.assert_array_equal(merged["embed"]["embedding"], table)
        plus, minus = fgrad.dual_forward(
            adapted.value_fn, rows, KEY, 0.5, base=tree, tokens=tokens
        )
        assert plus != minus


def test_prompts_need_rows_that_are_there():
    params = {"table": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="no leaf 'embedding'"):
        fgrad.prompts(jnp.sum, params, table="embedding", tokens=[0])
    for tokens in ([4], [-1], [], [[0]]):
        with pytest.raises(ValueError, match="must be rows"):
            fgrad.prompts(jnp.sum, params, table="table", tokens=tokens)
