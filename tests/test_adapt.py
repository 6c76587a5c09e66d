import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from lanes import some

import fgrad
from experiments.configs import quickstart
from experiments.data.arrays import Split
from experiments.learners import adapt
from experiments.learners.classification import Classification
from experiments.learners.learner import make_learner
from experiments.models import efficientnet, vit
from fgrad import layers

SETTINGS: dict[str, Any] = {"num_classes": 4, "patch": 4, "width": 8, "depth": 2}
NETWORK = functools.partial(vit.ViT, num_heads=2, mlp_width=12, **SETTINGS)
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "linear_probe": {"num_layers": 3},
    "last_blocks": {"num_blocks": 1},
    "deep_prompts": {"num_prompts": 3},
    "lora": {"rank": 2},
    "adapter": {"num_blocks": 1},
}
# The first stage with a leaf that trains: embedding, blocks 0 and 1, norm, head.
CUTS = {
    "full": 0,
    "linear_probe": 4,
    "last_blocks": 2,
    "deep_prompts": 1,
    "lora": 1,
    "adapter": 2,
}
HEAD = {"Dense_0/kernel", "Dense_0/bias"}


def images(count=6):
    return jax.random.uniform(jax.random.key(1), (count, 8, 8, 1))


def begin(way, **options):
    """A way of the small ViT, its first parameters and those of the ViT alone."""
    pretrained = NETWORK().init(jax.random.key(0), images(1))["params"]
    model = adapt.WAYS[way](NETWORK(), **(options or WAYS[way]))
    return model, model.begin(pretrained, jax.random.key(2), images(1)), pretrained


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def shaken(params):
    """No leaf is zero, nor like any other."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noise = [
        0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, map(jnp.add, leaves, noise))


# ------------------------------------------------------------------ stages


@pytest.mark.parametrize("network", ["vit", "efficientnet"])
def test_stages_one_after_the_other_are_the_network(network, monkeypatch):
    if network == "vit":
        model, x = NETWORK(), images(2)
    else:
        # Three of the sixteen blocks.
        monkeypatch.setattr(efficientnet, "_STAGES", efficientnet._STAGES[:2])
        model = efficientnet.EfficientNetLite0(num_classes=4)
        x = jax.random.uniform(jax.random.key(1), (1, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)

    @jax.jit
    def both(variables, x):
        whole = model.apply(variables, x)
        for index, names in enumerate(model.stages):
            own = {name: variables["params"][name] for name in names}
            x = model.apply({"params": own}, x, start=index, stop=index + 1)
        return whole, x

    np.testing.assert_allclose(*both(variables, x), rtol=1e-5, atol=1e-6)
    names = [name for stage in model.stages for name in stage]
    assert sorted(names) == sorted(variables["params"])


def test_efficientnet_has_sixteen_blocks_to_cut_between():
    network = efficientnet.EfficientNetLite0()
    model = adapt.last_blocks(network, num_blocks=1)
    assert [model.trains((name, "bias")) for name in ("blocks_14", "blocks_15")] == [
        False,
        True,
    ]
    assert model.cut({"blocks_15": {}, "head": {}, "classifier": {}}) == 16
    assert adapt.last_blocks(network, num_blocks=16).trains(("blocks_0", "bias"))
    assert not adapt.last_blocks(network, num_blocks=16).trains(("stem", "bias"))


# -------------------------------------------------------------------- ways


@pytest.mark.parametrize("way", WAYS)
def test_what_a_way_trains_and_where_it_begins(way):
    model, params, pretrained = begin(way)
    trained, frozen = model.split(params)
    assert model.cut(trained) == CUTS[way]
    # Of the pre-trained leaves nothing has changed.
    before, now = flat(pretrained), flat(params)
    for path, leaf in before.items():
        np.testing.assert_array_equal(now[path], leaf)
    new = set(now) - set(before)
    attention = "MultiHeadDotProductAttention_0"
    blocks = range(SETTINGS["depth"])
    expected_new = {
        "full": set(),
        "linear_probe": {
            f"Dense_0/hidden_{i}/{x}" for i in (0, 1) for x in ("kernel", "bias")
        },
        "last_blocks": set(),
        "deep_prompts": {f"Block_{i}/prompts" for i in blocks},
        "lora": {
            f"Block_{i}/{attention}/{layer}/lora_{x}/kernel"
            for i in blocks
            for layer in ("query", "value")
            for x in ("down", "up")
        },
        "adapter": {"Block_1/adapter/kernel", "Block_1/adapter/bias"},
    }[way]
    assert new == expected_new
    tops = {"full": "", "last_blocks": ("Block_1", "LayerNorm_0")}
    of_network = {p for p in before if way in tops and p.startswith(tops[way])}
    assert set(flat(trained)) == HEAD | new | of_network
    assert set(flat(frozen)) == set(now) - set(flat(trained))
    assert flat(adapt.merge(trained, frozen)).keys() == now.keys()
    # The predictions are the pre-trained network's, but for prompts.
    found = model.apply({"params": params}, images())
    expected = NETWORK().apply({"params": pretrained}, images())
    if way == "deep_prompts":
        assert np.abs(found - expected).max() > 1e-3
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_head_of_three_layers():
    model, params, _ = begin("linear_probe")
    params = shaken(params)
    x = np.asarray(model.apply({"params": params}, images(), stop=-1), np.float64)
    head = params["Dense_0"]
    for name in ("hidden_0", "hidden_1"):
        x = x + np.maximum(x, 0) @ head[name]["kernel"] + head[name]["bias"]
    expected = x @ head["kernel"] + head["bias"]
    found = model.apply({"params": params}, images())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_prompts_are_those_of_the_reference():
    model, params, _ = begin("deep_prompts")
    params = shaken(params)
    network, count = NETWORK(), 3
    variables = {"params": params}
    x = network.apply(variables, images(), stop=1)
    # As in VPT: behind the class token, each block's in the place of the last one's.
    shape = (len(x), count, SETTINGS["width"])
    x = jnp.concatenate([x[:, :1], jnp.zeros(shape), x[:, 1:]], axis=1)
    block = vit.Block(num_heads=2, mlp_width=12)
    for index in range(SETTINGS["depth"]):
        own = dict(params[f"Block_{index}"])
        prompts = own.pop("prompts")
        x = x.at[:, 1 : 1 + count].set(prompts)
        x = block.apply({"params": own}, x)
    expected = network.apply(variables, x, start=-2)
    found = model.apply(variables, images())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_low_rank_leaves_add_to_the_kernels():
    model, params, _ = begin("lora", rank=2, kernels=".*")
    params = flat(shaken(params))
    merged = {path: leaf for path, leaf in params.items() if "lora" not in path}
    downs = [path for path in params if "lora_down" in path]
    # The head; in each block four kernels of attention and two of the perceptron.
    assert len(downs) == 1 + 6 * SETTINGS["depth"]
    for path in downs:
        down = params[path].reshape(-1, 2)
        up = params[path.replace("down", "up")].reshape(2, -1)
        kernel = path.replace("lora_down/", "")
        merged[kernel] = merged[kernel] + (down @ up).reshape(merged[kernel].shape)
    params, merged = (
        traverse_util.unflatten_dict(x, sep="/") for x in (params, merged)
    )
    found = model.apply({"params": params}, images())
    expected = NETWORK().apply({"params": merged}, images())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


class Pointwise(nn.Module):
    """Stages as EfficientNet has them, with a 1x1 convolution in the block."""

    stages = (("stem",), ("block",), ("norm",), ("head",))

    @nn.compact
    def __call__(self, x, start=0, stop=None):
        stages = (
            layers.Conv(3, (3, 3), name="stem"),
            layers.Conv(5, (1, 1), name="block"),
            lambda x: nn.LayerNorm(name="norm")(x.mean((1, 2))),
            layers.Dense(2, name="head"),
        )
        for stage in stages[start:stop]:
            x = stage(x)
        return x


@pytest.mark.slow
def test_low_rank_leaves_of_a_pointwise_convolution():
    network = Pointwise()
    pretrained = network.init(jax.random.key(0), images(1))["params"]
    model = adapt.lora(network, rank=2, kernels=".*")
    params = shaken(model.begin(pretrained, jax.random.key(1), images(1)))
    assert "lora_down" not in params["stem"]
    block = params["block"]
    extra = block["lora_down"]["kernel"] @ block["lora_up"]["kernel"]
    head = params["head"]
    merged = {
        **params,
        "block": {"kernel": block["kernel"] + extra, "bias": block["bias"]},
        "head": {
            "kernel": head["kernel"]
            + head["lora_down"]["kernel"] @ head["lora_up"]["kernel"],
            "bias": head["bias"],
        },
    }
    found = model.apply({"params": params}, images())
    expected = network.apply({"params": merged}, images())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_with_a_hidden_layer():
    model, params, _ = begin("adapter", width=3)
    params = shaken(params)
    own = dict(params["Block_1"])
    assert own["adapter_down"]["kernel"].shape == (8, 3)
    up, down = own.pop("adapter"), own.pop("adapter_down")
    network, variables = NETWORK(), {"params": {**params, "Block_1": own}}
    x = network.apply(variables, images(), stop=2)
    hidden = np.maximum(x @ down["kernel"] + down["bias"], 0)
    x = x + hidden @ up["kernel"] + up["bias"]
    expected = network.apply(variables, x, start=2)
    found = model.apply({"params": params}, images())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_adapters_with_local_heads_learn_from_their_own_losses():
    settings = {"num_blocks": 2, "num_adapters": 2}
    model, params, _ = begin("adapter", **settings, local_heads=True)
    new = {"Block_0/adapter", "Block_1/adapter", "Block_0/local_head", "Dense_0"}
    trained, _ = model.split(params)
    assert {path.rpartition("/")[0] for path in flat(trained)} == new
    params = shaken(params)
    logits, local = model.outputs({"params": params}, images())
    without = {
        **params,
        "Block_0": {k: v for k, v in params["Block_0"].items() if k != "local_head"},
    }
    plain = adapt.adapter(NETWORK(), **settings)
    expected, none = plain.outputs({"params": without}, images())
    assert none == {}
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    x = plain.apply({"params": without}, images(), stop=2)
    head = params["Block_0"]["local_head"]
    expected = {"Block_0": x.mean(axis=1) @ head["kernel"] + head["bias"]}
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
        local,
        expected,
    )

    def moved_by(loss):
        """The leaves that train and have a gradient."""
        gradient, _ = model.split(jax.grad(loss)(params))
        return {k.rpartition("/")[0] for k, v in flat(gradient).items() if v.any()}

    def both(params):
        return model.outputs({"params": params}, images())

    assert moved_by(lambda p: both(p)[0].sum()) == {"Block_1/adapter", "Dense_0"}
    assert moved_by(lambda p: both(p)[1]["Block_0"].sum()) == {
        "Block_0/adapter",
        "Block_0/local_head",
    }


@pytest.mark.parametrize("way", some(["linear_probe", "lora"], ["lora"]))
def test_16w8a_logits_are_close_to_the_float_ones(way):
    model, params, _ = begin(way)
    params = shaken(params)
    expected = model.apply({"params": params}, images())
    fixed = adapt.WAYS[way](NETWORK(bits=(16, 8)), **WAYS[way])
    variables = layers.calibrate(fixed, {"params": fgrad.quantize(params)}, images())
    found = fixed.apply(variables, images())
    error = np.sqrt(np.mean((found - expected) ** 2) / np.var(expected))
    # 0.02 to 0.03; activations of 4 bits are off by 0.3 or more.
    assert error < 0.1
    # New layers have scales of their own.
    scales = "/".join(flat(variables[layers.SCALES]))
    assert {"linear_probe": "hidden_1/", "lora": "lora_up/"}[way] in scales


# ---------------------------------------------------------------- training


def method(name, way, *, cache=False):
    config = quickstart.base("smoke")
    changes = {
        "adaptation": {way: WAYS[way]},
        "cache_frozen": cache,
        "batch_size": 4,
    }
    return quickstart.changed(config.methods[name], changes)


def learner_of(settings):
    return make_learner(settings, NETWORK, Classification(settings))


@functools.cache
def trained(name, way, cache=False):
    """States before and after each of three steps, and the logits of all images."""
    learner = learner_of(method(name, way, cache=cache))
    pretrained = begin(way)[2]
    split = Split(images(), jnp.arange(6) % 4)
    start = learner.init(pretrained, split.images, 0)
    data = learner.cached(start, {"train": split})["train"]
    step, states = jax.jit(learner.step), [start]
    for _ in range(3):
        states.append(step(states[-1], jnp.float32(0.1), jnp.float32(10), data))
    return states, learner.logits(states[-1], data.images)


def bits_of(tree):
    return {path: np.asarray(x).tobytes() for path, x in leaves(tree).items()}


def leaves(tree):
    return {
        jax.tree_util.keystr(path): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


METHODS = ["backprop", "forward_16w8a"]


@pytest.mark.parametrize("name", some(METHODS, ["backprop"]))
def test_frozen_leaves_stay_and_have_no_state(name):
    (start, *_, end), _ = trained(name, "deep_prompts")
    assert bits_of(end.frozen) == bits_of(start.frozen)
    before, after = bits_of(start.params), bits_of(end.params)
    moved = {path for path in before if before[path] != after[path]}
    assert moved == {path for path in before if "scale" not in path}
    # Momenta, keys and counts, of which none grows with what is frozen.
    sizes = {path: x.size for path, x in leaves(end.opt_state).items()}
    weights = sum(x.size for x in jax.tree.leaves(end.params))
    assert sum(size for size in sizes.values()) <= weights + 20
    assert not any("Conv_0" in path for path in sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "deep_prompts") for name in METHODS),
        ("backprop", "last_blocks"),
    ],
)
def test_a_frozen_part_that_runs_once_changes_nothing(name, way):
    (*_, plain), logits = trained(name, way)
    (*_, cached), same = trained(name, way, cache=True)
    pairs = zip(
        jax.tree.leaves(plain.params), jax.tree.leaves(cached.params), strict=True
    )
    for x, y in pairs:
        # Another program may round float32 otherwise.
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(logits, same, rtol=1e-4, atol=1e-5)


def test_the_trajectory_is_that_of_the_whole_tree_with_a_mask():
    way, name = "deep_prompts", "forward_16w8a"
    (start, *_, end), _ = trained(name, way)
    settings = method(name, way)
    model = adapt.make(NETWORK(bits=(16, 8)), settings.adaptation)

    def loss_fn(params, batch):
        logits = model.apply({"params": params, **start.scales}, batch.images)
        labels = jax.nn.one_hot(batch.labels, 4)
        return optax.softmax_cross_entropy(logits, labels).mean()

    params = adapt.merge(start.params, start.frozen)
    mask = traverse_util.path_aware_map(
        lambda path, _: path[-1] == "prompts" or path[0] == "Dense_0", params
    )
    _, z_key = jax.random.split(jax.random.key(0))
    tx = optax.chain(
        fgrad.fixed_point_forward_grad(
            z_key,
            epsilon=settings.epsilon,
            num_perturbations=settings.num_perturbations,
            estimator=fgrad.estimators.normalized_spsa,
            mask=mask,
        ),
        optax.sgd(lambda count: 0.1 * (1 - count / 10)),
        fgrad.quantized_update(mask=mask),
    )
    split, state = Split(images(), jnp.arange(6) % 4), tx.init(params)

    @jax.jit
    def step(params, state, count):
        key = jax.random.fold_in(start.key, count)
        batch = Classification(settings).batch(key, split)
        updates, state = tx.update(params, state, params, value_fn=loss_fn, batch=batch)
        return optax.apply_updates(params, updates), state

    for count in range(3):
        params, state = step(params, state, jnp.int32(count))
    assert bits_of(params) == bits_of(adapt.merge(end.params, end.frozen))


@pytest.mark.slow
def test_the_backward_gradient_is_that_of_the_trained_leaves():
    (start, after, *_), _ = trained("backprop", "deep_prompts")
    settings = method("backprop", "deep_prompts")
    model = adapt.make(NETWORK(), settings.adaptation)
    split = Split(images(), jnp.arange(6) % 4)
    key = jax.random.fold_in(start.key, 0)
    batch = Classification(settings).batch(key, split)

    def loss_fn(params):
        logits = model.apply({"params": params}, batch.images)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(4), batch.labels])

    gradient = jax.grad(loss_fn)(adapt.merge(start.params, start.frozen))
    of_trained, _ = model.split(gradient)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, start.params, of_trained)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        after.params,
        expected,
    )


# ------------------------------------------------------------------ errors


def test_bad_choices_are_refused():
    network = NETWORK()
    with pytest.raises(ValueError, match="no way to adapt 'half'"):
        adapt.make(network, {"half": {}})
    with pytest.raises(ValueError, match="choose one way"):
        adapt.make(network, {"full": {}, "lora": {}})
    with pytest.raises(TypeError, match="Dense has no stages"):
        adapt.linear_probe(nn.Dense(3))
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        adapt.linear_probe(network, num_layers=0)
    with pytest.raises(ValueError, match=r"num_blocks must be 1 to 2.*got 3"):
        adapt.last_blocks(network, num_blocks=3)
    with pytest.raises(ValueError, match="num_prompts must be at least 1, got 0"):
        adapt.deep_prompts(network, num_prompts=0)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        adapt.lora(network, rank=0)
    with pytest.raises(ValueError, match=r"num_adapters must be 1 to 1.*got 2"):
        adapt.adapter(network, num_adapters=2)
    with pytest.raises(ValueError, match=r"num_adapters must be 2 to 2.*got 1"):
        adapt.adapter(network, num_blocks=2, local_heads=True)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        adapt.adapter(network, width=0)
    with pytest.raises(ValueError, match=r"take tokens.*Pointwise.*\(6, 8, 8, 3\)"):
        adapt.deep_prompts(Pointwise()).init(jax.random.key(0), images())


def test_pretrained_leaves_are_checked():
    pretrained = NETWORK().init(jax.random.key(0), images(1))["params"]
    key, x = jax.random.key(1), images(1)
    with pytest.raises(ValueError, match=r"adds no leaf.*Block_0/Dense_0"):
        adapt.lora(NETWORK(), kernels="nothing").begin(pretrained, key, x)
    other = NETWORK().clone(num_classes=7)
    with pytest.raises(ValueError, match=r"Dense_0/.*has shape .*leave it out"):
        adapt.linear_probe(other).begin(pretrained, key, x)
    with pytest.raises(ValueError, match=r"extra has shape \(2,\).*it has None"):
        adapt.full(NETWORK()).begin({**pretrained, "extra": jnp.ones(2)}, key, x)
    headless = {name: leaf for name, leaf in pretrained.items() if name != "Dense_0"}
    params = adapt.linear_probe(other).begin(headless, key, x)
    assert params["Dense_0"]["kernel"].shape == (8, 7)
    with pytest.raises(ValueError, match=r"lack .*Block_1.*do not train here"):
        adapt.linear_probe(NETWORK()).begin(
            {name: leaf for name, leaf in pretrained.items() if name != "Block_1"},
            key,
            x,
        )


def test_cached_activations_cannot_be_augmented():
    settings = method("backprop", "linear_probe", cache=True)
    settings.input_shift = 1
    with pytest.raises(ValueError, match="set one of them only"):
        learner_of(settings)
