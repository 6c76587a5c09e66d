import pathlib

import nbclient
import nbformat
import pytest

COLABS = sorted((pathlib.Path(__file__).parent.parent / "colabs").glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.slow
@pytest.mark.parametrize("path", COLABS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path, monkeypatch):
    # Of the kernel, whose programs are small.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    nbclient.NotebookClient(read(path), timeout=300, kernel_name="python3").execute()


@pytest.mark.parametrize("path", COLABS, ids=lambda path: path.stem)
def test_it_is_stored_without_outputs_and_installs_itself(path):
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert '%pip install -q "fgrad[colab]"' in code[0].source
    assert notebook.cells[0].source.startswith("# ")


def test_they_are_numbered():
    assert COLABS
    numbers = [int(path.name.split("_")[0]) for path in COLABS]
    assert numbers == sorted(set(numbers))
