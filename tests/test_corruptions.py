import sys
import types

import numpy as np
import pytest
from sklearn import datasets

from experiments.data import corruptions


def photographs(n=30, step=8):
    """32x32 pieces of a photograph that scikit-learn carries, every `step`th pixel."""
    photograph, rng = datasets.load_sample_image("china.jpg"), np.random.default_rng(0)
    ends = np.array(photograph.shape[:2]) - 32 * step
    return np.stack(
        [
            photograph[y : y + 32 * step : step, x : x + 32 * step : step]
            for y, x in rng.integers(0, ends, size=(n, 2))
        ]
    )


@pytest.fixture
def stand_in(monkeypatch):
    """A package that does as the real one asks: three channels out, global draws."""

    def corrupt(image, severity, corruption_name, seed=None):
        image = np.broadcast_to(image, (*image.shape[:2], 3))
        rng = np.random if seed is None else np.random.RandomState(seed)
        noise = rng.normal(scale=severity, size=image.shape)
        return np.clip(image + noise, 0, 255).astype(np.uint8)

    module = types.ModuleType("imagecorruptions")
    module.corrupt = corrupt
    monkeypatch.setitem(sys.modules, "imagecorruptions", module)


@pytest.fixture(params=["stand_in", "real"])
def library(request):
    if request.param == "real":
        pytest.importorskip("imagecorruptions")
    else:
        request.getfixturevalue("stand_in")


@pytest.mark.parametrize("kind", corruptions.KINDS)
def test_an_image_depends_on_seed_and_index_only(library, kind):
    images = photographs(4)
    before = images.copy()
    state = np.random.get_state()
    first = corruptions.corrupt(images, kind, 3)
    np.testing.assert_array_equal(images, before)
    assert first.shape == images.shape
    assert first.dtype == np.uint8
    assert np.all(np.any(first != images, axis=(1, 2, 3)))
    # Whatever was drawn before, the others of a batch and their order do not matter.
    np.random.seed(5)
    again = corruptions.corrupt(images[[2, 0]], kind, 3, indices=[2, 0])
    np.testing.assert_array_equal(again, first[[2, 0]])
    # The global state is as it was.
    found = np.random.random(3)
    np.random.seed(5)
    np.testing.assert_array_equal(found, np.random.random(3))
    np.random.set_state(state)


@pytest.mark.parametrize("kind", ["gaussian_noise", "impulse_noise", "glass_blur"])
def test_seeds_and_indices_differ(library, kind):
    images = np.repeat(photographs(1), 3, axis=0)
    one, other, _ = corruptions.corrupt(images, kind, 3)
    assert np.any(one != other)
    assert np.any(one != corruptions.corrupt(images, kind, 3, seed=1)[0])


def test_the_global_state_is_restored_after_an_error(library):
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    with pytest.raises(ValueError, match="invalid literal"):
        corruptions.corrupt(photographs(1), "fog", 1, indices=["a"])
    assert np.random.random() == expected


@pytest.mark.parametrize("kind", corruptions.KINDS)
def test_severity_is_distance_from_the_clean_image(kind):
    pytest.importorskip("imagecorruptions")
    images = photographs()
    mild, middle, strong = (
        np.abs(
            corruptions.corrupt(images, kind, severity) - images.astype(float)
        ).mean()
        for severity in corruptions.SEVERITIES
    )
    assert 0 < mild < middle
    if kind in ("glass_blur", "frost"):
        # Severity 5 has other iterations or less of the image, and not more distance.
        assert mild < strong
    else:
        assert middle < strong


def test_the_kinds_are_the_packages():
    package = pytest.importorskip("imagecorruptions")
    assert package.get_corruption_names("common") == list(corruptions.KINDS)


def test_contrast_has_its_closed_form():
    pytest.importorskip("imagecorruptions")
    images = photographs(2)
    found = corruptions.corrupt(images, "contrast", 1)
    mean = images.mean(axis=(1, 2), keepdims=True)
    # The package rounds down.
    np.testing.assert_allclose(found + 0.5, mean + 0.4 * (images - mean), atol=0.51)


def test_noise_of_one_channel_keeps_its_strength():
    pytest.importorskip("imagecorruptions")
    images = np.full((8, 32, 32, 1), 128, np.uint8)
    found = corruptions.corrupt(images, "gaussian_noise", 1)
    assert found.shape == images.shape
    # 8,192 draws of standard deviation 0.08: its error is 0.08 / sqrt(2 * 8192).
    assert np.std(found / 255) == pytest.approx(0.08, abs=4 * 0.08 / 128)


def test_bad_arguments_are_refused():
    images = photographs(2)
    with pytest.raises(TypeError, match="must be uint8 from 0 to 255, got float64"):
        corruptions.corrupt(images / 255, "fog", 1)
    with pytest.raises(ValueError, match=r"got shape \(2, 31, 32, 3\)"):
        corruptions.corrupt(images[:, 1:], "fog", 1)
    with pytest.raises(ValueError, match=r"got shape \(2, 32, 32, 2\)"):
        corruptions.corrupt(images[..., :2], "fog", 1)
    with pytest.raises(ValueError, match="got 'rain'"):
        corruptions.corrupt(images, "rain", 1)
    with pytest.raises(ValueError, match="severity must be 1 to 5, got 6"):
        corruptions.corrupt(images, "fog", 6)
    with pytest.raises(ValueError, match=r"for each of 2 images, got shape \(1,\)"):
        corruptions.corrupt(images, "fog", 1, indices=[0])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(
        ModuleNotFoundError, match="pip install 'imagecorruptions-imaug"
    ):
        corruptions.corrupt(photographs(1), "fog", 1)
