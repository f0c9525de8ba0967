"""Lightning's plugin for checkpoints: each is written whole, beside its target."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import TorchCheckpointIO

from adaptrank._files import atomic_file


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's plugin for checkpoints, with atomic writes.

    A checkpoint is written under a temporary name in its own folder, and renamed at the end. A full
    disk or a crash leaves the older file whole, and no part of a new one. Lightning's own plugin
    writes to the system's folder for temporary files, and copies from there if that is on another
    file system. Paths with a protocol, as in "s3://", are left to it.

    It also loads the quantized tensors of an optimizer, such as torchao's, which Lightning's own
    plugin cannot.

    The task modules of this library and the command line set this plugin. Other runs take it as
    `Trainer(plugins=[CheckpointFiles()])`.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            WriteError: if there is no room for it.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        # In memory first: PyTorch's writer of archives aborts in odd ways on a full disk.
        archive = io.BytesIO()
        torch.save(checkpoint, archive)
        with atomic_file(file) as temporary, temporary.open("wb") as stream:
            stream.write(archive.getbuffer())

    def load_checkpoint(
        self, path: _PATH, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint onto the CPU.

        Lightning's default is a function that does the same. PyTorch takes no function for a tensor
        subclass.
        """
        return super().load_checkpoint(path, map_location, weights_only)


def ensure_checkpoint_files(trainer: Trainer) -> None:
    """Set the plugin, unless the user or the strategy brings another one."""
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = CheckpointFiles()
