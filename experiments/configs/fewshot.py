r"""Few-shot learning of images and sounds, all that needs no download, in one table.

The cells of ``fewshot_vision.py`` and ``fewshot_audio.py``; the recordings are those of
Debian's packages, see `experiments.data.voices`.

    python -m experiments.main \
        --config=experiments/configs/fewshot.py --workdir=workdir/fewshot
"""

from ml_collections import ConfigDict

from experiments.configs import fewshot_audio, fewshot_vision


def get_config() -> ConfigDict:
    """The configuration."""
    config = fewshot_vision.get_config()
    config.parts.update(fewshot_audio.get_config().parts)
    return config
