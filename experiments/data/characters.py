"""Letters of five scripts, drawn from fonts that a package carries, for few-shot tasks.

The glyphs are those of the DejaVu fonts in matplotlib, under their own free licence
(Bitstream Vera's and Arev's: images of text may be used without restriction). Each is
rotated, sheared, stretched and bent at random, as a hand might.
"""

import dataclasses
import functools
import pathlib
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import tensorflow_datasets as tfds
from fontTools import ttLib
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

# Each script in one split, so that not even a relative of a class is in two.
SCRIPTS = {
    "train": ("LATIN", "GREEK"),
    "validation": ("CYRILLIC",),
    "test": ("ARMENIAN", "GEORGIAN"),
}
_SLANTS = ("", "-Bold", "-Oblique", "-BoldOblique")
# Validation and test are of fonts that train does not have, too.
_SANS_AND_MONO = tuple(
    f"DejaVuSans{m}{slant}" for m in ("", "Mono") for slant in _SLANTS
)
_SERIF = tuple(f"DejaVuSerif{s.replace('Oblique', 'Italic')}" for s in _SLANTS)
FONTS = {"train": _SANS_AND_MONO, "validation": _SERIF, "test": _SERIF}
# By which letters are compared, and which have to be in all fonts of a split.
_REFERENCE = "DejaVuSans"

_IMAGES = 32  # of each class
_CANVAS = 64  # pixels, where a glyph is drawn and bent before it gets its size
_GLYPH = 40  # of its longer side
# A letter whose image correlates so much with that of an earlier one is left out: most
# capitals with a small letter of their shape, and what scripts have in common.
_ALIKE = 0.9


@dataclasses.dataclass
class CharactersConfig(tfds.core.BuilderConfig):
    """A size.

    Attributes:
      size: height and width in pixels.
      most: letters of each script, at most, in the order of Unicode; None for all.
    """

    size: int = 32
    most: int | None = None


class Characters(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]  # mypy does not see tfds
):
    """Builder of the letters at a size; works without TensorFlow.

    Configurations are "16" and "32", the pixels of a side. The splits are class-
    disjoint, each with scripts and fonts of its own: "train" is of Latin and Greek
    letters in eight faces of DejaVu Sans and Sans Mono, "validation" of Cyrillic ones
    and "test" of Armenian and Georgian ones in the four faces of DejaVu Serif. A letter
    that looks like an earlier one is left out, in whatever script that is.

    The label is the number of the letter over all splits; "character" is its code point
    and "font" the number of the face in `FONTS`. A class has 32 images.

    Preparing takes about a minute.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012  (the name and type are TFDS's)
        CharactersConfig(
            name=str(size), description=f"{size}x{size} pixels.", size=size
        )
        for size in (16, 32)
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.size
        if size < 1:
            raise ValueError(f"size must be positive, got {size}.")
        scalar = tfds.features.Tensor(shape=(), dtype=np.int32)
        features = tfds.features.FeaturesDict(
            {
                # Tensor, not Image: decoding PNG would need TensorFlow.
                "image": tfds.features.Tensor(shape=(size, size, 1), dtype=np.uint8),
                "label": scalar,
                "character": scalar,
                "font": scalar,
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=features,
            homepage="https://dejavu-fonts.github.io",
            license="https://dejavu-fonts.github.io/License.html",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # the package carries the fonts
        chosen = letters(self.builder_config.most)
        starts = np.cumsum([0, *(len(of_split) for of_split in chosen.values())])
        return {
            split: self._generate_examples(split, of_split, int(start))
            for (split, of_split), start in zip(chosen.items(), starts, strict=False)
        }

    def _generate_examples(
        self, split: str, codes: Sequence[int], start: int
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        size = self.builder_config.size
        fonts = FONTS[split]
        for label, code in enumerate(codes, start=start):
            for index in range(_IMAGES):
                font = index % len(fonts)
                rng = np.random.default_rng((code, index))
                image = bent(glyph(chr(code), fonts[font]), rng)
                small = Image.fromarray(image).resize(
                    (size, size), Image.Resampling.BOX
                )
                yield (
                    f"{code}_{index}",
                    {
                        "image": np.asarray(small)[..., None],
                        "label": label,
                        "character": code,
                        "font": font,
                    },
                )


def letters(most: int | None = None) -> dict[str, list[int]]:
    """The code points of each split.

    They are letters that do not decompose into others and accents, in all fonts of
    their split.

    Args:
      most: of each script, at most; None for all.

    Returns:
      By the names of the splits, in the order of Unicode in each script.

    Example:
      >>> "".join(map(chr, letters(most=6)["test"]))
      'ԱԲԳԴԵԶႠႡႢႣႤႥ'
    """
    seen: list[np.ndarray] = []
    found: dict[str, list[int]] = {}
    for split, scripts in SCRIPTS.items():
        in_all = frozenset.intersection(*map(_code_points, {*FONTS[split], _REFERENCE}))
        found[split] = []
        for script in scripts:
            own = 0
            for code in sorted(in_all):
                if own == most:
                    break
                if not _is_letter(chr(code), script):
                    continue
                look = _look(code)
                if seen and np.max(np.stack(seen) @ look) > _ALIKE:
                    continue
                seen.append(look)
                found[split].append(code)
                own += 1
    return found


def _is_letter(character: str, script: str) -> bool:
    return (
        unicodedata.category(character) in ("Lu", "Ll", "Lo")
        and not unicodedata.decomposition(character)
        and unicodedata.name(character, "").startswith(f"{script} ")
    )


def _look(code: int) -> np.ndarray:
    """A unit vector of mean 0, of the glyph stretched to a square."""
    drawn = glyph(chr(code), _REFERENCE)
    box = Image.fromarray(drawn).getbbox()
    square = Image.fromarray(drawn).crop(box).resize((24, 24), Image.Resampling.BOX)
    blurred = ndimage.gaussian_filter(np.asarray(square, np.float64), 1)
    centred = (blurred - blurred.mean()).ravel()
    return centred / max(np.linalg.norm(centred), 1e-9)


class _Face(NamedTuple):
    """A font at a size where glyphs are measured."""

    path: pathlib.Path
    font: ImageFont.FreeTypeFont


@functools.cache
def _face(name: str) -> _Face:
    path = pathlib.Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return _Face(path, ImageFont.truetype(path, _CANVAS))


@functools.cache
def _code_points(name: str) -> frozenset[int]:
    with ttLib.TTFont(_face(name).path, lazy=True) as font:
        return frozenset(font["cmap"].getBestCmap())


@functools.lru_cache(maxsize=64)
def glyph(character: str, font: str) -> np.ndarray:
    """Draws a character, white on black, in the middle of a canvas.

    Args:
      character: one.
      font: name of a file of matplotlib's, such as "DejaVuSans".

    Returns:
      uint8 [64, 64]; its longer side is 40 pixels.
    """
    face = _face(font).font
    left, top, right, bottom = face.getbbox(character)
    scale = _GLYPH / max(right - left, bottom - top, 1)
    face = face.font_variant(size=_CANVAS * scale)
    drawn = Image.new("L", (2 * _CANVAS, 2 * _CANVAS))
    middle = (_CANVAS, _CANVAS)
    ImageDraw.Draw(drawn).text(middle, character, fill=255, font=face, anchor="mm")
    # Of what is drawn, since a glyph may stand out of its font's box.
    left, top, right, bottom = drawn.getbbox() or (0, 0, 1, 1)
    image = Image.new("L", (_CANVAS, _CANVAS))
    corner = (_CANVAS - right + left) // 2, (_CANVAS - bottom + top) // 2
    image.paste(drawn.crop((left, top, right, bottom)), corner)
    return np.asarray(image)


def bent(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves what an image shows: rotated, sheared, stretched, shifted and bent.

    Args:
      image: uint8 [side, side].
      rng: decides how; by standard deviations of 10 degrees, 0.15, 12%, 3% of the side
        and a smooth displacement of 3%.

    Returns:
      uint8 of the same shape.
    """
    side = len(image)
    angle, shear = rng.normal(0, [np.deg2rad(10), 0.15])
    stretch = np.exp(rng.normal(0, 0.12, 2))
    turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix = np.array(turn) @ [[1, 0], [shear, 1]] @ np.diag(stretch)
    smooth = ndimage.gaussian_filter(
        rng.normal(size=(2, side, side)), (0, side / 8, side / 8), mode="constant"
    )
    smooth *= 0.03 * side / smooth.std()
    grid = np.indices(image.shape) - (side - 1) / 2
    places = np.tensordot(matrix, grid, 1) + (side - 1) / 2 + smooth
    places += rng.normal(0, 0.03 * side, (2, 1, 1))
    moved = ndimage.map_coordinates(image.astype(np.float32), places, order=1)
    return np.clip(np.rint(moved), 0, 255).astype(np.uint8)


_DESCRIPTION = """
Letters of five scripts in the fonts of matplotlib, 32 images of each, rotated, sheared,
stretched and bent at random. The splits share neither classes nor scripts nor fonts:
"train" has Latin and Greek letters in DejaVu Sans and Sans Mono, "validation" Cyrillic,
"test" Armenian and Georgian ones in DejaVu Serif. The fonts are under the licences of
Bitstream Vera and Arev, https://dejavu-fonts.github.io/License.html.
"""
