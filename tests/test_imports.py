"""Imports point one way: what a part of `fgrad` builds on is in one table."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "fgrad"

# What each part may import. A part is a package or a module at the top of `fgrad`; it
# may always import itself. A new part needs a line of its own here, and a part that
# needs one more of the others says so here first.
ALLOWED = {
    "_trees": set(),
    "_checks": {"_trees"},
    "_loss_and_aux": {"_trees"},
    "tracing": {"_trees"},
    "fixed_point": {"_checks", "_trees", "tracing"},
    "_interchange": {"fixed_point"},
    "serialization": {"_trees", "fixed_point"},
    "layers": {"_checks", "_trees", "fixed_point"},
    "spread": {"_trees", "tracing"},
}
ALLOWED["perturbations"] = ALLOWED["fixed_point"] | {"fixed_point"}
ALLOWED["leaves"] = ALLOWED["perturbations"] | {"perturbations"}
ALLOWED["_arguments"] = ALLOWED["leaves"] | {"leaves", "spread"}
ALLOWED["evaluation"] = ALLOWED["_arguments"] | {"_loss_and_aux"}
ALLOWED["estimators"] = ALLOWED["evaluation"] | {"evaluation"}
ALLOWED["transform"] = ALLOWED["estimators"] | {"estimators", "_arguments"}
ALLOWED["enhancements"] = ALLOWED["transform"] | {"transform"}
# New weights for a model, by the same products as perturbations of low rank.
ALLOWED["adapters"] = ALLOWED["evaluation"] | {"evaluation"}
ALLOWED["run_log"] = ALLOWED["transform"] | {"transform", "serialization"}
# Beside the links: gradients from activations know the estimators' coefficients, and
# nothing of how losses are evaluated at perturbed weights.
ALLOWED["activity"] = ALLOWED["evaluation"] | {"estimators", "_arguments"}
# The best known method in one call.
ALLOWED["adaptation"] = ALLOWED["transform"] | {"transform", "activity"}
# What looks at a training step from outside, also through the eyes of its examples.
ALLOWED["analysis"] = ALLOWED["activity"] | {"activity", "evaluation"}
# Integer programs.
ALLOWED["integer"] = {"_checks", "_trees", "_arguments", "fixed_point", "tracing"}
ALLOWED["integer"] |= {"perturbations", "leaves", "layers", "serialization", "spread"}
# The face of the package.
ALLOWED["__init__"] = set(ALLOWED)


def part_of(module: str) -> str:
    """The part of a module by its full name: ``fgrad.leaves.plan`` is of `leaves`."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def modules(package: pathlib.Path = PACKAGE) -> dict[str, pathlib.Path]:
    """Every module below a package by its full name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        names = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


def imports(module: str, path: pathlib.Path, known: set[str]) -> set[str]:
    """The modules that one imports, at its top or inside its functions.

    ``from fgrad import leaves`` imports `fgrad.leaves`, for the module reads nothing
    else of `fgrad`; ``from fgrad import QTensor`` imports `fgrad` itself.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports are not used here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found


def graph() -> dict[str, set[str]]:
    """The modules of `fgrad`, and for each those that it imports from anywhere."""
    files = modules()
    return {name: imports(name, path, set(files)) for name, path in files.items()}


GRAPH = graph()


@pytest.mark.parametrize("module", GRAPH)
def test_a_module_imports_only_what_its_part_may(module):
    part = part_of(module)
    assert part in ALLOWED, f"{part} is new: say in ALLOWED what it may import"
    reached = {part_of(m) for m in GRAPH[module] if m.split(".")[0] == "fgrad"}
    forbidden = reached - ALLOWED[part] - {part}
    assert not forbidden, f"{module} imports {forbidden}, which ALLOWED does not list"


@pytest.mark.parametrize("module", GRAPH)
def test_the_library_knows_no_experiment_and_no_test(module):
    roots = {name.split(".")[0] for name in GRAPH[module]}
    assert not roots & {"experiments", "tests", "docs", "colabs"}


def test_parts_have_an_order():
    """Whatever the table allows, no part may import one that imports it."""
    graphlib.TopologicalSorter(ALLOWED).prepare()


def test_modules_have_an_order():
    """No circle, not even one that an import inside a function would hide."""
    graphlib.TopologicalSorter(
        {
            name: {
                m
                for m in imported
                # A package's face imports its modules, which may import one another.
                if m in GRAPH and not name.startswith(f"{m}.")
            }
            for name, imported in GRAPH.items()
        }
    ).prepare()


def test_the_table_allows_nothing_that_is_not_there():
    assert set(ALLOWED) <= {part_of(module) for module in GRAPH}


def test_imports_inside_functions_and_types_count(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "from fgrad import leaves, QTensor\n"
        "def f():\n"
        "    import experiments.main\n"
        "    from fgrad.leaves import Plan, plan\n"
    )
    found = imports(
        "fgrad.module", path, {"fgrad", "fgrad.leaves", "fgrad.leaves.plan"}
    )
    assert found == {
        "fgrad",
        "fgrad.leaves",
        "experiments.main",
        "fgrad.leaves.plan",
    }
