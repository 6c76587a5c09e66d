"""A table of the memory that networks need on a device, by the way they are trained.

It is counted and not measured, so nothing runs.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import rich
from matplotlib import figure
from ml_collections import ConfigDict

from experiments import registry
from experiments.drivers import settings
from experiments.learners import adapt
from experiments.workdir import report, runs
from fgrad import analysis

mpl.use("Agg")

_PARTS = ("weights", "activations", "gradients")


def run(config: ConfigDict, workdir: str, resume: bool = True) -> dict[str, Any]:
    """Counts the bytes of every network and method, and writes table and figure.

    Args:
      config: see ``configs/memory.py``.
      workdir: results.json, table.md and figure.png go here.
      resume: there is nothing to go on from.

    Returns:
      What results.json holds: by network and method the bytes of
      `fgrad.analysis.DeviceBudget`.

    Raises:
      UsageError: for a configuration that cannot be followed.
      InUseError, UsageError: as `experiments.workdir.runs.owned`.
    """
    settings.check_memory(config)
    directory = pathlib.Path(workdir)
    with runs.owned(directory, config, resume):
        results = {
            name: {
                title: _budget(config.networks[name], method).asdict()
                for title, method in config.methods.items()
            }
            for name in config.networks
        }
        report.write_json(results, directory)
        _write(results, config, directory)
        _draw(results, directory)
    rich.print(f"Written to {directory}: results.json, table.md, figure.png")
    return results


def _budget(network: ConfigDict, method: ConfigDict) -> analysis.DeviceBudget:
    made = registry.NETWORKS[network.name](num_classes=network.num_classes)
    model = adapt.make(made, method.adaptation)
    x = jax.ShapeDtypeStruct((1, *network.input_shape), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return model.apply({"params": params}, x)

    return analysis.device_budget(
        apply,
        params,
        x,
        method=method.method,
        trains=lambda name: model.trains(tuple(name.split("/"))),
        bits=tuple(method.bits),
        whole_gradient=method.whole_gradient,
    )


def _write(
    results: Mapping[str, Mapping[str, Any]],
    config: ConfigDict,
    directory: pathlib.Path,
) -> None:
    rows = []
    for name, methods in results.items():
        for title, budget in methods.items():
            said = config.networks[name].paper.get(title)
            fits = [f"{size:,}" for size in config.devices if budget["total"] <= size]
            rows.append(
                [
                    name,
                    title,
                    *(_mb(budget[part]) for part in (*_PARTS, "scratch", "total")),
                    f"{said:.2f}" if said else "",
                    fits[0] if fits else "none",
                ]
            )
    shapes = "; ".join(
        f"{name}: {'x'.join(map(str, network.input_shape))}"
        for name, network in config.networks.items()
    )
    sizes = ", ".join(f"{size:,}" for size in config.devices)
    note = (
        "MB (10^6 bytes) for a batch of one, as fgrad.analysis.device_budget counts "
        f"them; scratch: activations and gradients; fits: the least of {sizes} bytes "
        f"that holds everything. Inputs: {shapes}."
    )
    columns = (
        *("network", "method", *_PARTS, "scratch", "total"),
        *("scratch in the paper", "fits"),
    )
    report.write_table(columns, rows, note, directory, wide=len(columns))


def _draw(results: Mapping[str, Mapping[str, Any]], directory: pathlib.Path) -> None:
    fig = figure.Figure(figsize=(2.8 * len(results), 3.2), layout="constrained")
    panels = fig.subplots(ncols=len(results), squeeze=False, sharey=True)[0]
    for axes, (name, methods) in zip(panels, results.items(), strict=True):
        left = [0.0] * len(methods)
        for part in _PARTS:
            sizes = [budget[part] / 1e6 for budget in methods.values()]
            axes.barh(list(methods), sizes, left=left, label=part)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        axes.set(title=name, xlabel="MB")
        axes.set_ylim(len(methods) - 0.5, -0.5)
    panels[-1].legend(fontsize=7)
    fig.savefig(directory / "figure.png", dpi=100)


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"
