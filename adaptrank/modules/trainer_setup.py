"""Callbacks and settings that a task needs of the Trainer that runs it."""

import logging
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from adaptrank.artifacts.checkpoint_files import ensure_checkpoint_files
from adaptrank.checkpoints import ensure_recorder
from adaptrank.modules.averaging import average_trained_only
from adaptrank.modules.host_batch import watch_transfers
from adaptrank.modules.option_checks import check_clipping
from adaptrank.training.adapter_gradients import ensure_gradients
from adaptrank.training.distributed import check_launcher
from adaptrank.training.finite import ensure_finite
from adaptrank.training.peers import ensure_peer_watch

if TYPE_CHECKING:
    from adaptrank.modules.adapted import AdaptedModule

log = logging.getLogger("adaptrank")


def prepare_trainer(trainer: Trainer, module: "AdaptedModule", stage: str) -> None:
    """Check a Trainer, and give it the callbacks that the runs of this library need.

    Args:
        trainer: the Trainer.
        module: the task that it runs.
        stage: what it runs, such as "fit".

    Raises:
        UserError: if a setting of the Trainer does not go with adapters.
    """
    check_clipping(trainer)
    check_launcher(trainer)
    if stage == "fit":
        ensure_finite(trainer)
        ensure_peer_watch(trainer)
        ensure_checkpoint_files(trainer)
    ensure_gradients(trainer)
    ensure_recorder(trainer)
    if stage == "fit":
        average_trained_only(trainer, module)
        watch_transfers(trainer, module.host_batch)
    if trainer.precision in ("bf16-true", "16-true"):
        log.warning(
            "precision=%s trains the adapters in half precision, where small steps vanish. Use "
            "precision=32-true and model.dtype=bf16: the frozen weights stay in half precision.",
            trainer.precision,
        )
