"""Measures what compilation takes, in parts.

    python -m experiments.benchmarks.compile_run --workdir=workdir/compile

Does what ``experiments.benchmarks.main --only=compile`` does. The workdir keeps what
was measured program by program; the same command goes on where it was stopped, by
``--seconds`` or by a kill, prints the tables of what there is by then, and writes
`tables.md` and `compile_time.svg`, the growth with depth.
"""

import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from experiments.benchmarks import compile_time


def run(
    workdir: str,
    seconds: float | None = None,
    smoke: bool = False,
    **chosen: Sequence[str],
) -> bool:
    """Measures what the workdir does not have yet, and shows what it has.

    Args:
      workdir: records.json, tables.md and compile_time.svg go here.
      seconds: after how long no further program is begun; None for no limit.
      smoke: whether to take a tiny network.
      **chosen: which arithmetics, networks and programs, see `compile_time.records`.

    Returns:
      Whether everything is measured.
    """
    directory = pathlib.Path(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "records.json"
    records = json.loads(path.read_text()) if path.exists() else []
    start = time.monotonic()
    finished = True
    for record in compile_time.records(records, smoke=smoke, **chosen):
        records.append(record)
        path.write_text(json.dumps(records, indent=2) + "\n")
        print(json.dumps(record), flush=True)
        if seconds is not None and time.monotonic() - start > seconds:
            finished = False
            break
    tables = compile_time.tables_of(records)
    text = "\n".join(table.markdown() for table in tables)
    (directory / "tables.md").write_text(text)
    print(text, flush=True)
    figure(records, directory / "compile_time.svg")
    return finished


def figure(records: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Draws CPU seconds before the first run over depth, one panel per arithmetic."""
    import matplotlib.pyplot as plt

    series = compile_time.by_depth(records)
    arithmetics = list(dict.fromkeys(arithmetic for arithmetic, _ in series))
    phases = {"trace + lowering": compile_time.PHASES[:2], "XLA": ("compilation",)}
    panels, axes = plt.subplots(
        *(len(arithmetics), len(phases)),
        figsize=(9, 3.6 * len(arithmetics)),
        sharex=True,
        squeeze=False,
    )
    for row, arithmetic in zip(axes, arithmetics, strict=True):
        for axis, (title, parts) in zip(row, phases.items(), strict=True):
            for (of, program), found in series.items():
                if of == arithmetic:
                    depths = sorted(found)
                    times = [sum(found[d][p] for p in parts) for d in depths]
                    axis.plot(depths, times, marker="o", label=program)
            axis.set(title=f"{arithmetic}, {title}", xlabel="blocks")
            axis.set(xscale="log", yscale="log", ylabel="CPU seconds")
            axis.set_xticks(compile_time.DEPTHS, map(str, compile_time.DEPTHS))
    axes[0][0].legend(fontsize="small")
    panels.tight_layout()
    panels.savefig(path, metadata={"Date": None})
    plt.close(panels)


def main(argv: Sequence[str]) -> None:
    """Measures for as long as the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    given = flags.FLAGS
    finished = run(
        given.workdir,
        given.seconds,
        given.smoke,
        arithmetics=given.arithmetic,
        networks=given.network,
        chosen=given.program,
    )
    if not finished:
        print("The time is up; the same command goes on.", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory for the results.")
    flags.DEFINE_float("seconds", None, "When to begin no further program.")
    flags.DEFINE_list(
        "arithmetic", list(compile_time.ARITHMETICS), "Arithmetics of the networks."
    )
    flags.DEFINE_multi_string("network", [], "Some of the networks, by name.")
    flags.DEFINE_multi_string("program", [], "Some of the programs, by name.")
    flags.DEFINE_bool("smoke", False, "A tiny network, which shows no result.")
    flags.mark_flag_as_required("workdir")
    app.run(main)
