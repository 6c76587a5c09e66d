"""Public few-shot data, by tiny archives of the official layouts."""

import csv
import importlib.util
import io
import pickle
import tempfile
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from lanes import some
from PIL import Image
from tensorflow_datasets.image_classification import caltech_birds
from test_catalogue import prepared
from test_few_shot import Tiny

from experiments import registry
from experiments.configs import fewshot_audio, fewshot_vision
from experiments.data import (
    archives,
    arrays,
    few_shot_images,
    imagenet_subsets,
    sound_events,
    sounds,
)
from experiments.drivers import few_shot
from experiments.learners import episodes


def grey(level, size=8, mode="RGB"):
    return Image.new(
        mode, (size, size), (level,) * len(mode) if mode == "RGB" else level
    )


def encoded(level, extension):
    file = io.BytesIO()
    grey(level).save(file, extension)
    return file.getvalue()


def levels(split):
    """The grey level and the label of each image."""
    pixels = np.rint(np.asarray(split.images).mean((1, 2, 3)) * 255).astype(int)
    return sorted(zip(pixels.tolist(), split.labels.tolist(), strict=True))


class Pooled(Tiny):
    """Of images of any size."""

    def __call__(self, x, start=0, stop=None):
        return super().__call__(x if start else x.mean((1, 2)), start, stop)


@pytest.fixture(autouse=True)
def pooled_network(monkeypatch):
    monkeypatch.setitem(registry.NETWORKS, "tiny", Pooled)


def smoke(kind, dataset, data_dir, **changes):
    """Runs a configuration's smoke setting, of tasks that tiny data has."""
    get_config = {"vision": fewshot_vision, "audio": fewshot_audio}[kind].get_config
    head = ["simpleshot"] if kind == "audio" else []
    config = get_config(",".join([dataset, "tiny", *head, "smoke"]))
    config.data_dir, config.k_shot, config.num_queries = str(data_dir), 1, 1
    config.input_shift = 0
    for name, value in changes.items():
        config[name] = value
    with tempfile.TemporaryDirectory() as workdir:
        results = few_shot.run(config, workdir)
    assert list(results) == ["zero_shot", "lp_backprop", "lp_16w8a"]
    assert all(len(result["accuracies"]) == 4 for result in results.values())


def manual(root):
    folder = root / "downloads" / "manual"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def cifar_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("cifar")
    held_out = " ".join(few_shot_images.CIFAR_FS.values()).split()
    names = sorted([*held_out, *(f"other_{i}" for i in range(64))])
    assert len(set(names)) == 100
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(32, 32, 3)),
            "label": tfds.features.ClassLabel(names=names),
        }
    )
    examples = {
        split: [{"image": grey(2 * n + 1, 32), "label": n} for n in part]
        for split, part in (("train", range(100)), ("test", range(100)))
    }
    builder = tfds.image_classification.Cifar100
    prepared(builder, data_dir, features, examples)
    return str(data_dir), names


@pytest.mark.slow
def test_cifar_fs_has_its_published_classes(cifar_dir):
    data_dir, names = cifar_dir
    splits = few_shot_images.load("cifar_fs", data_dir)
    episodes.check_disjoint({name: split.labels for name, split in splits.items()})
    sizes = {name: len(set(s.labels.tolist())) for name, s in splits.items()}
    assert sizes == {"train": 64, "validation": 16, "test": 20}
    found = [pair for split in splits.values() for pair in levels(split)]
    assert sorted(found) == [(2 * n + 1, n) for n in range(100) for _ in "12"]
    test = {names[label] for label in splits["test"].labels.tolist()}
    assert {"whale", "rocket", "woman"} <= test
    assert test == set(few_shot_images.CIFAR_FS["test"].split())
    smoke("vision", "cifar_fs", data_dir)


@pytest.mark.slow
def test_cub_is_split_by_number(tmp_path):
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=200),
        }
    )
    examples = {
        split: [
            {"image": grey(n, 10 + n % 3), "label": n}
            for n in range(first, 200, 2)
            for _ in "12"
        ]
        for split, first in (("train", 0), ("test", 1))
    }
    prepared(caltech_birds.CaltechBirds2011, tmp_path, features, examples)
    splits = few_shot_images.load("cub_8", str(tmp_path))
    assert splits["test"].images.shape == (100, 8, 8, 3)
    for name, classes in (
        ("train", range(0, 200, 2)),
        ("validation", range(1, 200, 4)),
        ("test", range(3, 200, 4)),
    ):
        assert levels(splits[name]) == [(n, n) for n in classes for _ in "12"]
    smoke("vision", "cub", tmp_path, domain="cub_8")


@pytest.mark.slow
def test_omniglot_is_split_by_alphabets(tmp_path):
    # Two letters of each alphabet.
    alphabets = [f"alphabet_{i:02d}" for i in range(12)]
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(105, 105, 3), encoding_format="png"),
            "alphabet": tfds.features.ClassLabel(names=alphabets),
            "alphabet_char_id": np.int64,
            "label": tfds.features.ClassLabel(num_classes=24),
        }
    )

    def example(n):
        image = {"image": grey(255 - 5 * n, 105), "alphabet": n // 2}
        return {**image, "alphabet_char_id": n % 2, "label": n}

    examples = {
        "train": [example(n) for n in range(16) for _ in "12"],
        "test": [example(n) for n in range(16, 24) for _ in "12"],
    }
    prepared(tfds.image_classification.Omniglot, tmp_path, features, examples)
    splits = few_shot_images.load("omniglot_28", str(tmp_path))
    assert splits["train"].images.shape == (12, 28, 28, 1)
    # Of eight background alphabets the last five; white on black.
    for name, classes in (
        ("train", range(6)),
        ("validation", range(6, 16)),
        ("test", range(16, 24)),
    ):
        assert levels(splits[name]) == [(5 * n, n) for n in classes for _ in "12"]
    smoke("vision", "omniglot", tmp_path)


@pytest.mark.parametrize("domain", ["cifar", "cub", "cub_0", "omniglot_28x28"])
def test_unknown_domains_are_refused(domain, tmp_path):
    with pytest.raises(ValueError, match=f"such as .*, got {domain!r}"):
        few_shot_images.load(domain, str(tmp_path))


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow prepares it"
)
@pytest.mark.parametrize("domain", ["cifar_fs", "cub_84", "omniglot_28"])
def test_what_is_not_prepared_is_named(domain, tmp_path):
    with pytest.raises(ModuleNotFoundError, match=r"is not prepared in .* once"):
        few_shot_images.load(domain, str(tmp_path))


WORDNET = {"train": ("n03", "n01"), "val": ("n04", "n06"), "test": ("n02", "n05")}


def write_mini(root):
    """Three pictures of each class; the grey level tells the class."""
    (root / "images").mkdir(parents=True)
    for split, names in WORDNET.items():
        with (root / f"{split}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["filename", "label"])
            for name in names:
                for index in range(3):
                    table.writerow([f"{name}{index}.jpg", name])
                    content = encoded(40 * int(name[1:]), "jpeg")
                    (root / "images" / f"{name}{index}.jpg").write_bytes(content)


def zipped(folder):
    """Replaces a folder by a zip of it."""
    with zipfile.ZipFile(folder.with_name(f"{folder.name}.zip"), "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder.parent))
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


@pytest.mark.parametrize("packed", some([False, True], [True]))
def test_mini_imagenet_is_split_by_its_files(packed, tmp_path):
    folder = manual(tmp_path) / "miniImageNet"
    write_mini(folder)
    if packed:
        zipped(folder)
    config = imagenet_subsets.SubsetConfig(name="6", size=6)
    splits = arrays.load(
        imagenet_subsets.MiniImageNet(
            config=config, data_dir=str(tmp_path), file_format="array_record"
        )
    )
    assert splits["train"].images.shape == (6, 6, 6, 3)
    for name, split in (("train", "train"), ("validation", "val"), ("test", "test")):
        numbers = sorted(int(wordnet[1:]) for wordnet in WORDNET[split])
        assert levels(splits[name]) == [(40 * n, n - 1) for n in numbers for _ in "123"]
    if not packed:
        smoke("vision", "mini_imagenet", tmp_path, n_way=2)


@pytest.mark.slow
def test_tiered_imagenet_is_split_by_its_files(tmp_path):
    folder = manual(tmp_path) / "tiered-imagenet"
    folder.mkdir()
    start, expected = 0, {}
    for split, count in (("train", 3), ("val", 2), ("test", 2)):
        labels = np.repeat(np.arange(count), 2)
        # PNG bytes as OpenCV makes them: a column of uint8.
        images = [
            np.frombuffer(encoded(30 * (start + label), "png"), np.uint8)[:, None]
            for label in labels
        ]
        names = {"label_specific": labels, "label_specific_str": ["a"] * count}
        for part, content in (("images_png", images), ("labels", names)):
            with (folder / f"{split}_{part}.pkl").open("wb") as file:
                pickle.dump(content, file, protocol=2)
        expected[split] = [(30 * (start + n), start + n) for n in labels.tolist()]
        start += count
    config = imagenet_subsets.SubsetConfig(name="6", size=6)
    splits = arrays.load(
        imagenet_subsets.TieredImageNet(
            config=config, data_dir=str(tmp_path), file_format="array_record"
        )
    )
    for name, split in (("train", "train"), ("validation", "val"), ("test", "test")):
        assert levels(splits[name]) == expected[split]
    smoke("vision", "tiered_imagenet", tmp_path, n_way=2)


def test_pickles_of_old_python_are_read_and_code_is_not_run(tmp_path):
    # What Python 2 wrote of {"label_specific": array([1, 2], uint8)}.
    old = (
        b"\x80\x02}q\x00U\x0elabel_specificcnumpy.core.multiarray\n_reconstruct\n"
        b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\n"
        b"U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00"
        b"tb\x89U\x02\x01\x02tbs."
    )
    found = archives.load_pickle(io.BytesIO(old))["label_specific"]
    np.testing.assert_array_equal(found, np.array([1, 2], np.uint8))

    class Touch:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    with pytest.raises(ValueError, match=r"asks for (_io|io).open, which no array"):
        archives.load_pickle(io.BytesIO(pickle.dumps(Touch())))
    assert not (tmp_path / "touched").exists()


KINDS = {
    **{"dog": "train", "rain": "train", "cow": "validation"},
    **{"bell": "test", "owl": "validation", "wind": "test"},
}


def write_split(path, parts=None):
    parts = parts or [
        [name for name, split in KINDS.items() if split == wanted]
        for wanted in ("train", "validation", "test")
    ]
    array = np.empty(3, object)
    array[:] = [np.array(part) for part in parts]
    np.save(path, array, allow_pickle=True)


def wav(level):
    """A quarter of a second, up and down; the height tells the level, too."""
    soundfile = pytest.importorskip("soundfile")
    file = io.BytesIO()
    high = np.arange(4000) // round(40 * level) % 2
    soundfile.write(file, np.where(high, level, -level), 16_000, format="wav")
    return file.getvalue()


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def heard(builder):
    """Class and level of each recording, by split."""
    classes = sorted(KINDS)
    return {
        split: sorted(
            (classes[e["label"]], round(e["audio"].max() / 32767, 2))
            for e in builder.as_data_source(split)
        )
        for split in builder.info.splits
    }


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_esc50_is_read(packed, tmp_path):
    root = manual(tmp_path) / "ESC-50-master"
    (root / "audio").mkdir(parents=True)
    rows, expected = [], {"train": [], "validation": [], "test": []}
    for number, (kind, split) in enumerate(KINDS.items()):
        for take in range(2):
            name, level = f"1-{number}-{take}.wav", 0.1 * (number + 1) + 0.03 * take
            (root / "audio" / name).write_bytes(wav(level))
            rows.append([name, 1, number, kind, False, number, "A"])
            expected[split].append((kind, round(level, 2)))
    header = ["filename", "fold", "target", "category", "esc10", "src_file", "take"]
    write_csv(root / "meta" / "esc50.csv", header, rows)
    write_split(manual(tmp_path) / "ESC_paper_splits.npy")
    if packed:
        zipped(root)
    builder = sound_events.Esc50(data_dir=str(tmp_path), file_format="array_record")
    splits = sounds.load(builder, num_mels=8, hop_seconds=0.1)
    assert splits["train"].images.shape == (4, 50, 8, 1)
    assert heard(builder) == {name: sorted(pairs) for name, pairs in expected.items()}
    if not packed:
        smoke("audio", "esc50", tmp_path, n_way=2)


@pytest.mark.slow
def test_fsdkaggle2018_is_read(tmp_path):
    folder, number = manual(tmp_path), 0
    expected = {"train": [], "validation": [], "test": []}
    for part, table in (
        ("train", "train_post_competition.csv"),
        ("test", "test_post_competition_scoring_clips.csv"),
    ):
        rows = []
        root = folder / f"FSDKaggle2018.audio_{part}"
        root.mkdir()
        for kind, split in KINDS.items():
            number += 1
            level = round(0.05 * number, 2)
            (root / f"{number:08x}.wav").write_bytes(wav(level))
            rows.append([f"{number:08x}.wav", kind, "CC0"])
            expected[split].append((kind, level))
        header = ["fname", "label", "license"]
        write_csv(folder / "FSDKaggle2018.meta" / table, header, rows)
    write_split(folder / sound_events.FSD_SPLIT)
    builder = sound_events.FsdKaggle2018(
        data_dir=str(tmp_path), file_format="array_record"
    )
    builder.download_and_prepare()
    assert heard(builder) == {name: sorted(pairs) for name, pairs in expected.items()}
    smoke("audio", "fsdkaggle2018", tmp_path, n_way=2)


def test_missing_and_wrong_class_splits_are_named(tmp_path):
    classes = sorted(KINDS)
    with pytest.raises(FileNotFoundError, match=r"has no s.npy. Get it there."):
        sound_events.class_split(tmp_path, "s.npy", classes, "Get it there.")
    write_split(tmp_path / "s.npy", [["dog"], ["cow"], ["whale", "zebra"]])
    with pytest.raises(ValueError, match=r"names the classes \['whale', 'zebra'\]"):
        sound_events.class_split(tmp_path, "s.npy", classes, "")
    write_split(tmp_path / "s.npy", [["dog"], ["cow"], ["cow", "bell"]])
    with pytest.raises(ValueError, match="has a class in two splits"):
        sound_events.class_split(tmp_path, "s.npy", classes, "")


@pytest.mark.parametrize(
    ("builder", "match"),
    [
        (imagenet_subsets.MiniImageNet, r"miniImageNet.zip.*meta-learning-lstm"),
        (imagenet_subsets.TieredImageNet, r"tiered-imagenet.zip.*few-shot-ssl-public"),
        (sound_events.Esc50, r"ESC-50-master.zip.*karolpiczak"),
        (sound_events.FsdKaggle2018, r"FSDKaggle2018.meta.zip.*zenodo"),
    ],
)
def test_missing_archives_are_named(builder, match, tmp_path):
    (manual(tmp_path) / "notes.txt").touch()  # of an empty folder TFDS speaks
    config = next(iter(builder.builder_configs))
    with pytest.raises(FileNotFoundError, match=match):
        builder(config=config, data_dir=str(tmp_path)).download_and_prepare()


def test_names_that_lead_out_of_a_folder_are_refused(tmp_path):
    """A table must not make a file of elsewhere part of a dataset."""
    folder = manual(tmp_path)
    (folder / "secret.wav").write_bytes(b"secret")
    (folder / "ESC-50-master" / "audio").mkdir(parents=True)
    path = folder / "ESC-50-master" / "meta" / "esc50.csv"
    write_csv(path, ["filename", "category"], [["../../secret.wav", "dog"]])
    refused = r"esc50\.csv: the name '\.\./\.\./secret\.wav' leads out"
    with pytest.raises(ValueError, match=refused):
        sound_events.Esc50(data_dir=str(tmp_path)).recordings(folder)

    for part in ("audio_train", "audio_test"):
        (folder / f"FSDKaggle2018.{part}").mkdir()
    for name in ("train_post_competition", "test_post_competition_scoring_clips"):
        path = folder / "FSDKaggle2018.meta" / f"{name}.csv"
        write_csv(path, ["fname", "label"], [[str(folder / "secret.wav"), "dog"]])
    with pytest.raises(ValueError, match=r"competition\.csv: .* leads out"):
        sound_events.FsdKaggle2018(data_dir=str(tmp_path)).recordings(folder)

    for name in ("train", "val", "test"):
        path = folder / "miniImageNet" / f"{name}.csv"
        write_csv(path, ["filename", "label"], [["../../secret.wav", "n01"]])
    with pytest.raises(ValueError, match=r"train\.csv: .* leads out"):
        imagenet_subsets.MiniImageNet(data_dir=str(tmp_path)).pictures(folder)


def test_a_class_split_of_other_than_names_is_refused(tmp_path):
    doubling = []
    for _ in range(60):  # its text has 2**60 parts
        doubling = [doubling, doubling]
    for part, match in (
        (doubling, "a part that is no list of names"),
        ([1, 2], "a part that is no list of names"),
        ("dog", "a part that is no list of names"),
        (None, "a part that is no list of names"),
    ):
        array = np.empty(3, object)
        array[:] = [["dog"], part, ["cow"]]
        np.save(tmp_path / "s.npy", array, allow_pickle=True)
        with pytest.raises(ValueError, match=rf"s\.npy has {match}"):
            sound_events.class_split(tmp_path, "s.npy", sorted(KINDS), "")
    for array in (np.array("dog"), np.array(["dog", "cow"]), np.zeros((3, 2, 2))):
        np.save(tmp_path / "s.npy", array)
        with pytest.raises(ValueError, match=r"s\.npy is not of three lists"):
            sound_events.class_split(tmp_path, "s.npy", sorted(KINDS), "")


def test_a_class_split_of_equal_lengths_is_read(tmp_path):
    parts = [["dog", "rain"], ["cow", "owl"], ["bell", "wind"]]
    expected = dict(zip(("train", "validation", "test"), parts, strict=True))
    for array in (np.array(parts), np.array(parts, object)):
        np.save(tmp_path / "s.npy", array, allow_pickle=True)
        found = sound_events.class_split(tmp_path, "s.npy", sorted(KINDS), "")
        assert found == expected


@pytest.mark.parametrize(
    "labels",
    [
        {"label_specific": [0, "1"]},
        {"label_specific": np.array([-1, 0])},
        {"label_specific": np.array([0.5, 1])},
        {"label_specific": np.array([[0, 1]])},
        {"label_specific": np.array([0, 2**40])},
        {"label_specific": []},
        {"label_general": [0]},
        [0, 1],
    ],
)
def test_labels_that_are_none_are_refused(labels, tmp_path):
    folder = manual(tmp_path) / "tiered-imagenet"
    folder.mkdir()
    (folder / "train_labels.pkl").write_bytes(pickle.dumps(labels))
    match = r"train_labels\.pkl: its \"label_specific\" is no list of labels"
    with pytest.raises(ValueError, match=match):
        imagenet_subsets.TieredImageNet(data_dir=str(tmp_path)).pictures(folder.parent)


@pytest.mark.parametrize("images", [[b"x"], "xy", {"a": 1}, [[0], [1]], [None, None]])
def test_pictures_that_are_none_are_refused(images, tmp_path):
    folder = manual(tmp_path) / "tiered-imagenet"
    folder.mkdir()
    for name in ("train", "val", "test"):
        labels = pickle.dumps({"label_specific": np.array([0, 1])})
        (folder / f"{name}_labels.pkl").write_bytes(labels)
    (folder / "train_images_png.pkl").write_bytes(pickle.dumps(images))
    builder = imagenet_subsets.TieredImageNet(data_dir=str(tmp_path))
    found = builder.pictures(folder.parent)
    with pytest.raises(ValueError, match=r"train_images_png\.pkl: it"):
        list(found["train"])
