"""One progress bar over all optimizer steps of a run; plain lines where the output is no terminal."""

import sys
import time
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm  # type: ignore[import-untyped]

LINES = 10  # of a run whose output is no terminal


class StepProgress(ProgressBar):
    """Steps of all epochs on one bar, and a bar for each evaluation.

    In a file or a pipe a bar would leave thousands of lines: there, a run leaves ten plain ones.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream
        self._bar: tqdm[Any] | None = None
        self._evaluation: tqdm[Any] | None = None
        self._enabled = True
        self._began = 0.0
        self._first = 0
        self._shown = 0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    @property
    def stream(self) -> TextIO:
        """Where it writes: standard error, as it is now."""
        return self._stream or sys.stderr

    def _terminal(self) -> bool:
        return self._enabled and self.stream.isatty()

    # ---- training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._first, self._shown = (
            time.monotonic(),
            trainer.global_step,
            trainer.global_step,
        )
        if self._terminal():
            total = _finite(trainer.estimated_stepping_batches)
            self._bar = tqdm(
                total=total,
                initial=self._first,
                desc="fit",
                unit="step",
                file=self.stream,
                leave=True,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not self._enabled or (self._bar is not None and step == self._shown):
            return
        metrics = _short(self.get_metrics(trainer, pl_module))
        if self._bar is not None:
            self._bar.set_postfix_str(metrics, refresh=False)
            self._bar.update(step - self._shown)
            self._shown = step
            return
        total = _finite(trainer.estimated_stepping_batches)
        every = max(1, (total or 100 * LINES) // LINES)
        if step - self._shown >= every or (step == total and step != self._shown):
            self._shown = step
            took = time.monotonic() - self._began
            rate = took / max(1, step - self._first)
            left = f", {_minutes(rate * (total - step))} left" if total and step < total else ""
            of = f"/{total}" if total else ""
            print(
                f"step {step}{of}  {metrics}  ({_minutes(took)}{left})",
                file=self.stream,
                flush=True,
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        for bar in (self._evaluation, self._bar):
            if bar is not None:
                bar.close()
        self._bar = self._evaluation = None

    # ---- evaluation and prediction

    def _begin(self, what: str, batches: float) -> None:
        if self._terminal():
            self._evaluation = tqdm(
                total=_finite(batches), desc=what, unit="batch", file=self.stream, leave=False
            )

    def _advance(self, *_: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.update()

    def _end(self, *_: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("evaluate", self.total_val_batches)

    def on_validation_batch_end(self, *args: Any) -> None:
        self._advance()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("test", sum(map(float, trainer.num_test_batches)))

    def on_test_batch_end(self, *args: Any) -> None:
        self._advance()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("predict", sum(map(float, trainer.num_predict_batches)))

    def on_predict_batch_end(self, *args: Any) -> None:
        self._advance()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        bar = self._bar or self._evaluation
        if bar is None:
            print(*args, **kwargs)
        else:
            bar.write(" ".join(map(str, args)), file=kwargs.get("file", sys.stdout))


def _finite(total: float) -> int | None:
    return None if total in (float("inf"), -1) else int(total)


def _short(metrics: dict[str, Any]) -> str:
    return ", ".join(
        f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}"
        for k, v in metrics.items()
        if k != "v_num"
    )


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
