"""Metrics that callbacks and schedulers go by: the names that users expect, and wrong names.

The metrics of a validation have names without a prefix here, such as `loss` and `accuracy`. Users
of Lightning and of transformers write `val_loss` and `eval_loss`, which mean the same.
"""

import re
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torchmetrics import MetricCollection

from adaptrank._errors import did_you_mean, some
from adaptrank.cli.errors import ConfigError

VALIDATION = re.compile(r"(?:val|valid|validation|eval|dev)[_/](.+)")
TRAINING = re.compile(r"(?:train|training)[_/](.+)")
SHORT = {"acc": "accuracy", "ppl": "perplexity"}

TRAINING_METRICS = ("train_loss", "train_aux_loss", "penalty")
"""Metrics of training steps of the library's modules."""

OTHER_METRICS = ("ranks/", "spectral/", "tasks/", "lr-")
"""Beginnings of the names of metrics that callbacks log."""

HIGHER = frozenset(
    (
        *("acc", "accuracy", "match", "f1", "matthews", "mcc", "pearson", "spearman", "kappa"),
        *("precision", "recall", "auroc", "auc", "bleu", "rouge", "rouge1", "rouge2", "rougel"),
        *("r2", "iou", "map"),
    )
)
"""Words in the names of metrics of which more is better."""

LOWER = frozenset(
    ("loss", "perplexity", "ppl", "error", "mse", "mae", "rmse", "ece", "wer", "cer", "nll")
)
"""Words in the names of metrics of which less is better."""

ALWAYS = ("epoch", "step", "version")
"""Names in the template of a checkpoint's file that are no metrics."""

SOURCES = {
    "early_stopping.py": "_validate_condition_metric",
    "model_checkpoint.py": "_save_topk_checkpoint",
    "training_epoch_loop.py": "_update_learning_rates",
}
"""File of Lightning -> its function that misses a metric."""


def canonical(name: str) -> str:
    """Return the name that a metric has in this library: `loss` for `val_loss` or `eval/loss`."""
    if match := VALIDATION.fullmatch(name):
        return SHORT.get(match[1], match[1])
    if match := TRAINING.fullmatch(name):
        return f"train_{match[1]}"
    return name


class MetricNames(Callback):
    """Gives metrics the names that callbacks, schedulers and file names ask for.

    It stands in front of the callbacks that read them.
    """

    def __init__(self) -> None:
        self.typed: dict[str, str] = {}
        """Our name of a metric -> the name that the user wrote."""

    def adopt(self, module: LightningModule, callbacks: Sequence[Callback]) -> None:
        """Check the modes of callbacks that monitor a metric, and let them use our names.

        A resumed run finds the state of a ModelCheckpoint by the name, so that it changes early. Of
        a module that logs names of its own, names are left until they are known.

        Raises:
            ConfigError: if a mode would keep the worst.
        """
        for callback in _monitoring(callbacks):
            _check_mode(callback, module)
            if _logs_our_names(module):
                ours = canonical(callback.monitor)
                self.typed[ours] = callback.monitor
                callback.monitor = ours

    def check(
        self, module: LightningModule, callbacks: Sequence[Callback], logged: Iterable[str]
    ) -> None:
        """Refuse a name that no one logs, as far as that is known after a validation.

        A module or a callback of the user may log more while it trains. Then a wrong name shows at
        the first validation of training.

        Args:
            module: the module of the run.
            callbacks: all callbacks of the run.
            logged: names of the metrics of the validation.
        Raises:
            ConfigError: naming the metrics that exist.
        """
        metrics = list(logged)
        packages = {type(callback).__module__.partition(".")[0] for callback in callbacks}
        is_known = _logs_our_names(module) and packages <= {"adaptrank", "lightning"}
        # A validation without batches says nothing.
        if not is_known or not metrics:
            return
        for callback in callbacks:
            owner = type(callback).__name__
            for name in _names_in_file_name(callback):
                if not _is_logged(name, metrics):
                    raise ConfigError(_sentence(owner, "filename", name, metrics))
        for callback in _monitoring(callbacks):
            if not _is_logged(callback.monitor, metrics):
                name = self.typed.get(callback.monitor, callback.monitor)
                raise ConfigError(_sentence(type(callback).__name__, "monitor", name, metrics))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rename what is monitored, and add the names in file names."""
        metrics = trainer.callback_metrics
        asking: list[Any] = [*_monitoring(_callbacks(trainer)), *trainer.lr_scheduler_configs]
        for each in asking:
            each.monitor = _present(each.monitor, metrics)
        for callback in _callbacks(trainer):
            for name in _names_in_file_name(callback):
                if name not in metrics and canonical(name) in metrics:
                    metrics[name] = metrics[canonical(name)]


def missing_metric(trainer: Trainer, error: BaseException) -> str | None:
    """Return the sentence for Lightning's error about a metric that is missing, or None."""
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not any(
        code.co_filename.endswith(file) and code.co_name == function
        for code in frames
        for file, function in SOURCES.items()
    ):
        return None
    metrics = trainer.callback_metrics
    plateaus = [config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    owners: list[tuple[str, str | None]] = [
        (type(callback).__name__, callback.monitor) for callback in _monitoring(_callbacks(trainer))
    ]
    owners += [(type(config.scheduler).__name__, config.monitor) for config in plateaus]
    named = [c.typed for c in _callbacks(trainer) if isinstance(c, MetricNames)]
    typed = named[0] if named else {}
    for owner, name in owners:
        if name is not None and name not in metrics:
            return _sentence(owner, "monitor", typed.get(name, name), list(metrics))
    return None


def without_other_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics without the further names that a file name asked for."""
    return {
        name: value
        for name, value in metrics.items()
        if canonical(name) == name or canonical(name) not in metrics
    }


def _is_logged(name: str, metrics: Sequence[str]) -> bool:
    ours = canonical(name)
    return ours in (*metrics, *TRAINING_METRICS) or ours.startswith(OTHER_METRICS)


def _sentence(owner: str, key: str, name: str, metrics: Sequence[str]) -> str:
    validation = [each for each in metrics if not each.startswith(("train", *OTHER_METRICS))]
    training = [each for each in metrics if each.startswith("train")] or ["train_loss"]
    hint = did_you_mean(canonical(name), [*validation, *training])
    there = f"There are {some(validation)}, and of training {some(training)}."
    return f"{owner}: no metric {name!r} is logged, which `{key}` names.{hint} {there}"


def _check_mode(callback: Any, module: LightningModule) -> None:
    """Refuse a mode that is known not to suit the metric."""
    higher = _higher_is_better(canonical(callback.monitor), module)
    mode = getattr(callback, "mode", None)
    if higher is None or mode not in ("min", "max") or higher == (mode == "max"):
        return
    more, fits = ("higher", "max") if higher else ("lower", "min")
    raise ConfigError(
        f"{type(callback).__name__}: mode: {mode} does not suit {callback.monitor}, of which "
        f"{more} values are better. Write mode: {fits}"
    )


def _higher_is_better(name: str, module: LightningModule) -> bool | None:
    """Return whether more of a metric is better, or None if it is not known."""
    for child in module.modules():
        if isinstance(child, MetricCollection) and name in child:
            known: bool | None = child[name].higher_is_better
            return known
    words = set(re.split(r"[_/ -]", name.lower()))
    if words & LOWER:
        return False
    return True if words & HIGHER else None


def _logs_our_names(module: LightningModule) -> bool:
    """Return whether the validation of a module is the library's own."""
    step = getattr(type(module), "validation_step", None)
    return str(getattr(step, "__module__", "")).startswith("adaptrank.")


def _present(name: str | None, metrics: Mapping[str, Any]) -> str | None:
    if name is None or name in metrics or canonical(name) not in metrics:
        return name
    return canonical(name)


def _monitoring(callbacks: Iterable[Callback]) -> Iterator[Any]:
    """Yield the callbacks that go by a metric."""
    for callback in callbacks:
        if isinstance(getattr(callback, "monitor", None), str):
            yield callback


def _names_in_file_name(callback: Callback) -> list[str]:
    """Return the metrics in the template of a checkpoint's file, as in `{epoch}-{val_loss:.2f}`."""
    if not isinstance(callback, ModelCheckpoint) or not callback.filename:
        return []
    names = re.findall(r"\{([^:{}]+)", callback.filename)
    return [name for name in names if name not in ALWAYS]


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks
