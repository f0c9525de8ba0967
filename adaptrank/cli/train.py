"""`fit`, `validate`, `test`, `predict`: LightningCLI with a typed allocator and a folder for each run."""

import logging
import shlex
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

import adaptrank.data  # noqa: F401: so that YAML can name its classes
import adaptrank.modules  # noqa: F401
from adaptrank.allocators import Allocator
from adaptrank.artifacts.run import JsonlLogger, RunFiles, new_run_folder, render, summarize, write_json

TRAINER_DEFAULTS = {
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "use_distributed_sampler": False,  # our loaders share the data out by themselves, and resume in mid-epoch
}


class AdaptrankCLI(LightningCLI):
    """LightningCLI, a key `allocator`, and a run folder."""

    run_folder: Path | None = None
    before: dict[str, float]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_subclass_arguments(
            Allocator,
            "allocator",
            required=False,
            help="Moves ranks while training; see `python -m adaptrank methods`.",
        )
        parser.add_argument("--runs", type=str, default="runs", help="Folder that holds the run folders.")
        parser.add_argument("--evaluate", type=bool, default=True, help="Whether `fit` evaluates before and after.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        allocator = self._get(self.config_init, "allocator")
        extra: list[Callback] = [allocator] if allocator is not None else []
        if self.subcommand == "fit":
            folder = self._new_folder()
            self.run_folder = folder
            extra += [RunFiles(folder)]
            configured = self._get(self.config_init, "trainer.callbacks") or []
            if not any(isinstance(callback, ModelCheckpoint) for callback in configured):
                extra.append(ModelCheckpoint(folder / "checkpoints", filename="{step}", every_n_train_steps=50))
            if not any(isinstance(callback, ProgressBar) for callback in configured):
                extra.append(TQDMProgressBar())
            kwargs.setdefault("default_root_dir", str(folder))
            if self._get(self.config_init, "trainer.logger") in (None, True):
                kwargs["logger"] = JsonlLogger(folder)
        elif self._get(self.config_init, "trainer.logger") in (None, True):
            kwargs["logger"] = False
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        return self._instantiate_trainer(config, extra)

    def _new_folder(self) -> Path:
        configs = self._get(self.config, "config") or []
        name = Path(str(configs[-1])).stem if configs else "run"
        return new_run_folder(Path(self._get(self.config, "runs")) / name)

    # ---- around a fit

    def before_fit(self) -> None:
        self.before = {}
        say(f"Backbone {self.model.source.describe()}" if hasattr(self.model, "source") else "")
        if self._get(self.config, "evaluate") and not self._get(self.config, "ckpt_path"):
            self.before = self._evaluate()
        self._began = time.perf_counter()

    def after_fit(self) -> None:
        folder = self.run_folder
        assert folder is not None
        after = self._evaluate() if self._get(self.config, "evaluate") else numbers(self.trainer.callback_metrics)
        files = next(c for c in self.trainer.callbacks if isinstance(c, RunFiles))  # type: ignore[attr-defined]
        summary = summarize(self.model, self.before, after, self.trainer.global_step, files.seconds)
        if not self.trainer.is_global_zero:
            return
        write_json(folder / "summary.json", summary)
        names = (
            *getattr(self.model, "metrics_shown", ()),
            *(n for n in after if n not in getattr(self.model, "metrics_shown", ())),
        )
        say("\n" + render(summary, names))
        say("\n" + next_commands(folder, self._get(self.config, "config") or [], self.model))

    def _evaluate(self) -> dict[str, float]:
        results = self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        return {name: float(value) for result in results for name, value in result.items()}


class SaveConfig(SaveConfigCallback):
    """Writes the complete configuration into the run folder, where it starts the same run again."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = next((c.folder for c in trainer.callbacks if isinstance(c, RunFiles)), None)  # type: ignore[attr-defined]
        if folder is not None:
            self.parser.save(self.config, folder / "config.yaml", skip_none=False, overwrite=True, multifile=False)


@rank_zero_only
def say(text: str) -> None:
    """Print from the first process only."""
    if text:
        print(text, flush=True)


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Logged metrics as plain numbers."""
    return {name: float(value) for name, value in metrics.items()}


def next_commands(folder: Path, configs: Sequence[Any], module: LightningModule) -> str:
    """What one does next with a run, ready to paste."""
    adapter = shlex.quote(str(folder / "adapter"))
    config = shlex.quote(str(configs[-1])) if configs else "CONFIG"
    lines = [f"Adapter saved: {adapter}"]
    if hasattr(module, "complete"):
        prompt = r'"Question: Ann has 12 pears and buys 7 more. How many pears does Ann have now?\nAnswer:"'
        lines.append(f"  generate: python -m adaptrank generate {adapter} --prompt {prompt}")
    lines.append(f"  merge:    python -m adaptrank merge {adapter} --out {shlex.quote(str(folder / 'merged'))}")
    lines.append(f"  go on:    python -m adaptrank fit --config {config} --model.adapter {adapter}")
    return "\n".join(lines)


def quiet() -> None:
    """Leave out Lightning's tips and other libraries' deprecations; ours and real warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|transformers|jsonargparse)\b.*")


def run(verb: str, args: Sequence[str]) -> None:
    """One of LightningCLI's verbs."""
    quiet()
    torch.set_float32_matmul_precision("high")
    AdaptrankCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        save_config_kwargs={"save_to_log_dir": False},
        trainer_defaults=TRAINER_DEFAULTS,
        seed_everything_default=0,
        args=[verb, *args],
    )
