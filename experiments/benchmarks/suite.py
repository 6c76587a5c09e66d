"""All tables by name, and what makes, prints and writes them."""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

import fgrad
from experiments.benchmarks import (
    arithmetics,
    bars,
    by_hand,
    compile_time,
    floor,
    growth,
    integer_time,
    joint_memory,
    memory,
    peers,
    timing,
)
from experiments.benchmarks.table import Table

# tables(smoke) yields them as they are finished.
TABLES: dict[str, Callable[[bool], Iterator[Table]]] = {
    "bars": bars.tables,
    "fine_tuning": memory.fine_tuning,
    "memory": memory.tables,
    "time": timing.tables,
    "peers": peers.tables,
    "growth": growth.tables,
    "by_hand": by_hand.tables,
    "floor": floor.tables,
    "arithmetics": arithmetics.tables,
    "compile": compile_time.tables,
    "integer": integer_time.tables,
    "joint": joint_memory.tables,
    # In parts, such as "joint_vit_16w8a", or "joint_vit_16w8a_way" of that.
    **{
        name + suffix: functools.partial(
            joint_memory.tables, cases=(case,), way_only=bool(suffix)
        )
        for name, case in joint_memory.CASES.items()
        for suffix in ("", "_way")
    },
}
# What is made unless others are named: to compile deep networks takes 20 minutes.
ON_DEMAND = ("compile", "integer", "joint")
DEFAULT = [name for name in TABLES if name.partition("_")[0] not in ON_DEMAND]


def run(workdir: str, only: Sequence[str], smoke: bool = False) -> dict[str, Any]:
    """Makes tables, prints them and writes them into the workdir.

    Args:
      workdir: results.json and tables.md go here, anew after every table.
      only: keys of `TABLES`.
      smoke: whether to take tiny sizes, which show no result.

    Returns:
      What results.json holds: the device, the versions, and by its key in `TABLES` a
      list of tables, each with the raw numbers behind it.

    Raises:
      ValueError: for a name that is no key of `TABLES`.
    """
    if unknown := set(only) - set(TABLES):
        raise ValueError(
            f"there are no tables {sorted(unknown)}; choose from {list(TABLES)}."
        )
    directory = pathlib.Path(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    results: dict[str, Any] = {
        "device": device.device_kind,
        "platform": device.platform,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "fgrad": fgrad.__version__,
        "smoke": smoke,
        "tables": {},
    }
    text = (
        f"## Benchmarks on {device.platform} ({device.device_kind}, "
        f"{os.cpu_count()} cores), JAX {jax.__version__}, fgrad {fgrad.__version__}\n"
    )
    print(text, flush=True)
    for name in only:
        results["tables"][name] = []
        for table in TABLES[name](smoke):
            print(table.markdown(), flush=True)
            text += "\n" + table.markdown()
            results["tables"][name].append(table._asdict())
            written = json.dumps(results, indent=2) + "\n"
            (directory / "results.json").write_text(written)
            (directory / "tables.md").write_text(text)
    return results
