"""Progress over all optimizer steps of a run: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

from adaptrank.cli.verbosity import is_quiet

LINES = 10
"""Lines of a run whose output is no terminal."""
SHOWN_EVERY = 50
"""Optimizer steps between two looks at the metrics in a trainer that logs nothing."""
STEP_MEANS = ("train_loss", "train_aux_loss")
"""Names of the means over the targets of a step."""


def progress() -> ProgressBar:
    """Return a bar for a terminal, or plain lines for a file or a pipe. `--quiet` shows none."""
    if is_quiet():
        lines = StepLines()
        lines.disable()
        return lines
    return StepBar() if sys.stdout.isatty() and sys.stderr.isatty() else StepLines()


class StepBar(TQDMProgressBar):
    """Lightning's bar, over the steps of all epochs instead of the batches of each.

    Metrics are shown as often as they are logged, since each look at them waits for the device.
    """

    reads_logged_metrics = True
    """Whether Lightning need not read the metrics of each batch for it."""

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Keep one bar for all epochs."""
        self.train_progress_bar.total = total_steps(trainer)
        self.train_progress_bar.initial = 0
        self.train_progress_bar.set_description("fit")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count optimizer steps."""
        bar, step = self.train_progress_bar, trainer.global_step
        if step == bar.n or bar.disable:
            return
        every = trainer.log_every_n_steps or SHOWN_EVERY  # type: ignore[attr-defined]
        if step % every == 0 or step == bar.total or not bar.postfix:
            bar.set_postfix_str(shown_metrics(self, trainer, pl_module), refresh=False)
        bar.n = step
        bar.refresh()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """No-op. An epoch is not shown."""


class StepLines(ProgressBar):
    """Ten lines for a run. A bar would leave thousands of lines in a file.

    A line is `step 100/200  train_loss 0.213  (1:13, 1:13 left)`, on standard error.
    """

    reads_logged_metrics = True
    """Whether Lightning need not read the metrics of each batch for it."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._began = 0.0
        self._first = 0
        self._shown = 0

    @property
    def is_enabled(self) -> bool:
        """True if the lines are printed, which `LightningModule.print` asks for."""
        return self._enabled

    def disable(self) -> None:
        """Print nothing, as on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began = time.monotonic()
        self._first = self._shown = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line after each tenth of the run, and after the last step."""
        step, total = trainer.global_step, total_steps(trainer)
        every = max(1, (total or 100 * LINES) // LINES)
        is_last = step == total and step != self._shown
        if not self._enabled or (step - self._shown < every and not is_last):
            return
        self._shown = step
        seconds = time.monotonic() - self._began
        times = _minutes(seconds)
        if total and step < total:
            a_step = seconds / max(1, step - self._first)
            times += f", {_minutes(a_step * (total - step))} left"
        of = f"/{total}" if total else ""
        metrics = shown_metrics(self, trainer, pl_module)
        print(f"step {step}{of}  {metrics}  ({times})", file=sys.stderr, flush=True)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print what a module prints."""
        print(*args, **kwargs)


def total_steps(trainer: Trainer) -> int | None:
    """Return the optimizer steps of the whole run, or None if they are not known."""
    total = trainer.estimated_stepping_batches
    return None if total in (float("inf"), -1) else int(total)


def shown_metrics(bar: ProgressBar, trainer: Trainer, module: LightningModule) -> str:
    """Return the metrics of a bar in one line. This reads the device."""
    metrics = trainer.callback_metrics
    means = {name: float(metrics[name]) for name in STEP_MEANS if name in metrics}
    return metrics_line(means | dict(bar.get_metrics(trainer, module)))


def metrics_line(metrics: dict[str, Any]) -> str:
    """Return metrics in one line, without the number of Lightning's log folder."""
    parts = []
    for name, value in metrics.items():
        if name != "v_num":
            parts.append(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(parts)


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
