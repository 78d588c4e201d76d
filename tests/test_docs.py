"""docs/compatibility.md: every row names tests that there are."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "compatibility.md"
SUITES = "## Other projects' suites"  # they are not in this repository
ROWS = [line for line in PAGE.read_text().split(SUITES)[0].splitlines() if line.startswith("| ") and "---" not in line]
NAMED = re.compile(r"`(test_\w+)(?:::(test_\w+))?`")


def functions(name: str) -> set[str]:
    """Of a test file."""
    tree = ast.parse((TESTS / f"{name}.py").read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", [row for row in ROWS if not row.startswith("| What |")])
def test_row_names_its_tests(row: str) -> None:
    named = NAMED.findall(row.split("|")[2])
    assert named, "no test in the second column"
    for file, function in named:
        assert (TESTS / f"{file}.py").exists()
        assert not function or function in functions(file), f"no {function} in {file}.py"
