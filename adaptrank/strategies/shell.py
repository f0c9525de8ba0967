"""A training strategy as a callback of Lightning, or as four calls in a plain loop."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from torch import nn

from adaptrank._collectives import mean
from adaptrank._errors import UserError
from adaptrank.allocation import Participant, fit_before_load
from adaptrank.checkpoints import EngineCallback, ensure_recorder
from adaptrank.strategies.engine import RoundEngine
from adaptrank.training.evaluation import evaluating, training_loss

if TYPE_CHECKING:
    from adaptrank.strategies.strategy import TrainingStrategy

SHARDING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)
"""Lightning's strategies under which no process has the whole weight of a layer."""


class StrategyShell(EngineCallback):
    """Calls the engine from Lightning's hooks, or from four calls in a plain loop.

    Args:
        engine: runs the training strategy.
    """

    engine: RoundEngine
    accept_changes: bool

    @property
    def round_events(self) -> list[dict[str, Any]]:
        """Events at the start of each round."""
        return self.engine.events

    # ---- plain calls

    def start(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        total_steps: float,
        *,
        allocators: Sequence[Participant] = (),
        steps_done: int = 0,
    ) -> None:
        """Begin a run, or go on with the one whose state was loaded.

        Args:
            model: holds the wrappers. The optimizer may be made before or after.
            optimizers: one optimizer, or several.
            total_steps: optimizer steps of the whole run.
            allocators: allocators of the same run. Call their `step` before that of the strategy.
            steps_done: optimizer steps of the checkpoint that the run goes on from.
        Raises:
            UserError: if the run makes no sense.
        """
        if isinstance(optimizers, torch.optim.Optimizer):
            optimizers = [optimizers]
        self.engine.prepare(model)
        self.engine.start(model, list(optimizers), total_steps, allocators, steps_done)

    def step(self) -> dict[str, Any] | None:
        """Call this after the optimizer's step; return the event if a round has begun."""
        return self.engine.step()

    # ---- Lightning

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare the model before a checkpoint is loaded, and check what else is in the run."""
        if stage == "fit":
            self._check_trainer(trainer, pl_module)
        # Lightning builds the model after this hook, and loads a checkpoint right after that.
        pl_module.configure_model()
        pl_module.register_load_state_dict_pre_hook(fit_before_load)  # type: ignore[no-untyped-call]
        self.engine.prepare(pl_module)
        if stage != "fit":
            ensure_recorder(trainer)
            return
        # A checkpoint that this run resumes from is loaded after setup.
        self.engine.running = False
        self.prepare_fit(trainer)
        _put_behind_allocators(trainer, self)

    def _check_trainer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what a rewritten adapter cannot follow."""
        label = type(self).__name__
        self.engine.check_allocators(_participants(trainer))
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, StrategyShell) and callback is not self:
                raise UserError(
                    f"{label} and {type(callback).__name__} would both divide the run into rounds; "
                    f"keep one."
                )
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise UserError(
                    f"{type(callback).__name__} averages factors, which a new round replaces; "
                    f"leave it out, or train without {label}."
                )
        if isinstance(trainer.strategy, SHARDING):
            raise UserError(
                f"{label} merges whole weights, and {type(trainer.strategy).__name__} shards them; "
                f"use trainer.strategy: ddp."
            )
        if not pl_module.automatic_optimization:
            raise UserError(
                f"{label} counts the steps of one optimizer, and {type(pl_module).__name__} steps "
                f"its optimizers itself; use automatic optimization."
            )
        ratio = getattr(pl_module, "lora_plus_ratio", 1.0)
        if self.engine.strategy.trains_one_factor and ratio != 1:
            raise UserError(
                f"lora_plus_ratio={ratio} is the ratio of the learning rates of two trained "
                f"factors, and {label} trains one of them at a time; leave it at 1.0."
            )

    def start_engine(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the run, after its allocators."""
        if self.engine.running:
            return
        if len(trainer.optimizers) != 1:
            raise UserError(
                f"{type(self).__name__} counts the steps of one optimizer, and this run has "
                f"{len(trainer.optimizers)}; configure one."
            )
        accepts = self.accept_changes
        self.accept_changes = accepts or getattr(pl_module, "accept_changes", False)
        try:
            self.engine.start(
                pl_module,
                trainer.optimizers,
                trainer.estimated_stepping_batches,
                _participants(trainer),
                max(trainer.global_step, self._resumed_at),
            )
        finally:
            self.accept_changes = accepts

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Finish the optimizer step, if the batch completed one."""
        if trainer.global_step == self.engine.run.steps_done:  # gradients are being accumulated
            return
        engine = self.engine
        changes_function = not engine.strategy.preserves_function
        measures = changes_function and engine.ends_round(trainer.global_step)
        before = _loss(trainer, pl_module, batch) if measures else None
        event = engine.step(trainer.global_step)
        if event is None:
            return
        pl_module.log("round", float(event["round"]))
        if before is not None:
            event |= {"loss_before": before, "loss_after": _loss(trainer, pl_module, batch)}

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Finish the run."""
        self.finish()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo what the preparation for an evaluation has frozen."""
        super().teardown(trainer, pl_module, stage)
        if stage != "fit":
            self.engine.release()

    # ---- transformers

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to be a callback of transformers' Trainer, which calls this first.

        Raises:
            UserError: always.
        """
        label = type(self).__name__
        raise UserError(
            f"{label} does not work in transformers' Trainer, which has its own checkpoints and "
            f"clipping; train with Lightning, Trainer(callbacks=[{label}()]), or call start(), "
            f"step() and finish() in a loop of your own."
        )

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a Trainer that it was added to later."""
        self.on_init_end()


def strategy_of(trainer: Trainer) -> "TrainingStrategy | None":
    """Return the training strategy among the callbacks of a trainer, or None."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, StrategyShell)), None)  # type: ignore[return-value]


def _loss(trainer: Trainer, module: LightningModule, batch: Any) -> float:
    """Return the loss of a training batch in evaluation mode, as a mean over all processes."""
    with torch.no_grad(), evaluating(module):
        return float(mean(training_loss(trainer, module, batch)))


def _participants(trainer: Trainer) -> list[Participant]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, Participant)]


def _put_behind_allocators(trainer: Trainer, shell: StrategyShell) -> None:
    """Move a strategy behind the last allocator, so that a merge sees the final ranks.

    The list is replaced, not changed: Lightning may be iterating over it.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    others = [callback for callback in callbacks if callback is not shell]
    places = [n for n, callback in enumerate(callbacks) if callback is shell]
    allocators = [n for n, callback in enumerate(others) if isinstance(callback, Participant)]
    place = max([places[0], *(n + 1 for n in allocators)])
    trainer.callbacks = [*others[:place], shell, *others[place:]]  # type: ignore[attr-defined]
