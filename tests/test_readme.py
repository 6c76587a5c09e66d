import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def test_the_readmes_example_runs_and_learns():
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["loss_fn"](names["params"], names["batch"]) < 0.05


def test_the_readme_has_two_set_up_commands_of_one_line():
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)
    assert [c.count("\n") for c in commands] == [1, 1]
    assert all(c.startswith("python3.11 -m venv .venv && ") for c in commands)


def test_the_code_on_low_bits_runs_and_learns():
    page = (ROOT / "docs" / "low_bit.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "low_bit.md", "exec"), {})


@pytest.mark.parametrize("page", ["activity", "landscape"])
def test_the_code_of_a_page_runs_and_says_what_it_prints(page, capsys):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, f"{page}.md", "exec"), {})
    printed = re.findall(r"^# (.*)$", code, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == printed


def test_the_code_on_memory_runs_and_says_what_it_prints(capsys):
    page = (ROOT / "docs" / "memory.md").read_text()
    names = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "memory.md", "exec"), names)
        printed = re.findall(r"^# (.*)$", code, re.MULTILINE)
        if printed:
            assert capsys.readouterr().out.splitlines() == printed
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| MiB | step | inference | step / inference |"
    # Donated: the new parameters take the place of the old ones.
    assert names["report"].memory.aliased >= 4 * 65 * 64
