import unicodedata

import numpy as np
import pytest
from scipy import ndimage
from sklearn import datasets

from experiments.data import arrays, characters, digits
from experiments.learners import episodes

MOST = 4  # letters of each script


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    config = characters.CharactersConfig(name="few", size=16, most=MOST)
    builder = characters.Characters(
        config=config,
        data_dir=str(tmp_path_factory.mktemp("data")),
        file_format="array_record",
    )
    builder.download_and_prepare()
    return builder


def test_splits_share_neither_classes_nor_scripts_nor_fonts(builder):
    splits = arrays.load(builder)
    episodes.check_disjoint({name: split.labels for name, split in splits.items()})
    seen = {}
    for name, scripts in characters.SCRIPTS.items():
        examples = list(builder.as_data_source(split=name))
        assert len(examples) == 32 * MOST * len(scripts)
        names = {chr(e["character"]): int(e["label"]) for e in examples}
        assert {unicodedata.name(c).split()[0] for c in names} == set(scripts)
        assert len(set(names.values())) == MOST * len(scripts)
        faces = {characters.FONTS[name][e["font"]] for e in examples}
        assert faces == set(characters.FONTS[name])
        seen[name] = set(names), faces
        # Labels go with characters.
        assert all(names[chr(e["character"])] == e["label"] for e in examples)
    for other in ("validation", "test"):
        assert not seen["train"][0] & seen[other][0]
        assert not seen["train"][1] & seen[other][1]
    counts = np.bincount(np.concatenate([split.labels for split in splits.values()]))
    np.testing.assert_array_equal(counts, 32)


def test_images_are_distinct_and_not_empty(builder):
    for split in arrays.load(builder).values():
        images = np.asarray(split.images)
        assert images.shape[1:] == (16, 16, 1)
        assert len({image.tobytes() for image in images}) == len(images)
        ink = images.mean((1, 2, 3))
        assert ink.min() > 0.02
        assert ink.max() < 0.6


def test_preparing_again_makes_the_same(builder, tmp_path):
    again = characters.Characters(
        config=builder.builder_config,
        data_dir=str(tmp_path),
        file_format="array_record",
    )
    for one, other in zip(
        arrays.load(builder).values(), arrays.load(again).values(), strict=True
    ):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)


def test_letters_that_look_alike_are_one():
    chosen = characters.letters(most=70)
    everything = {chr(code) for codes in chosen.values() for code in codes}
    # Latin, Greek and Cyrillic A; small and capital letters of one shape.
    assert "A" in everything
    assert not everything & set("ΑАcosvwxzАВЕЅѕ")
    assert {"a", "b", "e"} <= everything
    # Neither accents nor letters outside of what was asked for.
    assert not everything & set("Äéй")


def test_a_glyph_is_drawn_upright_in_the_middle():
    drawn = characters.glyph("L", "DejaVuSans")
    rows, columns = np.nonzero(drawn > 127)
    assert rows.min() + rows.max() == pytest.approx(63, abs=2)
    assert columns.min() + columns.max() == pytest.approx(63, abs=2)
    assert rows.max() - rows.min() + 1 == pytest.approx(40, abs=2)
    stem, foot = drawn[:, columns.min() : columns.min() + 4], drawn[rows.max() - 2]
    assert (stem > 127).sum(0).max() > 35
    assert (foot > 127).sum() > 15
    top, bottom = np.split(drawn, 2)
    assert bottom.sum() > top.sum()


def test_bending_keeps_the_amount_of_ink():
    drawn = characters.glyph("B", "DejaVuSans")
    rng = np.random.default_rng(0)
    many = np.stack([characters.bent(drawn, rng) for _ in range(200)])
    ratios = many.mean((1, 2)) / drawn.mean()
    # The stretch of two sides, 12% each.
    assert np.log(ratios).mean() == pytest.approx(0, abs=0.05)
    assert np.log(ratios).std() == pytest.approx(0.17, abs=0.05)
    centres = np.array([ndimage.center_of_mass(image) for image in many])
    np.testing.assert_allclose(centres.mean(0), ndimage.center_of_mass(drawn), atol=1.5)


def test_bad_sizes_are_refused(tmp_path):
    config = characters.CharactersConfig(name="none", size=0)
    with pytest.raises(ValueError, match="size must be positive, got 0"):
        characters.Characters(config=config, data_dir=str(tmp_path))


def test_digits_are_in_the_split_of_their_class(tmp_path):
    splits = arrays.load(
        digits.DigitClasses(data_dir=str(tmp_path), file_format="array_record")
    )
    images, labels = datasets.load_digits(return_X_y=True)
    expected = {"train": {0, 1, 2, 3}, "validation": {4, 5, 6}, "test": {7, 8, 9}}
    for name, split in splits.items():
        assert set(split.labels.tolist()) == expected[name]
        own = images[np.isin(labels, list(expected[name]))]
        found = np.rint(np.asarray(split.images).reshape(-1, 64) * 16)
        assert sorted(found.tolist()) == sorted(own.tolist())
