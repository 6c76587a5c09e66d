"""The core lane: the tests that ``pytest -m "not slow"`` runs.

A test that takes long is marked ``slow`` as a whole if others show the same faster. Of
a test with many cases the core lane keeps some of each kind, by `some` or `every`. What
still took over half a second is named in slow_tests.txt, which

    python -m pytest --durations 0 --durations-min .5 > log; python tests/lanes.py log

writes again, by adding the tests of the log.
"""

import pathlib
import re
import sys
from collections.abc import Iterable
from typing import Any

import pytest

# Files that are slow as a whole. What they try on networks, data and chains of links is
# in the core lane in parts: the links, layers, readers and programs by themselves.
SLOW_FILES = {
    "integer/test_elsewhere.py",
    "integer/test_to_c.py",
    "test_adapt.py",
    "test_benchmarks.py",
    "test_compile_time.py",
    "test_conformance.py",
    "test_damaged_files.py",
    "test_few_shot.py",
    "test_few_shot_models.py",
    "test_fine_tuning.py",
    "test_gpu_benchmark.py",
    "test_landscape_figures.py",
    "test_launcher.py",
    "test_memory_table.py",
    "test_ood.py",
    "test_public_few_shot.py",
    "test_quantized_networks.py",
    "test_replay.py",
    "test_runs.py",
    "test_training.py",
}

_FILE = pathlib.Path(__file__).parent / "slow_tests.txt"
SLOW_TESTS = frozenset(_FILE.read_text().splitlines())


def some(cases: Iterable[Any], core: Iterable[Any]) -> list[Any]:
    """The values of one argument as parameters, slow but for those in ``core``."""
    cases, core = list(cases), list(core)
    missing = [case for case in core if case not in cases]
    assert not missing, f"{missing} are no cases"
    return [case if case in core else _slow(case) for case in cases]


def every(number: int, cases: Iterable[Any]) -> list[Any]:
    """The values of one argument, slow but for the first of each ``number``."""
    return [_slow(x) if i % number else x for i, x in enumerate(cases)]


def every_row(number: int, rows: Iterable[tuple[Any, ...]]) -> list[Any]:
    """The values of several arguments, slow but for the first of each ``number``."""
    return [_slow(*row) if i % number else row for i, row in enumerate(rows)]


def _slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def _add(log: str) -> None:
    """Names the tests of a log of pytest that took over half a second."""
    lines = re.findall(r"^ *([\d.]+)s call +(tests/.*?) *$", log, re.MULTILINE)
    slow = {name for seconds, name in lines if float(seconds) >= 0.5}
    _FILE.write_text("".join(f"{name}\n" for name in sorted(SLOW_TESTS | slow)))


if __name__ == "__main__":
    _add(pathlib.Path(sys.argv[1]).read_text())
