"""Sound: files, log-mel spectrograms in JAX, and their normalisation for AST.

The spectrogram is Kaldi's filter bank as AST uses it (``torchaudio.compliance.kaldi``
and Hugging Face's ``ASTFeatureExtractor`` compute the same), with frames that lie
within the signal, a symmetric Hann window and no dither. Against the packages
kaldi-native-fbank and transformers it is off by less than 1e-4 (in natural
logarithms of power; see ``tests/test_audio.py``).
"""

import io
import os
import pathlib
from math import gcd
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import archives, sound_files

_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG")
_RATES = (1_000, 384_000)  # Hz
_BLOCK = 1 << 22  # values that are decoded at once
_LONGEST = 1 << 27
# float32's epsilon: the least power, before the logarithm.
FLOOR = 2.0**-23
# Of log-mel spectrograms of AudioSet, by which AST's published weights are trained.
_AST_MEAN, _AST_DEVIATION = -4.2677393, 4.5689974


def read(
    file: str | os.PathLike[str] | BinaryIO,
    sample_rate: int = 16_000,
    *,
    name: str | None = None,
) -> np.ndarray:
    """Reads a sound file with one channel, at a sample rate.

    Channels are averaged; a file of another rate is resampled by a polyphase filter
    (SciPy's ``resample_poly``).

    Args:
      file: wav, flac or ogg.
      sample_rate: of the result, in Hz.
      name: of the file, for messages; by default its path.

    Returns:
      float32 [samples] in [-1, 1].

    Raises:
      ModuleNotFoundError: if the package soundfile is not installed.
      ValueError: if the file is no such sound, is damaged or truncated, is empty, has a
        sample that is no number, or is longer than 2**27 samples. The file is named.

    Example:
      >>> read("speech.ogg").shape  # doctest: +SKIP
      (16000,)
    """
    try:
        import soundfile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "sound files are read by a package that is not installed: "
            "pip install soundfile"
        ) from error
    from scipy import signal

    if isinstance(file, (str, os.PathLike)):
        content = pathlib.Path(file).read_bytes()
        name = name or str(file)
    else:
        content = file.read()
        name = name or str(getattr(file, "name", "the sound file"))
    with archives.naming(name):
        sound_files.check(content)
        with soundfile.SoundFile(io.BytesIO(content)) as sound:
            rate = sound.samplerate
            if not _RATES[0] <= rate <= _RATES[1]:
                raise ValueError(f"it has {rate} samples a second.")
            samples = _decoded(sound, sample_rate)
        if rate != sample_rate:
            common = gcd(rate, sample_rate)
            samples = signal.resample_poly(
                samples, sample_rate // common, rate // common
            )
        return np.clip(samples, -1, 1).astype(np.float32)


def _decoded(sound: Any, sample_rate: int) -> np.ndarray:
    """The mean of the channels, read in parts: a header may promise anything."""
    if sound.format not in _FORMATS:
        raise ValueError(f"it is a {sound.format} file; make it wav, flac or ogg.")
    parts, total = [], 0
    while len(part := sound.read(_BLOCK // sound.channels, "float32", always_2d=True)):
        total += len(part)
        # Before and after the resampling.
        if total * max(sound.channels, sample_rate / sound.samplerate) > _LONGEST:
            raise ValueError("it is longer than any recording that is read here.")
        if not np.isfinite(part).all():
            raise ValueError("it has a sample that is NaN or infinite.")
        parts.append(part.mean(axis=1))
    if not total or total < sound.frames:
        raise ValueError(
            f"it is truncated or damaged: it has {total} samples, and its header says "
            f"{sound.frames}."
        )
    return np.concatenate(parts)


def frames(signal: jax.Array, length: int, hop: int) -> jax.Array:
    """Cuts a signal into frames that overlap; what does not fill one is left out.

    Args:
      signal: [..., samples].
      length: samples of a frame.
      hop: samples from one to the next.

    Returns:
      [..., frames, length].

    Raises:
      ValueError: if the signal is shorter than a frame.

    Example:
      >>> frames(jnp.arange(6), length=3, hop=2)
      Array([[0, 1, 2],
             [2, 3, 4]], dtype=int32)
    """
    if signal.shape[-1] < length:
        raise ValueError(
            f"a signal of {signal.shape[-1]} samples is shorter than a frame of "
            f"{length}: pad it with zeros."
        )
    starts = np.arange(0, signal.shape[-1] - length + 1, hop)
    return signal[..., starts[:, None] + np.arange(length)]


def mel_filters(
    num_mels: int,
    fft_length: int,
    sample_rate: int,
    low: float = 20.0,
    high: float | None = None,
) -> np.ndarray:
    r"""Kaldi's mel filters: triangles of equal width on the mel scale.

    .. math:: mel(f) = 1127 \ln(1 + f / 700)

    Args:
      num_mels: number of filters.
      fft_length: length of the Fourier transform.
      sample_rate: in Hz.
      low: lower end of the first filter, in Hz.
      high: upper end of the last, in Hz; half of the sample rate by default.

    Returns:
      float32 [fft_length // 2 + 1, num_mels]. A filter that is too narrow to catch a
      frequency of the transform is all zero, as some of AST's 128 are.

    Raises:
      ValueError: if the ends are not in order below half of the sample rate.

    Example:
      >>> mel_filters(3, fft_length=16, sample_rate=8000).round(2)[:4]
      array([[0.  , 0.  , 0.  ],
             [0.91, 0.09, 0.  ],
             [0.17, 0.83, 0.  ],
             [0.  , 0.62, 0.38]], dtype=float32)

    Reference:
      Kaldi's ``feat/mel-computations.cc``.
    """
    high = sample_rate / 2 if high is None else high
    if not 0 <= low < high <= sample_rate / 2:
        raise ValueError(
            f"low={low} and high={high} Hz must be in order, up to half of the sample "
            f"rate, {sample_rate / 2:g}."
        )

    def mel(hertz: np.ndarray | float) -> np.ndarray:
        return 1127 * np.log1p(np.asarray(hertz) / 700)

    edges = np.linspace(mel(low), mel(high), num_mels + 2)
    place = mel(np.arange(fft_length // 2 + 1) * (sample_rate / fft_length))[:, None]
    rising = (place - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - place) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0, np.minimum(rising, falling))
    return filters.astype(np.float32)


def log_mel(
    signal: jax.Array,
    *,
    sample_rate: int = 16_000,
    num_mels: int = 128,
    frame_seconds: float = 0.025,
    hop_seconds: float = 0.01,
    preemphasis: float = 0.97,
    low: float = 20.0,
    high: float | None = None,
) -> jax.Array:
    r"""Log-mel spectrogram.

    .. math:: \log \max(ε, \sum_f m_{bf} |FFT(w (x_t - p x_{t-1}))_f|^2)

    in every frame, of which the mean is taken away first; x₋₁ is x₀. The transform is
    as long as the next power of two.

    Args:
      signal: float [..., samples] in [-1, 1].
      sample_rate: in Hz.
      num_mels: number of mel bins b.
      frame_seconds: length of a frame.
      hop_seconds: from one frame to the next.
      preemphasis: p.
      low: lower end of the first filter, in Hz.
      high: upper end of the last, in Hz; half of the sample rate by default.

    Returns:
      float32 [..., frames, num_mels]: 98 frames a second of 16 kHz.

    Raises:
      ValueError: as `frames` and `mel_filters`.

    Example:
      >>> tone = jnp.sin(2 * jnp.pi * 1000 * jnp.arange(16_000) / 16_000)
      >>> spectrogram = log_mel(tone, num_mels=40)
      >>> spectrogram.shape, int(spectrogram[50].argmax())
      ((98, 40), 13)

    Reference:
      Kaldi's ``feat/feature-fbank.cc``, with a Hann window and no dither, as in Gong et
      al., "AST: Audio Spectrogram Transformer", Interspeech 2021.
    """
    length, hop = round(sample_rate * frame_seconds), round(sample_rate * hop_seconds)
    fft_length = 1 << (length - 1).bit_length()
    filters = mel_filters(num_mels, fft_length, sample_rate, low, high)
    window = np.hanning(length).astype(np.float32)
    x = frames(jnp.asarray(signal, jnp.float32), length, hop)
    x -= x.mean(axis=-1, keepdims=True)
    x -= preemphasis * jnp.concatenate([x[..., :1], x[..., :-1]], axis=-1)
    spectrum = jnp.fft.rfft(x * window, fft_length)
    power = spectrum.real**2 + spectrum.imag**2
    return jnp.log(jnp.maximum(power @ filters, FLOOR))


def fitted(signal: np.ndarray, samples: int) -> np.ndarray:
    """Makes a signal as long as wanted: its middle, or zeros to both sides.

    Args:
      signal: [samples of its own].
      samples: wanted.

    Returns:
      [samples].

    Example:
      >>> fitted(np.array([1, 2, 3]), 5), fitted(np.array([1, 2, 3]), 1)
      (array([0, 1, 2, 3, 0]), array([2]))
    """
    missing = max(0, samples - len(signal))
    signal = np.pad(signal, (missing // 2, missing - missing // 2))
    start = (len(signal) - samples) // 2
    return signal[start : start + samples]


def ast_normalized(spectrograms: jax.Array, num_frames: int | None = None) -> jax.Array:
    """Log-mel spectrograms as AST's published weights want them.

    Frames are cut at the end, or zeros added there; then AudioSet's mean is taken away,
    and what is left divided by twice its deviation.

    Args:
      spectrograms: float [..., frames, mels], of `log_mel`.
      num_frames: wanted, 1,024 for the weights of AudioSet; as they are by default.

    Returns:
      [..., num_frames, mels].

    Example:
      >>> np.asarray(ast_normalized(jnp.full((1, 1), -4.2677393), 2)).round(3)
      array([[0.   ],
             [0.467]], dtype=float32)

    Reference:
      Hugging Face's ``ASTFeatureExtractor``, with its defaults.
    """
    if num_frames is not None:
        spectrograms = spectrograms[..., :num_frames, :]
        margin = [(0, 0)] * spectrograms.ndim
        margin[-2] = (0, num_frames - spectrograms.shape[-2])
        spectrograms = jnp.pad(spectrograms, margin)
    return (spectrograms - _AST_MEAN) / (2 * _AST_DEVIATION)
