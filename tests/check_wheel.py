"""Checks an installed wheel; `.ci/wheel` runs it where there is no checkout.

Usage: python check_wheel.py WHEEL PAGE; the Python of PAGE, a page of docs/, is run.
"""

import doctest
import importlib
import importlib.util
import pathlib
import re
import sys
import zipfile

import fgrad

MODULES = ("fgrad.transform", "fgrad.fixed_point.qtensor")


def check_contents(wheel: pathlib.Path) -> None:
    """The wheel holds the library, what it says about itself, and nothing else."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    info = f"fgrad-{fgrad.__version__}.dist-info"
    assert tops == {"fgrad", info}, f"{wheel.name} holds {sorted(tops)}."
    assert "fgrad/py.typed" in names, "type checkers would ignore the annotations."


def check_place() -> None:
    """What is imported is the installed library, and no experiments come with it."""
    found = pathlib.Path(fgrad.__file__).parent
    assert "site-packages" in found.parts, f"fgrad was imported from {found}."
    assert importlib.util.find_spec("experiments") is None, "the wheel has experiments."


def check_doctests() -> int:
    """The examples of two modules give what they say."""
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    results = [
        doctest.testmod(importlib.import_module(module), optionflags=flags)
        for module in MODULES
    ]
    assert all(result.attempted for result in results), "a module has no examples."
    assert not any(result.failed for result in results), results
    return sum(result.attempted for result in results)


def check_page(page: pathlib.Path) -> int:
    """The blocks of Python of a page run, one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks, f"{page.name} has no code."
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    return len(blocks)


if __name__ == "__main__":
    check_contents(pathlib.Path(sys.argv[1]))
    check_place()
    examples, blocks = check_doctests(), check_page(pathlib.Path(sys.argv[2]))
    print(
        f"fgrad {fgrad.__version__} from its wheel: {examples} lines of doctests and "
        f"{blocks} blocks of {sys.argv[2]} ran."
    )
