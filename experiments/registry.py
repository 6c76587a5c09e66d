"""The names that configurations use: of networks, published weights and datasets.

A network or a dataset is added by its line in `NETWORKS` or `DATASETS`.
"""

import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from experiments import features, published
from experiments.data import (
    arrays,
    characters,
    cifar,
    digits,
    few_shot_images,
    imagenet_subsets,
    mnist,
    mnist_c,
    solar,
    sound_events,
    sounds,
    voices,
    wake_words,
)
from experiments.models import (
    ast,
    cnn,
    crnn,
    efficientnet,
    linear,
    mlp,
    reparameterized,
    resnet,
    resnet12,
    vit,
)
from experiments.usage import check_names

Splits = Mapping[str, arrays.Split]


class _Built:
    """Loads a dataset that a builder of ours makes."""

    def __init__(self, builder: type[tfds.core.DatasetBuilder]):
        """Takes a builder from `experiments.data`."""
        self._builder = builder

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains; one empty name if there is a single domain."""
        return tuple(self._builder.builder_configs) or ("",)

    def __call__(self, domain: str, data_dir: str) -> Splits:
        """Makes the dataset in a directory if it is not there, and reads it."""
        config = {"config": domain} if domain else {}
        # array_record is read without TensorFlow.
        return arrays.load(
            self._builder(**config, data_dir=data_dir, file_format="array_record")
        )


def _sounds(
    builder: Callable[..., tfds.core.DatasetBuilder], **settings: Any
) -> Callable[..., Splits]:
    """``load(domain, data_dir)`` of recordings, as spectrograms.

    A domain is the name of a configuration of the builder, which the number of mel bins
    may follow, as in "1s_32".
    """

    def load(domain: str, data_dir: str) -> Splits:
        config, _, mels = domain.partition("_")
        made = builder(config=config, data_dir=data_dir, file_format="array_record")
        return sounds.load(made, num_mels=int(mels or 128), **settings)

    return load


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "ast": ast.AST,
    "cnn": cnn.CNN,
    "crnn": crnn.CRNN,
    "efficientnet_lite0": functools.partial(
        efficientnet.EfficientNetLite0, standardized=True
    ),
    "linear": linear.Linear,
    "reparameterized": reparameterized.ReparameterizedCNN,
    "resnet12": resnet12.ResNet12,
    "resnet18": resnet.ResNet,
    "vit_tiny": vit.ViT,
    # 11,018 parameters for 28x28 images, at the cost of "cnn" for 8x8 ones.
    "cnn_28": functools.partial(cnn.CNN, features=(8, 16, 32), strides=(2, 2, 2)),
    # 16,426 parameters for 28x28 images.
    "cnn_28_deep": functools.partial(
        cnn.CNN, features=(8, 16, 32, 32), strides=(2, 2, 2, 2)
    ),
    # 12,730 parameters for 28x28 images, 1,210 for 8x8: cheap for large batches.
    "mlp_small": functools.partial(mlp.MLP, width=16, depth=1),
    # 28,682 parameters for 32x32x1 images: 16 patches and the class token.
    "vit_32": functools.partial(
        vit.ViT, patch=8, width=32, depth=3, num_heads=4, mlp_width=64
    ),
    # 27,114 parameters for 28x28 images: 16 patches and the class token.
    "vit_28": functools.partial(
        vit.ViT,
        patch=7,
        width=32,
        depth=3,
        num_heads=4,
        mlp_width=64,
        mean_pooled=True,
    ),
    # Of a size for two processor cores; for 16x16 pixels, or 49 frames of 32 mel bins.
    "resnet12_small": functools.partial(resnet12.ResNet12, widths=(8, 16, 24, 32)),
    "resnet12_digits": functools.partial(resnet12.ResNet12, widths=(8, 16, 32)),
    "resnet18_small": functools.partial(resnet.ResNet, width=8, small_images=True),
    "vit_small": functools.partial(
        vit.ViT, patch=4, width=32, depth=3, num_heads=4, mlp_width=64
    ),
    "crnn_small": functools.partial(crnn.CRNN, width=24, pool=(2, 2)),
    "crnn_lstm_small": functools.partial(crnn.CRNN, width=24, pool=(2, 2), cell="lstm"),
    "ast_small": functools.partial(
        ast.AST, patch=8, strides=(6, 6), width=32, depth=3, num_heads=4, mlp_width=64
    ),
}
# load(domain, data_dir) gives the splits "train", "validation" and "test". In the first
# datasets all splits have the same classes.
DATASETS: dict[str, Callable[[str, str], Splits]] = {
    "cifar10": cifar.load,
    "digits": _Built(digits.Digits),
    "mnist_5k": _Built(mnist.Mnist5k),
    "mnist_5k_c": _Built(mnist_c.Mnist5kC),
    "solar_cells": _Built(solar.SolarCells),
    "visual_wake_words": wake_words.load,
    # In these, for few-shot learning, no class is in two splits.
    "characters": _Built(characters.Characters),
    "digit_classes": _Built(digits.DigitClasses),
    "few_shot_images": few_shot_images.load,
    "mini_imagenet": _Built(imagenet_subsets.MiniImageNet),
    "tiered_imagenet": _Built(imagenet_subsets.TieredImageNet),
    "voices": _sounds(voices.Voices, frame_seconds=0.04, hop_seconds=0.02),
    "esc50": _sounds(sound_events.Esc50),
    "fsdkaggle2018": _sounds(sound_events.FsdKaggle2018),
}
BACKBONES = {"efficientnet_lite0": efficientnet.backbone}


def check_domains(dataset: str, domains: Iterable[str]) -> None:
    """Makes sure that a dataset has some domains, if its loader knows their names.

    Args:
      dataset: a key of `DATASETS`.
      domains: names of domains; the empty name is that of the default.

    Raises:
      UsageError: for a domain that there is not.
    """
    known: Sequence[str] | None = getattr(DATASETS[dataset], "domains", None)
    if known is not None:
        check_names(f"domain of {dataset}", filter(None, domains), known)


def load(config: ConfigDict, domain: str, directory: pathlib.Path) -> Splits:
    """Loads the splits of one domain of the dataset, as the network takes them.

    Args:
      config: see ``configs/quickstart.py``.
      domain: one of the dataset's.
      directory: the workdir.
    """
    data_dir = config.data_dir or str(directory / "data")
    splits = _images(config, domain, data_dir)
    if not config.backbone:
        return splits
    # Of which domain the statistics are; each domain has its own by default.
    by = config.get("standardized_by") or domain
    reference = splits if by == domain else _images(config, by, data_dir)
    taken = _features(config, by, reference, data_dir)["train"].images
    splits = _features(config, domain, splits, data_dir)
    return features.standardize(splits, config.deviation_floor, taken)


def _images(config: ConfigDict, domain: str, data_dir: str) -> Splits:
    """The images of a domain, as published weights take them."""
    tfds.disable_progress_bar()
    return prepared(config, DATASETS[config.dataset](domain, data_dir))


def _features(
    config: ConfigDict, domain: str, splits: Splits, data_dir: str
) -> dict[str, arrays.Split]:
    """What the backbone makes of the images of a domain, kept beside the data."""
    side = f"_{config.image_side}" if config.get("image_side", 0) else ""
    name = f"{config.dataset}_{domain}{side}_{config.backbone}.npz"
    cache = pathlib.Path(data_dir) / "features" / name
    return features.extract(BACKBONES[config.backbone], splits, cache)


def prepared(config: ConfigDict, splits: Splits) -> dict[str, arrays.Split]:
    """Splits as the published weights of a configuration want them.

    Args:
      config: see ``configs/quickstart.py``.
      splits: as the dataset gives them.
    """
    weights, side = config.get("weights", ""), config.get("image_side", 0)
    if not (weights or side):
        return dict(splits)
    return published.prepared(
        splits,
        NETWORKS[config.network],
        weights,
        side=side,
        normalization=config.get("normalization", ""),
    )


def initial(config: ConfigDict, network: Callable[..., Any], data: Splits) -> Any:
    """Gives float parameters to pre-train: drawn, or published ones with a new head.

    Args:
      config: see ``configs/quickstart.py``.
      network: ``network(bits=...)`` gives the Flax module.
      data: splits of the domain of pre-training.
    """
    model, images = network(bits=None), data["train"].images[:1]
    found: dict[str, Any] = {}
    if config.weights:
        found = published.load(config.weights, model, images.shape)

    @jax.jit  # which leaves out what is not returned
    def drawn(key: jax.Array, images: jax.Array) -> dict[str, Any]:
        params = model.init(key, images)["params"]
        return {k: v for k, v in params.items() if k not in found}

    params = found | drawn(jax.random.key(config.pretrain.seed), images)
    if not found:
        return params
    return with_statistics(model, params, data, config.deviation_floor)


def with_statistics(model: Any, params: Any, data: Splits, floor: float) -> Any:
    """Puts a domain's statistics of the features into the parameters of a network.

    Args:
      model: the network; one without such statistics keeps its parameters.
      params: float parameters.
      data: splits of the domain.
      floor: the least deviation of a feature, as a share of the mean deviation.
    """
    if not getattr(model, "standardized", False):
        return params
    raw = functools.partial(model.clone(standardized=False).apply, stop=-1)
    apply = jax.jit(functools.partial(raw, {"params": params}))
    found = features.batched(apply, data["train"].images)
    return efficientnet.with_statistics(params, jnp.asarray(found), floor)
