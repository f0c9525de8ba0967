"""The rounds of a training strategy in a report: the file, a table, and sizes as events."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptrank.reports.records import COUNT, COUNTS, NUMBER, TEXT, Fields, check_fields, read_lines

Round = dict[str, Any]
"""One line of rounds.jsonl."""

ROUND: Fields = {
    "step": COUNT,
    "round": COUNT,
    "rounds": COUNT,
    "strategy": TEXT,
    "trained": COUNT,
    "ranks": COUNTS,
}
"""Keys of a line of rounds.jsonl."""

ROUND_OPTIONS: Fields = {"stored": COUNT, "loss_before": NUMBER, "loss_after": NUMBER}
"""Optional keys of a line of rounds.jsonl."""


def read_rounds(folder: Path) -> list[Round]:
    """Return the lines of rounds.jsonl in a run's folder, or [] if there is no file.

    Raises:
        UserError: if the file is damaged, naming the line and the key.
    """
    file = folder / "rounds.jsonl"
    if not file.is_file():
        return []
    rounds: list[Round] = []
    for place, record in read_lines(file):
        check_fields(place, record, ROUND, required=True)
        check_fields(place, record, ROUND_OPTIONS)
        rounds.append(record)
    return rounds


def events_of_rounds(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """Return each round as an event of an allocator, for a run that has no allocator."""
    events: list[dict[str, Any]] = []
    for record in rounds:
        units = sum(record["ranks"].values())
        event: dict[str, Any] = {
            "step": record["step"],
            "reason": f"round {record['round'] + 1} of {record['rounds']} begins",
            "sizes": record["ranks"],
            "active": units,
            "allocated": units,
            "total": units,
        }
        if not record["step"]:
            event["allocators"] = [record["strategy"]]
        events.append(event)
    return events


def round_rows(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """Return the cells of each round in the table of rounds."""
    return [
        {
            "number": record["round"] + 1,
            "step": record["step"] + 1,
            "trained": f"{record['trained']:,}",
            "stored": f"{record['stored']:,}" if "stored" in record else "",
            "loss": _loss_at_border(record),
        }
        for record in rounds
    ]


def _loss_at_border(record: Round) -> str:
    """Return the loss before and after a border that changes the function, else ""."""
    if "loss_before" not in record or "loss_after" not in record:
        return ""
    return f"{record['loss_before']:.4g} to {record['loss_after']:.4g}"
