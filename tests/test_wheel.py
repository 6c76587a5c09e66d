"""Which packages go into the wheel; `.ci/wheel` builds and installs it."""

import configparser
import fnmatch
import pathlib

ROOT = pathlib.Path(__file__).parent.parent


def packages(folder):
    """Dotted names of the folders that hold Python files."""
    files = (ROOT / folder).rglob("*.py")
    return {".".join(path.parent.relative_to(ROOT).parts) for path in files}


def included(name):
    """Whether setup.cfg puts a package into the wheel."""
    configuration = configparser.ConfigParser()
    configuration.read(ROOT / "setup.cfg")
    patterns = configuration["options.packages.find"]["include"].split()
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def test_the_wheel_holds_every_package_of_the_library():
    names = packages("fgrad")
    assert {"fgrad", "fgrad.fixed_point", "fgrad.activity"} <= names
    for name in names:
        # Without this file setuptools would pass the folder by.
        assert (ROOT / name.replace(".", "/") / "__init__.py").exists(), name
        assert included(name), name


def test_the_wheel_holds_neither_experiments_nor_tests():
    names = packages("experiments") | packages("tests") | packages("docs")
    assert "experiments.configs" in names
    assert not [name for name in names if included(name)]
