"""What the smoke settings of the experiments take, in seconds of the processor.

    python -m experiments.benchmarks.smokes --workdir=workdir/smokes

Each setting is started three times, as a process of its own: with no compiled programs,
in another workdir with those of the first start, and in the workdir that is finished,
which prints its table again. The same command goes on where it was stopped.
"""

import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from experiments.benchmarks.table import Table

CONFIGS = pathlib.Path("experiments/configs")
STARTS = ("first", "compiled before", "finished before")


def settings() -> dict[str, str]:
    """The smoke setting of each configuration by its name, as its docstring has it."""
    found = {}
    for path in sorted(CONFIGS.glob("*.py")):
        text = path.read_text()
        pattern = rf"({path.stem}\.py:[\w,]*\bsmoke)\b"
        if "smoke" in text and (match := re.search(pattern, text)):
            found[path.stem] = f"{CONFIGS}/{match[1]}"
    return found


def measured(setting: str) -> dict[str, float]:
    """CPU seconds of each of the `STARTS` of a setting.

    Args:
      setting: for ``--config``.

    Raises:
      subprocess.CalledProcessError: where a start fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache"}
        seconds = {}
        for start, workdir in zip(STARTS, ("a", "b", "b"), strict=True):
            command = [sys.executable, "-m", "experiments.main", f"--config={setting}"]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(
                [*command, f"--workdir={folder}/{workdir}"],
                check=True,
                capture_output=True,
                env=environment,
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds[start] = sum(
                getattr(after, what) - getattr(before, what)
                for what in ("ru_utime", "ru_stime")
            )
        return seconds


def table(records: Sequence[dict[str, Any]]) -> Table:
    """What was measured, a line for each setting."""
    return Table(
        title="Smoke settings: seconds of the processor",
        columns=("setting", *STARTS),
        rows=[
            [record["setting"], *(f"{record[start]:.0f}" for start in STARTS)]
            for record in records
        ],
        note="Each start is a process of its own; to import all libraries takes some "
        "seconds of each. Finished before: the table is printed again.",
        raw=list(records),
    )


def main(argv: Sequence[str]) -> None:
    """Measures what the workdir does not have yet."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    directory = pathlib.Path(flags.FLAGS.workdir)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "records.json"
    records = json.loads(path.read_text()) if path.exists() else []
    known = {record["setting"] for record in records}
    begin = time.monotonic()
    only, seconds = flags.FLAGS.only, flags.FLAGS.seconds
    for name, setting in settings().items():
        if (only and name not in only) or setting in known:
            continue
        if seconds is not None and time.monotonic() - begin > seconds:
            break
        records.append({"setting": setting, **measured(setting)})
        path.write_text(json.dumps(records, indent=2) + "\n")
        print(json.dumps(records[-1]), flush=True)
    text = table(records).markdown()
    (directory / "tables.md").write_text(text)
    print(text, flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory for the results.")
    flags.DEFINE_list("only", None, "Names of configurations; all by default.")
    flags.DEFINE_float("seconds", None, "When to begin no further setting.")
    flags.mark_flag_as_required("workdir")
    app.run(main)
