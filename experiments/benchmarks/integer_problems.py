"""Pre-trained networks whose integer programs are compared with them.

Each is pre-trained as the experiment does that it comes from, see
`experiments.configs`. A workdir keeps what was trained.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from experiments import registry
from experiments.configs import (
    fewshot_audio,
    fewshot_vision,
    fine_tuning,
    ood,
    quickstart,
)
from experiments.data.arrays import Split
from experiments.drivers import few_shot, training
from experiments.drivers.progress import Progress, show_progress
from experiments.learners import episodes, metrics, nearest_centroid

# score(outputs) gives a metric of the outputs of all inputs, and what they predict.
Score = Callable[[Any], tuple[float, np.ndarray]]
# Tasks that a few-shot network is tested on.
_TASKS = 200


class Problem(NamedTuple):
    """A network, and the examples that it is tested on.

    Attributes:
      what: the network and its data, for readers.
      metric: name of what is measured.
      function: ``function(params, inputs)`` gives the outputs of a batch.
      params: pre-trained float parameters.
      calibration: inputs that are typical, none of them tested on.
      inputs: the test split.
      score: of the outputs of these inputs.
    """

    what: str
    metric: str
    function: Callable[..., jax.Array]
    params: Any
    calibration: jax.Array
    inputs: jax.Array
    score: Score


def digits_cnn(directory: pathlib.Path, smoke: bool) -> Problem:
    """The quickstart's network on upright digits."""
    config = quickstart.get_config(_variant(smoke))
    config.target = config.source
    return _classifier("CNN, digits", config, directory)


def mnist_vit(directory: pathlib.Path, smoke: bool) -> Problem:
    """The vision transformer of ``configs/ood.py`` on clean digits of MNIST."""
    config = ood.get_config(_variant(smoke)).parts["severity_1"]
    config.target = config.source
    return _classifier("ViT, MNIST", config, directory)


def solar_efficientnet(directory: pathlib.Path, smoke: bool) -> Problem:
    """EfficientNet-Lite0 whose head was trained on monocrystalline solar cells.

    The cells have 64 pixels in the place of 96: XLA has no fast convolution of integers
    on a CPU.
    """
    config = fine_tuning.get_config(_variant(smoke))
    config.source = config.target = "mono_32" if smoke else "mono_64"
    return _classifier("EfficientNet-Lite0, solar cells, 64 px", config, directory)


def letters_resnet12(directory: pathlib.Path, smoke: bool) -> Problem:
    """ResNet12 on 5-way 5-shot tasks of letters that it has not seen."""
    cell = "characters,resnet12_small" + (",smoke" if smoke else "")
    config = fewshot_vision.get_config(cell)
    return _few_shot("ResNet12, letters, 5-way 5-shot", config, directory)


def voices_crnn(directory: pathlib.Path, smoke: bool) -> Problem:
    """CRNN on 5-way 1-shot tasks of voices that it has not heard."""
    return _few_shot("CRNN, voices, 5-way 1-shot", voices_config(smoke), directory)


def voices_config(smoke: bool) -> ConfigDict:
    """A cell of ``configs/fewshot_audio.py``, pre-trained in 600 steps, not 2,000."""
    cell = "voices,crnn_small,protonet" + (",smoke" if smoke else "")
    config = fewshot_audio.get_config(cell)
    config.pretrain.steps = min(config.pretrain.steps, 600)
    return config


PROBLEMS: dict[str, Callable[[pathlib.Path, bool], Problem]] = {
    "digits_cnn": digits_cnn,
    "letters_resnet12": letters_resnet12,
    "mnist_vit": mnist_vit,
    "voices_crnn": voices_crnn,
    "solar_efficientnet": solar_efficientnet,
}


def _variant(smoke: bool) -> str:
    return "smoke" if smoke else "full"


def _classifier(what: str, config: ConfigDict, directory: pathlib.Path) -> Problem:
    """A network that is tested by its logits on its own domain."""
    tfds.disable_progress_bar()
    with show_progress() as progress:
        progress.expect(config.pretrain.steps)
        task = training.prepare(config, directory, progress)
    metric, test = config.metrics[0], task.target["test"]

    def score(logits: Any) -> tuple[float, np.ndarray]:
        found = metrics.scores([metric], logits, test.labels)[metric]
        return found, np.argmax(logits, axis=-1)

    return Problem(
        what,
        metric,
        applied(task.network(bits=None)),
        task.start,
        task.target["train"].images[:256],
        test.images,
        score,
    )


def _few_shot(what: str, config: ConfigDict, directory: pathlib.Path) -> Problem:
    """A network that is tested by the distances of its features in new tasks."""
    with show_progress() as progress:
        network, params, data = features_network(config, directory, progress)
    test = data["test"]
    sample = episodes.sampler(
        test.labels,
        n_way=config.n_way,
        k_shot=config.k_shot,
        num_queries=config.num_queries,
    )
    tasks = jax.vmap(sample)(jax.random.split(jax.random.key(config.seed), _TASKS))

    @jax.jit
    def predicted(x: jax.Array) -> jax.Array:
        logits = jax.vmap(nearest_centroid.protonet_logits)(
            x[tasks.support], x[tasks.query]
        )
        return jnp.argmax(logits, axis=-1)

    def score(features: Any) -> tuple[float, np.ndarray]:
        found = np.asarray(predicted(jnp.asarray(features)))
        return float(np.mean(found == np.arange(config.n_way)[:, None])), found

    return Problem(
        what,
        "accuracy",
        applied(network(bits=None)),
        params,
        data["train"].images[:256],
        test.images,
        score,
    )


def features_network(
    config: ConfigDict, directory: pathlib.Path, progress: Progress
) -> tuple[Callable[..., Any], Any, registry.Splits]:
    """Pre-trains a few-shot network, whose outputs are then its features.

    Args:
      config: see ``configs/fewshot_vision.py``.
      directory: a workdir, which keeps the data and the pre-training.
      progress: told of the steps.

    Returns:
      ``network(bits=...)``, its parameters, and the splits, no class in two of them.
    """
    tfds.disable_progress_bar()
    progress.expect(config.pretrain.steps)
    data_dir = config.data_dir or str(directory / "data")
    data = registry.DATASETS[config.dataset](config.domain, data_dir)
    base = few_shot.base_splits(data["train"])
    make = registry.NETWORKS[config.network]
    num_classes = 1 + int(jnp.max(base["train"].labels))
    network = functools.partial(make, num_classes=num_classes)
    params = training.pretrain(config, network, base, progress, directory / "runs")
    images = data["train"].images
    params, mean = few_shot.with_identity(network(bits=None), params, images)
    return functools.partial(make, num_classes=len(mean)), params, data


def applied(network: Any) -> Callable[..., jax.Array]:
    """``function(params, inputs)`` of a Flax module."""

    def function(params: Any, inputs: jax.Array) -> jax.Array:
        outputs: jax.Array = network.apply({"params": params}, inputs)
        return outputs

    return function


def new_voices(split: Split) -> registry.Splits:
    """Every other recording of each voice to learn from, the others to be tested on.

    Args:
      split: recordings of voices, with labels of any numbers.

    Returns:
      "train", "validation" and "test", whose labels count from 0.
    """
    train, rest = _halves(split)
    validation, test = _halves(rest)
    classes = np.unique(np.asarray(split.labels))

    def counted(part: Split) -> Split:
        labels = np.searchsorted(classes, np.asarray(part.labels))
        return part._replace(labels=jnp.asarray(labels, jnp.int32))

    splits = {"train": train, "validation": validation, "test": test}
    return {name: counted(part) for name, part in splits.items()}


def _halves(split: Split) -> tuple[Split, Split]:
    """Every other example of each class, and the others."""
    labels = np.asarray(split.labels)
    odd = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        odd[np.flatnonzero(labels == label)[1::2]] = True
    first, second = (
        Split(split.images[chosen], split.labels[chosen])
        for chosen in (np.flatnonzero(~odd), np.flatnonzero(odd))
    )
    return first, second
