import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lanes import some

import fgrad
from fgrad import activity, estimators, layers
from fgrad.activity import Site


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def conv(x, w, **settings):
    return jax.lax.conv_general_dilated(
        x, w, padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings
    )


def watched(x, seen):
    """The identity, which keeps what it is given each time it runs."""
    return jax.pure_callback(
        lambda v: seen.append(np.asarray(v)) or v,
        jax.typeof(x),
        x,
        vmap_method="sequential",
    )


def sites_step(losses, params, sites, seed=0, count=0, **settings):
    """The gradient of one step; its state."""
    kwargs = settings.pop("kwargs")
    tx = activity.activity_forward_grad(jax.random.key(seed), sites, **settings)

    @jax.jit
    def step(params, count):
        state = tx.init(params)._replace(count=count)
        return tx.update(params, state, params, value_fn=losses, **kwargs)

    return step(params, jnp.int32(count))


# ------------------------------------------------ the layers of models as they are

IMAGES, TOKENS = (3, 5, 6, 4), (3, 5, 8)

# name: (module, shape of the data, names of the sites)
MODELS = {
    "dense": (nn.Dense(4), (3, 6), ["inner"]),
    "no bias": (nn.Dense(4, use_bias=False), (3, 6), ["inner"]),
    "several axes": (nn.DenseGeneral((2, 3)), TOKENS, ["inner"]),
    "convolution": (nn.Conv(3, (3, 3)), IMAGES, ["inner"]),
    "strided": (nn.Conv(3, (3, 2), strides=(2, 1)), IMAGES, ["inner"]),
    "dilated": (nn.Conv(3, (2, 2), kernel_dilation=2), IMAGES, ["inner"]),
    "grouped": (nn.Conv(4, (3, 3), feature_group_count=2), IMAGES, ["inner"]),
    "depthwise": (nn.Conv(4, (3, 3), feature_group_count=4), IMAGES, ["inner"]),
    "transposed": (nn.ConvTranspose(3, (2, 2), strides=(2, 2)), IMAGES, ["inner"]),
    "our depthwise": (
        layers.Conv(8, (3, 3), feature_group_count=4, strides=2),
        IMAGES,
        ["inner"],
    ),
    "attention": (
        nn.MultiHeadDotProductAttention(num_heads=2),
        TOKENS,
        ["inner/query", "inner/key", "inner/value", "inner/out"],
    ),
    "our attention": (
        layers.MultiHeadDotProductAttention(num_heads=2),
        TOKENS,
        ["inner/query", "inner/key", "inner/value", "inner/out"],
    ),
    "norm": (nn.LayerNorm(), TOKENS, ["inner"]),
    "remat": (nn.remat(nn.Dense)(4), (3, 6), ["inner"]),
}


class Net(nn.Module):
    """A layer between others, so that its input and its output are activations."""

    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(x.shape[-1], name="before")(x))
        x = jnp.sin(self.inner(x))
        return nn.Dense(2, name="head")(x.reshape(x.shape[0], -1))


def problem(name):
    module, shape, sites = MODELS[name]
    net, x, y = Net(module), normal(0, *shape), normal(1, shape[0], 2)
    params = net.init(jax.random.key(2), x)["params"]
    params = jax.tree.map(
        lambda w: w + 0.1 * jax.random.normal(jax.random.key(3), w.shape), params
    )

    def losses(params, x, y):
        return jnp.sum((net.apply({"params": params}, x) - y) ** 2, axis=-1) ** 2

    return losses, params, sites, {"x": x, "y": y}


def true_gradient(losses, params, kwargs):
    return jax.grad(lambda p: jnp.mean(losses(p, **kwargs)))(params)


def leaves_with_paths(tree):
    return [
        (fgrad.fixed_point.path_str(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


@pytest.mark.parametrize("name", some(MODELS, ["no bias", "norm"]))
def test_an_exact_site_has_the_gradient_of_its_layer(name, float64):
    losses, params, sites, kwargs = problem(name)
    sites = [Site(site, exact=True, epsilon=1e-4) for site in sites]
    found, state = sites_step(losses, params, sites, kwargs=kwargs, vectorize=16)
    expected = true_gradient(losses, params, kwargs)
    trained = dict(leaves_with_paths(activity.leaves_of(sites)(params)))
    for (path, a), (_, b) in zip(
        leaves_with_paths(found), leaves_with_paths(expected), strict=True
    ):
        b = b if trained[path] else jnp.zeros_like(b)
        # Central differences err by epsilon squared.
        np.testing.assert_allclose(
            a, b, atol=1e-6 * float(jnp.abs(expected["head"]["bias"]).max())
        )
    assert any(trained.values())
    assert not all(trained.values())
    np.testing.assert_allclose(state.loss, losses(params, **kwargs).mean(), rtol=1e-5)


@pytest.mark.optimized
@pytest.mark.parametrize(
    "name", some(["dense", "convolution", "depthwise", "attention"], ["dense"])
)
def test_random_directions_are_unbiased(name, float64):
    losses, params, sites, kwargs = problem(name)
    expected = true_gradient(losses, params, kwargs)
    tx = activity.activity_forward_grad(
        jax.random.key(0),
        [Site(*sites, epsilon=1e-4)],  # all at the same time
        num_perturbations=16,
        vectorize=16,
    )

    @jax.jit
    def gradients(counts):
        def gradient(count):
            state = tx.init(params)._replace(count=count)
            return tx.update(params, state, params, value_fn=losses, **kwargs)[0]

        return jax.lax.map(gradient, counts)

    steps = 200
    found = gradients(jnp.arange(steps))
    inside = activity.leaves_of(sites)(params)
    scores, all_found, all_expected = [], [], []
    for g, b, trained in zip(
        *map(jax.tree.leaves, (found, expected, inside)), strict=True
    ):
        if trained:
            error = g.std(0, ddof=1) / np.sqrt(steps)
            scores.append(np.ravel((g.mean(0) - b) / jnp.maximum(error, 1e-12)))
            all_found.append(np.ravel(g.mean(0)))
            all_expected.append(np.ravel(b))
    scores = np.concatenate(scores)
    # Standard normal if the mean is the gradient; entries share their u.
    assert np.abs(scores).max() < 5
    assert 0.5 < np.mean(scores**2) < 1.7
    a, b = np.concatenate(all_found), np.concatenate(all_expected)
    assert a @ b / np.sqrt((a @ a) * (b @ b)) > 0.95, "the error is small beside it"


def test_an_embedding(float64):
    params = {"table": normal(0, 7, 4), "head": normal(1, 4)}
    ids, y = jnp.array([[1, 2, 2], [6, 1, 0]]), normal(2, 2)

    def losses(params, ids, y):
        return (jnp.tanh(params["table"][ids]).sum(1) @ params["head"] - y) ** 2

    kwargs = {"ids": ids, "y": y}
    sites = [Site("table", exact=True, epsilon=1e-4)]
    found, _ = sites_step(losses, params, sites, kwargs=kwargs)
    expected = true_gradient(losses, params, kwargs)["table"]
    np.testing.assert_allclose(found["table"], expected, atol=1e-6)


def test_a_residual_belongs_to_the_layer(float64):
    # An adapter of zeros has no output of its own to take a scale from.
    params = {"adapter": jnp.zeros((4, 4)), "head": normal(1, 4)}
    x = normal(2, 5, 4)

    def losses(params, x):
        x = x + x @ params["adapter"]
        return jnp.sin(x * (1 + jnp.tanh(x))) @ params["head"]

    (line,) = activity.explain(losses, params, ["adapter"], x=x)
    assert line.primitives == ("dot_general", "add")
    sites = [Site("adapter", exact=True, epsilon=1e-4)]
    found, _ = sites_step(losses, params, sites, kwargs={"x": x})
    expected = true_gradient(losses, params, {"x": x})["adapter"]
    np.testing.assert_allclose(found["adapter"], expected, atol=1e-6)


def test_the_perturbation_has_the_size_of_the_residual_stream():
    params, x = {"adapter": jnp.zeros((4, 4)), "head": normal(1, 4)}, normal(2, 5, 4)
    seen = []

    def losses(params, x):
        x = watched(x + x @ params["adapter"], seen)
        return jnp.sin(x) @ params["head"]

    sites_step(losses, params, ["adapter"], kwargs={"x": x}, num_perturbations=2)
    changes = [np.abs(v - x) for v in seen if not np.array_equal(v, x)]
    assert len(changes) == 4
    rms = np.sqrt(np.mean(np.square(x)))
    np.testing.assert_allclose(changes, np.full((4, 5, 4), 0.03 * rms), rtol=1e-4)


# ------------------------------------------------------------------- fixed point


class IntegerNet(nn.Module):
    bits: object = None

    @nn.compact
    def __call__(self, x):
        x = nn.relu(layers.Conv(6, (3, 3), bits=self.bits, name="conv")(x))
        x = layers.Conv(
            6, (3, 3), feature_group_count=6, bits=self.bits, name="depthwise"
        )(x)
        x = nn.relu(x).reshape(x.shape[0], -1)
        return layers.Dense(3, bits=self.bits, name="head")(x)


@pytest.mark.parametrize("bits", some([(16, 8), (8, 8)], [(8, 8)]))
@pytest.mark.slow
def test_integer_layers_follow_the_float_ones(bits):
    x, y = normal(0, 16, 4, 4, 3), jnp.arange(16) % 3
    params = IntegerNet().init(jax.random.key(1), x)["params"]
    params = fgrad.quantize(params, bits=bits[0])
    variables = layers.calibrate(IntegerNet(bits), {"params": params}, x)
    scales = {layers.SCALES: variables[layers.SCALES]}

    def losses(bits, params, x, y, scales):
        logits = IntegerNet(bits).apply({"params": params, **scales}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    kwargs = {"x": x, "y": y, "scales": scales}
    sites = [Site("conv"), Site("depthwise"), Site("head", exact=True)]
    settings = {"kwargs": kwargs, "num_perturbations": 256, "vectorize": 64}
    found, state = sites_step(
        functools.partial(losses, bits), params, sites, **settings
    )
    floats = fgrad.dequantize(params)
    expected = true_gradient(
        functools.partial(losses, None), floats, kwargs | {"scales": {}}
    )
    for name, least in ("conv", 0.8), ("depthwise", 0.8), ("head", 0.999):
        a = found[name]["kernel"].qvalue.ravel()
        b = expected[name]["kernel"].ravel()
        # In units of the weight's value, and int8 products of int8 gradients.
        assert a @ b / jnp.sqrt((a @ a) * (b @ b)) > least, name
        assert 0.7 < float(jnp.sqrt((a @ a) / (b @ b))) < 1.6, name
        assert found[name]["kernel"].qvalue.dtype == jnp.float32
        assert not found[name]["kernel"].scale.any()
    assert state.nonfinite_pairs == 0
    # No product of floats anywhere: what is int8 stays int8.
    tx = activity.activity_forward_grad(jax.random.key(0), ["conv"])
    text = str(
        jax.make_jaxpr(
            lambda p, s: tx.update(
                p, s, p, value_fn=functools.partial(losses, bits), **kwargs
            )[0]
        )(params, tx.init(params))
    )
    products = [line for line in text.splitlines() if "dot_general[" in line]
    assert products
    assert not any("f32" in line and "integer" not in line for line in products)


def test_a_qtensor_has_the_gradient_of_the_floats_that_it_stands_for():
    x, y = normal(0, 8, 5), normal(1, 8)
    params = fgrad.quantize({"a": normal(2, 5, 4), "b": normal(3, 4)}, bits=16)

    def losses(params, x, y):
        return (jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2

    settings = {"kwargs": {"x": x, "y": y}}
    sites = [Site("a"), Site("b", exact=True)]
    found, _ = sites_step(losses, params, sites, **settings)
    expected, _ = sites_step(losses, fgrad.dequantize(params), sites, **settings)
    for name in params:
        np.testing.assert_allclose(found[name].qvalue, expected[name], rtol=1e-4)


@pytest.mark.slow
def test_a_chain_lands_on_the_grid_and_learns():
    x = normal(0, 64, 4)
    y = jnp.tanh(x @ normal(1, 4, 3)) @ normal(2, 3)

    def losses(params, x, y):
        hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        return (hidden @ params["head"] - y) ** 2

    params = {
        "hidden": {"kernel": normal(3, 4, 8) / 2, "bias": jnp.zeros(8)},
        "head": normal(4, 8) / 3,
    }
    params = fgrad.quantize(params, bits=16, headroom=3.0)
    tx = optax.chain(
        activity.activity_forward_grad(
            jax.random.key(0), ["hidden", Site("head", exact=True)]
        ),
        fgrad.on_values(optax.adam(2e-2)),
        fgrad.quantized_update(),
    )

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params, value_fn=losses, x=x, y=y)
        return optax.apply_updates(params, updates), state

    before = losses(params, x, y).mean()
    state = tx.init(params)
    for _ in range(150):
        params, state = step(params, state)
    assert losses(params, x, y).mean() < 0.1 * before
    assert params["hidden"]["kernel"].qvalue.dtype == jnp.int16


# ------------------------------------------------------------------ composition


def two_layers(params, x):
    return jnp.sum(jnp.tanh(x @ params["a"]) @ params["b"], axis=-1) ** 2


TWO = {"a": normal(0, 4, 3), "b": normal(1, 3, 2)}
X = {"x": normal(2, 6, 4)}


@pytest.mark.slow
def test_vectorize_is_a_trade_of_memory_for_speed_only():
    one, _state = sites_step(two_layers, TWO, ["a", "b"], kwargs=X)
    for vectorize in 3, 16:
        other, _ = sites_step(
            two_layers, TWO, ["a", "b"], kwargs=X, vectorize=vectorize
        )
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5),
            one,
            other,
        )


def test_u_depends_on_key_step_and_layer_only():
    alone, _ = sites_step(two_layers, TWO, ["a"], kwargs=X)
    beside, _ = sites_step(two_layers, TWO, ["b", "a"], kwargs=X)
    np.testing.assert_array_equal(alone["a"], beside["a"])
    for other in {"seed": 1}, {"count": 1}:
        changed, _ = sites_step(two_layers, TWO, ["a"], kwargs=X, **other)
        assert not np.allclose(alone["a"], changed["a"], rtol=1e-2)


def test_other_leaves_get_zeros_or_what_others_say():
    found, _ = sites_step(two_layers, TWO, ["b"], kwargs=X)
    assert found["b"].any()
    assert not found["a"].any()
    others = fgrad.fixed_point_forward_grad(
        jax.random.key(5), epsilon=1e-3, mask=activity.leaves_outside(["b"])
    )
    mixed, state = sites_step(two_layers, TWO, ["b"], kwargs=X, others=others)
    np.testing.assert_array_equal(mixed["b"], found["b"])
    alone, _ = others.update(
        TWO,
        others.init(TWO),
        TWO,
        value_fn=lambda params, x: two_layers(params, x).mean(),
        **X,
    )
    np.testing.assert_allclose(mixed["a"], alone["a"], rtol=1e-5)
    assert not alone["b"].any()
    assert state.others.count == 1


def test_signs_of_examples():
    # With the unit matrix as data, the gradient is that of the output.
    params, x = {"a": normal(0, 6, 3), "b": TWO["b"]}, jnp.eye(6)
    found, _ = sites_step(
        two_layers,
        params,
        ["a"],
        kwargs={"x": x},
        estimator=estimators.sign_m_spsa,
        num_perturbations=1,
    )
    scale = jnp.sqrt(jnp.mean(params["a"] ** 2))
    np.testing.assert_allclose(jnp.abs(found["a"]), 1 / (6 * scale), rtol=1e-5)


@pytest.mark.slow
def test_local_losses(float64):
    x, y = normal(0, 5, 4), normal(1, 5)
    params = {
        "a": normal(2, 4, 3),
        "b": normal(3, 3, 3),
        "probe": normal(4, 3),
        "head": normal(5, 3),
    }

    def losses(params, x, y):
        first = jnp.tanh(x @ params["a"])
        second = jnp.tanh(first @ params["b"])
        return {
            "block": (first @ params["probe"] - y) ** 2,
            "end": (second @ params["head"] - y) ** 2,
        }

    sites = [
        Site("a", exact=True, epsilon=1e-4, loss="block"),
        Site("b", exact=True, epsilon=1e-4, loss="end"),
    ]
    kwargs = {"x": x, "y": y}
    found, state = sites_step(losses, params, sites, kwargs=kwargs)
    block, end = (
        jax.grad(lambda p, name=name: losses(p, x, y)[name].mean())(params)
        for name in ("block", "end")
    )
    np.testing.assert_allclose(found["a"], block["a"], atol=1e-6)
    np.testing.assert_allclose(found["b"], end["b"], atol=1e-6)
    total = sum(v.mean() for v in losses(params, x, y).values())
    np.testing.assert_allclose(state.loss, total, rtol=1e-5)


def test_an_example_whose_loss_is_not_finite_is_left_out():
    def losses(params, x):
        y = two_layers(params, x)
        return jnp.where(jnp.arange(6) == 2, jnp.inf, y)

    found, state = sites_step(losses, TWO, ["a"], kwargs=X, num_perturbations=4)
    assert state.nonfinite_pairs == 4
    assert jnp.isfinite(state.loss)
    without, _ = sites_step(
        lambda params, x: jnp.where(jnp.arange(6) == 2, 0.0, two_layers(params, x)),
        TWO, ["a"], kwargs=X, num_perturbations=4,
    )  # fmt: skip
    np.testing.assert_allclose(found["a"], without["a"], rtol=1e-5)


# ------------------------------------------------------------------------ its cost


def deep(params, x, counted=lambda x: x):
    for name in sorted(params):
        x = counted(jnp.tanh(x @ params[name]))
    return x.sum(-1)


DEEP = {f"layer_{i}": normal(i, 16, 16) / 4 for i in range(8)}


def test_only_what_comes_after_the_site_is_evaluated_again():
    (line,) = activity.explain(deep, DEEP, ["layer_5"], x=normal(9, 4, 16))
    assert line == activity.PerturbedActivation(
        ("layer_5",), ("dot_general",), (4, 16), 4 * 16 * 4, 2 / 8
    )
    calls = []
    losses = functools.partial(deep, counted=lambda x: watched(x, calls))
    kwargs = {"x": normal(9, 4, 16)}
    sites_step(losses, DEEP, ["layer_5"], kwargs=kwargs, num_perturbations=3)
    # Layers 0 to 4 once; 5 to 7 for each of 6 perturbations.
    assert 5 + 3 * 6 <= len(calls) <= 8 + 3 * 6


@pytest.mark.optimized
def test_memory_is_that_of_inference_and_one_activation():
    params = {f"layer_{i:02}": normal(i, 64, 64) / 8 for i in range(12)}
    x = normal(0, 4096, 64)
    size = x.size * 4
    tx = activity.activity_forward_grad(jax.random.key(0), ["layer_06"])

    def temporaries(function, *arguments):
        return (
            jax.jit(function)
            .lower(*arguments)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    forward = temporaries(
        lambda p, s, x: tx.update(p, s, p, value_fn=deep, x=x)[0],
        params,
        tx.init(params),
        x,
    )
    backward = temporaries(jax.grad(lambda p, x: deep(p, x).mean()), params, x)
    inference = temporaries(deep, params, x)
    # The layer's input and output, the output's gradient, and one direction.
    assert forward <= inference + 5 * size
    assert forward < 0.6 * backward


# ---------------------------------------------------------------------------- errors


def tied(params, x):
    return jnp.sum(jnp.tanh(jnp.tanh(x @ params["w"]) @ params["w"]), axis=-1)


def scanned(params, x):
    x, _ = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, params["w"])
    return x.sum(-1)


# What update says: losses, sites, params, and a part of the error.
SQUARE, CUBE = {"w": normal(0, 4, 4)}, {"w": normal(0, 3, 4, 4)}
UPDATE_ERRORS = {
    "scalar": (
        lambda p, x: two_layers(p, x).mean(),
        ["a"],
        TWO,
        r"a loss for each example.*returns \[\(\)\]. Leave out the mean",
    ),
    "closure": (
        lambda p, x: jnp.tanh(X["x"] @ p["a"]).sum(-1) + x[:, 0] * 0,
        ["a"],
        TWO,
        "'a'.*the data is no argument of value_fn.*weight perturbation",
    ),
    "not linear": (
        lambda p, x: two_layers({**p, "a": jnp.tanh(p["a"])}, x),
        ["a"],
        TWO,
        "'a' has no output to perturb: 'tanh' uses it",
    ),
    "unused": (lambda p, x: x.sum(-1), ["a"], TWO, "the loss does not use it"),
    "loop": (scanned, ["w"], CUBE, "'scan' uses it"),
    "tied": (tied, ["w"], SQUARE, "it is used several times"),
    "too wide": (
        lambda p, x: jnp.tanh(x @ p["w"]).sum(-1),
        [Site("w", exact=True)],
        {"w": jnp.ones((4, 5000))},
        "exact, but its output has 5000 values",
    ),
    "which loss": (
        lambda p, x: dict.fromkeys(("one", "two"), two_layers(p, x)),
        ["a"],
        TWO,
        "does not say which is its own",
    ),
    "no such loss": (
        two_layers,
        [Site("a", loss="three")],
        TWO,
        "'three', but value_fn returns",
    ),
}


@pytest.mark.parametrize("name", UPDATE_ERRORS)
def test_update_says_what_is_wrong(name):
    losses, sites, params, text = UPDATE_ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=text):
        sites_step(losses, params, sites, kwargs=X)


def link(*sites, **settings):
    return activity.activity_forward_grad(jax.random.key(0), sites, **settings)


BUILD_ERRORS = {
    "unknown": (lambda: link("c").init(TWO), r"'c' names no parameter.*\['a', 'b'\]"),
    "twice": (lambda: link("a", Site("b", "a")).init(TWO), "'a' belongs to two sites"),
    "integers": (
        lambda: link("a").init({"a": jnp.arange(3)}),
        r"has dtype int32.*fgrad.QTensor\(qvalue, scale, bits\)",
    ),
    "no sites": (link, "sites is empty"),
    "no name": (Site, "needs the names of layers"),
    "no epsilon": (
        lambda: Site("a", epsilon=0),
        "positive and finite, got 0",
    ),
    "no count": (lambda: Site("a", num_perturbations=0), "positive integer, got 0"),
    "a number": (lambda: link(3), r"layer's name or fgrad.activity.Site.*got 3"),
    "estimator": (lambda: link("a", estimator="spsa"), "must be a function"),
    "others": (lambda: link("a", others="sgd"), "must be an optax transformation"),
    "no loss": (
        lambda: link("a").update(TWO, link("a").init(TWO), TWO),
        "activity_forward_grad needs the loss",
    ),
}


@pytest.mark.parametrize("name", BUILD_ERRORS)
def test_building_says_what_is_wrong(name):
    build, text = BUILD_ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=text):
        build()
