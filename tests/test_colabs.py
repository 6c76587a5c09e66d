import importlib.util
import pathlib
import re

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "colabs"
COLABS = sorted(FOLDER.glob("*.ipynb"))
ADDRESS = "https://github.com/someone/fgrad"
SETUP = (
    f"[metadata]\nproject_urls =\n    Paper = https://x.org\n    Source = {ADDRESS}/\n"
)

_spec = importlib.util.spec_from_file_location("first_cell", FOLDER / "first_cell.py")
first_cell = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(first_cell)


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
    assert re.search("^# ", notebook.cells[0].source, re.MULTILINE)
    # The badge and the cell that installs are those of the address in setup.cfg.
    address = first_cell.source((FOLDER.parent / "setup.cfg").read_text())
    assert path.read_text() == first_cell.written(path.read_text(), address, path.name)


def test_a_public_address_gives_every_notebook_a_badge_that_opens_it():
    assert first_cell.source(SETUP) == ADDRESS
    name = COLABS[0].name
    text = first_cell.written(COLABS[0].read_text(), ADDRESS, name)
    title = nbformat.reads(text, as_version=4).cells[0].source
    link = f"https://colab.research.google.com/github/someone/fgrad/blob/main/colabs/{name}"
    assert f"({link})\n\n# " in title
    # Written twice it is the same, and without an address the badge is gone.
    assert first_cell.written(text, ADDRESS, name) == text
    assert first_cell.written(text, "", name) == first_cell.written(
        COLABS[0].read_text(), "", name
    )


def installed_by_the_first_cell(address):
    """What the first cell installs where there is no fgrad."""
    asked = []
    code = re.sub(
        "%pip install -q (.*)", r"asked.append(f'\1')", first_cell.first_cell(address)
    )
    exec(code.replace('importlib.util.find_spec("fgrad")', "None"), {"asked": asked})
    return asked[0].split()[0]


def test_the_first_cell_installs_a_wheel_or_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert installed_by_the_first_cell(ADDRESS) == f"git+{ADDRESS}"
    with pytest.raises(FileNotFoundError, match="upload a wheel"):
        installed_by_the_first_cell("")
    (tmp_path / "fgrad-0.2.0-py3-none-any.whl").touch()
    for address in (ADDRESS, ""):
        assert installed_by_the_first_cell(address) == "fgrad-0.2.0-py3-none-any.whl"


def test_they_are_numbered():
    assert COLABS
    numbers = [int(path.name.split("_")[0]) for path in COLABS]
    assert numbers == sorted(set(numbers))
