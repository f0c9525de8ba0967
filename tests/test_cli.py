"""The command line from end to end, in this process, on a random tiny Llama."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from adaptrank.artifacts.header import digest_of
from adaptrank.cli import VERBS, main
from adaptrank.cli.out_folder import write_folder
from adaptrank.cli.output import run_name
from adaptrank.cli.train import AdaptrankCLI
from adaptrank.cli.verbs import methods

CONFIGS = sorted(Path(__file__).parents[1].joinpath("configs").glob("*.yaml"))


def write(folder, tiny, name="tiny.yaml", **changes):
    config = {
        "model": {
            "class_path": "CausalLM",
            "init_args": {
                "backbone": tiny,
                "adapters": [
                    {"targets": ["q_proj", "v_proj"], "parameterization": [{"class_path": "LoRA"}]}
                ],
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}},
                "max_new_tokens": 2,
                "dtype": "fp32",
            },
        },
        "allocator": {
            "class_path": "ElaLoRA",
            "init_args": {"swaps": 4, "every": 2, "warmup": 2, "final": 2},
        },
        "data": {
            "class_path": "ArithmeticProblems",
            "init_args": {"batch_size": 4, "train_size": 24, "val_size": 8},
        },
        "trainer": {"max_steps": 8, "accelerator": "cpu", "check_val_every_n_epoch": 1000},
    }
    config.update(changes)
    (folder / name).write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))


def same(first, second):
    """Whether two run folders hold the same adapter, tensor by tensor and bit by bit."""
    one, other = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first, second)
    )
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_llama):
    """A folder to work in, with a configuration tiny.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADAPTRANK_DEBUG", raising=False)
    write(tmp_path, tiny_llama)
    return tmp_path


@pytest.fixture
def cli(capsys):
    """Run a command, and return (exit code, stdout, stderr)."""

    def run(*args):
        capsys.readouterr()
        try:
            main(list(map(str, args)))
            code = 0
        except SystemExit as leaving:
            code = leaving.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama):
    """The adapter folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    write(folder, tiny_llama)
    main(
        [
            "fit",
            "--config",
            str(folder / "tiny.yaml"),
            "--runs",
            str(folder / "runs"),
            "--evaluate",
            "false",
        ]
    )
    return folder / "runs" / "tiny" / "0" / "adapter"


# ---- fit


def test_a_run_leaves_a_folder_and_says_what_next(here, cli):
    code, out, err = cli("fit", "--config", "tiny.yaml")
    assert code == 0, err
    folder = here / "runs" / "tiny" / "0"
    names = {"adapter", "config.yaml", "metrics.jsonl", "ranks.jsonl", "ranks.json", "summary.json"}
    assert names <= {p.name for p in folder.iterdir()}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 8
    assert {"loss", "perplexity", "exact_match"} <= summary["after"].keys()
    assert out.startswith("Backbone ")
    assert "before      after" in out
    for verb in ("generate", "merge", "fit"):
        assert f"python -m adaptrank {verb} " in out
    assert out.count("runs/tiny/0/adapter") == 4

    # Quiet: ten lines of progress in a file, and no tip, warning or deprecation of another library.
    assert len(re.findall(r"^step \d+/8 ", err, re.MULTILINE)) == 8
    assert "Epoch" not in err + out
    assert "v_num" not in err
    left = [line for line in err.splitlines() if not re.match(r"step \d+/8 ", line)]
    ours = re.compile(r"rows exceed max_length|LoRA trains at a learning rate of 0\.05\. Its study")
    assert all(ours.search(line) for line in left), left

    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    code, _, err = cli("fit", "--config", "tiny.yaml", "--evaluate", "false")
    assert code == 0, err
    assert (here / "runs" / "tiny" / "1" / "summary.json").is_file()
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}, (
        "a second run touched the first"
    )


def test_the_saved_config_starts_the_same_run_again(here, cli):
    assert (
        cli("fit", "--config", "tiny.yaml", "--evaluate", "false", "--model.optimizer.lr", "0.02")[
            0
        ]
        == 0
    )
    first, second = here / "runs" / "tiny" / "0", here / "runs" / "tiny" / "1"
    code, _, err = cli("fit", "--config", first / "config.yaml")
    assert code == 0, err
    saved = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (first, second)]
    assert saved[0] == saved[1]
    assert saved[0]["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.02
    assert same(first, second)


def test_an_allocator_as_a_key_or_among_the_callbacks(here, cli, tiny_llama):
    allocator = yaml.safe_load((here / "tiny.yaml").read_text())["allocator"]
    trainer = {"max_steps": 8, "accelerator": "cpu", "callbacks": [allocator]}
    write(here, tiny_llama, "listed.yaml", allocator=None, trainer=trainer)
    for config in ("tiny", "listed"):
        code, _, err = cli("fit", "--config", f"{config}.yaml", "--evaluate", "false")
        assert code == 0, err
    events = [
        (here / "runs" / config / "0" / "ranks.jsonl").read_text() for config in ("tiny", "listed")
    ]
    assert events[0] == events[1]
    assert events[0].count('"step"') >= 2


def test_the_allocator_comes_before_the_checkpoint(here, monkeypatch):
    seen = []
    monkeypatch.setattr(
        AdaptrankCLI,
        "fit",
        lambda cli, **_: seen.extend(type(c).__name__ for c in cli.trainer.callbacks),
    )
    main(["fit", "--config", "tiny.yaml"])
    assert seen.index("ElaLoRA") < seen.index("RunFiles") < seen.index("StepCheckpoint")
    assert seen.index("ElaLoRA") < seen.index("Interrupt")


def test_an_allocator_from_the_users_own_file(here, cli, tiny_llama, monkeypatch):
    (here / "my_own_allocator.py").write_text(
        "from adaptrank.allocation import Allocator\n"
        "class BiggestFirst(Allocator):\n"
        '    """Keep the units whose factors are largest."""\n'
        "    def score(self, axis):\n"
        "        sizes = self.sizes_of(axis)\n"
        "        return sum(v.abs().sum(tuple(d for d in range(v.dim()) if d)) for v in sizes)\n"
        "    def sizes_of(self, axis):\n"
        "        return [slot.tensor.movedim(slot.dim, 0) for slot in axis.slots()]\n"
    )
    monkeypatch.setattr(
        sys, "path", [p for p in sys.path if p not in ("", str(here))]
    )  # as a console script starts
    own = {
        "class_path": "my_own_allocator.BiggestFirst",
        "init_args": {"budget": 24, "every": 2, "warmup": 2, "final": 2},
    }
    write(here, tiny_llama, "own.yaml", allocator=own)
    code, _, err = cli("fit", "--config", "own.yaml", "--evaluate", "false")
    assert code == 0, err
    assert sum(json.loads((here / "runs" / "own" / "0" / "ranks.json").read_text()).values()) == 24
    code, out, _ = cli("methods", "--import", "my_own_allocator")
    assert code == 0
    assert "BiggestFirst" in out
    assert "Keep the units whose factors are largest." in out


def test_ctrl_c_keeps_all_and_says_how_to_resume(here, cli, tiny_llama, monkeypatch):
    (here / "pressing.py").write_text(
        "import os, signal\n"
        "from lightning.pytorch import Callback\n"
        "class Press(Callback):\n"
        "    def on_train_batch_start(self, trainer, *_):\n"
        "        if trainer.global_step == 3 and 'PRESS' in os.environ:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
    )
    monkeypatch.syspath_prepend(str(here))
    trainer = {
        "max_steps": 8,
        "accelerator": "cpu",
        "callbacks": [{"class_path": "pressing.Press"}],
    }
    write(here, tiny_llama, trainer=trainer)
    handler = signal.getsignal(signal.SIGINT)
    assert cli("fit", "--config", "tiny.yaml", "--evaluate", "false")[0] == 0
    assert signal.getsignal(signal.SIGINT) == handler
    monkeypatch.setenv("PRESS", "1")
    code, out, err = cli("fit", "--config", "tiny.yaml", "--evaluate", "false")
    monkeypatch.delenv("PRESS")
    assert code == 1
    assert "Traceback" not in err
    assert "Interrupted at step 4" in out
    assert "Stopping after this step" in err
    assert signal.getsignal(signal.SIGINT) == handler
    assert (here / "runs" / "tiny" / "1" / "adapter" / "adapter_model.safetensors").is_file()

    command = re.search(r"resume: +python -m adaptrank (.*)", out)[1].split()
    assert "interrupted.ckpt" in command[-1]
    code, _, err = cli(*command)
    assert code == 0, err
    whole, stopped, resumed = (here / "runs" / "tiny" / n for n in "012")
    assert same(whole, resumed), "a resumed run must end where the whole one ended"
    assert not same(whole, stopped)


def test_a_checkpoint_of_other_adapters_is_refused(here, cli, tiny_llama):
    callback = {
        "class_path": "ModelCheckpoint",
        "init_args": {"dirpath": "kept", "every_n_train_steps": 4},
    }
    trainer = {"max_steps": 4, "accelerator": "cpu", "callbacks": [callback]}
    write(here, tiny_llama, allocator=None, trainer=trainer)
    assert cli("fit", "--config", "tiny.yaml", "--evaluate", "false")[0] == 0
    (checkpoint,) = (here / "kept").glob("*.ckpt")
    code, _, err = cli(
        "fit",
        "--config",
        "tiny.yaml",
        "--ckpt_path",
        checkpoint,
        "--model.adapters",
        "[{parameterization: [HyperAdapt]}]",
    )
    assert code == 2
    assert len(err.split("adaptrank: ")[1].splitlines()) <= 3
    assert "saved under other adapters" in err
    assert [p.name for p in (here / "runs" / "tiny").iterdir()] == ["0"]


def test_our_own_warnings_are_shown_plainly(here, cli, monkeypatch):
    theirs, heard = (
        ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"),
        [],
    )

    def fit(cli, **_):
        import warnings

        warnings.warn("a sentence of ours", stacklevel=1)
        logging.getLogger("adaptrank.data").warning("another sentence")
        heard.extend(
            name for name in theirs if logging.getLogger(name).isEnabledFor(logging.WARNING)
        )

    monkeypatch.setattr(AdaptrankCLI, "fit", fit)
    with pytest.warns(UserWarning, match="a sentence of ours"):
        _, _, err = cli("fit", "--config", "tiny.yaml")
    assert "another sentence\n" in err
    assert heard == []
    assert not logging.getLogger("adaptrank").handlers


OWN = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from adaptrank import adapt
from adaptrank.parameterizations import LoRA

class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(48, 24)
        self.source = "a name of theirs"
    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

class Adapted(Plain):
    def __init__(self):
        super().__init__()
        adapt(self, parameterization=LoRA)
    def validation_step(self, batch, batch_idx):
        self.log("accuracy_norm", self.layer(batch).square().mean())

class Data(LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(24, 48), batch_size=4)

class Both(Data):
    def val_dataloader(self):
        return self.train_dataloader()
"""


@pytest.mark.parametrize(
    ("model", "data", "wanted", "saved"),
    [
        ("Plain", "Both", "Plain has no validation_step", False),
        ("Adapted", "Data", "Data has no val_dataloader", True),
        ("Adapted", "Both", "accuracy_norm", True),
    ],
)
def test_a_module_of_another_kind(here, cli, tiny_llama, monkeypatch, model, data, wanted, saved):
    (here / "own_modules.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(here))
    classes = {
        "model": {"class_path": f"own_modules.{model}"},
        "data": {"class_path": f"own_modules.{data}"},
    }
    write(here, tiny_llama, "own.yaml", allocator=None, **classes)
    code, out, err = cli("fit", "--config", "own.yaml")
    assert code == 0, err
    assert wanted in out
    assert out.count("No evaluation before and after") == (wanted != "accuracy_norm")
    assert "python -m adaptrank" not in out, "its commands cannot build this module"
    folder = here / "runs" / "own" / "0"
    assert (folder / "summary.json").is_file()
    assert (folder / "adapter").is_dir() == saved
    assert ("adaptrank.load_adapter" in out) == saved
    assert ("No adapter saved: Plain holds no adapted layer" in out) != saved


def test_go_on_is_a_whole_command(here, cli):
    (here / "less.yaml").write_text("trainer: {max_steps: 7}\n")
    configs = ["--config", "tiny.yaml", "--config", "less.yaml"]
    code, out, err = cli("fit", *configs, "--evaluate", "false", "--model.optimizer.lr", "0.02")
    assert code == 0, err
    command = re.search(r"go on: +python -m adaptrank (.*)", out)[1].split()
    assert command == [
        "fit",
        "--config",
        "runs/less/0/config.yaml",
        "--model.adapter",
        "runs/less/0/adapter",
    ]
    code, out, err = cli(*command)
    assert code == 0, err
    saved = yaml.safe_load((here / "runs" / "less" / "1" / "config.yaml").read_text())
    assert saved["trainer"]["max_steps"] == 7
    assert saved["model"]["init_args"]["adapter"] == "runs/less/0/adapter"
    assert saved["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.02
    assert not same(here / "runs" / "less" / "0", here / "runs" / "less" / "1")


def test_a_run_keeps_its_last_step_and_resumes_from_it(here, cli):
    fit = ["fit", "--config", "tiny.yaml", "--evaluate", "false", "--allocator", "null"]
    fit += ["--model.schedule", "constant", "--model.warmup", "0"]
    assert cli(*fit)[0] == 0
    assert cli(*fit, "--trainer.max_steps", "4")[0] == 0  # amid the first epoch, of six batches
    whole, short, resumed = (here / "runs" / "tiny" / n for n in "012")
    assert [p.name for p in (whole / "checkpoints").iterdir()] == ["step=8.ckpt"]
    (checkpoint,) = (short / "checkpoints").iterdir()
    code, _, err = cli(*fit, "--ckpt_path", checkpoint)
    assert code == 0, err
    assert same(whole, resumed)
    assert not same(short, resumed)
    assert checkpoint.is_file(), "a resumed run removed the checkpoint of another one"
    assert yaml.safe_load((resumed / "config.yaml").read_text())["ckpt_path"] is None


def test_a_run_of_whole_epochs_goes_on_after_them(here, cli):
    fit = [
        "fit",
        "--config",
        "tiny.yaml",
        "--evaluate",
        "false",
        "--allocator",
        "null",
        "--trainer.max_steps",
        "-1",
    ]
    fit += ["--model.schedule", "constant", "--model.warmup", "0", "--trainer.max_epochs"]
    assert cli(*fit, "2")[0] == 0
    assert cli(*fit, "1")[0] == 0
    code, _, err = cli(*fit, "2", "--ckpt_path", "runs/tiny/1/checkpoints/step=6.ckpt")
    assert code == 0, err
    whole, resumed = (here / "runs" / "tiny" / n for n in "02")
    assert json.loads((resumed / "summary.json").read_text())["steps"] == 12
    assert same(whole, resumed)


def test_a_run_that_is_stopped_amid_an_epoch_resumes_there(here, cli, tiny_llama, monkeypatch):
    (here / "stopping.py").write_text(
        "import os\n"
        "from lightning.pytorch import Callback\n"
        "class Stop(Callback):\n"
        "    def on_train_batch_end(self, trainer, *_):\n"
        "        trainer.should_stop = trainer.global_step == 3 and 'STOP' in os.environ\n"
    )
    monkeypatch.syspath_prepend(str(here))
    trainer = {"max_steps": 8, "accelerator": "cpu", "callbacks": {"class_path": "stopping.Stop"}}
    write(here, tiny_llama, trainer=trainer)
    fit = ["fit", "--config", "tiny.yaml", "--evaluate", "false"]
    assert cli(*fit)[0] == 0
    monkeypatch.setenv("STOP", "1")
    assert cli(*fit)[0] == 0
    monkeypatch.delenv("STOP")
    code, _, err = cli(*fit, "--ckpt_path", "runs/tiny/1/checkpoints/step=3.ckpt")
    assert code == 0, err
    whole, stopped, resumed = (here / "runs" / "tiny" / n for n in "012")
    assert json.loads((stopped / "summary.json").read_text())["steps"] == 3
    assert same(whole, resumed)


def test_the_last_step_is_kept_once(here, cli, monkeypatch):
    from lightning.pytorch import Trainer

    saved, save = [], Trainer.save_checkpoint
    monkeypatch.setattr(
        Trainer,
        "save_checkpoint",
        lambda t, *a, **k: (saved.append(t.global_step), save(t, *a, **k)),
    )
    fit = ["fit", "--config", "tiny.yaml", "--evaluate", "false", "--allocator", "null"]
    assert cli(*fit, "--trainer.max_steps", "50")[0] == 0
    assert cli(*fit, "--trainer.max_steps", "-1", "--trainer.max_epochs", "1")[0] == 0
    assert saved == [50, 6]


def test_a_checkpoint_callback_without_a_folder(here, cli, tiny_llama):
    callback = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 4}}
    write(
        here,
        tiny_llama,
        allocator=None,
        trainer={"max_steps": 4, "accelerator": "cpu", "callbacks": callback},
    )
    code, _, err = cli("fit", "--config", "tiny.yaml", "--evaluate", "false")
    assert code == 0, err
    assert [str(p.parent.relative_to(here)) for p in here.rglob("*.ckpt")] == [
        "runs/tiny/0/checkpoints"
    ]


def test_a_single_callback_needs_no_list(here, cli, tiny_llama):
    allocator = yaml.safe_load((here / "tiny.yaml").read_text())["allocator"]
    write(
        here,
        tiny_llama,
        allocator=None,
        trainer={"max_steps": 8, "accelerator": "cpu", "callbacks": allocator},
    )
    code, out, err = cli("fit", "--config", "tiny.yaml", "--evaluate", "false")
    assert code == 0, err
    assert (here / "runs" / "tiny" / "0" / "ranks.jsonl").is_file()
    assert "loss" in out
    assert "ranks/" not in out


def test_the_summary_stands_in_columns():
    from adaptrank.artifacts.run import render

    summary = {
        "layers": [
            {
                "kind": "q_proj",
                "count": 4,
                "method": "LoRA on HyperAdapt on another one",
                "trainable": 1234567,
            },
            {"kind": "a_rather_long_name", "count": 12, "method": "LoRA", "trainable": 8},
        ],
        "trainable": 1234575, "parameters": 9999999, "ranks": 8,
        "before": {"accuracy_norm": 0.25, "perplexity": 123456789.5},
        "after": {"accuracy_norm": 0.5, "perplexity": 12.0, "f1": 1.0, "ranks/allocated": 8.0},
        "steps": 8, "seconds": 61.0, "peak_memory_bytes": 2**30,
    }  # fmt: skip
    text = render(summary, tuple(summary["after"]))
    assert "ranks/" not in text
    assert "  0.2500" in text
    assert "1.0000" in text
    layers, (_, *metrics) = text.splitlines()[:2], text.split("\n\n")[1].splitlines()
    ends = [len(line) for line in layers]
    assert ends[0] == ends[1], text
    assert len({len(line) for line in metrics}) == 1, text
    column = {line.index(" x ") for line in layers}
    assert len(column) == 1, text
    assert "of 0 parameters, 8 ranks" in render(
        {**summary, "trainable": 0, "parameters": 0, "layers": [], "after": {}}, ()
    )


def test_a_quick_look_offers_no_configuration(here, cli):
    code, out, err = cli(
        "fit", "--config", "tiny.yaml", "--trainer.fast_dev_run", "true", "--allocator", "null"
    )
    assert code == 0, err
    assert "generate:" in out
    assert "go on:" not in out, "Lightning saves no config.yaml in a fast_dev_run"


def test_names_of_runs(tmp_path):
    assert run_name(None) == "run"
    assert run_name("configs/smoke.yaml") == "smoke"
    assert run_name(tmp_path / "runs" / "smoke" / "3" / "config.yaml") == "smoke"
    assert run_name(tmp_path / "config.yaml") == "config"


# ---- validate, test, predict


def test_evaluating_an_adapter(here, cli, trained):
    config = ["--config", "tiny.yaml", "--model.adapters", "null", "--model.adapter", trained]
    code, out, err = cli("validate", *config)
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()] == [
        "Backbone",
        "Scores",
        "loss",
        "perplexity",
        "exact_match",
    ]
    code, tested, _ = cli("test", *config)
    assert code == 0
    assert "perplexity" in tested
    code, untrained, _ = cli("validate", "--config", "tiny.yaml")
    assert code == 0
    assert untrained.splitlines()[1].startswith("Scores the untrained model")
    assert untrained.splitlines()[2] != out.splitlines()[2]
    assert not (here / "runs").exists()


def test_predictions_are_lines_of_json(here, cli, trained):
    config = ["--config", "tiny.yaml", "--model.adapters", "null", "--model.adapter", trained]
    code, out, err = cli("predict", *config)
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 8
    assert lines[0].keys() == {"prompt", "completion"}
    code, said, _ = cli("predict", *config, "--out", "new/answers.jsonl")
    assert code == 0
    assert "8 predictions in new/answers.jsonl" in said
    assert (here / "new" / "answers.jsonl").read_text() == out


def test_a_card_lies_beside_the_adapter(trained):
    text = (trained / "README.md").read_text()
    front, body = text.split("---\n")[1:3]
    matter = yaml.safe_load(front)
    assert matter["library_name"] == "adaptrank"
    assert "LoRA" in matter["tags"]
    for words in (
        "trainable of",
        "## Layers",
        "## Ranks",
        "| layer |",
        "## Configuration",
        "class_path",
    ):
        assert words in body


# ---- generate, merge, methods


def test_an_adapter_and_its_merged_model_say_the_same(here, cli, trained):
    ask = [
        "--prompt",
        "Question: How many 1 2 3?\\nAnswer:",
        "--prompt",
        "7 + 8 =",
        "--max_new_tokens",
        "12",
    ]
    ask += ["--dtype", "fp32", "--json"]
    code, adapted, err = cli("generate", trained, *ask)
    assert code == 0, err
    first = json.loads(adapted.splitlines()[0])
    assert first["prompt"].count("\n") == 1
    assert first["completion"]
    code, out, err = cli("merge", trained, "--out", "merged")
    assert code == 0, err
    assert "Merged 4 layers" in out
    assert "float32" in out
    assert err == ""
    assert cli("generate", "merged", *ask)[1] == adapted
    assert cli("generate", trained.parent, *ask)[1] == adapted, (
        "a run folder stands for its adapter"
    )
    base = json.loads((trained / "adapter_config.json").read_text())["base"]["name"]
    assert cli("generate", base, *ask)[1] != adapted, (
        "the adapter changes nothing, so the test shows nothing"
    )


def test_prompts_of_a_file_and_words_as_they_come(here, cli, trained, monkeypatch):
    (here / "prompts.txt").write_text("1 2\n\n3 4\n")
    (here / "prompts.jsonl").write_text('{"prompt": "1 2", "answer": 3}\n{"prompt": "3 4"}\n')
    ask = ["--max_new_tokens", "3"]
    want = cli("generate", trained, "--prompt", "1 2", "--prompt", "3 4", *ask)[1]
    for name in ("prompts.txt", "prompts.jsonl"):
        assert cli("generate", trained, "--file", name, *ask)[1] == want
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    streamed = cli("generate", trained, "--file", "prompts.txt", *ask)[1]
    assert streamed.split() == want.split()


def test_a_merged_folder_needs_no_adaptrank(here, cli, trained):
    assert cli("merge", trained, "--out", "merged", "--dtype", "bf16")[0] == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("merged", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any("adaptrank" in type(m).__module__ for m in model.modules())
    assert AutoTokenizer.from_pretrained("merged")("1 2")["input_ids"]


def test_merge_tells_what_rounding_loses(here, cli, trained):
    from safetensors import safe_open
    from safetensors.torch import save_file

    faint = here / "faint"
    faint.mkdir()
    name = "adapter_model.safetensors"
    with safe_open(trained / name, "pt") as stored:
        description = json.loads(stored.metadata()["adaptrank"])
    weak = {k: v * 1e-3 for k, v in load_file(trained / name).items()}
    description["digest"] = digest_of(description, weak)
    save_file(weak, faint / name, metadata={"adaptrank": json.dumps(description)})
    for dtype, warned in (("bf16", True), ("fp32", False)):
        code, _, err = cli("merge", faint, "--out", f"merged-{dtype}", "--dtype", dtype)
        assert code == 0, err
        assert ("Rounding to bfloat16 is an error of" in err) == warned
    assert "Rounding" not in cli("merge", trained, "--out", "merged", "--dtype", "bf16")[2], (
        "a strong adapter survives"
    )


def test_merge_keeps_what_is_there(here, cli, trained):
    (here / "merged").mkdir()
    (here / "merged" / "mine.txt").write_text("mine")
    code, _, err = cli("merge", trained, "--out", "merged")
    assert code == 2
    assert "--force" in err
    assert (here / "merged" / "mine.txt").is_file()
    assert cli("merge", trained, "--out", "merged", "--force")[0] == 0
    assert (here / "merged" / "config.json").is_file()
    assert not (here / "merged" / "mine.txt").exists()
    assert [p.name for p in here.iterdir() if p.name.startswith(".")] == []
    code, _, err = cli("merge", trained, "--out", trained.parent, "--force")
    assert code == 2
    assert "holds the adapter" in err
    assert (trained / "adapter_model.safetensors").is_file()


def test_a_merge_that_from_pretrained_would_drop_is_refused(here, cli, tiny_llama):
    """An offset becomes a bias, and a Llama has none."""
    from transformers import AutoModelForCausalLM

    from adaptrank import adapt, save_adapter
    from adaptrank.parameterizations import ResidualOffset

    model = adapt(AutoModelForCausalLM.from_pretrained(tiny_llama), ["o_proj"], ResidualOffset)
    save_adapter(model, here / "offsets", {"name": tiny_llama})
    code, _, err = cli("merge", here / "offsets", "--out", here / "merged")
    assert code == 2
    assert re.search(
        r"would make model\.layers\.0\.self_attn\.o_proj\.bias \(2 such\).*Keep the adapter", err
    )
    assert not (here / "merged").exists()


def test_a_merge_that_fails_changes_nothing(here, cli, trained, monkeypatch):
    (here / "merged").mkdir()
    (here / "merged" / "mine.txt").write_text("mine")
    monkeypatch.setattr(
        "transformers.PreTrainedTokenizerBase.save_pretrained", lambda *_, **__: 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        main(["merge", str(trained), "--out", "merged", "--force"])
    assert [
        p.name for p in here.iterdir() if p.name.endswith("merged") or p.name.startswith(".")
    ] == ["merged"]
    assert (here / "merged" / "mine.txt").read_text() == "mine"


def test_a_folder_that_cannot_take_its_place_gives_it_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: 1 / 0 if str(a).endswith(".new") else replace(a, b)
    )
    with pytest.raises(ZeroDivisionError):
        write_folder(tmp_path / "out", lambda folder: (folder / "theirs.txt").touch())
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["out", "out/mine.txt"]


def test_a_classifier_merges_with_its_head(here, cli, tiny_bert):
    model = {
        "class_path": "SequenceClassification",
        "init_args": {
            "backbone": tiny_bert,
            "adapters": [{"parameterization": ["HyperAdapt"]}],
            "dtype": "fp32",
        },
    }
    data = {
        "class_path": "GeneratedQuestions",
        "init_args": {"batch_size": 8, "train_size": 24, "val_size": 12},
    }
    write(here, tiny_bert, "bert.yaml", model=model, data=data, allocator=None)
    code, _, err = cli(
        "fit", "--config", "bert.yaml", "--evaluate", "false", "--trainer.max_steps", "3"
    )
    assert code == 0, err
    adapter = here / "runs" / "bert" / "0" / "adapter"
    code, out, err = cli("merge", adapter, "--out", "merged")
    assert code == 0, err
    assert "AutoModelForSequenceClassification.from_pretrained('merged')" in out
    code, out, err = cli(
        "predict", "--config", "bert.yaml", "--model.adapters", "null", "--model.adapter", adapter
    )
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 12
    assert lines[0].keys() == {"label", "name", "probabilities"}

    from transformers import AutoModelForSequenceClassification

    merged = AutoModelForSequenceClassification.from_pretrained("merged")
    head = load_file(adapter / "adapter_model.safetensors")["classifier.weight"]
    torch.testing.assert_close(merged.classifier.weight.data, head, rtol=0, atol=0)
    code, _, err = cli("generate", adapter, "--prompt", "1")
    assert code == 2
    assert "completes no text" in err


def test_prompts_come_from_standard_input(here, cli, trained, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("1 + 1 =\n\n2 + 2 =\n"))
    code, out, _ = cli("generate", trained, "--max_new_tokens", "2", "--json", "--raw")
    assert code == 0
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["1 + 1 =", "2 + 2 ="]


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["merge", "ADAPTER"], "--out"),
        (["merge", "ADAPTER", "--outt", "x"], "Did you mean '--out'"),
        (["merge", "./adaptr", "--out", "x"], "There is no adapter folder"),
        (["merge", "ADAPTER", "--out", "tiny.yaml"], "is a file"),
        (["generate", "."], "neither an adapter"),
        (["generate", "ADAPTER", "--prompt", ""], "empty prompt"),
        (["generate", "ADAPTER", "--prompt", "1", "--file", "x"], "both give prompts"),
        (["generate", "ADAPTER", "--file", "nowhere.txt"], "nowhere.txt"),
        (["generate", "ADAPTER", "--file", "broken.jsonl"], "cannot be read as json"),
        (["generate", "ADAPTER", "--dtype", "bf17"], "'bf17' is unknown"),
        (["generate", "ADAPTER", "--base", "./nowhere"], "Name the base with --base"),
        (["generate", "ADAPTER", "--prompt", "1", "--chat"], "no chat template"),
        (["methods", "--import", "no_such_module"], "no module 'no_such_module'"),
    ],
)
def test_mistakes_with_the_other_verbs(here, cli, trained, args, wanted):
    (here / "broken.jsonl").write_text("{\n")
    code, _, err = cli(*[trained if arg == "ADAPTER" else arg for arg in args])
    assert code == 2, err
    assert wanted in err, err
    assert len(err.strip().splitlines()) <= 3, err
    assert "Traceback" not in err, err


def test_methods_lists_the_registries(cli):
    from adaptrank.allocation import ALLOCATORS
    from adaptrank.parameterizations import PARAMETERIZATIONS

    computed = json.loads(json.dumps(methods.compute()))
    shipped = {
        kind: [each for each in computed[kind] if each["module"].startswith("adaptrank.")]
        for kind in ("parameterizations", "allocators", "strategies", "optimizers")
    }
    # Other tests define methods and allocators of their own.
    methods_here = {each["name"] for each in shipped["parameterizations"]}
    names = {kind: [each["name"] for each in shipped[kind]] for kind in shipped}
    for table, columns in (
        ("pairs", "allocators"),
        ("strategy_methods", "strategies"),
        ("optimizer_methods", "optimizers"),
    ):
        shipped[table] = {
            column: {
                nest: fit
                for nest, fit in computed[table][column].items()
                if methods_here.issuperset(nest.split(" + "))
            }
            for column in names[columns]
        }
    shipped["strategy_allocators"] = {
        strategy: {
            name: computed["strategy_allocators"][strategy][name] for name in names["allocators"]
        }
        for strategy in names["strategies"]
    }
    assert shipped == methods.read_table(), (
        "run: python -m adaptrank methods --recompute --json > adaptrank/cli/methods_table.json"
    )
    code, out, _ = cli("methods")
    assert code == 0
    for name, cls in PARAMETERIZATIONS.items():
        if cls.__module__.startswith("adaptrank."):
            assert re.search(rf"^  {name} .*{re.escape(cls.source)}$", out, re.MULTILINE), name
    found = json.loads(cli("methods", "--json")[1])
    lora = next(p for p in found["parameterizations"] if p["name"] == "LoRA")
    assert lora["parameters"] == 8 * (768 + 768)
    assert lora["axes"] == {"rank": 8}
    assert lora["wraps"] == "Linear, Conv1D, Embedding or Conv2d"
    assert lora["mergeable"] is lora["starts_at_base"] is True
    assert lora["needs_weight"] is lora["splits_fused"] is False
    assert lora["cost"]["flops_per_token"] == {"closed": 24_576, "measured": 24_576}
    assert lora["cost"]["bytes_per_token"] == {"closed": 4 * (768 + 8), "measured": 4 * (768 + 8)}
    assert re.search(r"^  LoRA +12,288 +24,576 +0 +3,104 ", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 110
    for method in found["parameterizations"]:
        if method["module"].startswith("adaptrank."):
            assert all(
                cost["closed"] in (cost["measured"], None) for cost in method["cost"].values()
            ), method
    assert lora["arguments"]["alpha"] == 16.0
    cells = found["pairs"]["ElaLoRA"]
    assert cells == {nest: ALLOCATORS["ElaLoRA"].pair(*nest.split(" + ")) for nest in cells}
    assert cells["HyperAdapt"] == ""
    assert cells["HyperAdapt + LoRA"] == "works"
    code, out, _ = cli("methods", "--pairs")
    assert re.search(r"^  HyperAdapt +-", out, re.MULTILINE)
    assert re.search(r"^  LoRA +yes", out, re.MULTILINE)
    foreign = [
        name for name, cls in ALLOCATORS.items() if not cls.__module__.startswith("adaptrank.")
    ]  # of other tests
    assert max(map(len, out.splitlines())) <= 110 + sum(len(name) + 1 for name in foreign)


def test_progress_is_lines_in_a_file_and_a_bar_on_a_terminal(monkeypatch, capsys):
    from adaptrank.cli.progress import StepBar, StepLines, progress

    lines = progress()
    assert isinstance(lines, StepLines)
    assert lines.is_enabled  # LightningModule.print asks
    lines.print("a line")
    assert capsys.readouterr().out == "a line\n"
    lines.disable()
    assert not lines.is_enabled
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    assert isinstance(progress(), StepBar)


# ---- help


def test_help_and_keys_import_nothing_heavy(tmp_path):
    """What makes help, `methods` and the answer to a mistake quick is that torch stays out."""
    (tmp_path / "wrong.yaml").write_text("trainer: {max_stps: 3}\n")
    (tmp_path / "class.yaml").write_text("allocator: {class_path: ElaLora}\n")
    code = (
        "import sys\nfrom adaptrank.cli import main\n"
        "main([]); main(['--help']); main(['fit', '--help']); main(['methods', '--pairs'])\n"
        "for verb in ('fit', 'plan'):\n"
        "    for file in ('wrong.yaml', 'class.yaml'):\n"
        "        try:\n            main([verb, '--config', file])\n"
        "        except SystemExit as leaving:\n            assert leaving.code == 2\n"
        "        else:\n            raise AssertionError(file)\n"
        "heavy = ('torch', 'lightning', 'transformers', 'jsonargparse')\n"
        "sys.exit(any(m in sys.modules for m in heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Did you mean 'trainer.max_steps'?") == 2
    assert done.stderr.count("Did you mean 'ElaLoRA'?") == 2
    assert done.stdout.count("usage: python -m adaptrank VERB") == 2


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, cli):
    code, out, err = cli(verb, "--help")
    assert code == 0
    assert out.startswith(f"usage: python -m adaptrank {verb}")
    assert err == ""
    assert 5 < len(out.splitlines()) < 160
    assert max(map(len, out.splitlines())) <= 120


def test_the_help_of_fit_is_true(cli):
    """Every key it names exists: it is read from the sources, and from a table for the trainer."""
    import inspect

    from lightning.pytorch import Trainer

    from adaptrank.allocation import ALLOCATORS
    from adaptrank.cli.help import TRAINER
    from adaptrank.modules import AdaptedModule, CausalLM
    from adaptrank.parameterizations import PARAMETERIZATIONS

    out = cli("fit", "--help")[1]
    assert TRAINER.keys() <= inspect.signature(Trainer).parameters.keys()
    keys = inspect.signature(CausalLM).parameters.keys()
    keys |= inspect.signature(AdaptedModule).parameters.keys()
    named = set(re.findall(r"^  model\.(\w+)", out, re.MULTILINE))
    assert {"backbone", "adapters", "optimizer"} <= named <= keys
    for registry in (ALLOCATORS, PARAMETERIZATIONS):
        for name, cls in registry.items():
            if cls.__module__.startswith("adaptrank.") and not cls.__module__.endswith(".base"):
                assert re.search(rf"\b{name}\b", out), name


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--help_all"], "--trainer.max_steps"),
        (["--allocator.help", "ElaLoRA"], "--allocator.swaps"),
    ],
)
def test_lightnings_own_help_is_there(cli, args, wanted):
    code, out, _ = cli("fit", *args)
    assert code == 0
    assert wanted in out


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses(config, cli):
    code, out, err = cli("fit", "--config", config, "--print_config")
    assert code == 0, err
    printed = yaml.safe_load(out)
    assert printed["model"]["class_path"].startswith("adaptrank.modules")
    assert "optimizer" not in printed
    assert "lr_scheduler" not in printed
