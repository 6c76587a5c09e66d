"""The core lane: the tests that ``pytest -m "not slow"`` runs.

A test that takes long is marked ``slow`` as a whole if others show the same faster. Of
a test with many cases the core lane keeps some of each kind, by `some` or `every`.
"""

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
    "test_runs.py",
    "test_training.py",
}


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
