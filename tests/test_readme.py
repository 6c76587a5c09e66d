import pathlib
import re

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
