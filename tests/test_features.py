import jax.numpy as jnp
import numpy as np
import pytest

from experiments import features
from experiments.data.arrays import Split

RNG = np.random.default_rng(0)


def splits(count, *shape):
    return {
        name: Split(
            jnp.asarray(RNG.normal(size=(n, *shape)), jnp.float32),
            jnp.arange(n, dtype=jnp.int32),
        )
        for name, n in (("train", count), ("test", 3))
    }


@pytest.mark.parametrize("count", [1, 4, 7, 8])
def test_features_of_every_image_in_order(count, tmp_path):
    given = splits(count, 2, 2, 1)
    made = []

    def backbone():
        made.append(1)
        return lambda images: images.reshape(len(images), -1) ** 2

    cache = tmp_path / "features" / "some.npz"
    for _ in range(2):
        found = features.extract(backbone, given, cache, batch_size=4)
        for name, split in given.items():
            expected = np.asarray(split.images).reshape(len(split.labels), -1) ** 2
            np.testing.assert_allclose(found[name].images, expected, rtol=1e-6)
            np.testing.assert_array_equal(found[name].labels, split.labels)
    assert made == [1]  # the second time they were read
    assert [p.name for p in cache.parent.iterdir()] == ["some.npz"]


def test_standardization_by_the_train_split_with_a_floor():
    given = splits(200, 5)
    # The last feature hardly varies: it is not blown up.
    scales, shift = np.array([1.0, 2.0, 3.0, 4.0, 1e-6]), np.arange(5)
    given = {
        name: split._replace(images=split.images * scales + shift)
        for name, split in given.items()
    }
    train = np.asarray(given["train"].images, np.float64)
    deviation = train.std(0)
    floor = 0.1 * deviation.mean()
    assert deviation[-1] < floor
    found = features.standardize(given)
    for name, split in given.items():
        expected = (np.asarray(split.images) - train.mean(0)) / np.maximum(
            deviation, floor
        )
        np.testing.assert_allclose(found[name].images, expected, atol=1e-5)
