"""Records what Kaldi's filter bank and AST's feature extractor say, for test_audio.py.

pip install kaldi-native-fbank torch transformers
python tests/record_audio.py
"""

import numpy as np
import recording

REFERENCES = recording.REFERENCES / "audio.npz"
# Sample rate, number of mel bins, seconds.
CASES = {"fbank_16k": (16_000, 64, 0.08), "fbank_8k": (8_000, 23, 0.1)}
FRAMES = 12  # of AST's: some are padding


def signal(sample_rate, seconds):
    """A rising tone and its overtones in noise, float32 [samples]."""
    n = np.arange(round(sample_rate * seconds))
    t = n / sample_rate
    phase = 2 * np.pi * (300 * t + 4000 * t**2)
    noise = np.random.default_rng(0).normal(0, 0.01, len(n))
    tone = 0.3 * np.sin(phase) + 0.1 * np.sin(3 * phase)
    return (tone + noise + 0.05).astype(np.float32)


def main():
    import kaldi_native_fbank
    import transformers

    recorded = {}
    for name, (sample_rate, num_mels, seconds) in CASES.items():
        options = kaldi_native_fbank.FbankOptions()
        options.frame_opts.samp_freq = sample_rate
        options.frame_opts.dither = 0
        options.frame_opts.window_type = "hanning"
        options.mel_opts.num_bins = num_mels
        bank = kaldi_native_fbank.OnlineFbank(options)
        bank.accept_waveform(sample_rate, signal(sample_rate, seconds).tolist())
        bank.input_finished()
        rows = [bank.get_frame(i) for i in range(bank.num_frames_ready)]
        recorded[name] = np.array(rows, np.float32)

    extract = transformers.ASTFeatureExtractor(max_length=FRAMES)
    sample_rate, _, seconds = CASES["fbank_16k"]
    found = extract(signal(sample_rate, seconds), sampling_rate=sample_rate)
    recorded["ast"] = np.asarray(found["input_values"][0], np.float32)
    for name, values in recorded.items():
        print(name, values.shape, values.min(), values.max())
    np.savez_compressed(REFERENCES, **recorded)


if __name__ == "__main__":
    main()
