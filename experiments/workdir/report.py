"""What an experiment shows and leaves behind: table, figure, JSON."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import rich
import rich.table
from matplotlib import figure
from ml_collections import ConfigDict

from experiments.workdir import runs

mpl.use("Agg")

_COLUMNS = ("forward passes", "learning rate", "seconds", "temporaries MiB")

_PRODUCTS = ("passes with products of gradients", "multiply-adds, 1e9")


def write_json(results: dict[str, Any], directory: pathlib.Path) -> None:
    """Writes results.json, also of an unfinished experiment.

    JSON has no word for numbers that are not finite, such as the loss of a run that
    diverged: they become null.
    """
    text = json.dumps(_finite(results), indent=2, allow_nan=False)
    runs.write_text(directory / "results.json", text + "\n")


def _finite(value: Any) -> Any:
    """The value with None in the place of numbers that are not finite."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write(results: dict[str, Any], config: ConfigDict, directory: pathlib.Path) -> None:
    """Prints the table; writes results.json, table.md and figure.png.

    Args:
      results: as `experiments.drivers.training.run` returns them.
      config: the configuration behind them.
      directory: the workdir.
    """
    columns = ("method", *config.metrics, *_COLUMNS)
    rows = [_row(name, result, config.metrics) for name, result in results.items()]
    if config.get("count_products", False):
        columns += _PRODUCTS
        for row, result in zip(rows, results.values(), strict=True):
            row += _products(result)
    if config.get("reach", 0.0):
        goal = f"to {100 * config.reach:g}%"
        columns += (f"passes {goal}", f"seconds {goal}")
        for row, result in zip(rows, results.values(), strict=True):
            row += _reached(result, config.reach)
    if config.gradient_estimates:
        columns += ("cosine",)
        for row, result in zip(rows, results.values(), strict=True):
            row.append(_cosines(result.get("cosine", {})))
    if config.early_stopping:
        metric = config.metrics[0]
        columns += (f"{metric}, stopped early",)
        for row, result in zip(rows, results.values(), strict=True):
            stopped = result.get("early_stopping")
            row.append(_score(stopped, metric) if stopped else "")
    note = (
        f"{config.source} to {config.target}, test {' and '.join(config.metrics)} in % "
        f"{spread(len(config.seeds))}; a backward pass "
        "counts as two forward passes; seconds per run with "
        f"{config.parallel_runs} runs at a time; temporaries of the compiled step."
    )
    if config.get("count_products", False):
        note += (
            " forward passes count a backward pass as two, whose second half is the "
            "products of the weights' gradients; passes with these products count them "
            "for every method."
        )
    if config.get("reach", 0.0):
        note += (
            f" passes and seconds to {100 * config.reach:g}%: when the mean of the "
            f"seeds was first seen there, at one of {config.num_evals} points of a run."
        )
    if config.gradient_estimates:
        note += (
            " cosine: of an estimate with the float gradient of its batch where runs "
            "start, which synthetic gradients had time to learn, over "
            f"{config.gradient_estimates} estimates."
        )
    if config.early_stopping:
        note += " stopped early: where the validation split's score was best."
    _print_table(columns, rows, note, wide=1 + len(config.metrics))
    write_json(results, directory)
    (directory / "table.md").write_text(_markdown(columns, rows, note))
    draw = FIGURES[config.figure]
    draw(results, config.metrics[0], directory / "figure.png")
    rich.print(
        f"Written to {directory}: results.json, config.json, table.md, figure.png"
    )


def write_table(
    columns: Sequence[str],
    rows: list[list[str]],
    note: str,
    directory: pathlib.Path,
    wide: int,
) -> None:
    """Prints a table and writes table.md.

    Args:
      columns: their names.
      rows: cells, as many as columns.
      note: what the numbers are.
      directory: the workdir.
      wide: how many of the columns the terminal does not fold.
    """
    _print_table(columns, rows, note, wide)
    (directory / "table.md").write_text(_markdown(columns, rows, note))


def write_parts(
    results: dict[str, dict[str, Any]], config: ConfigDict, directory: pathlib.Path
) -> None:
    """Prints the parts of an experiment side by side; writes table.md and figure.png.

    Args:
      results: by the names of the parts, which have the same methods.
      config: the configuration behind them.
      directory: the workdir.
    """
    parts = config.parts
    metrics = {name: part.metrics[0] for name, part in parts.items()}
    names = next(iter(results.values()))
    rows = [
        [name, *(_score(part[name], metrics[x]) for x, part in results.items())]
        for name in names
    ]
    passes = {
        name: max(method.get("forward_passes", 0) for method in part.values())
        for name, part in results.items()
    }
    tasks = "; ".join(
        f"{name}: {part.source} to {part.target}, "
        f"at most {passes[name]:,} forward passes"
        for name, part in parts.items()
    )
    seeds = sorted({len(part.seeds) for part in parts.values()})
    over = spread(" or ".join(map(str, seeds)))
    (metric, *others) = dict.fromkeys(metrics.values())
    of_others = "".join(
        f", of {' and '.join(x for x in metrics if metrics[x] == other)} {other}"
        for other in others
    )
    note = f"Test {metric}{of_others} in % {over}. {tasks}."
    columns = ("method", *results)
    _print_table(columns, rows, note, wide=len(columns))
    (directory / "table.md").write_text(_markdown(columns, rows, note))

    size = (3.2 * (1 + len(results)), 1 + 0.22 * len(rows))
    fig = figure.Figure(figsize=size, layout="constrained")
    panels = fig.subplots(ncols=len(results), sharey=True, squeeze=False)[0]
    for axes, (name, part) in zip(panels, results.items(), strict=True):
        _draw_dots(axes, part, metrics[name])
        axes.set_title(name)
    panels[0].invert_yaxis()
    fig.savefig(directory / "figure.png", dpi=120)


def _print_table(
    columns: Sequence[str], rows: list[list[str]], note: str, wide: int
) -> None:
    """Prints a table on the terminal; its first ``wide`` columns are not folded."""
    table = rich.table.Table(*columns, caption=note, caption_justify="left")
    for column in table.columns[:wide]:
        column.no_wrap = True
    table.columns[0].min_width = max(len(row[0]) for row in rows)
    for row in rows:
        table.add_row(*row)
    rich.print(table)


def _markdown(columns: Sequence[str], rows: list[list[str]], note: str) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}\n"


def _score(result: dict[str, Any], metric: str) -> str:
    """Mean and deviation in percent; the mean alone if one run has no deviation."""
    mean, deviation = result[metric], result[f"{metric}_std"]
    if deviation is None:
        return f"{100 * mean:.1f}"
    return f"{100 * mean:.1f} ± {100 * deviation:.1f}"


def mean_and_deviation(
    values: Sequence[float], factor: float = 100, digits: int = 1
) -> str:
    """Mean and standard deviation of runs; the mean alone of a single run.

    Args:
      values: one of each run.
      factor: what they are multiplied by; 100 for percent.
      digits: after the point.

    Example:
      >>> mean_and_deviation([0.5, 0.6])
      '55.0 ± 7.1'
    """
    mean = f"{factor * np.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {factor * np.std(values, ddof=1):.{digits}f}"


def spread(num_seeds: int | str) -> str:
    """What a mean and the number after it are."""
    if str(num_seeds) == "1":
        return "of one seed"
    return f"as mean ± standard deviation over {num_seeds} seeds"


def _row(name: str, result: dict[str, Any], metrics: Sequence[str]) -> list[str]:
    scores = [_score(result, metric) for metric in metrics]
    if "steps" not in result:
        return [name, *scores, "0", "", "", ""]
    return [
        name,
        *scores,
        f"{result['forward_passes']:,}",
        f"{result['learning_rate']:g}",
        f"{result['seconds']:.1f}",
        f"{result['temporaries_mib']:.2f}",
    ]


def _products(result: dict[str, Any]) -> list[str]:
    if "steps" not in result:
        return [""] * len(_PRODUCTS)
    return [
        f"{result['passes_with_products']:,}",
        f"{result['multiply_adds'] / 1e9:.1f}",
    ]


def _reached(result: dict[str, Any], score: float) -> list[str]:
    """The passes and the seconds until the mean curve has a score, if it ever has."""
    if "steps" not in result:
        return ["", ""]
    curve = np.mean(result["curves"], axis=0)
    (at,) = np.nonzero(curve >= score)
    if not at.size:
        return ["–", "–"]
    share = at[0] / (len(curve) - 1)
    return [
        f"{share * result['forward_passes']:,.0f}",
        f"{share * result['seconds']:.1f}",
    ]


def _cosines(cosines: dict[str, tuple[float, float]]) -> str:
    return ", ".join(
        f"{name} {mean:.2f} ± {d:.2f}" for name, (mean, d) in cosines.items()
    )


def _curves(results: dict[str, Any], metric: str, path: pathlib.Path) -> None:
    """Draws the curves of all methods by forward passes, and by seconds."""
    fig = figure.Figure(figsize=(11, 4.0), layout="constrained")
    panels = fig.subplots(1, 2, sharey=True)
    for axes, cost in zip(panels, ("forward_passes", "seconds"), strict=True):
        for name, result in results.items():
            if "curves" not in result:
                continue
            curves = 100 * np.array(result["curves"])
            points = np.linspace(0, result[cost], curves.shape[1])
            mean = curves.mean(0)
            std = curves.std(0, ddof=1) if len(curves) > 1 else np.zeros_like(mean)
            (line,) = axes.plot(points[1:], mean[1:], label=name)
            axes.fill_between(
                points[1:],
                (mean - std)[1:],
                (mean + std)[1:],
                alpha=0.2,
                color=line.get_color(),
            )
        zero_shot = 100 * results["zero_shot"][metric]
        axes.axhline(zero_shot, color="grey", linestyle=":", label="zero_shot")
        axes.set(xlabel=cost.replace("_", " "), xscale="log")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel=f"test {metric} (%)")
    fig.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    fig.savefig(path, dpi=120)


def _dots(results: dict[str, Any], metric: str, path: pathlib.Path) -> None:
    """Draws one line for each method, for experiments with many methods."""
    fig = figure.Figure(figsize=(6.4, 1 + 0.22 * len(results)), layout="constrained")
    axes = fig.subplots()
    _draw_dots(axes, results, metric)
    axes.invert_yaxis()
    fig.savefig(path, dpi=120)


def _draw_dots(axes: Any, results: dict[str, Any], metric: str) -> None:
    """Draws mean and deviation of each method, and a line at the best mean."""
    names = [name for name in results if name != "zero_shot"]
    mean = np.array([100 * results[name][metric] for name in names])
    # A single run has no deviation.
    std = np.array([100 * (results[name][f"{metric}_std"] or 0) for name in names])
    rows = np.arange(len(names))
    axes.errorbar(mean, rows, xerr=std, fmt="o", capsize=3)
    axes.axvline(mean.max(), color="grey", linestyle=":")
    axes.set_yticks(rows, names)
    axes.set(xlabel=f"test {metric} (%)")
    axes.grid(alpha=0.3)


def _memory(results: dict[str, Any], metric: str, path: pathlib.Path) -> None:
    """Draws accuracy against the scratch memory of a step: up and to the left is best.

    The area of a dot is in proportion to the forward passes.
    """
    fig = figure.Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = fig.subplots()
    methods = {name: x for name, x in results.items() if "temporaries_mib" in x}
    passes = np.array([x["forward_passes"] for x in methods.values()])
    for size, (name, x) in zip(passes / passes.min(), methods.items(), strict=True):
        point = x["temporaries_mib"], 100 * x[metric]
        deviation = 100 * (x[f"{metric}_std"] or 0)
        drawn = axes.errorbar(*point, yerr=deviation, capsize=3)
        colour = drawn.lines[0].get_color()
        axes.scatter(*point, s=30 * size, color=colour, alpha=0.5)
        axes.annotate(
            f"{name}\n{x['forward_passes']:,} passes",
            point,
            xytext=(8, -4),
            textcoords="offset points",
            fontsize="small",
            color=colour,
        )
    axes.set(xlabel="scratch memory of a step (MiB)", ylabel=f"test {metric} (%)")
    axes.set_xscale("log")
    axes.margins(0.25)
    axes.grid(alpha=0.3)
    fig.savefig(path, dpi=120)


FIGURES = {"curves": _curves, "dots": _dots, "memory": _memory}
