"""Adaptation at test time: the objective by hand, and what a stream tells."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import fast_jit

import fgrad
from experiments import registry
from experiments.configs import quickstart
from experiments.configs import test_time as test_time_config
from experiments.data import arrays, corruptions, mnist_c
from experiments.drivers import settings, test_time_table
from experiments.learners import adapt, test_time
from experiments.learners.learner import make_learner
from experiments.models import vit
from experiments.usage import UsageError

SIZES = {"num_classes": 4, "patch": 4, "width": 8, "depth": 2, "mlp_width": 12}


def network(bits=None):
    return vit.ViT(num_heads=2, bits=bits, **SIZES)


def images(count=6, seed=1):
    return jax.random.uniform(jax.random.key(seed), (count, 8, 8, 1))


def start():
    return fast_jit(network().init)(jax.random.key(0), images(1))["params"]


@functools.partial(fast_jit, static_argnames=("start", "stop"))
def applied(params, x, start=0, stop=None):
    return network().apply({"params": params}, x, start=start, stop=stop)


def outputs(params):
    """A float network as the objective sees it, in a program of its own."""
    return lambda x, **stages: (network().apply({"params": params}, x, **stages), {})


def method(name="forward_fp32", **changes):
    config = test_time_config.get_config("smoke")
    return quickstart.changed(config.methods[name], changes)


def behind_stages(params, x):
    """Class tokens behind each stage but the head, in float64."""
    found = []
    for stage in range(len(network().stages) - 1):
        x = applied(params, x, start=stage, stop=stage + 1)
        tokens = np.asarray(x, np.float64)
        found.append(tokens[:, 0] if tokens.ndim == 3 else tokens)
    return found


# ----------------------------------------------------------------- the objective


def test_the_loss_by_hand():
    params, x = start(), images()
    source = test_time.source_statistics(outputs(params), images(8, seed=2), 4, 4)
    settings = method(entropy=2.0, alignment=0.5)
    objective = test_time.EntropyAndAlignment(settings)
    batch = test_time.Unlabelled(x, source)
    losses = fast_jit(lambda batch: objective.losses(outputs(params), batch))(batch)

    logits = np.asarray(applied(params, x), np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(
        losses["entropy"], -2 * (p * np.log(p)).sum(-1), rtol=1e-5
    )
    pairs = zip(
        behind_stages(params, x), behind_stages(params, images(8, seed=2)), strict=True
    )
    distance = sum(
        np.linalg.norm(here.mean(0) - there.mean(0))
        + np.linalg.norm(here.std(0) - there.std(0))
        for here, there in pairs
    )
    np.testing.assert_allclose(losses["alignment"], distance / 2, rtol=1e-3)


def test_a_term_of_no_weight_is_left_out():
    params, x = start(), images()
    source = test_time.source_statistics(outputs(params), x, 4, 6)
    objective = test_time.EntropyAndAlignment(method(entropy=1.0, alignment=0.0))
    batch = test_time.Unlabelled(x, source)
    losses = jax.eval_shape(lambda: objective.losses(outputs(params), batch))
    assert list(losses) == ["entropy"]


def test_statistics_of_batches_are_those_of_all_images():
    params, x = start(), images(12)
    found = test_time.source_statistics(outputs(params), x, 4, batch_size=4)
    expected = behind_stages(params, x)
    for mean, deviation, tokens in zip(
        found.means, found.deviations, expected, strict=True
    ):
        np.testing.assert_allclose(mean, tokens.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(deviation, tokens.std(0), rtol=1e-2, atol=2e-3)


def test_realigned_features_have_the_moments_of_the_source():
    random = np.random.default_rng(0)
    features = jnp.asarray(random.normal(3.0, 2.0, (500, 5)), jnp.float32)
    source = test_time.Statistics(
        (jnp.arange(5.0),), (jnp.array([0.5, 1.0, 2.0, 1.0, 3.0]),)
    )
    state = test_time.moved(test_time.moving(5), features, 0.9)
    found = test_time.realigned(state, features, source)
    np.testing.assert_allclose(found.mean(0), source.means[0], atol=1e-4)
    np.testing.assert_allclose(found.std(0), source.deviations[0], rtol=1e-4)


def test_the_moving_mean_forgets():
    state = test_time.moving(1)
    for value in (1.0, 3.0):
        state = test_time.moved(state, jnp.full((4, 1), value), 0.75)
    # Weights 0.75 * 0.25 and 0.25 of what was seen.
    np.testing.assert_allclose(state.mean / state.weight, (0.75 + 3) / 1.75, rtol=1e-6)
    np.testing.assert_allclose(state.square / state.weight, (0.75 + 9) / 1.75)


# ------------------------------------------------------------- what trains, and how


def test_a_step_moves_the_normalisations_only_which_have_16_bits():
    settings = method("forward_8w8a", num_perturbations=1)
    objective = test_time.EntropyAndAlignment(settings)
    learner = make_learner(settings, network, objective)
    params, x = start(), images()
    source = test_time.source_statistics(outputs(params), x, 4, 6)
    state = learner.init(params, x, 0)
    trained = jax.tree.leaves(state.params, is_leaf=fgrad.fixed_point.is_qtensor)
    # Scale and shift of five normalisations of eight features.
    assert adapt.num_weights(state.params) == 5 * 2 * 8
    assert {leaf.bits for leaf in trained} == {16}
    frozen = jax.tree.leaves(state.frozen, is_leaf=fgrad.fixed_point.is_qtensor)
    assert {leaf.bits for leaf in frozen} == {8}
    batch = test_time.Unlabelled(images(seed=3), source)
    after = fast_jit(learner.step)(state, 1e-2, jnp.inf, batch)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params, after.params)
    assert any(jax.tree.leaves(moved))
    jax.tree.map(np.testing.assert_array_equal, state.frozen, after.frozen)


def test_prompts_may_train_without_the_head():
    model = adapt.deep_prompts(network(), num_prompts=2, with_head=False)
    trained, _ = model.split(model.begin(start(), jax.random.key(0), images(1)))
    assert sorted(trained) == ["Block_0", "Block_1"]
    assert adapt.num_weights(trained) == 2 * 2 * 8


# ------------------------------------------------------------------------ the stream


def test_kinds_are_the_images_of_the_builder(tmp_path, monkeypatch):
    def corrupt(image, severity, corruption_name, seed=None):
        shade = corruptions.KINDS.index(corruption_name) + severity
        return np.broadcast_to(image // 2 + shade, (*image.shape[:2], 3))

    module = types.ModuleType("imagecorruptions")
    module.corrupt = corrupt
    monkeypatch.setitem(sys.modules, "imagecorruptions", module)
    few = corruptions.KINDS[:2]
    monkeypatch.setattr(corruptions, "KINDS", few)
    found = mnist_c.by_kind(5, tmp_path)
    assert {name: kinds.images.shape[:2] for name, kinds in found.items()} == {
        "train": (2, 800),
        "validation": (2, 300),
        "test": (2, 300),
    }
    builder = mnist_c.Mnist5kC(config="severity_5", data_dir=str(tmp_path))
    generators = builder._split_generators(None)
    for name, kinds in found.items():
        made = [example for _, example in generators[name]]
        whole = kinds.images.reshape(-1, *kinds.images.shape[2:])
        np.testing.assert_array_equal(whole, [one["image"] for one in made])
        np.testing.assert_array_equal(
            np.tile(kinds.labels, 2), [one["label"] for one in made]
        )
    monkeypatch.delitem(sys.modules, "imagecorruptions")  # now it is read
    again = mnist_c.by_kind(5, tmp_path)
    np.testing.assert_array_equal(again["test"].images, found["test"].images)


@pytest.fixture
def stream(monkeypatch, tmp_path):
    """A configuration of a tiny network, and data of two kinds."""
    monkeypatch.setitem(registry.NETWORKS, "tiny", network)
    config = test_time_config.get_config("smoke")
    config.network, config.batch_size, config.rounds = "tiny", 4, 2
    params = start()
    kinds = jnp.stack([images(12, seed=5), 1 - images(12, seed=6)])
    labels = jnp.arange(12) % 4
    source = test_time.source_statistics(outputs(params), images(8), 4, 4)
    split = arrays.Split(kinds, labels)
    clean = arrays.Split(images(12, seed=7), labels)
    data = test_time_table._Data(split, split, clean, source)
    task = types.SimpleNamespace(network=network, start=params, source={"train": clean})

    def made(name, **changes):
        both = {"validation": data, "test": data}
        changed = method(name, num_perturbations=1, **changes)
        return test_time_table._Method(config, changed, task, both, tmp_path)

    return made, data, params


def accuracy(params, x, labels):
    logits = applied(params, x)
    return float(jnp.mean(logits.argmax(-1) == labels))


def test_an_unadapted_stream_tells_the_networks_accuracy(stream):
    made, data, params = stream
    scores = made("unadapted_fp32")._run("test", [0, 1, 0], 0.0, 0, reset=False)
    expected = [
        accuracy(params, data.stream.images[kind], data.stream.labels)
        for kind in (0, 1, 0)
    ]
    np.testing.assert_allclose(scores.after, expected, rtol=1e-6)
    np.testing.assert_allclose(scores.online, expected, rtol=1e-6)
    clean = accuracy(params, data.clean.images, data.clean.labels)
    np.testing.assert_allclose(scores.clean, [clean] * 3, rtol=1e-6)


def test_a_reset_forgets_and_a_long_stream_does_not(stream):
    made, _, _ = stream
    tent = made("tent")
    # Whatever came before: the second kind is met by the network of the start.
    same, other = (
        tent._run("test", [first, 1], 0.05, 0, reset=True) for first in (0, 1)
    )
    for score in ("online", "after", "clean"):
        assert getattr(same, score)[1] == getattr(other, score)[1]
    # The network that a long stream hands on is not the one that it began with.
    begun = test_time_table._Carry(tent._begin(0), test_time.moving(8))
    carry, _ = tent._one_kind(
        begun, tent._data["test"], 1, jnp.float32(0.05), jax.random.key(0)
    )
    assert int(carry.state.count) == 3  # batches of a kind
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), carry.state.params, begun.state.params
    )
    assert min(jax.tree.leaves(moved)) >= 0.04


@pytest.mark.slow
def test_smoke(stream):
    made, _, _ = stream
    found = made("forward_fp32").results()
    assert found["weights"] == 80
    assert found["passes"] == 3  # its prediction, and a pair
    assert np.shape(found["reset"]["online"]) == (2, 2)  # seeds, kinds
    assert np.shape(found["long"]["after"]) == (2, 4)  # two rounds


# ------------------------------------------------------------------ the configuration


def test_the_configuration_is_checked_before_any_work():
    config = test_time_config.get_config("smoke")
    settings.check_test_time(config)
    config.network = "mlp_small"
    with pytest.raises(UsageError, match="stages"):
        settings.check_test_time(config)
    config = test_time_config.get_config("smoke")
    config.methods.tent.entropy = 0.0
    with pytest.raises(UsageError, match=r"methods\.tent has nothing to minimise"):
        settings.check_test_time(config)
    config = test_time_config.get_config("smoke")
    config.severity = 2
    with pytest.raises(UsageError, match="severity must be"):
        settings.check_test_time(config)


def test_arithmetics_stand_side_by_side():
    config = test_time_config.get_config()
    assert config.severity == 5
    assert len(config.seeds) >= 3
    for arithmetic in ("fp32", "16w8a", "8w8a"):
        for name in ("unadapted", "realigned", "forward"):
            assert f"{name}_{arithmetic}" in config.run
    assert config.methods.tent.gradient == "backward"
    assert not config.methods.forward_8w8a.labels
    assert config.methods.forward_8w8a.gradient == "forward"
