"""An adapter out of a checkpoint that does not describe it, with the configuration of its run."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from adaptrank.artifacts import save_adapter
from adaptrank.artifacts.run import base_of
from adaptrank.cli.out_folder import write_folder
from adaptrank.cli.train import AdaptrankCLI
from adaptrank.parameterizations import adapted_part


class _Rebuilding(AdaptrankCLI):
    """`validate` without an evaluation: the model is built, and its checkpoint is loaded."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        # Callbacks and loggers of the run have nothing to do here.
        config = {
            **dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False),
            "accelerator": "cpu",
            "limit_val_batches": 0,
        }
        return Trainer(**config)  # type: ignore[arg-type]

    def validate(self, verbose: bool = True, **kwargs: Any) -> None:
        self.trainer.validate(**kwargs, verbose=False)


def save_rebuilt(file: Path, config: Path, out: Path) -> None:
    """Write the adapter of a checkpoint.

    Args:
        file: the checkpoint.
        config: configuration of its run.
        out: folder for the adapter.
    """
    cli = _Rebuilding("validate", ["--config", str(config), "--ckpt_path", str(file)])
    module = cli.model
    write_folder(out, lambda folder: save_adapter(adapted_part(module), folder, base_of(module)))
