"""Facts that are read from the folder of an earlier run: moves of units, and final ranks."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptrank._errors import UserError

EVENTS, RANKS = "ranks.jsonl", "ranks.json"


@dataclass(frozen=True)
class Move:
    """Numbers of units that moved at an event of a recorded run.

    Args:
        step: optimizer step of the event.
        pruned: number of units that were removed.
        grown: number of fresh units.
        closed: number of units that were closed after the event.
        active: number of open units after the event.
    """

    step: int
    pruned: int
    grown: int
    closed: int
    active: int


@dataclass(frozen=True)
class RecordedMoves:
    """The events of a recorded run.

    Args:
        folder: folder of the run, as it was given.
        units: number of units at the start.
        moves: one entry for each event, by step.
    """

    folder: str
    units: int
    moves: tuple[Move, ...]

    def at(self, step: int) -> Move | None:
        """Return the event of a step, or None if the run had none there."""
        return next((move for move in self.moves if move.step == step), None)


def read_moves(folder: str) -> RecordedMoves:
    """Read the events of a run from its `ranks.jsonl`.

    A last line that a killed run cut off is left out.

    Args:
        folder: folder of the run.

    Raises:
        UserError: if there is no such file, it is damaged, or no unit could move in the run.
    """
    file = _file_of(folder, EVENTS, "no allocator moved a rank in that run")
    events = [_parsed(line, file, number) for number, line in _lines(file)]
    if not events or events[0].get("step") != 0:
        raise UserError(f"{file} does not begin with the sizes at the start. It is damaged.")
    moves = [_move(event, file) for event in events if event.get("step")]
    if not any(move.pruned or move.grown or move.closed for move in moves):
        raise UserError(f"No unit moved in the run {folder!r}. Name a run with an allocator.")
    return RecordedMoves(folder, _count(events[0], "active", file), tuple(moves))


def read_ranks(folder: str) -> dict[str, int]:
    """Read the final ranks of a run from its `ranks.json`, {axis key: units}.

    Args:
        folder: folder of the run.

    Raises:
        UserError: if there is no such file, or it is damaged.
    """
    file = _file_of(folder, RANKS, "no rank axis was in that run, or it did not end")
    content = _parsed(file.read_text(encoding="utf-8"), file, 1)
    for key in content:
        _count(content, key, file)
    return content


def check_axes(owner: str, folder: str, ranks: Mapping[str, int], axes: Mapping[str, Any]) -> None:
    """Check that a recorded run had the axes of this one.

    Raises:
        UserError: naming an axis that only one of the two has.
    """
    only_here, only_there = sorted(set(axes) - set(ranks)), sorted(set(ranks) - set(axes))
    if only_here or only_there:
        key, where = (only_here[0], "this model") if only_here else (only_there[0], folder)
        raise UserError(
            f"{owner}: the run {folder!r} has {len(ranks)} axes, and this model has {len(axes)}. "
            f"Only {where} has {key}. Name a run with the same adapters."
        )


def _file_of(folder: str, name: str, reason: str) -> Path:
    file = Path(folder) / name
    if not Path(folder).is_dir():
        raise UserError(
            f"run={folder!r} is no folder. Name the folder of a run, such as runs/NAME/0."
        )
    if not file.is_file():
        raise UserError(f"run={folder!r} holds no {name}: {reason}.")
    return file


def _lines(file: Path) -> list[tuple[int, str]]:
    """Return (number, line) of each complete line of a file."""
    complete = file.read_text(encoding="utf-8").split("\n")[:-1]
    return [(number, line) for number, line in enumerate(complete, 1) if line.strip()]


def _parsed(text: str, file: Path, number: int) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{file}, line {number}: this is no JSON mapping. The file is damaged.")
    return content


def _count(content: Mapping[str, Any], key: str, file: Path) -> int:
    value = content.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(
            f"{file}: {key} is {value!r}, and must be a whole number from 0 on. The file is "
            f"damaged."
        )
    return value


def _move(event: Mapping[str, Any], file: Path) -> Move:
    counts = {}
    for name in ("pruned", "closed"):
        units = event.get(name, {})
        lists = units.values() if isinstance(units, dict) else ()
        counts[name] = sum(len(each) for each in lists if isinstance(each, list))
    grown = event.get("grown", {})
    if not isinstance(grown, dict):
        raise UserError(f"{file}: grown is {grown!r}, and must be a mapping. The file is damaged.")
    return Move(
        step=_count(event, "step", file),
        pruned=counts["pruned"],
        grown=sum(_count(grown, axis, file) for axis in grown),
        closed=counts["closed"],
        active=_count(event, "active", file),
    )
