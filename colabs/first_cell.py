"""Writes the badge and the first cell of every notebook, from the address in setup.cfg.

Colab opens notebooks from a public repository, and installs from it. Before there is
one, the notebooks have no badge, and their first cell asks for a wheel. Once
``project_urls`` of setup.cfg has a line ``Source = https://github.com/...``, run

    python colabs/first_cell.py
"""

from __future__ import annotations

import configparser
import json
import pathlib

ROOT = pathlib.Path(__file__).parent.parent

CELL = """\
# On Colab this installs fgrad; elsewhere it finds what is there.
import glob
import importlib.util

REPOSITORY = "{repository}"

if importlib.util.find_spec("fgrad") is None:
    fgrad = next(iter(glob.glob("fgrad-*.whl")), REPOSITORY)
    if not fgrad:
        raise FileNotFoundError(
            "upload a wheel of fgrad to this folder (in a checkout: pip install build; "
            "python -m build --wheel; it is in dist/), and run this cell again"
        )
    %pip install -q {{fgrad}} matplotlib pillow scikit-learn scipy
"""

_BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{name}/blob/main/colabs/{file})\n\n"
)
_GITHUB = "https://github.com/"


def source(setup: str) -> str:
    """The address of the repository in the text of a setup.cfg, or nothing."""
    parser = configparser.ConfigParser()
    parser.read_string(setup)
    lines = parser["metadata"]["project_urls"].strip().splitlines()
    urls = dict(line.split(" = ", 1) for line in lines)
    return urls.get("Source", "").rstrip("/")


def badge(address: str, file: str) -> str:
    """What stands above a notebook's title: a badge if its repository is on GitHub."""
    if not address.startswith(_GITHUB):
        return ""
    return _BADGE.format(name=address.removeprefix(_GITHUB), file=file)


def first_cell(address: str) -> str:
    """The code that finds fgrad or installs it."""
    return CELL.format(repository=f"git+{address}" if address else "").rstrip("\n")


def written(notebook: str, address: str, file: str) -> str:
    """The text of a notebook with its badge and its first cell."""
    content = json.loads(notebook)
    title, install = content["cells"][:2]
    text = "".join(title["source"])
    title["source"] = _lines(badge(address, file) + text[text.index("# ") :])
    install["source"] = _lines(first_cell(address))
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    """Rewrites all notebooks."""
    address = source((ROOT / "setup.cfg").read_text())
    for path in sorted((ROOT / "colabs").glob("*.ipynb")):
        path.write_text(written(path.read_text(), address, path.name))


if __name__ == "__main__":
    main()
