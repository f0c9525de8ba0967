"""The tables of docs/fidelity.md as rows, for the test of the page and the marker `fidelity`."""

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "fidelity.md"
HEADER = ["Method", "Source", "Compared", "Result", "Known departures", "Test"]


@dataclass(frozen=True)
class Row:
    """A row of the page.

    `names` are the code spans of the first cell, and `tests` are (file, function) of the last.
    """

    room: str
    cells: tuple[str, ...]
    names: tuple[str, ...]
    tests: tuple[tuple[str, str], ...]


def rows() -> list[Row]:
    """Return the rows of all tables, top to bottom."""
    found = []
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for section in sections[1:]:
        room, *lines = section.splitlines()
        tables = [line for line in lines if line.startswith("|")]
        for line in tables[2:]:
            cells = tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            found.append(
                Row(
                    room=room,
                    cells=cells,
                    names=tuple(re.findall(r"`([\w.]+)`", cells[0])),
                    tests=tuple(re.findall(r"`(test_\w+\.py)::(test_\w+)`", cells[-1])),
                )
            )
    return found


def named_tests() -> set[tuple[str, str]]:
    """Return (file, function) of every test that the page names."""
    return {test for row in rows() for test in row.tests}
