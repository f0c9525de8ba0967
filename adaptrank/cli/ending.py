"""The end of a run: its summary, the card of its adapter, what to do next, or what went wrong."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightning.pytorch.trainer.states import TrainerStatus

from adaptrank._errors import UserError
from adaptrank.allocation import Participant, parameter_growth
from adaptrank.artifacts.run import (
    RunFiles,
    discard_unbegun,
    render,
    round_events,
    summarize,
    write_json,
)
from adaptrank.axes import rank_axes
from adaptrank.cli import errors
from adaptrank.cli.chance import no_better_than_chance
from adaptrank.cli.checkpoint_path import explain_restoring
from adaptrank.cli.monitors import missing_metric, without_other_names
from adaptrank.cli.output import metric_names, next_commands, numbers, resume_command, say
from adaptrank.modules import task_matrix
from adaptrank.parameterizations import adapted_part
from adaptrank.reports.card import write_card
from adaptrank.training.peers import lost_peer

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from adaptrank.cli.train import AdaptrankCLI

log = logging.getLogger("adaptrank")


def finish(cli: "AdaptrankCLI") -> None:
    """Write the summary and the adapter's card, and print what to do next.

    The module holds the weights that were saved, so that all figures are theirs.
    """
    folder, trainer = cli.run_folder, cli.trainer
    assert folder is not None
    files = next(c for c in trainer.callbacks if isinstance(c, RunFiles))  # type: ignore[attr-defined]
    after = cli.evaluate() if cli.evaluates else _logged(numbers(trainer.callback_metrics), files)
    if (matrix := task_matrix(trainer)) is not None:
        after |= matrix.figures
    steps, saved = trainer.global_step, files.saved
    rounds = round_events(trainer)
    summary = summarize(cli.model, cli.before, after, steps, files.seconds, saved, rounds)
    warning = no_better_than_chance(cli.model, cli.before, after)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    grown = [parameter_growth(each) for each in callbacks if isinstance(each, Participant)]
    summary["warnings"] = [text for text in (warning, *grown) if text]
    if not trainer.is_global_zero:
        return
    write_json(folder / "summary.json", summary)
    if (folder / "adapter").is_dir():
        _write_card(folder, cli.model, summary)
    say("\n" + render(summary, metric_names(cli.model, after)))
    if warning:
        log.warning("\n%s", warning)
    say("\n" + next_commands(folder, cli.model, cli.datamodule))


def _logged(metrics: dict[str, float], files: RunFiles) -> dict[str, float]:
    """Return the last logged metrics that are those of the weights that were saved."""
    saved = files.saved
    if saved.get("weights") == "best" and saved["step"] != saved["of"]:
        return {saved["monitor"]: saved["value"]}
    return without_other_names(metrics)


def _write_card(folder: Path, module: "LightningModule", summary: dict[str, Any]) -> None:
    axes = rank_axes(adapted_part(module))
    ranks = {key: len(axis) for key, axis in axes.items()}
    file = folder / "config.yaml"
    config = file.read_text(encoding="utf-8") if file.is_file() else ""
    write_card(folder / "adapter", summary, ranks, config)


def explain(cli: "AdaptrankCLI", error: Exception) -> str | None:
    """Return the sentence of a mistake, or None for a bug, which keeps its traceback.

    Once training has begun, the library's own errors alone are known to be no bugs.
    """
    trainer = getattr(cli, "trainer", None)
    if trainer is not None and (text := missing_metric(trainer, error)):
        return text
    is_own = isinstance(errors.unwrap(error), UserError)
    if cli.began and not is_own:
        return None
    return errors.explain(error) or explain_restoring(error)


def lost(cli: "AdaptrankCLI") -> bool:
    """Return whether another process of the run is gone. Its sentence was printed already."""
    trainer = getattr(cli, "trainer", None)
    return trainer is not None and lost_peer(trainer) is not None


def interrupted(cli: "AdaptrankCLI", error: BaseException) -> bool:
    """Return True for Ctrl-C, which Lightning turns into an exit."""
    trainer = getattr(cli, "trainer", None)
    if isinstance(error, KeyboardInterrupt):
        return True
    return trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED


def leave(cli: "AdaptrankCLI") -> NoReturn:
    """Say what an interrupted run leaves, and exit with 1."""
    if cli.began and cli.run_folder is not None:
        say(resume_command(cli.run_folder, cli.trainer.global_step))
    else:
        discard_unbegun(cli.run_folder)
        print("\nInterrupted.", file=sys.stderr)
    raise SystemExit(1)
