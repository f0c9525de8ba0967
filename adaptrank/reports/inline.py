"""The report of a run as an object: a notebook shows its pictures, and Python prints a summary."""

import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from adaptrank._errors import UserError
from adaptrank.reports.figures import draw_run
from adaptrank.reports.history import History, history_of_events, read_history
from adaptrank.reports.rendering import Picture, render
from adaptrank.reports.run_words import DESCRIPTIONS


class Started(Protocol):
    """A run of an allocator."""

    @property
    def start_sizes(self) -> Mapping[str, int]:
        """Sizes of the axes at the start."""
        ...


class HasEvents(Protocol):
    """An allocator after its training."""

    @property
    def events(self) -> Sequence[Mapping[str, Any]]:
        """Everything that has happened in the run."""
        ...

    @property
    def run(self) -> Started:
        """The run that it takes part in."""
        ...


class RunReport:
    """Events of an allocator in a run.

    The last line of a notebook's cell shows the pictures. `pictures` has their content.

    Args:
        history: history of the run.
    """

    def __init__(self, history: History) -> None:
        self.history = history

    @cached_property
    def pictures(self) -> dict[str, bytes]:
        """Name of a picture -> content of its PNG file.

        Raises:
            ModuleNotFoundError: if matplotlib is missing.
        """
        with tempfile.TemporaryDirectory() as folder:
            files = draw_run(self.history, Path(folder))
            return {name: file.read_bytes() for name, file in files.items()}

    def __repr__(self) -> str:
        """Return the units at the start and at the end, and the axes that changed most."""
        start, end = self.history.start, self.history.end
        change = {axis: end.get(axis, size) - size for axis, size in start.items()}
        names = ", ".join(self.history.allocators)
        lines = [
            f"{self.history.name}{f', {names}' if names else ''}",
            f"  units {sum(start.values()):,} -> {sum(end.values()):,} on {len(end)} axes",
        ]
        gain = max(change, key=lambda axis: change[axis])
        loss = min(change, key=lambda axis: change[axis])
        if change[gain] > 0:
            lines.append(f"  most gained: {gain} {change[gain]:+d}")
        if change[loss] < 0:
            lines.append(f"  most lost: {loss} {change[loss]:+d}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the pictures for a notebook, and above them the text."""
        pictures = [Picture(DESCRIPTIONS[name], png) for name, png in self.pictures.items()]
        return render("inline.html.j2", text=repr(self), pictures=pictures)


def report(run: str | Path | HasEvents) -> RunReport:
    """Return the report of a run, to be shown in a notebook or printed.

    Args:
        run: the folder of a run, such as runs/NAME/0, or an allocator after its training.

    Raises:
        FileNotFoundError: if there is no such folder, or no allocator ran in it.
        UserError: if the allocator has no events.
    """
    if isinstance(run, str | Path):
        return RunReport(read_history(Path(run)))
    events = getattr(run, "events", None)
    if events is None:
        raise UserError(
            f"report takes the folder of a run, or an allocator after its training, and not "
            f"{type(run).__name__}."
        )
    title = str(getattr(run, "title", type(run).__name__))
    start = run.run.start_sizes if events else {}
    return RunReport(history_of_events(events, start, "this run", title))
