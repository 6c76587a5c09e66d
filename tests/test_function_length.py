"""No function is longer than a screen; ruff.toml bounds how many branches it has."""

import ast
import io
import pathlib
import textwrap
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LIMIT = 60

# Tokens that make no line of code by themselves.
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def lines_of_code(source: str) -> dict[str, int]:
    """The lines of code of each function by its name and first line.

    Decorators and signature count, and so do the functions inside it. Comments, blank
    lines and docstrings do not.
    """
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    tree = ast.parse(source)
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    documented = [
        node for node in ast.walk(tree) if isinstance(node, functions | ast.ClassDef)
    ]
    for node in documented:
        if ast.get_docstring(node) is not None:
            text = node.body[0]
            code.difference_update(range(text.lineno, text.end_lineno + 1))
    found = {}
    for node in documented:
        if isinstance(node, functions):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            inside = code.intersection(range(first, node.end_lineno + 1))
            found[f"{node.name}:{node.lineno}"] = len(inside)
    return found


FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("fgrad", "experiments")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", FILES)
def test_functions_are_no_longer_than_a_screen(path):
    found = lines_of_code((ROOT / path).read_text())
    long = {name: lines for name, lines in found.items() if lines > LIMIT}
    assert not long, f"over {LIMIT} lines of code in {path}: break up {long}"


def test_what_counts_as_a_line_of_code():
    source = '''
        @decorator
        def outer(
            a,  # a comment
        ):
            """A docstring

            of three lines."""
            # A comment.

            def inner():
                """Another."""
                return """a string

                of three lines"""

            return inner
    '''
    found = lines_of_code(textwrap.dedent(source))
    assert found == {"outer:3": 9, "inner:11": 4}
