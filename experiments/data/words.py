"""Spoken words: twenty English words, said by eSpeak NG in 84 voices with noise.

No package carries recordings of one word by many people, so these are synthesised, when
the dataset is made, by the speech synthesiser in the package espeakng-loader. It is
under GPL-3.0-or-later and is loaded as a library; this project passes on neither it nor
what it says. It sounds mechanical, and its voices differ by less than people's do:
accuracies on these words are those of synthetic speech. The synthesiser goes on from
what it said before, so a dataset is the same to the bit if a fresh process makes it.
"""

import ctypes
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from experiments.data import sounds

# The first ten are those of a result; learning rates are chosen with the others.
WORDS = (
    *("lamp", "heater", "window", "music", "garden"),
    *("kitchen", "mirror", "candle", "radio", "blanket"),
    *("open", "close", "higher", "lower", "morning"),
    *("evening", "begin", "finish", "left", "right"),
)
# Variants of eSpeak's English voices; what imitates robots and monsters is left out.
VOICES = {
    "train": (
        *("Alex", "Andy", "Denis", "Gene2", "Hugo", "Marco", "Mike", "Reed"),
        *("RicishayMax2", "adam", "antonio", "belinda", "caleb", "ed", "edward2"),
        *("f2", "f4", "grandma", "gustave", "iven", "iven3", "john", "klatt", "klatt3"),
        *("klatt5", "linda", "m2", "m4", "m6", "m8", "marcelo", "michel", "mike2"),
        *("pablo", "pedro", "rob", "sandro", "steph", "steph3", "victor"),
    ),
    "validation": (
        *("Alicia", "Diogo", "Henrique", "Lee", "Michael", "RicishayMax"),
        *("benjamin", "david", "f1", "f5", "ian", "iven4", "klatt2", "m1", "m5", "zac"),
    ),
    "test": (
        *("Andrea", "Annie", "Gene", "Jacky", "Mario", "Nguyen", "RicishayMax3"),
        *("anika", "aunty", "boris", "edward", "f3", "grandpa", "iven2", "kaukovalta"),
        *("klatt4", "klatt6", "m3", "m7", "max", "miguel", "norbert", "paul"),
        *("quincy", "robert", "shelby", "steph2", "travis"),
    ),
}
ACCENTS = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-us-nyc", "en-029")
_TAKES = 3  # of a word in a voice
# Ranges of what differs between two takes: words a minute, pitch in eSpeak's units,
# decibels of the word above the noise, and the exponent of the noise's spectrum.
_SPEED, _PITCH, _DECIBELS, _SLOPE = (140, 200), (35, 65), (5.0, 25.0), (0.0, 0.5)
_LEVEL = (0.02, 0.15)  # root of a word's mean power
_JITTER = 0.1  # seconds that a word may begin early or late
# Numbers in eSpeak's C interface.
_SYNCHRONOUS, _PLAIN_TEXT, _RATE, _PITCH_PARAMETER = 2, 1, 1, 3
_SAMPLES = ctypes.POINTER(ctypes.c_short)


class Words(sounds.Sounds):
    """Builder of the words; works without TensorFlow.

    The splits share no voices, and each has every word three times in each of its
    voices. Nothing has to be downloaded.
    """

    BUILDER_CONFIGS = [  # noqa: RUF012  (the name and type are TFDS's)
        sounds.SoundsConfig(name="1s", description="One second.", seconds=1.0)
    ]
    DESCRIPTION = __doc__
    CITATION = ""
    HOMEPAGE = "https://pypi.org/project/espeakng-loader"
    LICENSE = "synthesised by eSpeak NG, which is under GPL-3.0-or-later"

    def recordings(
        self, folder: pathlib.Path
    ) -> Mapping[str, Iterator[sounds.Recording]]:
        """Those of each split; nothing is read of the folder."""
        return {split: _takes(voices) for split, voices in VOICES.items()}


def _takes(voices: tuple[str, ...]) -> Iterator[sounds.Recording]:
    """Every word in some voices."""
    for voice in voices:
        for label, word in enumerate(WORDS):
            for take in range(_TAKES):
                seed = [*map(ord, voice), label, take]
                samples = _take(word, voice, np.random.default_rng(seed))
                yield sounds.Recording(f"{word}_{voice}_{take}", samples, label)


def _take(word: str, voice: str, rng: np.random.Generator) -> np.ndarray:
    """A second with a word in noise."""
    accent = ACCENTS[rng.integers(len(ACCENTS))]
    speed, pitch = (int(rng.integers(*ends)) for ends in (_SPEED, _PITCH))
    said = speech(word, f"{accent}+{voice}", speed, pitch)[: sounds.SAMPLE_RATE]
    said *= rng.uniform(*_LEVEL) / np.sqrt(np.mean(said**2))
    spare = sounds.SAMPLE_RATE - len(said)
    middle = spare / 2 + rng.uniform(-_JITTER, _JITTER) * sounds.SAMPLE_RATE
    start = round(np.clip(middle, 0, spare))
    power = np.mean(said**2) / 10 ** (rng.uniform(*_DECIBELS) / 10)
    samples = np.sqrt(power) * _noise(rng)
    samples[start : start + len(said)] += said
    return samples.astype(np.float32)


def _noise(rng: np.random.Generator) -> np.ndarray:
    """A second of noise between white and pink, of power 1."""
    spectrum = np.fft.rfft(rng.standard_normal(sounds.SAMPLE_RATE))
    frequency = np.maximum(np.arange(len(spectrum)), 1)
    noise = np.fft.irfft(spectrum / frequency ** rng.uniform(*_SLOPE))
    return noise / np.sqrt(np.mean(noise**2))


def speech(text: str, voice: str, speed: int = 170, pitch: int = 50) -> np.ndarray:
    """Lets eSpeak NG say something.

    Args:
      text: in English.
      voice: an accent and a variant, such as "en-us+f2".
      speed: in words a minute.
      pitch: 0 to 99.

    Returns:
      float64 [samples] in [-1, 1] at 16 kHz.

    Raises:
      ModuleNotFoundError: if the package espeakng-loader is not installed.
      ValueError: for a voice that there is not.

    Example:
      >>> speech("hello", "en+f3").shape  # doctest: +SKIP
      (7686,)
    """
    # SciPy is slow to import, and the names of datasets are listed without it.
    from scipy import signal

    library, rate, data = _espeak()
    variant = voice.partition("+")[2]
    if variant and not (data / "voices" / "!v" / variant).exists():
        raise ValueError(f"eSpeak NG has no voice {variant!r}.")
    parts: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, _SAMPLES, ctypes.c_int, ctypes.c_void_p)
    def take(samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(take)
    if library.espeak_SetVoiceByName(voice.encode()):
        raise ValueError(f"eSpeak NG has no voice {voice!r}.")
    library.espeak_SetParameter(_RATE, speed, 0)
    library.espeak_SetParameter(_PITCH_PARAMETER, pitch, 0)
    content = text.encode()
    library.espeak_Synth(content, len(content) + 1, 0, 1, 0, _PLAIN_TEXT, None, None)
    library.espeak_Synchronize()
    samples = np.concatenate(parts).astype(np.float64) / 32768
    common = np.gcd(rate, sounds.SAMPLE_RATE)
    found = signal.resample_poly(samples, sounds.SAMPLE_RATE // common, rate // common)
    return np.clip(found, -1, 1)


@functools.cache
def _espeak() -> tuple[Any, int, pathlib.Path]:
    """The library, its sample rate and the folder of its voices; begun once."""
    try:
        import espeakng_loader
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "words are spoken by a package that is not installed: "
            "pip install espeakng-loader"
        ) from error
    data = espeakng_loader.get_data_path()
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, os.fsencode(data), 0)
    if rate <= 0:
        raise RuntimeError(f"eSpeak NG does not start with its voices in {data}.")
    library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # otherwise it is the time
    return library, rate, pathlib.Path(data)
