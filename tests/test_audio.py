import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import record_audio as recorded
import scipy.signal

from experiments import audio


@pytest.mark.parametrize("name", recorded.CASES)
def test_filter_bank_is_kaldis(name):
    sample_rate, num_mels, seconds = recorded.CASES[name]
    signal = recorded.signal(sample_rate, seconds)
    found = audio.log_mel(signal, sample_rate=sample_rate, num_mels=num_mels)
    expected = np.load(recorded.REFERENCES)[name]
    # Both in float32; the largest difference seen is 7.4e-5. A periodic window is off
    # by 8e-2, no preemphasis by 4.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_features_are_those_of_ast():
    sample_rate, _, seconds = recorded.CASES["fbank_16k"]
    signal = recorded.signal(sample_rate, seconds)
    found = audio.ast_normalized(audio.log_mel(signal), recorded.FRAMES)
    expected = np.load(recorded.REFERENCES)["ast"]
    assert found.shape == (recorded.FRAMES, 128)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(
        audio.ast_normalized(audio.log_mel(signal), 4), found[:4]
    )


@pytest.mark.slow
def test_signals_go_in_batches_under_jit():
    signals = np.stack([recorded.signal(16_000, 0.1), np.zeros(1600, np.float32)])
    both = jax.jit(audio.log_mel)(signals)
    # Of a power that is near the floor the rounding tells.
    np.testing.assert_allclose(both[0], audio.log_mel(signals[0]), atol=1e-3)
    # Silence is the floor, and has a gradient.
    np.testing.assert_allclose(both[1], np.log(2.0**-23), rtol=1e-6)
    slope = jax.grad(lambda x: audio.log_mel(x).sum())(jnp.zeros(1600))
    assert bool(jnp.all(jnp.isfinite(slope)))


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="399 samples is shorter than a frame of 400"):
        audio.log_mel(jnp.zeros(399))
    with pytest.raises(ValueError, match=r"low=20.0 and high=9000 Hz .* rate, 8000"):
        audio.log_mel(jnp.zeros(400), high=9000)


@pytest.mark.parametrize(("format", "tolerance"), [("wav", 1e-3), ("ogg", 0.05)])
def test_files_are_read_at_the_rate(format, tolerance, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    t = np.arange(22_050) / 22_050
    left = 0.5 * np.sin(2 * np.pi * 440 * t)
    stereo = np.stack([left, 0 * left], axis=1)
    soundfile.write(tmp_path / f"tone.{format}", stereo, 22_050)
    expected = 0.25 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    for file in (
        tmp_path / f"tone.{format}",
        io.BytesIO((tmp_path / f"tone.{format}").read_bytes()),
    ):
        found = audio.read(file, 16_000)
        assert found.shape == (16_000,)
        assert found.dtype == np.float32
        middle = slice(100, -100)  # the filter sees zeros beyond the ends
        np.testing.assert_allclose(found[middle], expected[middle], atol=tolerance)


def test_resampling_removes_what_does_not_fit(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    t = np.arange(48_000) / 48_000
    high = 0.5 * np.sin(2 * np.pi * 10_000 * t)  # above half of 16 kHz
    soundfile.write(tmp_path / "high.wav", high, 48_000)
    found = audio.read(tmp_path / "high.wav", 16_000)[100:-100]
    assert np.abs(found).max() < 0.01
    # Dropping samples would have folded it.
    assert np.abs(scipy.signal.periodogram(high[::3])[1]).max() > 1


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ModuleNotFoundError, match="pip install soundfile"):
        audio.read("speech.ogg")
