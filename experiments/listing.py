"""What there is to run, by name: configurations, networks, datasets, ways to adapt."""

import ast
import pathlib
from collections.abc import Iterable

from experiments import published, registry
from experiments.learners import adapt, metrics

CONFIGS = pathlib.Path(__file__).parent / "configs"


def text() -> str:
    """All names that a configuration or a command can use, one kind after another.

    Example:
      >>> "quickstart.py" in text() and "resnet18" in text()
      True
    """
    sections = {
        "configurations, --config=experiments/configs/...": _configurations(),
        "networks, --config.network=...": sorted(registry.NETWORKS),
        "datasets, --config.dataset=..., and their domains": _datasets(),
        "published weights, --config.weights=...": _weights(),
        "backbones, --config.backbone=...": sorted(registry.BACKBONES),
        "ways to adapt, methods.NAME.adaptation": sorted(adapt.WAYS),
        "metrics, --config.metrics=...": sorted(metrics.METRICS),
    }
    return "\n\n".join(
        "\n".join([title, *(f"  {line}" for line in lines)])
        for title, lines in sections.items()
    )


def _configurations() -> Iterable[str]:
    """Each file with the first sentence of its docstring."""
    for path in sorted(CONFIGS.glob("*.py")):
        said = ast.get_docstring(ast.parse(path.read_text()))
        if path.stem != "__init__" and said:
            summary = " ".join(said.split("\n\n")[0].split())
            yield f"{path.name}: {summary}"


def _weights() -> Iterable[str]:
    """The names of those that packages carry, and which files the networks read."""
    for name, (owner, _) in sorted(published.PACKAGED.items()):
        yield f"{name}: of {owner.__name__}, from a package"
    for module, reader in published.READERS.items():
        yield f"a path, for {module.__name__}: {reader.files}"


def _datasets() -> Iterable[str]:
    for name, load in sorted(registry.DATASETS.items()):
        domains = [domain for domain in getattr(load, "domains", ()) if domain]
        yield f"{name}: {', '.join(domains)}" if domains else name
