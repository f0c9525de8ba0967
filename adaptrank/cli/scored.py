"""Choice of the model that `validate`, `test` and `predict` score."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import LightningModule

from adaptrank.artifacts import WEIGHTS
from adaptrank.cli.past_runs import newest_of_run, past_runs
from adaptrank.data import TaskData
from adaptrank.modules import AdaptedModule


@dataclass(frozen=True)
class Scored:
    """A model that is scored.

    Args:
        sentence: what it is, and what was not loaded.
        is_trained: whether it may hold trained weights.
    """

    sentence: str
    is_trained: bool


def scored(
    module: LightningModule,
    checkpoint: str | None,
    config: str | None,
    runs: str,
    rows: str = "",
) -> Scored:
    """Return what is scored.

    Args:
        module: the module, as it was configured.
        checkpoint: value of `ckpt_path`.
        config: the last configuration file, or None.
        runs: folder of the run folders.
        rows: the rows that are scored, such as "on the test rows", or "".
    """
    rows = f" {rows}" if rows else ""
    adapter = getattr(module, "adapter", None)
    if checkpoint is not None:
        on = f", over the adapter {adapter}" if adapter else ""
        return Scored(f"Scores the checkpoint {checkpoint}{on}{rows}", True)
    if adapter is not None:
        return Scored(f"Scores the adapter {adapter}{rows}", True)
    if not isinstance(module, AdaptedModule):
        kind = type(module).__name__
        text = f"Scores {kind} as its constructor makes it, without a checkpoint{rows}"
        return Scored(text, True)
    text = "Scores the untrained model: no adapter and no checkpoint was given."
    if rows:
        text += f" It is scored{rows}."
    beside = None if config is None else _beside(Path(config), Path(runs))
    if beside is not None:
        option, path = beside
        pattern = " --model.rank_pattern null" if module.rank_pattern else ""
        text += (
            f"\n{path} stands beside the configuration and was not loaded: add "
            f"--{option} {shlex.quote(str(path))}{pattern if option == 'adapter' else ''}"
        )
    return Scored(text, False)


def rows_scored(data: object, verb: str) -> str:
    """Return which rows are scored once the data are read, or "" for data of another library.

    Args:
        data: the data module.
        verb: "validate" or "test".
    """
    if not isinstance(data, TaskData):
        return ""
    if verb == "validate":
        return "on the validation rows"
    if "test" in data.encoded:
        return "on the test rows"
    return "on the validation rows, since no `test` source is given"


def _beside(config: Path, runs: Path) -> tuple[str, Path] | None:
    """Return the option and the path of what a run of this configuration left, or None.

    It is the run in whose folder the configuration lies, or the last run of the configuration.
    """
    for folder in past_runs(config, runs):
        if (folder / "adapter" / WEIGHTS).is_file():
            return "adapter", folder / "adapter"
        checkpoint = newest_of_run(folder)
        if checkpoint is not None:
            return "ckpt_path", checkpoint
    return None
