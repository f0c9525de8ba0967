"""Loggers of a run: metrics.jsonl in any case, and a user's own ones beside it."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger

from adaptrank.cli.errors import ConfigError, constructing
from adaptrank.cli.parser import RUN_FOLDER

log = logging.getLogger("adaptrank")

PACKAGES = {
    "CometLogger": "comet-ml",
    "MLFlowLogger": "mlflow",
    "TensorBoardLogger": "tensorboard",
    "WandbLogger": "wandb",
}
"""Class of Lightning -> the package that it needs."""


class Pending(DummyLogger):
    """Stands for a logger that writes into the run folder, until there is one.

    Args:
        kind: class of the logger.
        arguments: arguments of its constructor but the folder.
    """

    def __init__(self, kind: type[Logger], arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.kind, self.arguments = kind, arguments

    def build(self, folder: Path) -> Logger:
        """Return the logger."""
        with constructing(self.kind.__name__), naming_package(self.kind.__name__):
            return self.kind(**{**self.arguments, "save_dir": str(folder)})


def make_logger(kind: type[Logger], *args: Any, **kwargs: Any) -> Logger:
    """Return a logger, or what stands for it as long as its folder is not known."""
    if kwargs.get("save_dir") == RUN_FOLDER:
        return Pending(kind, kwargs)
    with constructing(kind.__name__), naming_package(kind.__name__):
        return kind(*args, **kwargs)


def loggers_in(folder: Path | None, configured: Any, verb: str) -> list[Logger]:
    """Return the loggers that a user configured: none, one, or a list of them.

    A log line names those that have no folder to write into.

    Args:
        folder: the run folder, or None for a verb that has none.
        configured: value of `trainer.logger`.
        verb: the verb, for the log.
    """
    if configured is None or isinstance(configured, bool):
        return []
    loggers = []
    for logger in list(configured) if isinstance(configured, Iterable) else [configured]:
        if not isinstance(logger, Pending):
            loggers.append(logger)
        elif folder is not None:
            loggers.append(logger.build(folder))
        else:
            log.warning(
                "%s logs nothing: `%s` has no run folder. Give it a `save_dir` to log.",
                logger.kind.__name__,
                verb,
            )
    return loggers


@contextmanager
def naming_package(kind: str) -> Iterator[None]:
    """Turn the error of a logger whose package is missing into one sentence.

    Raises:
        ConfigError: naming the package.
    """
    try:
        yield
    except ImportError as error:
        named = re.search(r"pip install (?:-U )?'?([\w.-]+)", str(error))
        package = PACKAGES.get(kind) or (named[1] if named else error.name) or "another package"
        raise ConfigError(
            f"trainer.logger: {kind} needs {package}, which is not installed: pip install {package}"
        ) from error


def keep_checkpoints_in(folder: Path, callbacks: Iterable[Callback]) -> None:
    """Let callbacks without a folder of their own write their checkpoints into the run folder.

    Lightning would put them where the first logger writes.
    """
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(folder / "checkpoints")
