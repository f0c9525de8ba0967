"""What a run leaves when it ends: the weights that were meant, or a sentence about why not."""

import copy
import json
import math
import os
import re
import subprocess
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from test_cli import cli, here, write  # noqa: F401
from torch import nn
from torch.utils.data import DataLoader

from adaptrank import _files, adapt, save_adapter
from adaptrank._errors import UserError
from adaptrank.allocation import AdaLoRA
from adaptrank.artifacts import TENSORS, extract_adapter, read_adapter
from adaptrank.artifacts.checkpoint_files import CheckpointFiles, ensure_checkpoint_files
from adaptrank.cli.chance import no_better_than_chance
from adaptrank.modules import AdaptedModule, CausalLM
from adaptrank.modules.label_counts import LabelCounts, LabelSpread
from adaptrank.parameterizations import SVD as SVDForm
from adaptrank.parameterizations import LoRA
from adaptrank.training import peers
from adaptrank.training.finite import MOST_BAD_LOSSES, FiniteWeights, NotFiniteError

CALLBACKS = '''
import torch
from lightning.pytorch import Callback

def trained(module):
    return [p for p in module.parameters() if p.requires_grad]

class Harm(Callback):
    """Make something NaN at one step: the weights, the gradients, the moments, or one weight."""
    def __init__(self, what: str, step: int = 3):
        self.what, self.step = what, step
    def on_train_batch_start(self, trainer, module, *_):
        if trainer.global_step == self.step and self.what == "weights":
            for p in trained(module):
                p.data.view(-1)[0] = float("nan")
    def on_after_backward(self, trainer, module):
        if trainer.global_step == self.step and self.what == "gradients":
            for p in trained(module):
                p.grad.fill_(float("nan"))
    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.step and self.what == "moments":
            state = trainer.optimizers[0].state[trained(module)[0]]
            state["exp_avg_sq"].view(-1)[0] = float("inf")

class Stop(Callback):
    """Stop after a step, as EarlyStopping does."""
    def __init__(self, step: int):
        self.step = step
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step

class Scores(Callback):
    """Log a metric of one's choice at every validation."""
    def __init__(self, values: dict):
        self.values = {int(step): value for step, value in values.items()}
    def on_validation_epoch_end(self, trainer, module):
        if trainer.state.fn == "fit":
            module.log("chosen", float(self.values.get(trainer.global_step, 9.0)))
'''


@pytest.fixture
def fit(here, cli, tiny_llama, monkeypatch):  # noqa: F811
    """Run `fit` with callbacks and changes of the configuration: (code, out, err, run folder)."""
    (here / "ending_callbacks.py").write_text(CALLBACKS)
    monkeypatch.syspath_prepend(str(here))

    def run(*callbacks, options=(), trainer=(), generate=True, **changes):
        settings = {
            "max_steps": 8,
            "accelerator": "cpu",
            "val_check_interval": 1,
            "check_val_every_n_epoch": None,
            "limit_val_batches": 1,
            "callbacks": list(callbacks),
            **dict(trainer),
        }
        changes = {"allocator": None, **changes, "trainer": settings}
        write(here, tiny_llama, **changes)
        options = [*options, *(["--model.generate", "false"] if generate else [])]
        code, out, err = cli("fit", "--config", "tiny.yaml", *options)
        folders = sorted((here / "runs" / "tiny").glob("*"), key=lambda f: int(f.name))
        return code, out, err, folders[-1] if folders else None

    return run


def harm(what, step=3):
    return {"class_path": "ending_callbacks.Harm", "init_args": {"what": what, "step": step}}


def scores(values):
    return {"class_path": "ending_callbacks.Scores", "init_args": {"values": values}}


def stop(step):
    return {"class_path": "ending_callbacks.Stop", "init_args": {"step": step}}


def checkpoint(monitor="chosen", **arguments):
    return {"class_path": "ModelCheckpoint", "init_args": {"monitor": monitor, **arguments}}


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


QUICK = ("--evaluate", "false")
ELALORA = {"class_path": "ElaLoRA", "init_args": {"swaps": 4, "every": 2, "warmup": 2, "final": 3}}
ADALORA = {
    "class_path": "AdaLoRA",
    "init_args": {"budget": 12, "every": 2, "warmup": 1, "final": 3},
}
SVD = {
    "backbone": None,
    "dtype": "fp32",
    "generate": False,
    "adapters": [
        {
            "targets": ["q_proj", "v_proj"],
            "parameterization": [{"class_path": "SVD", "init_args": {"rank": 4}}],
        }
    ],
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}},
}


def svd_model(tiny_llama):
    return {"class_path": "CausalLM", "init_args": {**SVD, "backbone": tiny_llama}}


# ---- weights that are not finite


@pytest.mark.parametrize("what", ["weights", "gradients", "moments"])
def test_a_run_that_is_not_finite_stops_and_saves_nothing_of_it(fit, what):
    saving = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 2}}
    code, out, err, folder = fit(
        harm(what), saving, options=QUICK, trainer={"log_every_n_steps": 100}
    )
    assert code == 2
    assert "Traceback" not in err
    assert "Adapter saved" not in out
    sentence = err.split("adaptrank: ")[1]
    assert "not finite" in sentence
    assert re.search(r"between step 2 and step 4\.$", sentence, re.MULTILINE)
    assert ("exp_avg_sq of " if what == "moments" else "trained tensors") in sentence
    assert "lora" not in sentence.lower()
    assert "Lower the learning rate" in sentence
    assert not (folder / "adapter").exists()
    (last_good,) = folder.rglob("*.ckpt")
    stored = torch.load(last_good, weights_only=True)
    assert stored["global_step"] == 2
    assert all(t.isfinite().all() for t in stored["state_dict"].values())


def test_weights_are_looked_at_as_often_as_one_logs_and_at_the_end(fit):
    code, _, err, _ = fit(
        harm("gradients", 2), options=QUICK, trainer={"log_every_n_steps": 5, "max_steps": 8}
    )
    assert code == 2
    assert "between step 0 and step 5" in err
    without_files = {"log_every_n_steps": 100, "enable_checkpointing": False, "max_steps": 4}
    code, _, err, folder = fit(harm("gradients", 2), options=QUICK, trainer=without_files)
    assert code == 2
    assert "between step 0 and step 4" in err
    assert not (folder / "adapter").exists()


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x):
        return self.layer(x)


def module_of(loss, **arguments):
    """A LightningModule whose loss is a function of (batch number, outputs)."""

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = adapt(Small(), parameterization=LoRA, **arguments)

        def training_step(self, batch, batch_idx):
            return loss(batch_idx, self.model(batch))

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    return Module()


def train(module, steps, *callbacks, **arguments):
    data = DataLoader(torch.ones(4 * steps, 6), batch_size=4)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    settings = {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False, **quiet}
    trainer = Trainer(callbacks=list(callbacks), **{**settings, **arguments})
    trainer.fit(module, data)
    return trainer


def test_a_loss_that_is_never_finite_stops_a_run_whose_weights_are():
    module = module_of(lambda i, y: (y * 0).sum() + torch.nan)
    with pytest.raises(NotFiniteError, match="loss was not finite in any of the last 3 batches"):
        train(module, 3, FiniteWeights(), Skip())
    assert all(p.isfinite().all() for p in module.parameters())
    few = module_of(lambda i, y: y.square().mean() * (torch.nan if i == 1 else 1.0))
    train(few, 3, FiniteWeights(), Skip())
    many = module_of(lambda i, y: y.square().mean() * (torch.nan if i else 1.0))
    with pytest.raises(NotFiniteError, match=f"last {MOST_BAD_LOSSES} batches"):
        train(many, 2 * MOST_BAD_LOSSES, FiniteWeights(), Skip(), log_every_n_steps=1)


class Skip(Callback):
    """Leave steps out whose gradients are not finite, as a gradient scaler does."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        for p in module.parameters():
            if p.grad is not None and not p.grad.isfinite().all():
                p.grad.zero_()


def test_a_step_reads_nothing_from_the_device(monkeypatch):
    looks = []
    check = FiniteWeights.check
    monkeypatch.setattr(
        FiniteWeights,
        "check",
        lambda self, trainer, *a, **k: (
            looks.append(trainer.global_step),
            check(self, trainer, *a, **k),
        ),
    )
    train(module_of(lambda i, y: y.square().mean()), 11, FiniteWeights(), log_every_n_steps=4)
    assert looks == [4, 8, 11]


def test_large_values_are_finite():
    """The norm of float32 values as large as these overflows."""
    module = module_of(lambda i, y: y.square().mean() * 0)
    module.model.layer.A.data.fill_(1e30)
    train(module, 2, FiniteWeights())


def test_an_adapter_that_is_not_finite_is_not_saved(tmp_path):
    model = adapt(Small(), parameterization=LoRA)
    save_adapter(model, tmp_path / "a")
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    model.layer.A.data[0, 0] = torch.inf
    with pytest.raises(UserError, match=r"1 of 2 tensors .*not finite \(layer\.0\.A\): nothing"):
        save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match="not finite"):
        save_adapter(model, tmp_path / "b")
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before
    assert not (tmp_path / "b").exists()
    model.layer.A.data[0, 0] = 0
    model.layer.base.register_buffer("mask", torch.tensor([-torch.inf]))
    model.layer.base.weight.requires_grad_(True)
    save_adapter(model, tmp_path / "b")


# ---- the best weights, or the last


@pytest.mark.parametrize(("mode", "best"), [("min", 3), ("max", 5)])
def test_the_adapter_is_that_of_the_best_step(fit, cli, mode, best):  # noqa: F811
    values = {"3": 1.0, "5": 99.0}
    code, out, err, folder = fit(
        scores(values), checkpoint(mode=mode, filename="{step}"), options=QUICK
    )
    assert code == 0, err
    saved = {"weights": "best", "step": best, "of": 8, "monitor": "chosen", "mode": mode}
    saved["value"] = values[str(best)]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["saved"] == saved
    assert summary["after"] == {"chosen": values[str(best)]}
    assert read_adapter(folder / "adapter")["run"] == saved
    assert f"those of step {best}, the best by chosen" in out
    (kept,) = folder.rglob(f"step={best}.ckpt")
    code, out, err = cli("extract", kept, "--out", "extracted")
    assert code == 0, err
    assert equal(tensors(folder / "adapter"), tensors(Path("extracted")))

    code, _, err, folder = fit(
        scores(values), checkpoint(mode=mode), options=(*QUICK, "--save", "last")
    )
    assert code == 0, err
    assert json.loads((folder / "summary.json").read_text())["saved"]["step"] == 8
    assert not equal(tensors(folder / "adapter"), tensors(Path("extracted")))


def test_figures_after_training_are_those_of_the_best_weights(fit):
    values = {"2": 1.0}
    code, _, err, folder = fit(scores(values), checkpoint())
    assert code == 0, err
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in metrics if "loss" in line}
    after = json.loads((folder / "summary.json").read_text())["after"]
    # A line is logged under the number of the last whole step, counted from 0.
    assert after["loss"] == pytest.approx(losses[1], abs=1e-6)
    assert after["loss"] != pytest.approx(losses[7], abs=1e-6)


@pytest.mark.parametrize("name", ["ElaLoRA", "AdaLoRA"])
def test_steps_before_the_last_event_are_not_ranked(fit, tiny_llama, name):
    allocator = ELALORA if name == "ElaLoRA" else ADALORA
    changes = {} if name == "ElaLoRA" else {"model": svd_model(tiny_llama)}
    values = {"2": 0.0, "6": 5.0}
    code, _, err, folder = fit(
        scores(values), checkpoint(), allocator=allocator, options=QUICK, **changes
    )
    assert code == 0, err
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["saved"]["weights"], summary["saved"]["step"]) == ("best", 6)
    ranks = json.loads((folder / "ranks.json").read_text())
    assert ranks == read_adapter(folder / "adapter")["ranks"]
    if name == "AdaLoRA":
        assert sum(ranks.values()) == summary["ranks"] == 12


def test_the_last_event_itself_is_ranked(fit):
    code, _, err, folder = fit(scores({"5": 1.0}), checkpoint(), allocator=ELALORA, options=QUICK)
    assert code == 0, err
    assert json.loads((folder / "summary.json").read_text())["saved"]["step"] == 5


def test_without_a_ranked_step_the_last_is_saved_and_a_line_says_so(fit):
    callbacks = [scores({"2": 0.0}), checkpoint(), stop(4)]
    code, _, err, folder = fit(*callbacks, allocator=ELALORA, options=QUICK)
    assert code == 0, err
    assert "No step after the allocator's last event was ranked by chosen" in err
    saved = json.loads((folder / "summary.json").read_text())["saved"]
    assert saved == {"weights": "last", "step": 4, "of": 4}


def test_a_resumed_run_knows_the_best_step_of_the_run_before(fit, here):  # noqa: F811
    callbacks = [scores({"2": 1.0, "6": 2.0}), checkpoint(filename="{step}", save_top_k=-1)]
    code, _, err, first = fit(*callbacks, options=QUICK)
    assert code == 0, err
    (middle,) = first.rglob("step=4.ckpt")
    code, _, err, second = fit(*callbacks, options=(*QUICK, "--ckpt_path", str(middle)))
    assert code == 0, err
    saved = [json.loads((f / "summary.json").read_text())["saved"]["step"] for f in (first, second)]
    assert saved == [2, 2]
    assert equal(tensors(first / "adapter"), tensors(second / "adapter"))


def test_a_best_checkpoint_that_cannot_be_read_leaves_the_last_weights(fit, here):  # noqa: F811
    callbacks = [scores({"2": 1.0}), checkpoint(dirpath=str(here / "kept"), filename="best")]
    code, _, err, folder = fit(*callbacks, spoil(here), options=QUICK)
    assert code == 0, err
    assert "best.ckpt is no Lightning checkpoint, or it is damaged" in err
    assert "the adapter holds the last step, 8" in err
    assert json.loads((folder / "summary.json").read_text())["saved"]["weights"] == "last"


def spoil(here):  # noqa: F811
    (here / "spoiling.py").write_text(
        "from pathlib import Path\n"
        "from lightning.pytorch import Callback\n"
        "class Spoil(Callback):\n"
        "    def on_train_end(self, *_):\n"
        "        Path('kept/best.ckpt').write_bytes(b'torn')\n"
    )
    return {"class_path": "spoiling.Spoil"}


def test_best_needs_a_metric(fit):
    code, _, err, folder = fit(options=("--save", "best"))
    assert code == 2
    assert "save: best needs a metric: add a ModelCheckpoint with a `monitor`" in err
    assert folder is None


def test_last_ckpt_holds_the_last_weights_when_the_best_are_saved(fit):
    code, _, err, folder = fit(
        scores({"2": 1.0}),
        checkpoint(save_last=True, save_top_k=-1, filename="{step}"),
        options=QUICK,
    )
    assert code == 0, err
    (last,) = folder.rglob("last.ckpt")
    stored = torch.load(last, weights_only=True)
    (best,) = folder.rglob("step=2.ckpt")
    assert not equal(stored["state_dict"], torch.load(best, weights_only=True)["state_dict"])


# ---- checkpoints as adapters


def test_an_extracted_adapter_is_what_the_run_saved(fit, cli, tiny_llama):  # noqa: F811
    step = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 8}}
    nest = ["HyperAdapt", {"class_path": "LoRA", "init_args": {"rank": 4}}]
    arguments = {**SVD, "backbone": tiny_llama, "train_modules": ["norm"]}
    arguments["adapters"] = [{"targets": "all-linear", "parameterization": nest}]
    model = {"class_path": "CausalLM", "init_args": arguments}
    code, _, err, folder = fit(step, model=model, allocator=ELALORA, options=QUICK)
    assert code == 0, err
    (file,) = folder.rglob("*.ckpt")
    code, out, err = cli("extract", file, "--out", "extracted")
    assert code == 0, err
    assert "merge:" in out
    assert equal(tensors(folder / "adapter"), tensors(Path("extracted")))
    ours, theirs = (read_adapter(f) for f in (folder / "adapter", Path("extracted")))
    assert theirs.pop("run") == {"weights": "checkpoint", "step": 8}
    for description in (ours, theirs):
        description.pop("run", None)
        description.pop("digest")
    assert ours == theirs
    code, _, err = cli("extract", file, "--out", "extracted")
    assert code == 2
    assert "--force" in err

    # A checkpoint that does not describe its adapter, as those of earlier versions.
    stored = torch.load(file, weights_only=True)
    del stored["adapter_tensors"]
    stored.pop("adaptrank", None)
    torch.save(stored, file)
    code, _, err = cli("extract", file, "--out", "rebuilt")
    assert code == 0, err
    assert equal(tensors(folder / "adapter"), tensors(Path("rebuilt")))
    file.rename("alone.ckpt")
    code, _, err = cli("extract", "alone.ckpt", "--out", "other")
    assert code == 2
    assert "--config" in err
    code, _, err = cli(
        "extract", "alone.ckpt", "--out", "other", "--config", folder / "config.yaml"
    )
    assert code == 0, err


def test_gates_of_an_allocator_are_in_the_extracted_adapter(fit, cli):  # noqa: F811
    sora = {"class_path": "SoRA", "init_args": {"budget": 20, "every": 2, "warmup": 2, "final": 1}}
    step = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 4}}
    code, _, err, folder = fit(step, stop(4), allocator=sora, options=QUICK)
    assert code == 0, err
    (file,) = folder.rglob("*.ckpt")
    code, _, err = cli("extract", file, "--out", "extracted")
    assert code == 0, err
    assert torch.load(file, weights_only=True)["adapter_tensors"]["gated"]
    assert equal(tensors(folder / "adapter"), tensors(Path("extracted")))


@pytest.mark.parametrize(
    "command",
    [
        ["merge", "a.ckpt", "--out", "m"],
        ["generate", "a.ckpt", "--prompt", "x"],
        ["inspect", "a.ckpt"],
        ["export", "a.ckpt", "--out", "m"],
        ["compose", "a.ckpt", "a.ckpt", "--out", "m"],
        ["test", "--config", "tiny.yaml", "--model.adapter", "a.ckpt"],
        ["fit", "--config", "tiny.yaml", "--model.adapter", "a.ckpt"],
    ],
    ids=lambda command: command[0],
)
def test_a_checkpoint_where_an_adapter_belongs(here, cli, command):  # noqa: F811
    torch.save({"state_dict": {}}, "a.ckpt")
    code, _, err = cli(*command)
    assert code == 2
    assert "python -m adaptrank extract a.ckpt --out a" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"nothing", "is no Lightning checkpoint, or it is damaged"),
        ({"a": 1}, "it has no 'state_dict'"),
        ({"state_dict": {}, "object": Path("x")}, "holds a pickled object"),
    ],
)
def test_files_that_are_no_checkpoint(here, cli, contents, reason):  # noqa: F811
    file = here / "c.ckpt"
    if isinstance(contents, bytes):
        file.write_bytes(contents)
    else:
        torch.save(contents, file)
    code, _, err = cli("extract", file, "--out", "out")
    assert code == 2
    assert reason in err
    assert not (here / "out").exists()


# ---- a run that learned nothing


def test_a_run_that_learned_nothing_says_so(fit, tiny_llama):
    frozen = svd_model(tiny_llama)
    frozen["init_args"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}}
    code, _, err, folder = fit(model=frozen, trainer={"max_steps": 2})
    assert code == 0
    summary = json.loads((folder / "summary.json").read_text())
    loss = f"{summary['after']['loss']:.4f}"
    assert f"the loss is {loss}" in err
    assert "better than" in err
    assert len(summary["warnings"]) == 1
    code, _, err, folder = fit(trainer={"max_steps": 8})
    assert "better than" not in err
    assert json.loads((folder / "summary.json").read_text())["warnings"] == []


# ---- units that are closed, and a budget that is missed


def test_an_early_end_says_what_the_budget_misses(fit, tiny_llama):
    model = svd_model(tiny_llama)
    code, _, err, folder = fit(stop(4), model=model, allocator=ADALORA, options=QUICK)
    assert code == 0
    lines = [line for line in err.splitlines() if "AdaLoRA was stopped" in line]
    assert len(lines) == 1
    assert "at step 4, before its last event at step 5" in lines[0]
    assert "its budget of 12 ranks is exceeded by 4" in lines[0]
    assert "still in the file" not in err
    assert sum(json.loads((folder / "ranks.json").read_text()).values()) == 16
    code, _, err, folder = fit(model=model, allocator=ADALORA, options=QUICK)
    assert "was stopped" not in err
    assert sum(json.loads((folder / "ranks.json").read_text()).values()) == 12


# ---- files are whole


@pytest.fixture
def full(monkeypatch):
    """Let the disk be full for files of a name: any write beyond some bytes fails."""
    resource = pytest.importorskip("resource")
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


WRITERS = {
    "text": lambda file: _files.write_text(file, "x" * 9000),
    "line": lambda file: _files.append_text(file, "x" * 9000),
    "adapter": lambda file: save_adapter(adapt(Big(), parameterization=LoRA), file.parent),
    "checkpoint": lambda file: CheckpointFiles().save_checkpoint({"t": torch.ones(9000)}, file),
    "torch": lambda file: write_by_torch(file),
}


class Big(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(500, 500)


def write_by_torch(file):
    with _files.atomic_file(file) as temporary:
        torch.save({"t": torch.ones(9000)}, temporary)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_sentence_and_leaves_the_older_file(tmp_path, full, writer):
    names = {"adapter": "adapter_model.safetensors"}
    file = tmp_path / names.get(writer, "file.ckpt")
    file.write_text("old")
    full(4096)
    with pytest.raises(_files.WriteError, match=r"could not be written: .*older file"):
        WRITERS[writer](file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_text() == "old"
    full(1 << 30)
    WRITERS[writer](file)
    assert file.stat().st_size > 4096
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_run_on_a_full_disk_keeps_its_older_checkpoint(fit, full, here):  # noqa: F811
    every = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 2}}
    every["init_args"].update(save_last=True, save_top_k=0)
    code, _, err, folder = fit(every, fill(here, 4), options=QUICK)
    assert code == 2
    assert "Traceback" not in err
    assert re.search(r"adaptrank: \S+last\.ckpt could not be written", err)
    (last,) = folder.rglob("*.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 2
    assert not list(folder.rglob(".*"))
    assert not (folder / "adapter").exists()


def fill(here, step):  # noqa: F811
    (here / "filling.py").write_text(
        "import resource\n"
        "from lightning.pytorch import Callback\n"
        "class Fill(Callback):\n"
        "    def __init__(self, step: int): self.step = step\n"
        "    def on_train_batch_start(self, trainer, *_):\n"
        "        if trainer.global_step == self.step - 1:\n"
        "            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))\n"
    )
    return {"class_path": "filling.Fill", "init_args": {"step": step}}


def test_a_checkpoint_does_not_pass_through_the_folder_for_temporary_files(
    fit, monkeypatch, tmp_path
):
    import tempfile

    def refuse(*_, **__):
        raise AssertionError("a checkpoint went through the folder for temporary files")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    code, _, err, folder = fit(options=QUICK, trainer={"max_steps": 2})
    assert code == 0, err
    assert [*folder.rglob("*.ckpt")]


def test_the_plugin_is_set_for_modules_of_the_library_and_not_over_another_one(tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False)
    ensure_checkpoint_files(trainer)
    assert type(trainer.strategy.checkpoint_io) is CheckpointFiles
    other = type("Other", (CheckpointFiles,), {})()
    trainer = Trainer(accelerator="cpu", logger=False, plugins=[other])
    ensure_checkpoint_files(trainer)
    assert trainer.strategy.checkpoint_io is other


# ---- processes


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_strategies_that_train_in_child_processes_are_refused(fit, monkeypatch, strategy):
    monkeypatch.setattr(CausalLM, "load_backbone", lambda self: pytest.fail("it loaded"))
    code, _, err, folder = fit(options=("--trainer.strategy", strategy, "--trainer.devices", "2"))
    assert code == 2
    assert "use strategy=ddp" in err
    assert len(err.strip().splitlines()) == 1
    assert folder is None


def test_a_process_that_would_wait_for_a_lost_one_is_ended(monkeypatch, caplog):
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set() if code else None)
    monkeypatch.setattr(peers, "EVERY", 0.01)
    monkeypatch.setattr(peers, "PATIENCE", 0.05)
    child = subprocess.Popen(["sleep", "60"])
    watch = peers.PeerWatch()
    host, ours = peers._host(), peers._this_process()
    theirs = peers.Process(host, child.pid, peers._status(child.pid)[1])
    elsewhere = peers.Process("another machine", 1, "0")
    monkeypatch.setattr(peers, "several", lambda: True)
    monkeypatch.setattr(peers, "from_all", lambda value: [ours, theirs, elsewhere])
    trainer = SimpleNamespace(global_rank=0, global_step=7)
    watch.on_train_start(trainer, None)
    assert not ended.wait(0.2)
    child.kill()
    assert ended.wait(5)
    child.wait()
    (record,) = caplog.records
    assert f"Rank 1 (process {child.pid}) of this run is gone" in record.getMessage()
    assert "after step 7" in record.getMessage()
    # Another process that got the number does not count.
    assert not peers.Process(host, os.getpid(), "1").runs()
    assert ours.runs()


def test_a_peer_may_end_once_no_process_trains(monkeypatch, caplog):
    monkeypatch.setattr(peers, "EVERY", 0.01)
    watch = peers.PeerWatch()
    gone = peers.Process(peers._host(), 1 << 30, "")
    monkeypatch.setattr(peers, "several", lambda: True)
    monkeypatch.setattr(peers, "from_all", lambda value: [peers._this_process(), gone])
    monkeypatch.setattr(peers.PeerWatch, "_gone", lambda self: [])
    watch.on_train_start(SimpleNamespace(global_rank=0, global_step=0), None)
    watch.on_train_end(None, None)
    monkeypatch.undo()
    assert watch._gone() == [1]
    watch.on_exception(None, None, RuntimeError("gloo"))
    assert watch.lost is None
    assert not caplog.records


# ---- chance


class Guessing(AdaptedModule):
    def __init__(self, metric, *labels):
        LightningModule.__init__(self)
        self.metric = metric
        for batch in labels:
            metric.update(torch.tensor(batch))

    def chance(self):
        return self.metric.chance()


BALANCED = (LabelCounts(2), [0, 1] * 8, [0, 1, 0, 1])
SKEWED = (LabelCounts(3), [2] * 18 + [0, 1])
SPREAD = (LabelSpread(), [0.0, 2.0, 4.0], [2.0])


@pytest.mark.parametrize(
    ("labels", "after", "warning"),
    [
        (BALANCED, {"loss": 0.70, "accuracy": 0.5}, "guessing has 0.6931; the accuracy is 0.5"),
        (BALANCED, {"loss": 0.69, "accuracy": 0.6}, "most frequent class has 0.5000"),
        (BALANCED, {"loss": 0.30, "accuracy": 0.9}, None),
        (BALANCED, {"loss": 0.80, "accuracy": 0.9}, None),
        (SKEWED, {"loss": 0.3, "accuracy": 0.9}, "most frequent class has 0.9000"),
        (SKEWED, {"loss": 0.1, "accuracy": 0.95}, None),
        (SPREAD, {"loss": 2.0}, "No better than chance: the loss is 2.0000, and guessing has 2.00"),
        (SPREAD, {"loss": 1.0}, None),
        (BALANCED, {"loss": float("nan"), "accuracy": 0.5}, "is not a number"),
        (BALANCED, {}, None),
    ],
)
def test_what_guessing_would_reach(labels, after, warning):
    metric, *batches = labels
    text = no_better_than_chance(Guessing(copy.deepcopy(metric), *batches), {}, after)
    assert text is None if warning is None else warning in text


def test_a_language_model_is_compared_with_its_vocabulary_and_with_its_start():
    module = Guessing(SimpleNamespace(chance=lambda: {"loss": 4.0, "vocabulary": 54.6}))
    assert "guessing has 4.0000" in no_better_than_chance(module, {}, {"loss": 4.0})
    assert "guessing has 4.0000" in no_better_than_chance(module, {}, {"train_loss": 4.1})
    assert no_better_than_chance(module, {}, {"loss": 3.99}) is None
    before = {"loss": 3.0}
    assert "3.0000 before it" in no_better_than_chance(module, before, {"loss": 3.00001})
    assert no_better_than_chance(module, before, {"loss": 2.9}) is None


def test_a_classifier_that_does_not_train_says_so(fit, tiny_bert):
    model = {
        "class_path": "SequenceClassification",
        "init_args": {
            "backbone": tiny_bert,
            "dtype": "fp32",
            "adapters": [{"targets": ["query"], "parameterization": ["LoRA"]}],
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}},
        },
    }
    data = {"class_path": "GeneratedQuestions", "init_args": {"train_size": 8, "val_size": 60}}
    trainer = {"max_steps": 1, "limit_val_batches": 1.0}
    code, _, err, folder = fit(model=model, data=data, trainer=trainer, generate=False)
    assert code == 0, err
    assert "No better than chance" in err
    assert "guessing has 1.7918" in err
    assert len(json.loads((folder / "summary.json").read_text())["warnings"]) == 1


# ---- plain calls


def test_plain_calls_say_what_an_early_end_leaves(caplog, tmp_path):
    torch.manual_seed(0)
    model = adapt(nn.Sequential(Small()), parameterization=partial(SVDForm, rank=4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    allocator = AdaLoRA(budget=2, every=2, warmup=1, final=2)
    allocator.start(model, optimizer, 12)
    for _ in range(6):
        model(torch.ones(3, 6)).square().mean().backward()
        allocator.before_step()
        optimizer.step()
        optimizer.zero_grad()
        allocator.step()
    assert allocator.closed
    save_adapter(model, tmp_path / "amid")
    assert "saved between two events of its allocator" in caplog.text
    caplog.clear()
    allocator.finish()
    allocator.finish()
    assert caplog.text.count("AdaLoRA was stopped at step 6, before its last event at step 10") == 1
    save_adapter(model, tmp_path / "after")
    assert "between two events" not in caplog.text


def test_a_factored_moment_is_looked_at_too():
    parameter = nn.Parameter(torch.ones(3, 4))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter]["exp_avg_sq_row"] = torch.full((3,), math.inf)
    trainer = SimpleNamespace(
        optimizers=[optimizer], callbacks=[], global_step=4, log_every_n_steps=1
    )
    module = SimpleNamespace(device="cpu", named_parameters=lambda: [("p", parameter)])
    with pytest.raises(NotFiniteError, match="exp_avg_sq_row"):
        FiniteWeights().check(trainer, module)


def test_a_checkpoint_that_does_not_say_where_its_tensors_are(tmp_path):
    nest = [{"class": "LoRA", "init_args": {"rank": 1}, "name": "default"}]
    description = {
        "base": {"fingerprint": "0"},
        "adapters": [{"nest": nest, "layers": {"q": [4, 4]}}],
        "ranks": {},
        "trained_modules": [],
        "tied": {},
        "split": {},
    }
    for places in (None, {"keys": {}}, {"keys": [], "gated": {}}):
        checkpoint = {"state_dict": {}, TENSORS: places}
        with pytest.raises(ValueError, match="does not say where its adapter's tensors are"):
            extract_adapter(checkpoint, description, tmp_path / "c.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
