"""Published weights by configuration: read by their network, refused by any other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import record_vit
from flax import traverse_util
from safetensors.numpy import save_file

from experiments import published, registry
from experiments.configs import fewshot_vision, quickstart
from experiments.data import arrays
from experiments.drivers import few_shot, progress, settings, training
from experiments.models import ast, cnn, efficientnet, resnet, vit
from experiments.usage import UsageError

NARROW = functools.partial(
    vit.ViT, patch=8, width=96, depth=2, num_heads=4, mlp_width=384
)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """The path of a vision transformer of timm's, of 25 patches."""
    path = tmp_path_factory.mktemp("weights") / "narrow.safetensors"
    save_file(record_vit.random_state_dict("narrow"), path)
    return str(path)


@pytest.fixture
def narrow_network(monkeypatch):
    monkeypatch.setitem(registry.NETWORKS, "narrow", NARROW)
    return "narrow"


def test_all_but_the_head_is_what_the_file_holds(narrow):
    model = NARROW(num_classes=3)
    found = published.load(narrow, model, (1, 40, 40, 3))
    expected = vit.load(narrow, num_heads=4)
    assert sorted(found) == sorted(set(expected) - {"Dense_0"})
    for name, leaf in traverse_util.flatten_dict(found).items():
        np.testing.assert_array_equal(leaf, traverse_util.flatten_dict(expected)[name])


def test_positions_of_a_ramp_stay_a_ramp():
    # A cubic interpolation has linear functions exactly, away from the edges.
    rows, columns = np.mgrid[:8, :8]
    ramp = np.stack([rows, columns, 2.0 * rows - columns], -1).reshape(1, 64, 3)
    own = np.full((1, 1, 3), 7.0)
    params = {"positions": np.concatenate([own, ramp], axis=1)}
    found = vit.resized(vit.ViT(patch=4), params, (1, 64, 64, 3))["positions"]
    assert found.shape == (1, 1 + 16 * 16, 3)
    np.testing.assert_array_equal(found[:, 0], own[:, 0])
    grid = np.asarray(found[0, 1:]).reshape(16, 16, 3)[4:12, 4:12]
    # The centre of patch i of 16 lies at (i + 1/2)/2 - 1/2 of 8.
    y, x = (np.mgrid[4:12, 4:12] + 0.5) / 2 - 0.5
    np.testing.assert_allclose(grid, np.stack([y, x, 2 * y - x], -1), atol=1e-5)


def test_a_shorter_spectrogram_has_the_positions_of_the_middle():
    model = ast.AST(patch=4, strides=(2, 4))
    # 2 along mel bins, 9 along time: entry 9 u + t, after two tokens.
    positions = np.arange(20.0)[None, :, None]
    found = ast.resized(model, {"positions": positions}, (1, 12, 8, 1))["positions"]
    # 12 frames have 5 patches: of 9 those from 2 to 6.
    middle = [2 + 9 * up + t for up in range(2) for t in range(2, 7)]
    np.testing.assert_array_equal(found[0, :, 0], [0, 1, *middle])


def test_images_are_as_the_weights_want_them():
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(3, 4, 4, 1)).astype(np.float32)
    splits = {"train": arrays.Split(jnp.asarray(images), jnp.zeros(3, jnp.int32))}
    found = published.prepared(splits, NARROW, "x")["train"].images
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(found, (images - mean) / deviation, atol=1e-5)
    half = published.prepared(splits, NARROW, "x", normalization="half", side=8)
    assert half["train"].images.shape == (3, 8, 8, 3)
    np.testing.assert_allclose(half["train"].images.mean(), 2 * images.mean() - 1, 1e-3)
    assert published.prepared(splits, NARROW, "")["train"] is splits["train"]


@pytest.mark.parametrize(
    ("weights", "network", "match"),
    [
        ("imagenet", vit.ViT, "are of EfficientNetLite0, .* is a ViT"),
        ("imagenet", cnn.CNN, "reads no published weights"),
        ("missing.pth", resnet.ResNet, "neither a file .* torchvision's resnet18"),
        ("missing", efficientnet.EfficientNetLite0, "neither a file nor one of image"),
    ],
)
def test_weights_of_another_network_are_refused_before_any_work(
    weights, network, match
):
    with pytest.raises(UsageError, match=match):
        published.check(weights, "its name", network)


def test_a_configuration_of_a_wrong_network_is_refused():
    config = quickstart.get_config("smoke")
    config.weights, config.network = "imagenet", "vit_28"
    with pytest.raises(UsageError, match="are of EfficientNetLite0"):
        settings.check_training(config)
    config = quickstart.get_config("smoke")
    config.normalization = "imagnet"
    with pytest.raises(UsageError, match="did you mean 'imagenet'"):
        settings.check_training(config)


def test_a_file_of_another_network_or_size_is_refused(narrow, tmp_path):
    deeper = NARROW(depth=3)
    with pytest.raises(UsageError, match=r"this is no ResNet"):
        published.load(narrow, resnet.ResNet(), (1, 32, 32, 3))
    wider = NARROW(width=192)
    with pytest.raises(UsageError, match=r"another size: .* has shape"):
        published.load(narrow, wider, (1, 40, 40, 3))
    with pytest.raises(UsageError, match="they lack Block_2"):
        published.load(narrow, deeper, (1, 40, 40, 3))


@pytest.mark.slow
def test_a_run_begins_at_the_weights_of_a_file(narrow, narrow_network, tmp_path):
    config = quickstart.base("smoke")
    config.network, config.weights, config.image_side = narrow_network, narrow, 16
    config.pretrain.steps = 0
    with progress.show_progress() as told:
        task = training.prepare(config, tmp_path, told)
    assert task.source["train"].images.shape[1:] == (16, 16, 3)
    expected = published.load(narrow, NARROW(num_classes=10), (1, 16, 16, 3))
    for name, leaves in expected.items():
        jax.tree.map(np.testing.assert_array_equal, task.start[name], leaves)


@pytest.mark.slow
def test_few_shot_learning_begins_at_the_weights_of_a_file(
    narrow, narrow_network, tmp_path
):
    config = fewshot_vision.get_config(f"digits,{narrow_network},smoke")
    config.weights, config.image_side = narrow, 16
    config.pretrain.steps, config.run = 0, ("lp_backprop",)
    results = few_shot.run(config, str(tmp_path))
    # Features of random layers, yet of all the image: better than one of three.
    assert results["zero_shot"]["accuracy"] > 0.4
