"""The callback that stops a run whose weights are not finite, before anything is saved of it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from adaptrank._collectives import from_all, several
from adaptrank._errors import RunError, some
from adaptrank.axes import dequantized
from adaptrank.training.adapter_gradients import HasGates
from adaptrank.training.callback_order import ensure_in_front

EVERY = 50
"""Optimizer steps from one look to the next in a trainer that logs nothing."""

MOST_BAD_LOSSES = 50
"""Batches in a row without a finite loss, after which a run stops."""

ADVICE = (
    "Lower the learning rate, clip gradients (gradient_clip_val=1.0), lengthen the warm-up, or "
    "look for a batch that is not finite"
)


class NotFiniteError(RunError):
    """A run whose trained tensors, moments or losses are not finite."""


class FiniteWeights(Callback):
    """Stop a run whose trained tensors or moments are not finite.

    A weight that is not a number stays one. Weights are therefore looked at as often as metrics are
    logged (`log_every_n_steps`), before each checkpoint, and at the end. A step in between reads
    nothing from the device: it adds to a counter of finite losses that stays there. Of several
    processes, all stop if one has to.

    The task modules of this library and the command line put this callback into the trainer. A
    LightningModule of your own takes it as `callbacks=[FiniteWeights()]`.

    Raises:
        NotFiniteError: between which steps it happened, to which tensors, and what to try.
    """

    def __init__(self) -> None:
        self._step = 0
        self._finite_until = 0
        self._batches = 0
        self._finite_losses: Tensor | None = None
        self._bad_batches = 0
        self._ever_finite = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count."""
        self._step = self._finite_until = trainer.global_step
        self._bad_batches = 0
        self._ever_finite = False
        self._start_counting()

    def _start_counting(self) -> None:
        self._batches = 0
        self._finite_losses = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a finite loss on its device, and look at the weights as often as one logs."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            is_finite = torch.isfinite(loss.detach()).all()
            counted = self._finite_losses
            self._finite_losses = is_finite.long() if counted is None else counted.add_(is_finite)
            self._batches += 1
        step = trainer.global_step
        every = trainer.log_every_n_steps or EVERY  # type: ignore[attr-defined]
        if step != self._step and step % every == 0:
            self.check(trainer, pl_module)
        self._step = step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look once more, before the files of the run are written."""
        self.check(trainer, pl_module, at_the_end=True)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a checkpoint of weights that are not finite."""
        self.check(trainer, pl_module)

    def check(self, trainer: Trainer, module: LightningModule, at_the_end: bool = False) -> None:
        """Raise if a trained tensor, a moment, or every loss for long is not finite.

        All processes have to call this at the same step.

        Args:
            trainer: the trainer of the run.
            module: its module, which names the tensors.
            at_the_end: whether a run without a single finite loss is refused, however short it is.
        Raises:
            NotFiniteError: on all processes, if it is so on one.
        """
        step = trainer.global_step
        trained = list(_trained(trainer))
        moments = [moment for _, _, moment in _moments(trainer)]
        flag = torch.zeros(1, device=module.device)
        if not _all_finite([*trained, *moments]):
            flag += 1
        self._note_losses()
        few = 1 if at_the_end and not self._ever_finite else MOST_BAD_LOSSES
        if self._bad_batches >= few:
            flag += 1
        if several():
            dist.all_reduce(flag)
        if not flag.item():
            self._finite_until = step
            return
        problems = from_all(_problem(trainer, module) or self._problem_of_losses(few))
        rank, problem = next(((r, p) for r, p in enumerate(problems) if p), (0, ""))
        if not problem:
            # A norm overflowed although no value did.
            self._finite_until = step
            return
        where = f" on process {rank}" if several() else ""
        raise NotFiniteError(
            f"{problem}{where}: it happened between step {self._finite_until} and step {step}.\n"
            f"Nothing of it is saved, and the checkpoints from before are whole. {ADVICE}."
        )

    def _note_losses(self) -> None:
        """Count the batches in a row without a finite loss."""
        if self._finite_losses is not None:
            is_finite = bool(self._finite_losses)
            self._ever_finite = self._ever_finite or is_finite
            self._bad_batches = 0 if is_finite else self._bad_batches + self._batches
            self._start_counting()

    def _problem_of_losses(self, few: int) -> str:
        if self._bad_batches < few:
            return ""
        return f"The loss was not finite in any of the last {self._bad_batches} batches"


def ensure_finite(trainer: Trainer) -> None:
    """Put `FiniteWeights` in front of all callbacks, unless there is one."""
    ensure_in_front(trainer, FiniteWeights)


def check_finite(trainer: Trainer, module: LightningModule) -> None:
    """Look at the weights of a run now, if its trainer has the callback."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, FiniteWeights):
            callback.check(trainer, module)
            return


def _trained(trainer: Trainer) -> Iterator[Tensor]:
    """Yield the tensors of all optimizers, and the trained gates, which are in none."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, HasGates):
            yield from callback.gate_parameters()


def _moments(trainer: Trainer) -> Iterator[tuple[Tensor, str, Tensor]]:
    """Yield (parameter, name, tensor) of the optimizers' state that is no single number."""
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dim():
                    yield parameter, name, value


def _all_finite(tensors: list[Tensor]) -> bool:
    """Return False if a value may not be finite. The device is read once.

    The largest absolute value of each tensor is taken by one call for all tensors.
    """
    plain = [_local(tensor.detach()) for tensor in tensors]
    plain = [tensor for tensor in plain if tensor.is_floating_point() and tensor.numel()]
    if not plain:
        return True
    largest = torch._foreach_norm(plain, math.inf)
    device = largest[0].device
    together = torch.stack([value.to(device, torch.float32) for value in largest])
    return bool(torch.isfinite(together).all())


def _local(tensor: Tensor) -> Tensor:
    """Return plain values: this process's part of a sharded tensor, and of a quantized one."""
    to_local = getattr(tensor, "to_local", None)
    return dequantized(tensor if to_local is None else to_local())


def _problem(trainer: Trainer, module: LightningModule) -> str:
    """Name the trained tensors, or else the moments, that are not finite. "" if there is none."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    trained = list(_trained(trainer))
    bad = [names.get(id(tensor), "a gate") for tensor in trained if _is_bad(tensor)]
    if bad:
        return f"{len(bad)} of {len(trained)} trained tensors are not finite ({some(bad, 1)})"
    moments = [
        f"{name} of {names.get(id(parameter), 'a tensor')}"
        for parameter, name, value in _moments(trainer)
        if _is_bad(value)
    ]
    if moments:
        return f"{len(moments)} moments of the optimizer are not finite ({some(moments, 1)})"
    return ""


def _is_bad(tensor: Tensor) -> bool:
    values = _local(tensor.detach())
    return values.is_floating_point() and not bool(torch.isfinite(values).all())
