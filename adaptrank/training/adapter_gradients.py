"""The callback that completes the gradients of adapters before an optimizer step."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor

from adaptrank.training.clipping import warn_of_clipping
from adaptrank.training.distributed import average_adapters
from adaptrank.training.penalties import add_penalty_gradients
from adaptrank.training.step_mean import StepMean


@runtime_checkable
class HasGates(Protocol):
    """A callback that trains tensors which are in no optimizer."""

    def gate_parameters(self) -> list[Tensor]:
        """Return these tensors."""


class AdapterGradients(Callback):
    """Average the gradients of adapters over processes, and add the penalties of methods.

    A module of this library leaves the weights of an accumulated step to its `step_mean`. Its
    gradients become those of the mean over all targets here, before clipping and before allocators
    look at them.

    A penalty is a regularizer that a method brings along, such as the orthogonality of the SVD
    form. Allocators and the modules of this library put this callback into the trainer by
    themselves, see `ensure_gradients`. A LightningModule of your own that trains such a method
    without an allocator takes it as `callbacks=[AdapterGradients()]`. Several of them in a trainer
    act as one.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where the trainer clips beside an optimizer that clips by itself."""
        if self._acts(trainer):
            for optimizer in trainer.optimizers:
                warn_of_clipping(optimizer, "gradient_clip_val", trainer.gradient_clip_val)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average gradients where the strategy leaves that to us."""
        if self._acts(trainer):
            average_adapters(trainer, pl_module, list(_gates(trainer)))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Take the mean over all targets of the step, and add the gradient of the mean penalty.

        Tensors of axes without units have no gradient afterwards.
        Each of several optimizers gets the penalty's gradient for its own tensors, and gets it
        once. The means of the losses and the penalty are logged.
        """
        if self._acts(trainer):
            _drop_empty_gradients(pl_module)
            self._take_step_mean(trainer, pl_module)
            moved = None if len(trainer.optimizers) == 1 else _tensors_of(optimizer)
            value = add_penalty_gradients(pl_module, moved)
            if value is not None:
                pl_module.log("penalty", value)

    def _take_step_mean(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step_mean = getattr(pl_module, "step_mean", None)
        if not isinstance(step_mean, StepMean):
            return
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        means = step_mean.complete([*trained, *_gates(trainer)], trainer.accumulate_grad_batches)
        for name, value in means.items():
            pl_module.log(name, value, prog_bar=_wants_numbers(trainer.progress_bar_callback))

    def _acts(self, trainer: Trainer) -> bool:
        """Return whether this is the first one of the trainer."""
        return next(_instances(trainer), self) is self


def _wants_numbers(bar: ProgressBar | None) -> bool:
    """Return whether a progress bar gets its metrics from Lightning.

    Lightning reads them from the device at every batch then, however seldom the bar shows them. A
    bar with the attribute `reads_logged_metrics` takes them from what is logged when it shows them.
    """
    return bar is not None and not getattr(bar, "reads_logged_metrics", False)


def ensure_gradients(trainer: Trainer) -> None:
    """Put `AdapterGradients` in front of all callbacks, unless there is one already.

    It has to act before allocators look at gradients. The list is replaced, not changed: Lightning
    may be iterating over it.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    present = list(_instances(trainer))
    in_front = present[0] if present else AdapterGradients()
    others = [callback for callback in callbacks if callback is not in_front]
    trainer.callbacks = [in_front, *others]  # type: ignore[attr-defined]


def _drop_empty_gradients(module: LightningModule) -> None:
    """Drop gradients without elements, of which PyTorch can take no largest absolute value."""
    for parameter in module.parameters():
        if parameter.grad is not None and not parameter.numel():
            parameter.grad = None


def _instances(trainer: Trainer) -> Iterator[AdapterGradients]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AdapterGradients):
            yield callback


def _tensors_of(optimizer: Any) -> set[int]:
    """Return the ids of the parameters that an optimizer moves."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _gates(trainer: Trainer) -> Iterator[Tensor]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, HasGates):
            yield from callback.gate_parameters()
