"""The page docs/fidelity.md: every method has a row, and every row names tests that exist."""

import ast
import re

import pytest
from fidelity_page import HEADER, PAGE, Row, rows

from adaptrank import ALLOCATORS, PARAMETERIZATIONS
from adaptrank.composition import OPERATORS
from adaptrank.optimizers import OPTIMIZERS
from adaptrank.strategies import STRATEGIES

ROWS = rows()


def shipped(registry):
    return {name for name, cls in registry.items() if cls.__module__.startswith("adaptrank.")}


def named(*rooms):
    return {name for row in ROWS if row.room in rooms for name in row.names}


@pytest.mark.parametrize(
    ("rooms", "methods"),
    [
        (["Parameterizations"], shipped(PARAMETERIZATIONS)),
        (["Allocators", "Rank initializers"], shipped(ALLOCATORS)),
        (["Training strategies"], shipped(STRATEGIES) - {"SequentialTasks"}),
        (["Optimizers"], shipped(OPTIMIZERS)),
        (["Composition"], set(OPERATORS)),
    ],
    ids=["parameterizations", "allocators", "strategies", "optimizers", "operators"],
)
def test_every_method_has_a_row(rooms, methods):
    """A new method is not done before its source, or its formula, is compared."""
    assert methods - named(*rooms) == set()


def test_every_table_has_the_same_columns():
    headers = re.findall(r"^(\|.*\|)\n\| *-", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(headers) == 6
    for header in headers:
        assert [cell.strip() for cell in header.strip("|").split("|")] == HEADER


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.room}: {row.cells[0]}")
def test_a_row_is_whole(row: Row):
    """It has all cells, a source that can be looked up, and at least one test."""
    assert len(row.cells) == len(HEADER)
    assert all(row.cells)
    assert row.names
    is_pinned = re.search(r"[\w.-]+/[\w.-]+@[0-9a-f]{7,}", row.cells[1])
    assert is_pinned or "formula" in row.cells[1] or re.search(r" \d+\.\d+", row.cells[1])
    assert row.tests


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.room}: {row.cells[0]}")
def test_a_row_names_tests_that_exist(row: Row):
    spans = re.findall(r"`([^`]+)`", row.cells[-1])
    assert len(spans) == len(row.tests), f"{spans} are not all written file.py::function"
    for file, function in row.tests:
        tree = ast.parse((PAGE.parents[1] / "tests" / file).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function in functions, f"{file} has no {function}"


@pytest.mark.parametrize("file", ["test_fidelity_parameterizations.py", "test_fidelity_starts.py"])
def test_every_comparison_of_a_parameterization_is_in_a_row(file):
    """A comparison that no row shows is of no use to a reader."""
    tests = {test for row in ROWS for test in row.tests}
    tree = ast.parse((PAGE.parents[1] / "tests" / file).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            assert (file, node.name) in tests, f"{node.name} has no row"
