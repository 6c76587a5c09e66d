"""Runs the sections of the GPU's table, each in a process of its own."""

import json
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection
from typing import Any, NamedTuple

from experiments.benchmarks import gpu_sections, h100
from experiments.benchmarks.gpu_sections import Row

# Sections that take less time than this are not begun.
_LEAST_SECONDS = 10.0


class Section(NamedTuple):
    """A part of the table.

    Attributes:
      rows: ``rows(smoke)`` yields them as they are measured.
      seconds: after which its process is stopped.
      environment: variables that its process gets.
    """

    rows: Callable[[bool], Iterator[Row]]
    seconds: float
    environment: Mapping[str, str] = {}


# One program's memory is to be free for the next, and for other processes.
_SHARED = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
}
# In one piece, or it would come in pieces that a large leaf does not fit into.
_WHOLE = {**_SHARED, "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}

SECTIONS = {
    "vit": Section(gpu_sections.vit, 60, _SHARED),
    "vit_integers": Section(gpu_sections.vit_integers, 110, _SHARED),
    "int8": Section(gpu_sections.int8, 40, _SHARED),
    "kernel": Section(gpu_sections.kernel, 45, _SHARED),
    "headline": Section(gpu_sections.headline, 110, _WHOLE),
    "headline_8w8a": Section(gpu_sections.headline_8w8a, 130, _WHOLE),
    "decoder": Section(gpu_sections.decoder, 40, _SHARED),
    "decoder_8w8a": Section(gpu_sections.decoder_8w8a, 120, _SHARED),
    "decoder_16w8a": Section(gpu_sections.decoder_16w8a, 120, _SHARED),
    "peers": Section(gpu_sections.peers, 60, _SHARED),
    "mezo": Section(gpu_sections.mezo, 30, {"JAX_PLATFORMS": "cpu"}),
    "seeds": Section(gpu_sections.seeds, 60, _SHARED),
    "seeds_integers": Section(gpu_sections.seeds_integers, 150, _SHARED),
    "plan": Section(gpu_sections.plan, 240, h100.ENVIRONMENT),
}
# The plan of what is run anyway would only cost time.
MEASURED = [name for name in SECTIONS if name != "plan"]


def run(out: str, only: Sequence[str], smoke: bool, budget: float) -> dict[str, Any]:
    """Measures sections and prints the table.

    Args:
      out: directory for results.json and table.md, written anew after every row.
      only: keys of `SECTIONS`, in the order to take them.
      smoke: whether to take tiny sizes, in this process.
      budget: seconds for all of it.

    Returns:
      What results.json holds.

    Raises:
      ValueError: for a name that is no key of `SECTIONS`.
    """
    if unknown := [name for name in only if name not in SECTIONS]:
        raise ValueError(
            f"there are no sections {unknown}; choose from {list(SECTIONS)}."
        )
    directory = pathlib.Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    results: dict[str, Any] = {"smoke": smoke, "rows": []}
    text = ""

    def keep(row: Row) -> None:
        nonlocal text
        if not text:
            results.update(row.where)
            text = gpu_sections.head(row) + "\n"
            print(text, flush=True, end="")
        print(row.markdown(), flush=True)
        text += row.markdown() + "\n"
        results["rows"].append(row.asdict())
        results["seconds"] = time.monotonic() - start
        written = json.dumps(results, indent=2) + "\n"
        (directory / "results.json").write_text(written)
        (directory / "table.md").write_text(text)

    for name in only:
        left = budget - (time.monotonic() - start)
        if left < _LEAST_SECONDS:
            keep(Row(name, remark=f"left out: {budget:.0f} s were not enough"))
            continue
        section = SECTIONS[name]
        if smoke:
            rows = guarded(name, section.rows, smoke)
        else:
            rows = _in_process(name, section, min(section.seconds, left))
        for row in rows:
            keep(row)
    return results


def guarded(
    name: str, rows: Callable[[bool], Iterator[Row]], smoke: bool
) -> Iterator[Row]:
    """The rows of a section, and one with the reason if it fails."""
    try:
        yield from rows(smoke)
    except Exception as error:
        yield Row(name, remark=gpu_sections.reason(error))


def _in_process(name: str, section: Section, seconds: float) -> Iterator[Row]:
    """The rows of a section from a process of its own, which gets so many seconds."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(name, sender), daemon=True)
    before = dict(os.environ)
    os.environ.update(section.environment)
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    sender.close()
    end = time.monotonic() + seconds
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            yield receiver.recv()
        yield Row(name, remark=f"stopped after {seconds:.0f} s")
    except EOFError:
        process.join(_LEAST_SECONDS)
        if process.exitcode:
            yield Row(name, remark=f"its process ended with code {process.exitcode}")
    finally:
        process.kill()
        process.join()
        receiver.close()


def _send(name: str, sender: connection.Connection) -> None:
    """Measures a section and sends its rows; what a section's process runs."""
    for row in guarded(name, SECTIONS[name].rows, False):
        sender.send(row)
    sender.close()
