"""Checks of configurations before any work begins.

A name that is not known, or a number that makes a result meaningless, is told at once
and not after minutes of pre-training.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments import published, registry
from experiments.data import corruptions, texts
from experiments.drivers import layouts
from experiments.learners import (
    adapt,
    learner,
    metrics,
    nearest_centroid,
    optimizers,
    predicted_time,
)
from experiments.models import decoder, sampled
from experiments.usage import UsageError, check_names
from experiments.workdir import report


def check_training(config: ConfigDict) -> None:
    """Checks a configuration of ordinary training, or of a landscape.

    Args:
      config: see ``configs/quickstart.py``; one with ``parts`` holds several by name.

    Raises:
      UsageError: for unknown names, and for seeds or learning rates that are missing.
    """
    for part in _parts(config):
        _check_common(part)
        check_names("backbone", _given(part.backbone), registry.BACKBONES)
        check_names("figure", [part.figure], report.FIGURES)
        registry.check_domains(part.dataset, [part.source, part.target])
        _check_seeds("seeds", part.seeds)
        predicted_time.Question.of(part.get("estimate", {}))
        layouts.check(part)
        for name in part.run:
            rates = part.methods[name].learning_rates
            _check_some(f"methods.{name}.learning_rates", rates)
            if len(rates) > 1:
                _check_seeds("tuning_seeds", part.tuning_seeds)


def check_few_shot(config: ConfigDict) -> None:
    """Checks a configuration of few-shot learning.

    Args:
      config: see ``configs/fewshot_vision.py``; one with ``parts`` holds several.

    Raises:
      UsageError: for unknown names, and for fewer than two tasks.
    """
    for part in _parts(config):
        _check_common(part)
        nearest_centroid.check_settings(part)
        registry.check_domains(part.dataset, [part.domain])
        if part.tasks < 2:
            raise UsageError(
                "tasks must be at least 2, for an interval of the mean accuracy, got "
                f"{part.tasks}."
            )
        if part.tuning_tasks < 1:
            raise UsageError(
                f"tuning_tasks must be at least 1, got {part.tuning_tasks}."
            )


def check_memory(config: ConfigDict) -> None:
    """Checks a configuration of the table of memory.

    Args:
      config: see ``configs/memory.py``.

    Raises:
      UsageError: for unknown names.
    """
    names = [network.name for network in config.networks.values()]
    check_names("network", names, registry.NETWORKS)
    for method in config.methods.values():
        adapt.check_way(method.adaptation)


def check_influence(config: ConfigDict) -> None:
    """Checks a configuration of the influence of training examples.

    Args:
      config: see ``configs/influence.py``.

    Raises:
      UsageError: for unknown names, and for numbers that leave nothing to look at.
    """
    check_names("network", [config.network], registry.NETWORKS)
    _check_data(config, config.domain)
    learner.check_method(config.method)
    _check_seeds("seeds", config.seeds)
    _check_some("directions", config.directions)
    _check_some("checked", config.checked)
    if not 0 < config.flipped < 1:
        raise UsageError(f"flipped must lie between 0 and 1, got {config.flipped}.")
    if not 1 <= config.checkpoints <= config.method.steps:
        raise UsageError(
            f"checkpoints must be 1 to {config.method.steps}, the steps of a run, got "
            f"{config.checkpoints}."
        )


def check_private(config: ConfigDict) -> None:
    """Checks a configuration of accuracy against privacy.

    Args:
      config: see ``configs/private.py``.

    Raises:
      UsageError: for unknown names, and for numbers that have no meaning.
    """
    check_names("network", [config.network], registry.NETWORKS)
    _check_data(config, config.source, config.target)
    check_names("method", config.run, config.methods)
    _check_some("run", config.run)
    learner.check_method(config.pretrain)
    _check_seeds("seeds", config.seeds)
    _check_seeds("tuning_seeds", config.tuning_seeds)
    for name in config.run:
        mechanism = config.methods[name].mechanism
        check_names("mechanism", [mechanism], ("backward", "gaussian", "sign"))
        _check_some(
            f"methods.{name}.learning_rates", config.methods[name].learning_rates
        )
    if not all(epsilon > 0 for epsilon in config.epsilons):
        raise UsageError(f"epsilons must be positive, got {config.epsilons}.")
    if config.tuning_epsilon not in config.epsilons:
        raise UsageError(
            f"tuning_epsilon must be one of the epsilons {config.epsilons}, got "
            f"{config.tuning_epsilon}."
        )


def check_training_time(config: ConfigDict) -> None:
    """Checks a configuration of predicted training times.

    Args:
      config: see ``configs/training_time.py``.

    Raises:
      UsageError: for unknown names, and for numbers that have no meaning.
    """
    for task in config.tasks.values():
        check_names("network", [task.network], registry.NETWORKS)
        _check_data(task, task.source, task.target)
        learner.check_method(task.pretrain)
    check_names("method", config.learning_rates, ("backprop", "forward"))
    _check_seeds("seeds", config.seeds)
    for name in ("directions", "targets", "learning_rates", "tasks"):
        _check_some(name, config[name])
    if not all(0 < share < 1 for share in config.targets):
        raise UsageError(
            f"targets are shares of the first loss, between 0 and 1, got "
            f"{config.targets}."
        )


def check_equilibrium(config: ConfigDict) -> None:
    """Checks a configuration of the deep equilibrium network.

    Args:
      config: see ``configs/equilibrium.py``.

    Raises:
      UsageError: for unknown names, and for numbers that have no meaning.
    """
    _check_data(config, config.source, config.target)
    check_names("method", config.run, config.methods)
    _check_some("run", config.run)
    _check_seeds("seeds", config.seeds)
    for name in config.run:
        method = config.methods[name]
        _check_some(f"methods.{name}.learning_rates", method.learning_rates)
        if method.kind != "forward" and method.kind not in range(1000):
            raise UsageError(
                f'methods.{name}.kind must be "forward" or a number of steps, got '
                f"{method.kind!r}."
            )
    if config.estimates < 2:
        raise UsageError(f"estimates must be at least 2, got {config.estimates}.")


def check_sampled(config: ConfigDict) -> None:
    """Checks a configuration of backpropagation with sampled activations.

    Args:
      config: see ``configs/sampled.py``.

    Raises:
      UsageError: for unknown names, and for numbers that have no meaning.
    """
    _check_data(config, config.source, config.target)
    check_names("sampler", config.samplers, sampled.SAMPLERS)
    _check_seeds("seeds", config.seeds)
    _check_seeds("tuning_seeds", config.tuning_seeds)
    _check_some("learning_rates", config.learning_rates)
    if not all(1 <= rows <= config.batch_size for rows in config.rows):
        raise UsageError(
            f"rows must be 1 to {config.batch_size}, the size of a batch, got "
            f"{config.rows}."
        )


def check_keywords(config: ConfigDict) -> None:
    """Checks a configuration of a keyword network that learns new words.

    Args:
      config: see ``configs/keywords.py``.

    Raises:
      UsageError: for unknown names, and for numbers that have no meaning.
    """
    check_names("task", config.tasks, ("words", "voices"))
    check_names("method", config.run, config.methods)
    for name in ("tasks", "run"):
        _check_some(name, config[name])
    _check_seeds("seeds", config.seeds)
    _check_seeds("tuning_seeds", config.tuning_seeds)
    for name in config.run:
        method = config.methods[name]
        check_names("gradient", [method.gradient], ("backward", "adapt"))
        _check_some(f"methods.{name}.learning_rates", method.learning_rates)
    for name in ("shots", "batch_size", "every"):
        if config[name] < 1:
            raise UsageError(f"{name} must be at least 1, got {config[name]}.")


def check_test_time(config: ConfigDict) -> None:
    """Checks a configuration of adaptation at test time.

    Args:
      config: see ``configs/test_time.py``.

    Raises:
      UsageError: for unknown names, for a network without stages, and for numbers that
        have no meaning.
    """
    _check_common(config)
    _check_seeds("seeds", config.seeds)
    _check_seeds("tuning_seeds", config.tuning_seeds)
    _check_some("run", config.run)
    for name in config.run:
        method = config.methods[name]
        _check_some(f"methods.{name}.learning_rates", method.learning_rates)
        if method.updates and not (method.labels or method.entropy or method.alignment):
            raise UsageError(
                f"methods.{name} has nothing to minimise: set labels, or entropy or "
                "alignment to more than 0."
            )
    if not hasattr(registry.NETWORKS[config.network](), "stages"):
        raise UsageError(
            f"adaptation at test time looks behind the stages of a network, and "
            f"{config.network} has none; choose a ViT or a ResNet."
        )
    if config.severity not in (0, *corruptions.SEVERITIES):
        raise UsageError(
            f"severity must be 0 or one of {corruptions.SEVERITIES}, got "
            f"{config.severity}."
        )
    if config.rounds < 1:
        raise UsageError(f"rounds must be at least 1, got {config.rounds}.")


def check_text(config: ConfigDict) -> None:
    """Checks a configuration of a decoder of bytes.

    Args:
      config: see ``configs/text.py``.

    Raises:
      UsageError: for unknown names, and for numbers that have no meaning.
    """
    check_names("network", [config.network], ("decoder",))
    check_names("domain of texts", [config.source, config.target], texts.DOMAINS)
    check_names("domain of texts", config.words, texts.DOMAINS)
    check_names("task", config.tasks, ("language", "kinds"))
    check_names("method", config.run, config.methods)
    _check_seeds("seeds", config.seeds)
    _check_seeds("tuning_seeds", config.tuning_seeds)
    for name in ("run", "tasks", "buckets", "words"):
        _check_some(name, config[name])
    for name in config.run:
        method = config.methods[name]
        optimizers.check_method(method)
        check_names(f"methods.{name}.trains", [method.trains], ("lora", "full"))
        _check_some(f"methods.{name}.learning_rates", method.learning_rates)
    longest = decoder.Decoder().longest
    if not all(0 < length <= longest for length in config.buckets):
        raise UsageError(
            f"buckets must be lengths of 1 to {longest} bytes, which the decoder has "
            f"positions for, got {config.buckets}."
        )


def _parts(config: ConfigDict) -> list[ConfigDict]:
    """The parts of a configuration, or itself if it has none."""
    if "parts" not in config:
        return [config]
    parts = list(config.parts.values())
    if len({tuple(part.run) for part in parts}) != 1:
        raise UsageError(
            "the parts of a configuration stand side by side in one table, so there "
            "must be parts and all must run the same methods; got "
            f"{ {name: tuple(part.run) for name, part in config.parts.items()} }."
        )
    return parts


def _check_common(config: ConfigDict) -> None:
    """Checks what every experiment with a dataset names."""
    check_names("network", [config.network], registry.NETWORKS)
    check_names("dataset", [config.dataset], registry.DATASETS)
    published.check(config.weights, config.network, registry.NETWORKS[config.network])
    published.check_normalization(config.normalization)
    check_names("metric", config.metrics, metrics.METRICS)
    _check_some("metrics", config.metrics)
    methods: Mapping[str, Any] = config.methods
    check_names("method", config.run, methods)
    for method in (config.pretrain, *(methods[name] for name in config.run)):
        learner.check_method(method)


def _given(name: str | None) -> list[str]:
    """A name that may be left out, as a list."""
    return [name] if name else []


def _check_data(config: ConfigDict, *domains: str) -> None:
    """Raises a UsageError unless there is the dataset, and the domains of it."""
    check_names("dataset", [config.dataset], registry.DATASETS)
    registry.check_domains(config.dataset, list(domains))


def _check_seeds(name: str, seeds: Any) -> None:
    _check_some(name, seeds)
    if not all(isinstance(seed, int) for seed in seeds):
        raise UsageError(f"{name} must be whole numbers, got {seeds!r}.")


def _check_some(name: str, values: Any) -> None:
    if not len(values):
        raise UsageError(f"{name} must have at least one entry, got none.")
