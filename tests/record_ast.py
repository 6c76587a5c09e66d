"""Records what Hugging Face's audio spectrogram transformer says, for test_ast.py.

pip install torch transformers safetensors
python tests/record_ast.py
"""

import pathlib
import tempfile

import numpy as np
import recording

REFERENCES = recording.REFERENCES / "ast.npz"
CLASSES = 7
FRAMES, MELS = 36, 20
# Of the one network: patch, strides in frames and mel bins, width, depth, heads.
PATCH, STRIDES, WIDTH, DEPTH, HEADS = 8, (6, 4), 48, 2, 4
CASES = {"narrow": ("narrow", 2, FRAMES)}


def spectrograms(count):
    """Smooth patterns, float32 [count, FRAMES, MELS]."""
    return recording.images(count, FRAMES)[:, :, :MELS, 0]


def random_state_dict():
    """Weights in the ranges of a trained network's, from a seed."""
    rng = np.random.default_rng(0)
    state = {}
    along, up = (
        1 + (size - PATCH) // stride
        for size, stride in zip((FRAMES, MELS), STRIDES, strict=True)
    )
    body = "audio_spectrogram_transformer"
    embeddings = f"{body}.embeddings"
    # Tokens begin small, so that the epsilon of the first normalisation tells.
    for name, tokens in (
        ("cls_token", 1),
        ("distillation_token", 1),
        ("position_embeddings", 2 + along * up),
    ):
        state[f"{embeddings}.{name}"] = rng.normal(0, 0.02, (1, tokens, WIDTH))

    def norm(name):
        state[f"{name}.weight"] = rng.uniform(0.5, 1.5, WIDTH)
        state[f"{name}.bias"] = rng.normal(0, 0.3, WIDTH)

    def dense(name, outputs, inputs):
        recording.dense(state, rng, name, outputs, inputs)

    patches = f"{embeddings}.patch_embeddings.projection"
    dense(patches, WIDTH, PATCH**2)
    kernel = 0.05 * state[f"{patches}.weight"]
    state[f"{patches}.weight"] = kernel.reshape(WIDTH, 1, PATCH, PATCH)
    state[f"{patches}.bias"] *= 0.05
    for index in range(DEPTH):
        block = f"{body}.encoder.layer.{index}"
        norm(f"{block}.layernorm_before")
        for name in ("query", "key", "value"):
            dense(f"{block}.attention.attention.{name}", WIDTH, WIDTH)
        dense(f"{block}.attention.output.dense", WIDTH, WIDTH)
        norm(f"{block}.layernorm_after")
        dense(f"{block}.intermediate.dense", 3 * WIDTH, WIDTH)
        dense(f"{block}.output.dense", WIDTH, 3 * WIDTH)
    norm(f"{body}.layernorm")
    norm("classifier.layernorm")
    dense("classifier.dense", CLASSES, WIDTH)
    return recording.float32(state)


def main():
    import transformers
    from safetensors import numpy as safetensors_numpy

    class OfImages(transformers.ASTForAudioClassification):
        """Takes what `recording.record` gives: [count, channels, FRAMES, FRAMES]."""

        def forward(self, images):
            return super().forward(images[:, 0, :, :MELS]).logits

    config = transformers.ASTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=3 * WIDTH,
        patch_size=PATCH,
        time_stride=STRIDES[0],
        frequency_stride=STRIDES[1],
        max_length=FRAMES,
        num_mel_bins=MELS,
        num_labels=CLASSES,
        attn_implementation="eager",
    )

    def make(*_):
        # The library renames the weights of published files as it reads them.
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            file = pathlib.Path(folder) / "model.safetensors"
            safetensors_numpy.save_file(random_state_dict(), file, {"format": "pt"})
            model, report = OfImages.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        return model, model.state_dict()

    recording.record(REFERENCES.name, CASES, make)


if __name__ == "__main__":
    main()
