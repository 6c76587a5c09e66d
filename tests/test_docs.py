"""README and the pages of docs/: their code runs, and the site builds."""

import importlib
import importlib.util
import inspect
import json
import os
import pathlib
import pydoc
import re
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from sklearn import datasets
from test_stranger import PAGES as WALKED

import fgrad

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WITH_CODE = [
    page
    for page in PAGES
    if "```python\n" in page.read_text() and page.stem not in WALKED
]


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
@pytest.mark.slow
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
    assert sum(bool(line) for line in code.splitlines()) < 20
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
    assert all(c.startswith("python3 -m venv .venv && ") for c in commands)


@pytest.mark.slow
def test_three_processes_train_together_and_print_what_the_page_says():
    page = (DOCS / "how_to/devices.md").read_text()
    (said,) = re.findall(r"It prints:\n\n```text\n(.*?)```", page, re.DOTALL)
    program = [sys.executable, DOCS / "how_to/federated.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert result.stdout == said, result.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site; links to other sites are those of inventories/."""
    pytest.importorskip("sphinx")
    pytest.importorskip("latex2mathml")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", DOCS, folder]
    environment = os.environ | {"FGRAD_DOCS_OFFLINE": "1"}
    result = subprocess.run(build, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_without_warnings(site):
    index = (site / "index.html").read_text()
    for title in ("Getting started", "Theory", "Read an error", "Tutorials"):
        assert title in index
    assert 'id="fgrad.quantized_update"' in (site / "api/fgrad.html").read_text()


@pytest.mark.slow
def test_equations_are_in_the_page_and_need_no_script(site):
    theory = (site / "theory.html").read_text()
    equations = re.findall(r"<math .*?</math>", theory, re.DOTALL)
    source = re.sub(r"```.*?```", "", (DOCS / "theory.md").read_text(), flags=re.DOTALL)
    assert len(equations) == len(re.findall(r"\$\$.+?\$\$|\$.+?\$", source, re.DOTALL))
    assert "<mo>&#x02211;</mo>" in theory  # a sum, not the word
    assert not re.search(r"<script[^>]*src=\"https?:", theory)


# What a reader types into the search, as Sphinx stems it, and the page that is meant.
SEARCHED = {
    "export": "how_to/save_and_export",
    "lora": "how_to/adapters",
    "aqt": "how_to/quantized_networks",
    "qwix": "how_to/quantized_networks",
    "recalibr": "how_to/recalibrate",
    "dropout": "how_to/training_loop",
    "equinox": "how_to/equinox",
    "keyword": "how_to/keyword_network",
}


@pytest.mark.slow
@pytest.mark.parametrize("word", SEARCHED)
def test_the_search_finds_the_page_of_a_word_by_its_title(site, word):
    text = (site / "searchindex.js").read_text()
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    found = index["titleterms"].get(word, [])
    pages = [index["docnames"][i] for i in np.atleast_1d(found).astype(int)]
    assert SEARCHED[word] in pages


def test_an_equation_that_has_no_mathml_is_an_error():
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("mathml", DOCS / "mathml.py")
    mathml = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mathml)
    assert "<mo>clip</mo>" in mathml.to_mathml("clip(w)", "inline")
    with pytest.raises(ValueError, match="no MathML"):
        mathml.to_mathml(r"\nosuchcommand x", "inline")


@pytest.mark.slow
def test_names_of_other_projects_have_links(site):
    page = (site / "api/fgrad.html").read_text()
    assert "_autosummary/jax.Array.html#jax.Array" in page
    assert "transformations.html#optax.GradientTransformationExtraArgs" in page


# What one module of fgrad offers to another, and not to users.
PLUMBING = {
    "estimators": {"estimate", "estimate_from_losses", "half_difference"},
    "evaluation": {"TracedLoss", "evaluate_examples", "evaluate_pairs"},
    "fixed_point": {
        "MAX_BITS",
        "MIN_BITS",
        "Calibration",
        "as_gradient",
        "as_update",
        "check_values",
        "integer_reads",
        "is_concrete",
        "path_str",
        "restored",
        "stored",
        "with_stored",
    },
    "leaves": {"Epsilon", "Mask", "Plan", "map_leaves", "trained_leaves"},
    "perturbations": {
        "accumulate",
        "checked",
        "hashed",
        "pieces",
        "product",
        "row_major",
        "word_of_block",
    },
}


def documented(site):
    """The objects of the reference by their names."""
    inventory = pytest.importorskip("sphinx.util.inventory")
    loaded = inventory.InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    names = {
        name
        for kind, entries in loaded.data.items()
        if kind in ("py:class", "py:exception", "py:function", "py:module")
        for name in entries
    }
    return {name: pydoc.locate(name) or named(name) for name in names}


def named(name):
    """An object of a module that a function of its package hides by its name."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def public(module):
    """Names of the functions and classes that a module offers."""
    if hasattr(module, "__all__"):
        return set(module.__all__)
    return {
        name
        for name, value in vars(module).items()
        if callable(value)
        and getattr(value, "__module__", "") == module.__name__
        and not name.startswith("_")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "activity",
        "adapters",
        "analysis",
        "enhancements",
        "estimators",
        "evaluation",
        "fixed_point",
        "fixed_point.aqt_products",
        "integer",
        "integer.audit",
        "integer.loss",
        "layers",
        "leaves",
        "perturbations",
        "serialization",
        "transform",
    ],
)
def test_the_reference_has_every_public_name(site, name):
    module = importlib.import_module(f"fgrad.{name}")
    objects = {id(value) for value in documented(site).values()}
    missing = {
        each for each in public(module) if id(getattr(module, each)) not in objects
    }
    assert missing == PLUMBING.get(name, set())


@pytest.mark.slow
def test_the_reference_has_the_top_of_the_package_under_its_short_names(site):
    names = {
        name for name in fgrad.__all__ if not inspect.ismodule(getattr(fgrad, name))
    }
    assert {f"fgrad.{name}" for name in names} <= set(documented(site))


@pytest.mark.slow
def test_the_reference_has_nothing_private(site):
    for name, value in documented(site).items():
        assert value is not None, name
        assert not any(part.startswith("_") for part in name.split(".")), name
