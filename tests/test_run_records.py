"""What a run records by: loggers, monitored metrics, and what an evaluation says it scored."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from test_cli import cli, here, write  # noqa: F401
from torch import nn
from torch.utils.data import DataLoader

from adaptrank.cli.checkpoint_path import resolve_keyword
from adaptrank.cli.errors import ConfigError
from adaptrank.cli.loggers import naming_package
from adaptrank.cli.monitors import (
    MetricNames,
    canonical,
    missing_metric,
    without_other_names,
)
from adaptrank.cli.scored import scored
from adaptrank.modules import Adapter, CausalLM
from adaptrank.parameterizations import LoRA
from adaptrank.reports.history import read_history

CALLBACK = '''
from lightning.pytorch import Callback

class Logs(Callback):
    """Logs a metric of one's own: whether the first logger is one's own, too."""
    def on_validation_epoch_end(self, trainer, module):
        if trainer.state.fn == "fit":
            module.log("mine", float(type(trainer.logger).__name__ == "TensorBoardLogger"))
'''


ELALORA = {"class_path": "ElaLoRA", "init_args": {"swaps": 4, "every": 2, "warmup": 1, "final": 1}}


@pytest.fixture
def fit(here, cli, tiny_llama, monkeypatch):  # noqa: F811
    """Run `fit` with two validations: (code, out, err, run folder)."""
    (here / "record_callbacks.py").write_text(CALLBACK)
    monkeypatch.syspath_prepend(str(here))

    def run(*options, callbacks=(), evaluate=False, **changes):
        settings = {
            "max_steps": 6,
            "accelerator": "cpu",
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "limit_val_batches": 1,
            "log_every_n_steps": 2,
            "callbacks": list(callbacks),
        }
        write(here, tiny_llama, **{"allocator": None, "trainer": settings, **changes})
        quick = ("--model.generate", "false", "--evaluate", str(evaluate).lower())
        code, out, err = cli("fit", "--config", "tiny.yaml", *quick, *options)
        folders = sorted((here / "runs" / "tiny").glob("*"), key=lambda f: int(f.name))
        return code, out, err, folders[-1] if folders else None

    return run


def checkpoint(monitor, **arguments):
    return {"class_path": "ModelCheckpoint", "init_args": {"monitor": monitor, **arguments}}


def logged(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return set().union(*map(json.loads, lines))


# ---- loggers


def test_loggers_of_ones_own_leave_the_run_folder_whole(fit, cli, here):  # noqa: F811
    best = checkpoint("val_loss", filename="{epoch}-{val_loss:.2f}")
    code, out, err, folder = fit(
        "--trainer.logger",
        "[TensorBoardLogger, CSVLogger]",
        callbacks=[best, "record_callbacks.Logs"],
        allocator=ELALORA,
    )
    assert code == 0, err
    assert {"loss", "train_loss"} <= logged(folder)
    assert '"mine": 1.0' in (folder / "metrics.jsonl").read_text()
    events = list(folder.rglob("events.out.tfevents*"))
    tables = list(folder.rglob("metrics.csv"))
    assert len(events) == len(tables) == 1
    names = [file.name for file in (folder / "checkpoints").glob("*.ckpt")]
    value = json.loads((folder / "summary.json").read_text())["saved"]["value"]
    assert any(name.startswith(f"epoch=0-val_loss={value:.2f}") for name in names), names
    assert "the best by loss" in out
    assert "val_loss" not in json.loads((folder / "summary.json").read_text())["after"]
    assert sorted(path.name for path in here.iterdir()) == [
        "record_callbacks.py",
        "runs",
        "tiny.yaml",
    ]
    assert read_history(folder).start

    # The configuration of the run starts the same one again, in a folder of its own.
    saved = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["logger"]
    assert [each["init_args"]["save_dir"] for each in saved] == ["<run folder>"] * 2
    code, _, err = cli("validate", "--config", folder / "config.yaml")
    assert code == 0
    assert "TensorBoardLogger logs nothing: `validate` has no run folder" in err
    assert list(folder.rglob("events.out.tfevents*")) == events


def test_no_logger_of_ones_own(fit):
    code, _, err, folder = fit("--trainer.logger", "false", allocator=ELALORA)
    assert code == 0, err
    assert {"loss", "train_loss"} <= logged(folder)
    assert list((folder / "checkpoints").glob("*.ckpt"))
    assert read_history(folder).start


@pytest.mark.parametrize(
    ("logger", "wanted"),
    [
        ("WandbLogger", "WandbLogger needs wandb, which is not installed: pip install wandb"),
        ("TensorBordLogger", "Did you mean 'TensorBoardLogger'?"),
    ],
)
def test_mistakes_with_loggers(fit, logger, wanted):
    if logger == "WandbLogger":
        try:
            import wandb  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("wandb is installed")
    code, _, err, folder = fit("--trainer.logger", logger)
    assert code == 2
    assert wanted in err, err
    assert len(err.strip().splitlines()) <= 3, err
    assert folder is None


def test_the_package_of_another_logger_is_named():
    with pytest.raises(ConfigError, match="Mine needs thing, which"), naming_package("Mine"):
        raise ModuleNotFoundError("HINT: Try running `pip install -U 'thing>=1'`")


# ---- monitored metrics


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("val_loss", "loss"),
        ("val/loss", "loss"),
        ("eval_loss", "loss"),
        ("valid_loss", "loss"),
        ("validation/perplexity", "perplexity"),
        ("val_accuracy", "accuracy"),
        ("val_acc", "accuracy"),
        ("train/loss", "train_loss"),
        ("loss", "loss"),
        ("value", "value"),
        ("evaluation", "evaluation"),
    ],
)
def test_names_that_users_expect(name, ours):
    assert canonical(name) == ours


def module(adapter="adapter"):
    """A module of the library that is not built yet."""
    return CausalLM("backbone", [Adapter([LoRA])], adapter)


@pytest.mark.parametrize(
    ("callback", "wanted"),
    [
        (lambda: ModelCheckpoint(monitor="val_accuracy"), "higher values are better"),
        (lambda: EarlyStopping("eval_loss", mode="max"), "Write mode: min"),
        (lambda: ModelCheckpoint(monitor="los"), r"'los' is logged.*Did you mean 'loss'\?"),
        (lambda: ModelCheckpoint(monitor="los"), "and of training train_loss"),
        (lambda: EarlyStopping("val_f1", mode="max"), "There are loss, perplexity"),
        (lambda: EarlyStopping("train_accuracy", mode="max"), "no metric 'train_accuracy'"),
        (lambda: ModelCheckpoint(filename="{epoch}-{val_lss:.2f}"), "which `filename` names"),
    ],
)  # fmt: skip
def test_a_wrong_metric_is_refused_before_training(callback, wanted):
    callbacks = [MetricNames(), callback()]

    def refuse():
        callbacks[0].adopt(module(), callbacks)
        callbacks[0].check(module(), callbacks, ["loss", "perplexity"])

    with pytest.raises(ConfigError, match=wanted):
        refuse()


def test_right_metrics_are_taken_by_our_names():
    names = MetricNames()
    callbacks = [
        ModelCheckpoint(monitor="val/loss", filename="{epoch}-{step}-{val_loss:.3f}-{train_loss}"),
        ModelCheckpoint(monitor="exact_match", mode="max"),
        EarlyStopping("train/loss"),
        ModelCheckpoint(),
    ]
    names.adopt(module(), callbacks)
    names.check(module(), callbacks, ["loss", "exact_match"])
    assert [callback.monitor for callback in callbacks] == [
        "loss",
        "exact_match",
        "train_loss",
        None,
    ]
    assert without_other_names({"val_loss": 1.0, "loss": 1.0, "val_x": 2.0}) == {
        "loss": 1.0,
        "val_x": 2.0,
    }


def test_a_wrong_metric_shows_before_the_first_step(fit):
    code, _, err, folder = fit(callbacks=[checkpoint("val_los")], evaluate=True)
    assert code == 2
    assert "no metric 'val_los' is logged, which `monitor` names. Did you mean 'loss'?" in err, err
    assert len(err.strip().splitlines()) == 1, err
    assert folder is None


@pytest.mark.parametrize("kind", ["ModelCheckpoint", "EarlyStopping"])
def test_a_wrong_metric_shows_at_the_first_validation(fit, kind):
    callback = {"class_path": kind, "init_args": {"monitor": "los"}}
    code, _, err, folder = fit(callbacks=[callback, "record_callbacks.Logs"])
    assert code == 2
    assert f"{kind}: no metric 'los' is logged" in err, err
    assert "Did you mean 'loss'?" in err
    assert "Traceback" not in err
    assert not (folder / "adapter").exists()


class Plateau(LightningModule):
    """A user's module, with names of its own and a scheduler that goes by a metric."""

    def __init__(self, monitor):
        super().__init__()
        self.layer, self.monitor = nn.Linear(2, 1), monitor

    def training_step(self, batch, _):
        return self.layer(batch).mean()

    def validation_step(self, batch, _):
        self.log("loss", self.layer(batch).mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": self.monitor},
        }


@pytest.mark.parametrize("monitor", ["val_loss", "wrong"])
def test_the_metric_of_a_scheduler(monitor):
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[MetricNames()], **quiet)
    data = DataLoader(torch.ones(2, 2))
    if monitor == "val_loss":
        trainer.fit(Plateau(monitor), data, data)
        assert trainer.lr_scheduler_configs[0].monitor == "loss"
        return
    with pytest.raises(Exception, match="conditioned on metric") as caught:
        trainer.fit(Plateau(monitor), data, data)
    text = missing_metric(trainer, caught.value)
    assert text.startswith("ReduceLROnPlateau: no metric 'wrong' is logged")
    assert missing_metric(trainer, ValueError("another")) is None


# ---- what an evaluation scores


def test_an_evaluation_says_what_it_scores(fit, cli, here):  # noqa: F811
    code, _, err, folder = fit()
    assert code == 0, err
    folder = Path(os.path.relpath(folder))
    adapter, config = folder / "adapter", folder / "config.yaml"
    quick = ("--config", config, "--model.generate", "false")
    code, untrained, _ = cli("validate", *quick)
    assert code == 0
    assert "Scores the untrained model: no adapter and no checkpoint was given." in untrained
    hint = re.search(r"^(.*) stands beside the configuration .*: add (.*)$", untrained, re.M)
    assert hint.groups() == (str(adapter), f"--adapter {adapter}")
    code, out, err = cli("validate", *quick, *hint[2].split())
    assert code == 0, err
    assert f"Scores the adapter {adapter}" in out
    assert "untrained" not in out
    assert out.splitlines()[-1] != untrained.splitlines()[-1]

    # Beside the configuration that started the run, it is the last run. A checkpoint is named, too.
    assert f"add --adapter {adapter}" in scored(module(None), None, "tiny.yaml", "runs").sentence
    (ckpt,) = (folder / "checkpoints").glob("*.ckpt")
    assert scored(module(), str(ckpt), None, "runs").sentence == (
        f"Scores the checkpoint {ckpt}, over the adapter adapter"
    )
    adapter.rename(here / "elsewhere")
    code, out, err = cli("predict", *quick)
    assert code == 0
    assert f"add --ckpt_path {ckpt}" in err
    assert all(json.loads(line) for line in out.splitlines())


def test_last_is_the_newest_checkpoint_of_the_configuration(fit, cli, here):  # noqa: F811
    quick = ("--model.generate", "false")
    code, out, err = cli("validate", "--config", "tiny.yaml", *quick, "--ckpt_path", "last")
    assert code == 2
    assert "ckpt_path: no run of tiny.yaml has left a checkpoint. Give the path of one" in err
    code, out, err, folder = fit("--ckpt_path", "last")
    assert code == 0, err
    assert "no run of tiny.yaml has left a checkpoint, so training starts anew." in out

    (ckpt,) = (Path(os.path.relpath(folder)) / "checkpoints").glob("*.ckpt")
    for config in ("tiny.yaml", str(folder / "config.yaml")):
        named = [config, *quick, "--ckpt_path", ckpt]
        by_path = cli("validate", "--config", *named)[1].splitlines()
        by_keyword = cli("validate", "--config", *named[:-1], "last")[1].splitlines()
        assert by_keyword[-1] == by_path[-1]
        assert any(
            line.startswith("Scores the checkpoint") and ckpt.name in line for line in by_keyword
        )
    code, out, err, _ = fit(
        "--ckpt_path", "last", "--accept_changes", "true", "--trainer.max_steps", "8"
    )
    assert code == 0, err
    assert f"Goes on from the checkpoint {ckpt}" in out
    code, _, err = cli("test", "--config", "tiny.yaml", "--ckpt_path", "best")
    assert code == 2
    assert "best is known only while its run trains. Give last, or a file, such as" in err
    code, _, err = cli("fit", "--config", "tiny.yaml", "--ckpt_path", "hpc")
    assert code == 2
    assert "trainer.default_root_dir names no folder with an hpc_ckpt_*.ckpt." in err


def test_last_looks_into_the_folder_of_a_model_checkpoint(here, tmp_path):  # noqa: F811
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "step=3.ckpt").touch()
    callback = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "own")}}
    section = {"callbacks": [callback, {"class_path": "Timer"}]}
    assert resolve_keyword("last", [], section) == str(tmp_path / "own" / "step=3.ckpt")
    assert resolve_keyword("last", [], {}) is None
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    assert resolve_keyword("hpc", [], {"default_root_dir": str(tmp_path)}) == "hpc"


def test_nothing_beside_the_configuration(here, cli):  # noqa: F811
    code, out, _ = cli("validate", "--config", "tiny.yaml", "--model.generate", "false")
    assert code == 0
    assert "Scores the untrained model" in out
    assert "beside" not in out
    assert not Path("runs").exists()
