"""README and the pages of docs/: their code runs, and the site builds."""

import pathlib
import re
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from sklearn import datasets

import fgrad

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WITH_CODE = [page for page in PAGES if "```python\n" in page.read_text()]


def name(page):
    return str(page.relative_to(ROOT))


def run(page, capsys, **given):
    """Runs a page's blocks in one namespace, which it returns with the last output.

    A block's comments at the beginning of a line are what it prints.
    """
    names, last = dict(given), ""
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(code, name(page), "exec"), names)
        last = capsys.readouterr().out
        if said := re.findall(r"^# (.*)$", code, re.MULTILINE):
            assert last.splitlines() == said
    return names, last


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_the_code_of_a_page_runs_and_says_what_it_prints(page, capsys):
    run(page, capsys)


class Network(nn.Module):
    """A newcomer's model."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(32)(x)))


@pytest.mark.optimized
def test_a_newcomer_adapts_a_flax_model_by_the_readmes_few_lines(capsys):
    readme = ROOT / "README.md"
    (code,) = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert sum(bool(line) for line in code.splitlines()) < 15
    images, labels = datasets.load_digits(return_X_y=True)
    images = images.astype("float32") / 16
    images -= images.mean(0)
    model = Network()
    params = model.init(jax.random.key(1), images[:1])["params"]
    order = np.random.default_rng(0).integers(0, 1500, (600, 64))
    batches = [(images[index], labels[index]) for index in order]

    def accuracy(params):
        logits = model.apply({"params": fgrad.dequantize(params)}, images[1500:])
        return (logits.argmax(-1) == labels[1500:]).mean()

    assert accuracy(params) < 0.3
    names, _ = run(readme, capsys, model=model, params=params, batches=batches)
    assert accuracy(names["params"]) > 0.7
    assert names["params"]["Dense_0"]["kernel"].qvalue.dtype == "int16"


def test_the_memory_report_is_of_a_step_in_place(capsys):
    names, last = run(DOCS / "memory.md", capsys)
    assert last.splitlines()[0] == "| MiB | step | inference | step / inference |"
    # Donated: the new parameters take the place of the old ones.
    assert names["report"].memory.aliased >= 4 * 65 * 64


def test_the_readme_has_two_set_up_commands_of_one_line():
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)
    assert [c.count("\n") for c in commands] == [1, 1]
    assert all(c.startswith("python3.11 -m venv .venv && ") for c in commands)


def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx")
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", DOCS, tmp_path]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    index = (tmp_path / "index.html").read_text()
    for title in ("Theory", "Read an error", "The optax links", "Tutorials"):
        assert title in index
    assert 'id="fgrad.quantized_update"' in (tmp_path / "api/fgrad.html").read_text()


def test_every_public_module_is_in_the_reference():
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    modules = [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for folder in ("", "enhancements", "analysis")
        for path in (ROOT / "fgrad" / folder).glob("*.py")
        if path.stem != "__init__"
    ]
    inner = {"checks", "graph", "low_rank", "ordering", "point_of_use", "tapped"}
    for module in modules:
        if module.rpartition(".")[2] not in inner:
            assert f"automodule:: {module}\n" in pages, module
