import base64
import importlib.util
import io
import pathlib
import re

import nbclient
import nbformat
import pytest
from PIL import Image

FOLDER = pathlib.Path(__file__).parent.parent / "colabs"
COLABS = sorted(FOLDER.glob("*.ipynb"))
ADDRESS = "https://github.com/someone/fgrad"
SETUP = (
    f"[metadata]\nproject_urls =\n    Paper = https://x.org\n    Source = {ADDRESS}/\n"
)


def module(name):
    """A program of the folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


first_cell, execute = module("first_cell"), module("execute")


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.slow
@pytest.mark.parametrize("path", COLABS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    nbclient.NotebookClient(read(path), timeout=300, kernel_name="python3").execute()


@pytest.mark.parametrize("path", COLABS, ids=lambda path: path.stem)
def test_it_is_stored_with_its_figures_and_installs_itself(path):
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # As the command that stores outputs leaves them: in order, without warnings, and
    # without paths of a machine, which `cleaned` refuses.
    assert execute.cleaned(read(path)) == notebook, "run python colabs/execute.py"
    drawn = ["plt.show()" in cell.source for cell in code]
    kept = ["image/png" in str(cell.outputs) for cell in code]
    assert drawn == kept
    printed = [re.search(r"^ *print\(", cell.source, re.MULTILINE) for cell in code]
    assert all(cell.outputs for cell, p in zip(code, printed, strict=True) if p)
    assert path.stat().st_size < 400_000
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


def test_outputs_are_stored_without_what_differs_between_machines():
    picture = io.BytesIO()
    Image.radial_gradient("L").convert("RGBA").save(picture, "png")
    shown = nbformat.v4.new_output(
        "display_data",
        {
            "image/png": base64.b64encode(picture.getvalue()).decode(),
            "text/plain": "<Figure of 0x7f1234>",
        },
    )
    said = nbformat.v4.new_output("stream", name="stdout", text="accuracy 97.9%")
    warned = nbformat.v4.new_output("stream", name="stderr", text="/tmp/x: a warning")
    cell = nbformat.v4.new_code_cell("plt.show()", outputs=[warned, shown, said])
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"machine": "mine"})
    cleaned = execute.cleaned(notebook)
    (found,) = cleaned.cells
    assert found.execution_count == 1
    assert [sorted(output) for output in found.outputs] == [
        ["data", "metadata", "output_type"],
        ["name", "output_type", "text"],
    ]
    (name,) = found.outputs[0].data
    stored = Image.open(io.BytesIO(base64.b64decode(found.outputs[0].data[name])))
    assert stored.mode == "P"
    assert "machine" not in cleaned.metadata
    nbformat.validate(cleaned)
    cell.outputs = [nbformat.v4.new_output("stream", text="kept in /tmp/abc/x.npz")]
    with pytest.raises(ValueError, match="cell 1 prints a path"):
        execute.cleaned(notebook)


def test_they_are_numbered():
    assert COLABS
    numbers = [int(path.name.split("_")[0]) for path in COLABS]
    assert numbers == sorted(set(numbers))
