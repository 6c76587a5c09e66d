"""Recordings as TFDS datasets, and their splits as spectrograms in memory."""

import abc
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds

from experiments import audio, features
from experiments.data import arrays

SAMPLE_RATE = 16_000


class Recording(NamedTuple):
    """One example.

    Attributes:
      key: its name, one for each of a split.
      samples: float32 in [-1, 1], at `SAMPLE_RATE`, of any length.
      label: number of its class, over all splits.
    """

    key: str
    samples: np.ndarray
    label: int


@dataclasses.dataclass
class SoundsConfig(tfds.core.BuilderConfig):
    """A length.

    Attributes:
      seconds: of every example: the middle of a recording, or zeros to both sides.
    """

    seconds: float = 1.0


class Sounds(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]  # mypy does not see tfds
):
    """Builder of recordings with class-disjoint splits; works without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    # Set by each dataset.
    DESCRIPTION: ClassVar[str]
    CITATION: ClassVar[str]
    HOMEPAGE: ClassVar[str]
    LICENSE: ClassVar[str]

    @abc.abstractmethod
    def recordings(self, folder: pathlib.Path) -> Mapping[str, Iterator[Recording]]:
        """Those of each split, of the files in TFDS's folder for manual downloads."""

    def _info(self) -> tfds.core.DatasetInfo:
        samples = round(self.builder_config.seconds * SAMPLE_RATE)
        if samples < 1:
            raise ValueError(
                f"seconds must be positive, got {self.builder_config.seconds}."
            )
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "audio": tfds.features.Tensor(shape=(samples,), dtype=np.int16),
                    "label": tfds.features.Tensor(shape=(), dtype=np.int32),
                }
            ),
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            license=self.LICENSE,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        manual = self.MANUAL_DOWNLOAD_INSTRUCTIONS  # none if nothing is downloaded
        folder = pathlib.Path(dl_manager.manual_dir if manual else ".")
        splits = self.recordings(folder)
        return {name: self._generate_examples(split) for name, split in splits.items()}

    def _generate_examples(
        self, recordings: Iterator[Recording]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        samples = round(self.builder_config.seconds * SAMPLE_RATE)
        for recording in recordings:
            fitted = audio.fitted(recording.samples, samples)
            whole = np.rint(32767 * np.clip(fitted, -1, 1)).astype(np.int16)
            yield recording.key, {"audio": whole, "label": recording.label}


def load(builder: tfds.core.DatasetBuilder, **settings: Any) -> dict[str, arrays.Split]:
    """Prepares a dataset and reads all its splits into memory, as spectrograms.

    Args:
      builder: of `Sounds`, of array_record files.
      **settings: of `experiments.audio.log_mel`.

    Returns:
      A `Split` for each split; its images are [examples, frames, mels, 1], normalised
      as `experiments.audio.ast_normalized` says.
    """

    def spectrograms(samples: jax.Array) -> jax.Array:
        signals = samples.astype(jnp.float32) / 32767
        found = audio.log_mel(signals, sample_rate=SAMPLE_RATE, **settings)
        return audio.ast_normalized(found)[..., None]

    transform = jax.jit(spectrograms)
    splits = {}
    for name, (samples, labels) in read(builder).items():
        found = features.batched(transform, samples, 64)
        splits[name] = arrays.Split(jnp.asarray(found), jnp.asarray(labels))
    return splits


def read(
    builder: tfds.core.DatasetBuilder,
) -> dict[str, tuple[Any, np.ndarray]]:
    """Prepares a dataset and reads all its splits into memory, as they are.

    Args:
      builder: of `Sounds`, of array_record files.

    Returns:
      For each split int16 samples [examples, samples] and int32 labels [examples].
    """
    builder.download_and_prepare()
    splits = {}
    for name in builder.info.splits:
        examples = list(builder.as_data_source(split=name))
        samples = np.stack([example["audio"] for example in examples])
        labels = np.array([example["label"] for example in examples], np.int32)
        splits[name] = samples, labels
    return splits
