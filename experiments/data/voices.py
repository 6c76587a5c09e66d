"""Whose recording is it? Letters, syllables and words in 37 sets that Debian carries.

Each set is one voice in one language, made in one way; a class is all of these.
The recordings are read from Debian's packages, which this project does not pass on:

  klettres-data: GPL-2+; letters and syllables of a game that teaches them.
  ktuberling-data: GPL-2+; words of a game.
  asterisk-core-sounds-{en,es,fr,it,ru}-wav: CC BY-SA 3.0 (English, Spanish: Allison
    Smith; French: June Wallack) and CC BY 3.0 (Italian: Carlo Flora; Russian: Maxim
    Topal); prompts of a telephone exchange.
"""

import io
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from experiments import audio
from experiments.data import archives, sounds
from experiments.data.debian import files

PACKAGES = (
    "klettres-data",
    "ktuberling-data",
    *(
        f"asterisk-core-sounds-{language}-wav"
        for language in ["en", "es", "fr", "it", "ru"]
    ),
)
# SHA-256 of the packages of Debian 12, of which the numbers below are.
CHECKSUMS = {
    "asterisk-core-sounds-en-wav_1.6.1-1_all.deb": (
        "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d"
    ),
    "asterisk-core-sounds-es-wav_1.6.1-1_all.deb": (
        "9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903"
    ),
    "asterisk-core-sounds-fr-wav_1.6.1-1_all.deb": (
        "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e"
    ),
    "asterisk-core-sounds-it-wav_1.6.1-1_all.deb": (
        "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb"
    ),
    "asterisk-core-sounds-ru-wav_1.6.1-1_all.deb": (
        "ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201"
    ),
    "klettres-data_4%3a22.12.3-1_all.deb": (
        "1186d257a19e84230856baea0b0b1ded8be9195080fcdb2588970b5cd937f5a8"
    ),
    "ktuberling-data_4%3a22.12.3-1_all.deb": (
        "fba44c875bfa31ea488dadd9263e87a4dcaea0bd47d28817f6c0dc6d2af970ed"
    ),
}
# Languages, all sets of one in the same split: a voice may be in two of them, as
# Allison Smith's is in English and Spanish. Ours; nobody has published any.
LANGUAGES = {
    "train": ("da", "de", "en", "es", "fr", "it", "ru", "uk"),
    "validation": ("cs", "lt", "nb", "nds", "nl", "pt"),
    "test": ("ar", "ca", "el", "gl", "he", "hu", "ml", "sl", "tn", "wa"),
}
_FEWEST = 25  # recordings of a set; smaller ones are left out
_MOST = 60  # evenly among them, by name
_FOLDERS = re.compile(
    r"usr/share/(?:(klettres)/(?P<k>\w+)/(?:alpha|syllab)"
    r"|(ktuberling)/sounds/(?P<t>[\w@]+)"
    r"|(asterisk)/sounds/(?P<a>[a-z]{2})_\w+(?:/(?!silence)\w+)?)/[^/]+\.(?:wav|ogg)"
)


class Voices(sounds.Sounds):
    """Builder of the recordings; works without TensorFlow.

    Configurations are "1s" and "2s", the length of every example. The splits share
    neither sets nor languages: 20 sets in train, 7 in validation and 10 in test, each
    of 28 to 60 recordings, resampled to 16 kHz.
    """

    BUILDER_CONFIGS = [  # noqa: RUF012  (the name and type are TFDS's)
        sounds.SoundsConfig(
            name=f"{seconds}s",
            description=f"The middle of each recording: {seconds} s.",
            seconds=float(seconds),
        )
        for seconds in (1, 2)
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "In TFDS's folder for manual downloads (downloads/manual in the data_dir), on "
        f"Debian or a relative of it: apt-get download {' '.join(PACKAGES)}"
    )
    DESCRIPTION = """
    Recordings of letters, syllables, words and phrases in 37 sets, of Debian's packages
    klettres-data, ktuberling-data and asterisk-core-sounds-*-wav. The label is
    the set: a voice in a language, recorded in one way. The splits are disjoint by
    language. Licences: GPL-2+ (klettres, ktuberling), CC BY-SA 3.0 and CC BY 3.0
    (asterisk), see the packages' copyright files.
    """
    CITATION = ""
    HOMEPAGE = "https://packages.debian.org"
    LICENSE = "GPL-2+, CC BY-SA 3.0 and CC BY 3.0, by package"

    def recordings(
        self, folder: pathlib.Path
    ) -> Mapping[str, Iterator[sounds.Recording]]:
        """Those of each split, of the packages in the folder."""
        sets: dict[tuple[str, str], dict[str, bytes]] = defaultdict(dict)
        for package in PACKAGES:
            path = _package(folder, package)
            archives.verify(path, CHECKSUMS)
            for name, content in files(path):
                if match := _FOLDERS.fullmatch(name):
                    language = match["k"] or match["t"] or match["a"]
                    game = next(filter(None, match.groups()))
                    sets[language, game][name] = content
        large = sorted(key for key, found in sets.items() if len(found) >= _FEWEST)
        labels = {key: label for label, key in enumerate(large)}

        def of_split(languages: tuple[str, ...]) -> Iterator[sounds.Recording]:
            for key, label in labels.items():
                if key[0].partition("_")[0] in languages:
                    yield from _read(sets[key], label)

        return {split: of_split(languages) for split, languages in LANGUAGES.items()}


def _read(found: Mapping[str, bytes], label: int) -> Iterator[sounds.Recording]:
    names = sorted(found)
    count = min(_MOST, len(names))
    for index in range(count):
        name = names[index * len(names) // count]
        content = io.BytesIO(found[name])
        samples = audio.read(content, sounds.SAMPLE_RATE, name=name)
        yield sounds.Recording(name, samples, label)


def _package(folder: pathlib.Path, package: str) -> pathlib.Path:
    paths = sorted(folder.glob(f"{package}_*.deb"))
    if not paths:
        raise FileNotFoundError(
            f"{folder} has no {package}_*.deb. {Voices.MANUAL_DOWNLOAD_INSTRUCTIONS}"
        )
    return paths[-1]
