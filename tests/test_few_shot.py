import functools
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import registry
from experiments.configs import fewshot, fewshot_audio, fewshot_vision, quickstart
from experiments.data.arrays import Split
from experiments.drivers import few_shot
from experiments.learners.learner import make_learner
from experiments.learners.nearest_centroid import NearestCentroid
from fgrad import layers

SIDE, HIDDEN = 4, 16


class Tiny(nn.Module):
    """One hidden layer, with stages."""

    num_classes: int = 3
    bits: Any = None

    stages = (("Dense_0",), (), ("Dense_1",))

    @nn.compact
    def __call__(self, x, start=0, stop=None):
        stages = [
            lambda x: layers.Dense(HIDDEN, name="Dense_0", bits=self.bits)(
                x.reshape(len(x), -1)
            ),
            nn.relu,
            layers.Dense(self.num_classes, name="Dense_1", bits=self.bits),
        ]
        for stage in stages[start:stop]:
            x = stage(x)
        return x


def examples(seed, classes, count):
    """Classes differ by a little in a quarter of the pixels; the others are noise."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(classes, count)
    means = np.zeros((max(classes) + 1, SIDE, SIDE, 1))
    means[:, 0] = np.random.default_rng(0).normal(0, 2, (len(means), SIDE, 1))
    images = means[labels] + rng.normal(0, 1, (len(labels), SIDE, SIDE, 1))
    images[:, 1:] *= 3
    return Split(jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32))


def data(domain="", data_dir=""):
    del domain, data_dir
    return {
        "train": examples(1, [0, 5, 2, 8], 30),
        "validation": examples(2, [1, 3, 4], 25),
        "test": examples(3, [6, 7, 9, 10], 25),
    }


def configured(**changes):
    config = fewshot_vision.common(
        "tiny", "", "tiny", "smoke", {"n_way": 3, "input_shift": 0, **changes}
    )
    config.pretrain.input_shift = 0
    return config


def method(config, name, **changes):
    return quickstart.changed(config.methods[name], changes)


@pytest.fixture(scope="module")
def started():
    """Parameters that begin a task, and their mean output."""
    # Pixels, far from where the ReLU bends; a new head can leave out what is noise.
    layer = {"kernel": jnp.eye(HIDDEN), "bias": jnp.full(HIDDEN, 10.0)}
    params = {"Dense_0": layer}
    images = data()["train"].images
    return few_shot.with_identity(Tiny(), params, images)


def learner_of(settings, objective):
    network = functools.partial(Tiny, HIDDEN)
    return make_learner(settings, network, objective, skips_frozen=True)


def numpy_features(params, images):
    layer, head = (jax.tree.map(np.asarray, params[f"Dense_{i}"]) for i in (0, 1))
    flat = np.asarray(images).reshape(-1, SIDE * SIDE)
    hidden = np.maximum(flat @ layer["kernel"] + layer["bias"], 0)
    found = hidden @ head["kernel"] + head["bias"]
    return found.reshape(*images.shape[: images.ndim - 3], -1)


def test_the_new_head_gives_features_of_variance_one(started):
    params, mean = started
    found = numpy_features(params, data()["train"].images)
    assert found.var(axis=0).sum() == pytest.approx(1, rel=1e-4)
    np.testing.assert_allclose(mean, found.mean(axis=0), rtol=1e-4)
    kernel = np.asarray(params["Dense_1"]["kernel"])
    np.testing.assert_array_equal(kernel, kernel[0, 0] * np.eye(HIDDEN))


@pytest.mark.parametrize("head", ["protonet", "simpleshot"])
def test_without_steps_it_is_the_nearest_centroid(head, started):
    params, mean = started
    config = configured(head=head)
    still = method(config, "lp_backprop", steps=0)
    objective = NearestCentroid(config)
    learner = learner_of(still, objective)
    split = data()["test"]
    images = split.images.reshape(4, 25, SIDE, SIDE, 1)[:3]
    support, query = images[:, :5], images[:, 5:]
    key = jax.random.key(0)
    weights = learner.weights(params, data()["train"].images, key)
    begin = jax.jit(functools.partial(objective.begin, learner))
    accuracy = objective.accuracy(learner, *begin(weights, mean, (support, query), key))

    def transformed(images):
        x = numpy_features(params, images)
        if head == "protonet":
            return x
        x = x - np.asarray(mean)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    centroids = transformed(support).mean(1)
    distances = np.linalg.norm(transformed(query)[:, :, None] - centroids, axis=-1)
    expected = np.mean(distances.argmin(-1) == np.arange(3)[:, None])
    assert 0.3 < expected < 1
    assert float(accuracy) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["ft_backprop", "lp_backprop", "lp_16w8a"])
def test_training_helps(name, started):
    params, mean = started
    config = configured(temperature=0.2, k_shot=10, num_queries=10)
    sampler = few_shot._samplers(config, data())["test"]
    support, query = sampler(jax.random.split(jax.random.key(0), 16))
    keys = jax.random.split(jax.random.key(1), 16)
    found = {}
    forward = {} if "backprop" in name else {"num_perturbations": 4}
    trained = method(config, name, steps=25, **forward)
    objective = NearestCentroid(config)
    learner = learner_of(trained, objective)
    images = data()["train"].images[:256]
    weights = learner.weights(params, images, jax.random.key(0))

    @jax.jit
    def accuracies(rate):
        def one(given):
            *images, key = given
            state, task = objective.begin(learner, weights, mean, images, key)
            state = jax.lax.fori_loop(
                0,
                trained.steps,
                lambda _, state: learner.step(state, rate, trained.steps, task),
                state,
            )
            return objective.accuracy(learner, state, task)

        return jax.lax.map(one, (support, query, keys))

    found = {rate: float(accuracies(rate).mean()) for rate in (0.0, 0.02)}
    assert found[0.02] > found[0.0] + 0.04
    # The same tasks and keys give the same.
    assert float(accuracies(0.02).mean()) == found[0.02]


def test_pre_training_has_nine_of_ten_images_of_each_class():
    split = examples(0, [5, 0, 2], 20)
    found = few_shot.base_splits(split)
    names = {5: 2, 2: 1, 0: 0}
    for name, count in (("train", 18), ("validation", 2), ("test", 2)):
        np.testing.assert_array_equal(np.bincount(found[name].labels), [count] * 3)

    def pairs(split):
        images, labels = map(np.asarray, split)
        return [(i.tobytes(), int(n)) for i, n in zip(images, labels, strict=True)]

    given = sorted((image, names[label]) for image, label in pairs(split))
    assert sorted(pairs(found["train"]) + pairs(found["test"])) == given


def test_small_classes_keep_one_image_to_test_with():
    split = examples(0, [3], 4)
    two = jax.tree.map(lambda *x: jnp.concatenate(x), split, examples(1, [8], 1))
    found = few_shot.base_splits(two)
    assert found["train"].labels.tolist() == [0, 0, 0, 1]
    np.testing.assert_array_equal(found["test"].images, split.images[3:])
    with pytest.raises(ValueError, match="one image of each class"):
        few_shot.base_splits(examples(1, [8, 9], 1))


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(registry.DATASETS, "tiny", data)
    monkeypatch.setitem(registry.NETWORKS, "tiny", Tiny)


@pytest.mark.slow
def test_it_runs_and_resumes(registered, tmp_path, monkeypatch):
    config = ConfigDict({"driver": "few_shot", "parts": {"one": configured()}})
    config.parts.one.tasks = 5
    results = few_shot.run(config, str(tmp_path))
    part = results["one"]
    assert list(part) == ["zero_shot", "lp_backprop", "lp_16w8a"]
    for result in part.values():
        scores = np.array(result["accuracies"])
        assert scores.shape == (5,)
        assert result["accuracy"] == pytest.approx(scores.mean())
        half = 1.96 * scores.std(ddof=1) / np.sqrt(5)
        assert result["accuracy_interval"] == pytest.approx(half)
        # Of 3 classes with 15 queries each.
        np.testing.assert_allclose(scores * 45, np.rint(scores * 45), atol=1e-4)
    difference = np.subtract(
        part["lp_16w8a"]["accuracies"], part["lp_backprop"]["accuracies"]
    )
    assert part["lp_16w8a"]["gap"] == pytest.approx(difference.mean())
    assert "gap" not in part["lp_backprop"]
    assert "gap" not in part["zero_shot"]
    assert part["lp_16w8a"]["forward_passes"] == 2 * 2 * 2
    assert part["lp_backprop"]["forward_passes"] == 2 * 3
    table = (tmp_path / "one" / "table.md").read_text()
    assert f"| lp_16w8a | {100 * part['lp_16w8a']['accuracy']:.1f} ± " in table
    near = int(difference.mean() >= -0.05)
    assert f"{near} of 1 cells in 16w8a" in (tmp_path / "table.md").read_text()

    def not_again(*args):
        raise AssertionError("a finished method runs again")

    monkeypatch.setattr(few_shot, "_Adaptation", not_again)
    assert few_shot.run(config, str(tmp_path)) == results
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_the_grid_counts_gaps(tmp_path):
    def result(accuracy, gap=None, half=0.03):
        shown = {"accuracy": accuracy, "accuracy_interval": 0.02}
        gaps = {"gap": gap, "gap_interval": half}
        return shown if gap is None else {**shown, **gaps}

    grid = {
        "one": {
            "zero_shot": result(0.5),
            "ft_backprop": result(0.8),
            "ft_fp32": result(0.79, -0.01),
            "ft_16w8a": result(0.77, -0.03),
        },
        "two": {
            "zero_shot": result(0.6),
            "ft_backprop": result(0.8),
            "ft_fp32": result(0.7, -0.1),
            "ft_16w8a": result(0.74, -0.06),
        },
    }
    few_shot._write_parts(grid, tmp_path)
    header, _, one, two, *_, note = (tmp_path / "table.md").read_text().splitlines()
    assert header == "|  | zero_shot | ft_backprop | ft_fp32 | ft_16w8a |"
    assert one.startswith("| one | 50.0 ± 2.0 | 80.0 ± 2.0 | 79.0 ± 2.0 (-1.0 ± 3.0) |")
    assert two.endswith("| 74.0 ± 2.0 (-6.0 ± 3.0) |")
    assert "1 of 2 cells in 16w8a are at most 5 points below it." in note
    # From -6 to 0 and from -9 to -3: only the second lies below -1 with all of it.
    assert "2 are more than a point below, 1 of them with all of the inter" in note
    assert "1 of 2 are at most a point below float32." in note


def test_splits_that_share_classes_are_refused(registered, tmp_path, monkeypatch):
    shared = {**data(), "test": data()["train"]}
    monkeypatch.setitem(registry.DATASETS, "tiny", lambda *_: shared)
    with pytest.raises(ValueError, match="train and test share the classes"):
        few_shot.run(configured(), str(tmp_path))


def test_another_head_is_refused():
    config = configured(head="matching")
    with pytest.raises(ValueError, match=r"head must be .* got 'matching'"):
        NearestCentroid(config)


def test_the_grid_has_every_cell_and_equal_tuning():
    vision, audio = fewshot_vision.get_config(), fewshot_audio.get_config()
    assert len(vision.parts) == 2 * 3
    assert len(audio.parts) == 1 * 2 * 2
    both = {**vision.parts, **audio.parts}
    assert fewshot.get_config().parts.to_dict() == ConfigDict(both).to_dict()
    for config in (*vision.parts.values(), *audio.parts.values()):
        assert config.driver == "few_shot"
        assert config.dataset in registry.DATASETS
        assert config.network in registry.NETWORKS
        assert config.run == tuple(
            f"{way}_{kind}"
            for way in ("ft", "lp")
            for kind in ("backprop", "fp32", "16w8a")
        )
        for name in config.run:
            chosen = config.methods[name]
            assert len(chosen.learning_rates) == 3
            assert list(chosen.adaptation) == [
                {"ft": "full", "lp": "linear_probe"}[name[:2]]
            ]
            assert (chosen.gradient == "backward") == name.endswith("backprop")
            assert bool(chosen.bits) == name.endswith("16w8a")
    assert {c.k_shot for c in vision.parts.values()} == {5}
    assert {c.k_shot for c in audio.parts.values()} == {1}
    assert {c.n_way for c in audio.parts.values()} == {5}


@pytest.mark.parametrize("file", [fewshot_vision, fewshot_audio])
def test_every_dataset_has_its_loader(file):
    for name, (dataset, _, _) in file.DATASETS.items():
        assert file.get_config(f"{name},resnet18").dataset == dataset
        assert dataset in registry.DATASETS
    with pytest.raises(ValueError, match=r"dataset must be one of .* got 'mnist'"):
        file.get_config("mnist,resnet18")
