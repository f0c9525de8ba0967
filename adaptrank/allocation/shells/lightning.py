"""The Lightning callback of an allocator, and the plain calls of a loop of one's own."""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.allocation import checks
from adaptrank.allocation.context import Loss
from adaptrank.allocation.engine import Engine
from adaptrank.allocation.events import Event
from adaptrank.allocation.resuming import UNCHECKED
from adaptrank.axes import fit_ranks
from adaptrank.checkpoints import EngineCallback, ensure_recorder
from adaptrank.training.evaluation import training_loss
from adaptrank.training.penalties import add_penalty_gradients

log = logging.getLogger("adaptrank")


class LightningShell(EngineCallback):
    """Calls the engine from Lightning's hooks, or from four calls in a plain loop.

    Args:
        engine: runs the allocator.
    """

    engine: Engine
    accept_changes: bool

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._owner: torch.optim.Optimizer | None = None
        """Optimizer that moves the axes, where the module steps several by itself."""
        self._owner_steps = 0

    @property
    def events(self) -> list[Event]:
        """Everything that has happened in the run."""
        return self.engine.progress.events

    @property
    def closed(self) -> dict[str, tuple[int, ...]]:
        """Units of each axis that a plan closed, until the next event."""
        return self.engine.progress.closed

    @property
    def moves_left(self) -> bool:
        """Whether an event of the run may still come."""
        participant = self.engine.participant
        return participant.moves and participant.run.moves_left

    # ---- plain calls

    def start(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        total_steps: float,
        *,
        batches: Iterable[Any] = (),
        loss: Loss | None = None,
    ) -> None:
        """Begin a run, or go on with the one whose state was loaded.

        Args:
            model: holds the wrappers, on its device.
            optimizers: one optimizer, or several.
            total_steps: optimizer steps of the whole run.
            batches: training batches, for allocators that look at data; they are read when needed.
            loss: batch -> mean loss, for allocators that evaluate it.
        Raises:
            ValueError: if the run makes no sense.
        """
        if self.engine.restored and self.engine.stored_run is None:
            log.warning(UNCHECKED, self.engine.participant.label)
        self.engine.start(model, optimizers, total_steps, batches, loss)

    def foresee(self, model: nn.Module, total_steps: float) -> list[tuple[int, int | None]]:
        """Return (step, budget) of every event of a run, from the shapes of a model alone."""
        return self.engine.foresee(model, total_steps)

    def before_step(self, scale: float = 1.0) -> None:
        """Call this after the last backward pass of an optimizer step, before clipping.

        It adds the gradients of the methods' regularizers, and updates the scores.

        Args:
            scale: factor of a gradient scaler, `scaler.get_scale()`. The gradients in the
                optimizer must be unscaled already.
        """
        add_penalty_gradients(self.engine.run.model)
        self.engine.before_step(scale)

    def step(self) -> Event | None:
        """Call this after the optimizer's step; return the event if there was one."""
        return self.engine.step()

    # ---- Lightning

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what else is in the run, and prepare the axes for a checkpoint."""
        # Any LightningModule can resume: its axes take the stored sizes before its weights load.
        pl_module.register_load_state_dict_pre_hook(fit_before_load)  # type: ignore[no-untyped-call]
        if stage != "fit":
            ensure_recorder(trainer)
            return
        # A checkpoint that this run resumes from is loaded after setup.
        self.engine.restored = False
        self.engine.running = False
        self._owner = None
        for other in shells(trainer):
            if other is not self:
                checks.check_beside(self.engine.participant, other.engine.participant)
        _refuse_weight_averaging(trainer)
        self.prepare_fit(trainer)

    def start_engine(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the run, after the allocator that chooses its ranks."""
        if self.engine.running:  # started by on_fit_start, or by the other allocator of the run
            return
        # Ranks to start from come first, whatever the order of the callbacks.
        if not self.engine.participant.chooses_ranks:
            for other in shells(trainer):
                if other.engine.participant.chooses_ranks:
                    other.start_engine(trainer, pl_module)
        total_steps = trainer.estimated_stepping_batches  # it builds the loaders, too
        several = len(trainer.optimizers) if not pl_module.automatic_optimization else 1
        if trainer.max_steps != -1:
            # `max_steps` counts the steps of all optimizers. A batch is taken to step each once.
            total_steps = min(total_steps, trainer.max_steps // several)

        def loss(batch: Any) -> Tensor:
            return training_loss(trainer, pl_module, batch)

        engine, participant = self.engine, self.engine.participant
        goes_on, accepts = engine.restored, participant.accept_changes
        if self._resumed_at and not goes_on and participant.chooses_ranks:
            raise UserError(
                f"{participant.label} chooses the ranks that a run starts from, and the run of the "
                f"checkpoint has begun without it; leave it out, or start a new run."
            )
        participant.accept_changes = accepts or getattr(pl_module, "accept_changes", False)
        try:
            data = _TrainingData(trainer)
            engine.start(pl_module, trainer.optimizers, total_steps, data, loss)
        finally:
            participant.accept_changes = accepts
        if not goes_on:
            engine.progress.steps_done = max(trainer.global_step, self._resumed_at) // several
        if not pl_module.automatic_optimization:
            self._count_steps_of_owner()

    def _count_steps_of_owner(self) -> None:
        """Count the steps of the optimizer that moves the axes, which the module calls itself."""
        run = self.engine.run
        self._owner = next(iter(run.owners()), None)
        self._owner_steps = run.steps_done

        def count(*_: Any) -> None:
            self._owner_steps += 1

        if self._owner is not None:
            run.handles.append(self._owner.register_step_post_hook(count))

    def gate_parameters(self) -> list[Tensor]:
        """Return trained tensors that are in no optimizer, for averaging over processes."""
        return self.engine.state.leaves()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Update the scores before a step of the optimizer that moves the axes."""
        if self._owner is not None and optimizer is not self._owner:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.engine.before_step(1.0 if scaler is None else scaler.get_scale())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Finish the optimizer step, if the batch completed one."""
        step = trainer.global_step if self._owner is None else self._owner_steps
        if step == self.engine.progress.steps_done:  # gradients are being accumulated
            return
        event = self.engine.step(step)
        if event is not None:
            _log(pl_module, event)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            self.engine.read_bad_steps()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Carry out a last event that training did not reach, and say what is undone.

        The event is left out where something stopped the run, such as early stopping.
        """
        if self.engine.running and not trainer.should_stop:
            self.engine.catch_up()
        self.engine.say_shortfall()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Finish the run."""
        if not isinstance(exception, KeyboardInterrupt | SystemExit):
            # Nothing is saved after an error, so that no budget is missed.
            self.engine.running = False
        self.finish()


def shells(trainer: Trainer) -> list[LightningShell]:
    """Return the allocators and rank initializers among the callbacks of a trainer."""
    callbacks: Sequence[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, LightningShell)]


def fit_before_load(
    module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any
) -> None:
    """Give the axes of a model the sizes in its state dict; a load pre-hook."""
    if not prefix:
        fit_ranks(module, state_dict)


def _refuse_weight_averaging(trainer: Trainer) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise UserError(
                f"{type(callback).__name__} keeps a copy of the weights that cannot follow a "
                f"rank; leave it out, or run it without an allocator."
            )


def _log(pl_module: LightningModule, event: Event) -> None:
    names = ("budget", "total", "active", "allocated", "parameters")
    values = {name: event.get(name) for name in names}
    pl_module.log_dict(
        {
            f"ranks/{name}": float(cast(int, value))
            for name, value in values.items()
            if value is not None
        }
    )


class _TrainingData:
    """Batches of the trainer's loader, on the device.

    Reading them moves neither the loader that training reads nor any random number generator.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        trainer = self._trainer
        if trainer.train_dataloader is None:  # with max_steps alone nobody had to count batches
            trainer.fit_loop.setup_data()
        device = trainer.strategy.root_device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # a DataLoader draws the seed of its workers
            batches = iter(copy.copy(trainer.train_dataloader) or ())
        while True:
            with torch.random.fork_rng(devices=devices):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield trainer.strategy.batch_to_device(batch)
