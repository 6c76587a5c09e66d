r"""Few-shot learning of images and sounds, all that needs no download, in one table.

The cells of ``fewshot_vision.py`` and ``fewshot_audio.py``; the recordings are those of
Debian's packages, see `experiments.data.voices`.

    python -m experiments.main \
        --config=experiments/configs/fewshot.py --workdir=workdir/fewshot

Some two hours on one core. Expect 16w8a within 5 points of backpropagation in all 20
cells, and at most a point below float32 in 19 (docs/results.md has the table).
"""

from ml_collections import ConfigDict

from experiments.configs import fewshot_audio, fewshot_vision


def get_config() -> ConfigDict:
    """The configuration."""
    config = fewshot_vision.get_config()
    config.parts.update(fewshot_audio.get_config().parts)
    return config
