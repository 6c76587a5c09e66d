"""Runs notebooks from top to bottom and stores what they show, figures and all.

    python colabs/execute.py                                # all of them
    python colabs/execute.py colabs/5_loss_landscape.ipynb

What differs between two runs or two machines for no reason that a reader cares about is
left out: warnings, times of execution, what a figure's object is called. Figures are
stored with few colours, which makes them small. A path of this machine in an output is
an error.
"""

from __future__ import annotations

import base64
import io
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import nbclient
import nbformat
from PIL import Image

FOLDER = pathlib.Path(__file__).parent
COLOURS = 64
_SECONDS = 900  # of one cell
# What the paths of somebody's machine begin with, and where its packages lie.
PATHS = ("/home/", "/root/", "/tmp/", "/usr/", "/work/", "/Users/", "site-packages")


def executed(notebook: Any) -> Any:
    """Runs a notebook, in place.

    Args:
      notebook: as nbformat reads it.

    Returns:
      The same notebook with its outputs, as `cleaned` leaves them.
    """
    client = nbclient.NotebookClient(
        notebook, timeout=_SECONDS, kernel_name="python3", record_timing=False
    )
    client.execute()
    return cleaned(notebook)


def cleaned(notebook: Any) -> Any:
    """Leaves of the outputs what a reader wants to see, in place.

    Raises:
      ValueError: if an output has a path of this machine, which is told.
    """
    notebook.metadata = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, start=1):
        cell.execution_count = number
        cell.outputs = list(_kept(cell.outputs, number))
    return notebook


def _kept(outputs: Any, number: int) -> Iterator[Any]:
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if "execution_count" in output:
            output.execution_count = number
        output.metadata = {}
        if "data" in output and "image/png" in output.data:
            output.data = {"image/png": _small(output.data["image/png"])}
        for text in (
            output.get("text", ""),
            output.get("data", {}).get("text/plain", ""),
        ):
            if found := [path for path in PATHS if path in text]:
                raise ValueError(f"cell {number} prints a path with {found}: {text}")
        if output.output_type == "stream":
            del output["metadata"]
        yield output


def _small(content: str) -> str:
    """A PNG in base64, with few colours."""
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    if image.mode == "P":  # it has few
        return content
    small = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    written = io.BytesIO()
    small.save(written, "png", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def main() -> None:
    """Runs the notebooks that are named, or all."""
    paths = [pathlib.Path(name) for name in sys.argv[1:]]
    for path in paths or sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        text = nbformat.writes(executed(notebook), indent=1, ensure_ascii=False)
        path.write_text(text.rstrip("\n") + "\n")
        print(f"{path.name}: {len(text):,} bytes")


if __name__ == "__main__":
    main()
