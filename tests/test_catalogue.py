"""Datasets of TFDS's catalogue, with files of a few examples in place of the real ones.

TFDS's own code writes them: PIL images, since it encodes arrays by TensorFlow.
"""

import functools
import importlib.util
import io

import numpy as np
import pytest
import record_vit
import tensorflow_datasets as tfds
from PIL import Image
from safetensors.numpy import save_file

from experiments import registry
from experiments.configs import ood
from experiments.configs import wake_words as wake_words_config
from experiments.data import catalogue, cifar, wake_words
from experiments.drivers import progress, training
from experiments.models import vit

TRAIN, TEST = 100, 160


def prepared(builder, data_dir, features, examples, **kwargs):
    """Writes splits of a dataset, by the name of the builder.

    ``examples`` maps the splits to lists.
    """

    class Small(builder, skip_registration=True):
        name = builder.name

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {split: iter(enumerate(items)) for split, items in examples.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Small(
        data_dir=str(data_dir), file_format="array_record", **kwargs
    ).download_and_prepare()


def cifar_example(number, mark):
    """Grey levels tell the number and who made it."""
    image = np.full((32, 32, 3), [number, mark, 255 - number], np.uint8)
    return {"image": Image.fromarray(image), "label": number % 10}


CIFAR_FEATURES = tfds.features.FeaturesDict(
    {
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(num_classes=10),
    }
)
_cifar = tfds.image_classification


@pytest.fixture(scope="module")
def cifar_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("cifar")
    features = tfds.features.FeaturesDict(
        {"id": tfds.features.Text(), **CIFAR_FEATURES}
    )
    prepared(
        _cifar.Cifar10,
        data_dir,
        features,
        {
            split: [{"id": f"{split}_{n}", **cifar_example(n, 0)} for n in range(size)]
            for split, size in (("train", TRAIN), ("test", TEST))
        },
    )
    for mark, kind in enumerate(cifar.KINDS):
        examples = [cifar_example(n, mark) for n in range(TEST)]
        prepared(
            _cifar.Cifar10Corrupted,
            data_dir,
            CIFAR_FEATURES,
            {"test": examples},
            config=f"{kind}_3",
        )
    return str(data_dir)


def numbers(split):
    """Number and mark of each example; checks what else is known of it."""
    pixels = np.rint(np.asarray(split.images) * 255).astype(int)
    assert pixels.shape[1:] == (32, 32, 3)
    assert np.all(pixels == pixels[:, :1, :1])
    number, mark, rest = pixels[:, 0, 0].T
    np.testing.assert_array_equal(number + rest, 255)
    np.testing.assert_array_equal(split.labels, number % 10)
    return number.tolist(), mark.tolist()


@pytest.mark.parametrize("domain", ["clean", "gaussian_noise_3"])
def test_tfds_mock_of_cifar_is_read(domain, monkeypatch, tmp_path):
    # What prepares the files is a mock, too, and asks for no TensorFlow.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with tfds.testing.mock_data(num_examples=20):
        splits = cifar.load(domain, str(tmp_path))
    for split in splits.values():
        assert split.images.shape == (20, 32, 32, 3)
        assert float(split.images.min()) >= 0
        assert 0.9 < float(split.images.max()) <= 1
        assert 0 <= int(split.labels.min()) <= int(split.labels.max()) < 10


def test_clean_cifar_has_its_splits(cifar_dir):
    splits = registry.DATASETS["cifar10"]("clean", cifar_dir)
    found = {name: numbers(split)[0] for name, split in splits.items()}
    assert {name: len(n) for name, n in found.items()} == {
        "train": 90,
        "validation": 10,
        "test": TEST,
    }
    assert sorted(found["train"] + found["validation"]) == list(range(TRAIN))
    assert sorted(found["test"]) == list(range(TEST))


def test_corrupted_cifar_has_the_same_splits_for_every_kind(cifar_dir):
    found = {}
    for kind in ("fog", "elastic"):
        for name, split in cifar.load(f"{kind}_3", cifar_dir).items():
            number, mark = numbers(split)
            assert set(mark) == {cifar.KINDS.index(kind)}
            found[kind, name] = number
    sizes = {name: len(found["fog", name]) for name in ("train", "validation", "test")}
    assert sizes == {"train": 128, "validation": 16, "test": 16}
    everything = [n for name in sizes for n in found["fog", name]]
    assert sorted(everything) == list(range(TEST))
    for name in sizes:
        assert found["fog", name] == found["elastic", name]


def test_all_kinds_have_each_image_once(cifar_dir):
    splits, fog = (cifar.load(f"{kind}_3", cifar_dir) for kind in ("all", "fog"))
    for name, split in splits.items():
        number, mark = numbers(split)
        assert sorted(number) == sorted(numbers(fog[name])[0])
        counts = np.bincount(mark, minlength=len(cifar.KINDS))
        assert counts.max() - counts.min() <= 1


def test_the_kinds_are_those_of_tfds():
    configs = set(_cifar.Cifar10Corrupted.builder_configs)
    for kind in cifar.KINDS:
        assert {f"{kind}_{severity}" for severity in range(1, 6)} <= configs
    assert len(set(cifar.KINDS)) == 15


@pytest.mark.parametrize("domain", ["fog", "fog_6", "rain_3", "_3", ""])
def test_unknown_cifar_domains_are_refused(domain, tmp_path):
    with pytest.raises(ValueError, match=f"domain must be .* got {domain!r}"):
        cifar.load(domain, str(tmp_path))


class Coco(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Stands for TFDS's, whose code asks for TensorFlow at once."""

    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2014")]  # noqa: RUF012
    name = "coco"


def picture(colour, mode="RGB"):
    """The file of a picture twice as wide as high, with a black right half.

    A PNG, which keeps the colour, where COCO has JPEGs; what reads both is the same.
    """
    image = Image.new(mode, (80, 40))
    image.paste(colour, (0, 0, 40, 40))
    file = io.BytesIO()
    image.save(file, format="PNG")
    file.seek(0)
    return file


# Objects as (class, top, left, bottom, right), and the label.
SCENES = [
    ([], 0),
    ([("person", 0.1, 0.1, 0.2, 0.2)], 1),  # 1% of the picture
    ([("person", 0.0, 0.3, 0.1, 0.34)], 0),  # 0.4%
    ([("dog", 0.0, 0.0, 1.0, 1.0)], 0),
    ([("dog", 0.0, 0.0, 1.0, 1.0), ("person", 0.5, 0.5, 0.55, 0.55)], 0),
    ([("person", 0.0, 0.0, 0.01, 0.01), ("person", 0.0, 0.2, 1.0, 0.3)], 1),
]


def scene(number):
    objects, _ = SCENES[number % len(SCENES)]
    grey = number % 2
    # The number is in the red of the picture, or in its grey.
    colour = 4 * number if grey else (4 * number, 0, 128)
    return {
        "image": picture(colour, "L" if grey else "RGB"),
        "image/filename": f"{number}.jpg",
        "image/id": number,
        "objects": [
            {
                "id": i,
                "area": 1,
                "bbox": tfds.features.BBox(*box),
                "label": name,
                "is_crowd": False,
            }
            for i, (name, *box) in enumerate(objects)
        ],
    }


@pytest.fixture(scope="module")
def coco_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("coco")
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(
                {
                    "id": np.int64,
                    "area": np.int64,
                    "bbox": tfds.features.BBoxFeature(),
                    "label": tfds.features.ClassLabel(names=["dog", "person"]),
                    "is_crowd": np.bool_,
                }
            ),
        }
    )
    # The test set has no annotations.
    sizes = {"train": 60, "validation": 24, "test": 3}
    scenes = {name: [scene(n) for n in range(size)] for name, size in sizes.items()}
    prepared(Coco, data_dir, features, scenes, config="2014")
    return str(data_dir)


def test_wake_words_are_persons_of_some_size(coco_dir):
    splits = registry.DATASETS["visual_wake_words"]("8", coco_dir)
    seen = {}
    for name, split in splits.items():
        images = np.asarray(split.images)
        assert images.shape[1:] == (8, 8, 3)
        np.testing.assert_allclose(images[:, :, 5:], 0, atol=0.03)  # the right half
        reds = images[:, 4, 0, 0] * 255
        found = np.rint(reds / 4).astype(int)
        labels = [SCENES[n % len(SCENES)][1] for n in found]
        np.testing.assert_array_equal(split.labels, labels)
        # Pictures of one channel have three alike.
        grey = found % 2 == 1
        np.testing.assert_array_equal(images[grey][..., 0], images[grey][..., 2])
        seen[name] = sorted(found.tolist())
    assert len(seen["validation"]) == 6
    assert sorted(seen["train"] + seen["validation"]) == list(range(60))
    assert seen["test"] == list(range(24))


def test_some_wake_words_can_be_read(coco_dir):
    splits, whole = (wake_words.load(domain, coco_dir) for domain in ("8_10", "8"))
    sizes = {name: len(split.labels) for name, split in splits.items()}
    assert sizes == {"train": 10, "validation": 6, "test": 10}
    for name, split in splits.items():
        np.testing.assert_array_equal(
            split.images, whole[name].images[: len(split.labels)]
        )


@pytest.mark.parametrize("domain", ["0", "96_0", "96_", "small", "96_5%"])
def test_unknown_wake_word_domains_are_refused(domain, tmp_path):
    with pytest.raises(ValueError, match=f"pixels of a side, .* got {domain!r}"):
        wake_words.load(domain, str(tmp_path))


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow prepares it"
)
@pytest.mark.parametrize("name", ["cifar10:3.0.2", "coco/2014:1.1.0"])
def test_a_dataset_that_is_not_prepared_is_named(name, tmp_path):
    with pytest.raises(ModuleNotFoundError, match=f"{name} is not prepared in .* once"):
        catalogue.builder(name, str(tmp_path))


def test_a_dataset_is_prepared_where_tensorflow_is(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    prepared_for = []
    monkeypatch.setattr(
        tfds.core.DatasetBuilder,
        "download_and_prepare",
        lambda self: prepared_for.append(self.name),
    )
    catalogue.builder("cifar10:3.0.2", str(tmp_path))
    assert prepared_for == ["cifar10"]


@pytest.fixture
def narrow_weights(tmp_path, monkeypatch):
    """A small file of timm's, which the network "vit_tiny" reads."""
    network = functools.partial(
        vit.ViT, patch=8, width=96, depth=2, num_heads=4, mlp_width=384
    )
    monkeypatch.setitem(registry.NETWORKS, "vit_tiny", network)
    path = tmp_path / "narrow.safetensors"
    save_file(record_vit.random_state_dict("narrow"), path)
    return str(path)


@pytest.mark.slow
def test_published_weights_move_to_wake_words(narrow_weights, coco_dir, tmp_path):
    config = config_of(wake_words_config.get_config("smoke"), narrow_weights, coco_dir)
    config.run, config.seeds = ("lp_backprop",), (0,)
    config.methods.lp_backprop.steps = 1
    config.methods.lp_backprop.learning_rates = (0.1,)
    results = training.run(config, str(tmp_path / "run"))
    assert 0 <= results["lp_backprop"]["accuracy"] <= 1


@pytest.mark.slow
def test_published_weights_move_to_corrupted_cifar(narrow_weights, cifar_dir, tmp_path):
    config = config_of(ood.get_config("cifar10"), narrow_weights, cifar_dir)
    part = config.parts.severity_3
    assert (part.weights, part.data_dir) == (narrow_weights, str(cifar_dir))
    part.pretrain.steps, part.image_side = 0, 16
    with progress.show_progress() as told:
        task = training.prepare(part, tmp_path, told)
    # Each of the target's test images is in one of the fifteen kinds.
    assert task.target["test"].images.shape[1:] == (16, 16, 3)
    positions = task.start["positions"]
    assert positions.shape == (1, 1 + 4, 96)


def config_of(config, weights, data_dir):
    """A configuration with its weights and data."""
    config.weights, config.data_dir = weights, str(data_dir)
    return config
