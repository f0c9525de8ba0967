"""The callback that records a run in its checkpoints, and compares a run that resumes."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn

from adaptrank._errors import UserError
from adaptrank.artifacts import check_form, explain_damage
from adaptrank.artifacts.checkpoint_files import ensure_checkpoint_files
from adaptrank.axes import misfit_of_state
from adaptrank.checkpoints.accepted import accept_optimizers
from adaptrank.checkpoints.differences import Difference, refuse
from adaptrank.checkpoints.other_runs import (
    WORDED_BY_THE_ENGINE,
    changed_length,
    compare_allocators,
    compare_models,
    compare_training,
)
from adaptrank.checkpoints.record import (
    FORMAT,
    RECORD,
    base_fingerprint_of,
    describe_allocators,
    make_record,
    training_settings,
)
from adaptrank.training.callback_order import ensure_in_front

log = logging.getLogger("adaptrank")

UNCHECKED = (
    "The checkpoint was written without a record of its run, by an earlier version. Nothing can be "
    "compared but the tensors: the options of the adapters (such as alpha and dropout), those of "
    "the allocator, the optimizer, the data and the base are taken to be the same."
)


class RunRecorder(Callback):
    """Records nests, allocators and settings in each checkpoint, and refuses another run's.

    The modules of this library and allocators put it into the trainer, see `ensure_recorder`. With
    `module.accept_changes = True` differences are accepted and logged.
    """

    def __init__(self) -> None:
        self._checkpoint: dict[str, Any] | None = None
        """Checkpoint that this run resumes from, until it is compared."""
        self._training: dict[str, Any] | None = None
        self._base_fingerprint: str | None = None

    # ---- writing

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the record."""
        if self._base_fingerprint is None:
            self._base_fingerprint = base_fingerprint_of(pl_module)
        training = self._training
        if training is None:
            training = training_settings(trainer, pl_module)
        checkpoint[RECORD] = make_record(trainer, pl_module, self._base_fingerprint, training)

    # ---- reading

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the run before."""
        self._checkpoint = self._training = self._base_fingerprint = None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the checkpoint until the run's optimizers exist, or compare the models at once."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._checkpoint = checkpoint
        elif not hasattr(pl_module, "base_fingerprint"):  # which compares by itself
            compare_model(pl_module, checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the settings that the run starts with, and compare those of the checkpoint."""
        self._base_fingerprint = base_fingerprint_of(pl_module)
        self._training = training_settings(trainer, pl_module)
        self._compare(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare where the strategy loads late, and check the optimizers' restored state."""
        self._compare(trainer, pl_module)
        for optimizer in trainer.optimizers:
            reason = misfit_of_state(optimizer, known_roles_only=True)
            if reason:
                raise UserError(
                    f"The checkpoint is damaged: the state of {type(optimizer).__name__} does not "
                    f"fit its parameters ({reason})."
                )

    def _compare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None:
            return
        assert self._training is not None
        stored = record_in(checkpoint)
        if stored is None:
            log.warning(UNCHECKED)
            stored_allocators = _allocators_by_state(checkpoint)
            differences: list[Difference] = []
        else:
            stored_allocators = stored["allocators"]
            here = make_record(trainer, pl_module, self._base_fingerprint)
            differences = compare_models(here, stored)
            step = int(checkpoint.get("global_step", 0))
            training = stored.get("training", {})
            differences += compare_training(self._training, training, step)
            if sentence := changed_length(self._training, training):
                log.warning(sentence)
        differences += compare_allocators(describe_allocators(trainer), stored_allocators)
        if stored is not None and _only_for_the_engine(differences):
            return
        accept_or_refuse(pl_module, differences, trainer.callbacks)  # type: ignore[attr-defined]
        if differences and stored is not None:
            accept_optimizers(trainer, self._training, stored.get("training", {}), checkpoint)


def _only_for_the_engine(differences: list[Difference]) -> bool:
    """Return whether the allocator's engine will name all differences, in steps and units."""
    return all(difference.name in WORDED_BY_THE_ENGINE for difference in differences) and all(
        " of the data" not in difference.clause for difference in differences
    )


def accept_or_refuse(
    module: LightningModule, differences: list[Difference], callbacks: Sequence[Callback] = ()
) -> None:
    """Raise an error that names the differences, or log them where the user accepts them."""
    if not differences:
        return
    accepts = [getattr(each, "accept_changes", False) for each in (module, *callbacks)]
    if not any(accepts):
        refuse(differences)
    listed = "; ".join(dict.fromkeys(difference.clause for difference in differences))
    log.warning("Resuming with changes: %s.", listed)


def compare_model(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Compare the adapters and the base of a module with those of a checkpoint to be evaluated.

    Raises:
        ListedError: naming the differences, unless `module.accept_changes` is set.
    """
    stored = record_in(checkpoint)
    if stored is None:
        log.warning(UNCHECKED)
        return
    here = make_record(None, module, base_fingerprint_of(module))
    accept_or_refuse(module, compare_models(here, stored))


def model_differences(module: LightningModule, checkpoint: Mapping[str, Any]) -> list[str]:
    """Return how a module and the model of a checkpoint differ, as clauses."""
    stored = record_in(checkpoint)
    if stored is None:
        return []
    here = make_record(None, module, base_fingerprint_of(module))
    return [difference.clause for difference in compare_models(here, stored)]


def record_in(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the record in a checkpoint, or None in one of an earlier version.

    Raises:
        UserError: if the record is damaged, or of a later version.
    """
    record = checkpoint.get(RECORD)
    if record is None:
        return None
    if not isinstance(record, Mapping) or not isinstance(record.get("format"), int):
        raise UserError(f"The checkpoint is damaged: its record {RECORD!r} has no format.")
    if record["format"] > FORMAT:
        raise UserError(
            f"The checkpoint's record has format {record['format']}; this version of adaptrank "
            f"reads up to {FORMAT}: pip install --upgrade adaptrank."
        )
    adapter = record.get("adapter")
    whole = isinstance(record.get("allocators"), list) and isinstance(adapter, Mapping)
    parts = ("adapters", "trained_modules", "base")
    if not whole or any(part not in adapter for part in parts):  # type: ignore[operator]
        raise UserError(f"The checkpoint is damaged: its record {RECORD!r} is not whole.")
    return record


def _allocators_by_state(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the allocators whose state a checkpoint without a record holds, by class."""
    return [
        {"class": str(name)}
        for name, state in checkpoint.get("callbacks", {}).items()
        if isinstance(state, Mapping) and {"tracked", "start", "steps_done"} <= state.keys()
    ]


def ensure_recorder(trainer: Trainer) -> None:
    """Put a `RunRecorder` in front of all callbacks, unless there is one.

    It has to act before allocators start. Damaged checkpoints are refused in a sentence from now
    on.
    """
    ensure_in_front(trainer, RunRecorder)
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        strategy: Any = trainer.strategy
        strategy.load_checkpoint = partial(_load_checkpoint, trainer, strategy)


def _load_checkpoint(
    trainer: Trainer, strategy: Strategy, path: Any, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Load a checkpoint as the strategy does, and say in a sentence what is wrong with the file."""
    ensure_checkpoint_files(trainer)
    try:
        checkpoint = type(strategy).load_checkpoint(strategy, path, *args, **kwargs)
    except (FileNotFoundError, PermissionError, IsADirectoryError, UserError):
        raise
    except Exception as error:
        raise explain_damage(path, error) from error
    check_form(checkpoint, path, resumes=trainer.state.fn == TrainerFn.FITTING)
    return checkpoint
