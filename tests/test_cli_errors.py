"""What mistakes say. Pure functions first; then the command line, in this process, on a random tiny Llama."""

import copy
import os
import sys

import pytest
import yaml

from adaptrank.cli import errors, main
from adaptrank.cli.errors import (
    ConfigError,
    check,
    collect,
    condense,
    explain,
    line_of,
    nearest,
    read_yaml,
    shorten,
)

ENTRY = ("model", "init_args", "adapters", 0)
METHODS = (*ENTRY, "parameterization")


@pytest.fixture
def config(tiny_llama):
    """A configuration that works, in which a test breaks one thing."""
    return {
        "model": {
            "class_path": "CausalLM",
            "init_args": {
                "backbone": tiny_llama,
                "adapters": [
                    {
                        "targets": "all-linear",
                        "parameterization": [
                            "HyperAdapt",
                            {"class_path": "LoRA", "init_args": {"rank": 4}},
                        ],
                    }
                ],
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "generate": False,
                "dtype": "fp32",
            },
        },
        "allocator": {
            "class_path": "ElaLoRA",
            "init_args": {"swaps": 4, "every": 2, "warmup": 2, "final": 2},
        },
        "data": {
            "class_path": "ArithmeticProblems",
            "init_args": {"batch_size": 4, "train_size": 24, "val_size": 4},
        },
        "trainer": {"max_steps": 8, "accelerator": "cpu", "check_val_every_n_epoch": 1000},
    }


def put(config, path, value):
    changed = node = copy.deepcopy(config)
    *parents, last = path
    for part in parents:
        node = node[part]
    node[last] = value
    return changed


def drop(config, path):
    changed = node = copy.deepcopy(config)
    *parents, last = path
    for part in parents:
        node = node[part]
    del node[last]
    return changed


@pytest.fixture
def mistake(tmp_path, monkeypatch, capsys):
    """Run a verb that must exit with 2, and return what it says, checked for brevity; no run folder may be left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADAPTRANK_DEBUG", raising=False)

    def run(config=None, *args, verb="fit"):
        capsys.readouterr()
        if config is not None:
            (tmp_path / "c.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
            args = ("--config", "c.yaml", *args)
        with pytest.raises(SystemExit) as leaving:
            main([verb, *args])
        said = capsys.readouterr().err
        text = said[said.index("adaptrank: ") :]
        assert leaving.value.code == 2, said
        assert "Traceback" not in said
        assert "usage:" not in said
        assert "Subtypes" not in said
        assert len(text.strip().splitlines()) <= 3, text
        assert max(map(len, text.splitlines())) < 400, text
        assert not (tmp_path / "runs").exists(), "a run that never began left its folder"
        return text

    return run


# (where, what stands there, what the text must hold)
BROKEN = {
    "unknown key at the top": (("modle",), 1, ["'modle'", "did you mean 'model'", "c.yaml, line "]),
    "unknown key of the trainer": (("trainer", "max_step"), 3, ["trainer.max_step", "'max_steps'"]),
    "unknown key of the model": (
        ("model", "init_args", "backbon"),
        "x",
        ["init_args.backbon", "'backbone'"],
    ),
    "unknown key of an entry": ((*ENTRY, "target"), "x", ["adapters[0].target", "'targets'"]),
    "unknown key of a method": (
        (*METHODS, 1, "init_args", "rnak"),
        4,
        ["[1].init_args.rnak", "'rank'", "LoRA accepts"],
    ),
    "unknown key of the allocator": (
        ("allocator", "init_args", "swpas"),
        4,
        ["swpas", "'swaps'", "ElaLoRA accepts"],
    ),
    "unknown key of the optimizer": (
        ("model", "init_args", "optimizer", "init_args"),
        {"lrr": 1},
        ["lrr", "'lr'"],
    ),
    "unknown key of the data": (
        ("data", "init_args", "batchsize"),
        1,
        ["batchsize", "'batch_size'"],
    ),
    "argument beside class_path": (
        ("allocator", "every"),
        3,
        ["allocator.every", "init_args, one level deeper"],
    ),
    "unknown model": (
        ("model", "class_path"),
        "CausalML",
        ["'CausalML'", "'CausalLM'", "SequenceClassification"],
    ),
    "unknown data": (("data", "class_path"), "ArithmeticProblem", ["'ArithmeticProblems'"]),
    "unknown allocator": (
        ("allocator", "class_path"),
        "ElaLora",
        ["'ElaLora'", "did you mean 'ElaLoRA'"],
    ),
    "unknown method": ((*METHODS, 0), "HyperAdpat", ["'HyperAdpat'", "'HyperAdapt'", "DoRA"]),
    "unknown optimizer": (
        ("model", "init_args", "optimizer", "class_path"),
        "torch.optim.AdmW",
        ["no 'AdmW'", "'torch.optim.AdamW'"],
    ),
    "unknown callback": (
        ("trainer", "callbacks"),
        [{"class_path": "EarlyStoping"}],
        ["callbacks[0]", "'EarlyStopping'"],
    ),
    "unknown module": (
        ("allocator", "class_path"),
        "my_alocator.Mine",
        ["no module 'my_alocator'", "folder you start"],
    ),
    "a class of another kind": (
        ("allocator", "class_path"),
        "adaptrank.parameterizations.LoRA",
        ["LoRA is no Allocator", "ElaLoRA"],
    ),
    "no class_path": (
        ("allocator",),
        {"init_args": {"swaps": 4}},
        ["allocator has no class_path", "ElaLoRA"],
    ),
    "wrong type": (
        (*METHODS, 1, "init_args", "rank"),
        "eight",
        ["rank is 'eight'", "a whole number"],
    ),
    "wrong type in the trainer": (
        ("trainer", "max_steps"),
        "many",
        ["trainer.max_steps is 'many'", "a whole number"],
    ),
    "wrong choice": (
        ("model", "init_args", "schedule"),
        "cosin",
        ["'cosin'", "'linear'", "did you mean 'cosine'"],
    ),
    "text for a number": (
        ("model", "init_args", "warmup"),
        "long",
        ["warmup is 'long'", "a number"],
    ),
    "text for a list": (METHODS, "LoRA", ["'LoRA'", "must be a list", "write [LoRA]"]),
    "mapping for a list": (
        ENTRY[:-1],
        {"targets": "all-linear"},
        ["adapters is {'targets'", "a list"],
    ),
    "a number for a name": (
        (*ENTRY, "name"),
        3,
        ["name is 3", "must be a string", 'quote it, as in "3"', "line "],
    ),
    "a boolean for a name": (
        (*ENTRY, "targets"),
        [False, "q_proj"],
        ["targets[0] is False", "must be a string", "YAML reads", "line "],
    ),
    "none for null": (("allocator",), "none", ["no Allocator 'none'", "write null"]),
    "rank out of range": ((*METHODS, 1, "init_args", "rank"), 0, ["rank=0", "use rank >= 1"]),
    "every out of range": (("allocator", "init_args", "every"), 0, ["every=0", "at least 1"]),
    "size out of range": (
        ("data", "init_args", "batch_size"),
        0,
        ["batch_size=0", "use 1 or more"],
    ),
    "learning rate out of range": (
        ("model", "init_args", "optimizer", "init_args", "lr"),
        -1.0,
        ["learning rate: -1"],
    ),
    "no such device": (("trainer", "accelerator"), "cpuu", ["cpuu"]),
    "nothing to train": (ENTRY[:-1], None, ["Nothing to train"]),
    "no layer": ((*ENTRY, "targets"), ["q_porj"], ["q_porj", "Did you mean 'q_proj'"]),
    "impossible schedule": (("trainer", "max_steps"), 3, ["would never act", "raise max_steps"]),
    "nothing to allocate": (
        METHODS,
        ["HyperAdapt"],
        ["nothing to allocate", "or nest one: [HyperAdapt, "],
    ),
    "two allocators": (
        ("trainer", "callbacks"),
        [{"class_path": "AdaLoRA"}],
        ["trainer.callbacks lists AdaLoRA", "keep one"],
    ),
    "no such backbone": (("model", "init_args", "backbone"), "./llma", ["'./llma'"]),
    "no such adapter": (("model", "init_args", "adapter"), "nowhere", ["No adapter at 'nowhere'"]),
    "no such data file": (
        ("data",),
        {"class_path": "CausalLMData", "init_args": {"sources": "d.yaml.jsonl"}},
        ["There is no 'd.yaml.jsonl'"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_mistake_in_the_file(name, config, mistake):
    where, value, wanted = BROKEN[name]
    text = mistake(put(config, where, value))
    for part in wanted:
        assert part in text


def test_a_missing_key_is_named(config, mistake):
    text = mistake(drop(config, ("model", "init_args", "backbone")))
    assert "model.init_args.backbone is missing" in text
    assert "c.yaml, line 3" in text
    assert "no 'data'" in mistake(drop(config, ("data",)))
    assert "no 'model'" in mistake(None)


def test_the_line_of_a_mistake(config, mistake):
    changed = put(config, ("allocator", "class_path"), "ElaLoRAA")
    line = yaml.safe_dump(changed, sort_keys=False).splitlines().index("  class_path: ElaLoRAA") + 1
    assert mistake(changed).startswith(f"adaptrank: c.yaml, line {line}: allocator.class_path")
    broken = put(config, ("allocator", "init_args", "swpas"), 4)
    text = mistake(broken, "--allocator", "ElaLoRA")
    assert text.startswith("adaptrank: c.yaml, line "), (
        "the option names the class; its arguments are the file's"
    )


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--tariner.max_steps", "3"], ["--tariner.max_steps", "did you mean 'trainer'"]),
        (["--trainer.max_step=3"], ["--trainer.max_step", "'max_steps'"]),
        (["--model.backbon", "x"], ["--model.backbon", "'backbone'"]),
        (["--model.optimizer.lr", "x"], ["--model.optimizer.lr", "'x'", "a number"]),
        (["--allocator.swaps", "z"], ["--allocator.swaps", "'z'", "a whole number"]),
        (["--trainer.max_steps"], ["--trainer.max_steps", "a whole number"]),
        (["foo"], ["'foo' is no option"]),
        (["c.yaml"], ["'c.yaml' is no option", "write --config c.yaml"]),
        (["--config"], ["--config needs a file"]),
        (["--config", "--trainer.max_steps", "3"], ["--config needs a file"]),
        (["--model.adapter", "c.yaml"], ["'c.yaml' is a file", "name the folder"]),
        (
            ["--trainer.fast_dev_run", "true"],
            ["fast_dev_run", "leave the allocator out", "--allocator null"],
        ),
        (["--allocator", "none"], ["adaptrank: --allocator: ", "no Allocator 'none'"]),
        (["--model", "CausalML"], ["adaptrank: --model: ", "'CausalLM'"]),
        (
            ["--model.adapters", "[{parameterization: [LoRA, LoRAA]}]"],
            ["adaptrank: --model.adapters: ", "parameterization[1]", "'LoRA'"],
        ),
        (
            ["--model.adapters", "[{parameterization: [LoRA], name: 3}]"],
            ["--model.adapters: ", 'quote it, as in "3"'],
        ),
        (
            ["--model.adapters", "null", "--config", "c.yaml", "--model.backbon", "x"],
            ["--model.backbon: "],
        ),
        (["--config", "cc.yaml"], ["'cc.yaml'", "did you mean 'c.yaml'"]),
        (["--ckpt_path", "last.ckpt"], ["ckpt_path", "no checkpoint 'last.ckpt'"]),
        (["--ckpt_path", "c.yaml"], ["c.yaml is no Lightning checkpoint"]),
    ],
)
def test_a_mistake_on_the_command_line(args, wanted, config, mistake):
    text = mistake(config, *args)
    for part in wanted:
        assert part in text


def test_broken_yaml_shows_file_line_and_column(tmp_path, mistake):
    (tmp_path / "broken.yaml").write_text(
        "model:\n  init_args: {backbone: tiny\ntrainer:\n  max_steps: 3\n"
    )
    text = mistake(None, "--config", "broken.yaml")
    assert "broken.yaml, line 3, column 8" in text
    assert "not YAML" in text
    assert text.rstrip().endswith("trainer:")
    (tmp_path / "list.yaml").write_text("- a\n")
    assert "list.yaml holds a list" in mistake(None, "--config", "list.yaml")


def test_a_mistake_leaves_the_runs_of_others_alone(config, mistake, tmp_path):
    (tmp_path / "kept" / "c" / "0").mkdir(parents=True)
    mistake(put(config, ("trainer", "max_steps"), 3), "--runs", "kept")
    assert [p.name for p in (tmp_path / "kept" / "c").iterdir()] == ["0"]


def test_debug_shows_the_traceback(config, mistake, monkeypatch):
    broken = put(config, (*METHODS, 1, "init_args", "rank"), 0)
    mistake(broken)
    with pytest.raises(ValueError, match="rank=0"):
        main(["fit", "--config", "c.yaml", "--debug"])
    monkeypatch.setenv("ADAPTRANK_DEBUG", "1")
    with pytest.raises(ValueError, match="rank=0"):
        main(["fit", "--config", "c.yaml"])


def test_a_bug_keeps_its_traceback(config, tmp_path, monkeypatch):
    """In a user's class while it is built, and a ValueError in mid-training: neither is a mistake in the configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faulty_callbacks.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Early(Callback):\n"
        "    def __init__(self):\n"
        "        int('seven')\n"
        "class Late(Callback):\n"
        "    def on_train_batch_end(self, *_):\n"
        "        raise ValueError('deep in training')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config["model"]["init_args"]["adapters"][0]["targets"] = ["q_proj"]
    for name, expected in (("Early", "invalid literal"), ("Late", "deep in training")):
        changed = put(
            config, ("trainer", "callbacks"), [{"class_path": f"faulty_callbacks.{name}"}]
        )
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(changed))
        with pytest.raises(Exception, match=expected):
            main(["fit", "--config", "c.yaml", "--evaluate", "false"])


def test_an_unknown_verb(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["fitt"])
    assert leaving.value.code == 2
    assert "Did you mean 'fit'?" in capsys.readouterr().err


# ---- pure


def test_on_purpose_or_not():
    def purpose():
        raise ValueError("a sentence\nand more")

    def accident():
        int("seven")

    def missing():
        os.stat("/no/such/file")

    texts = {}
    for function in (purpose, accident, missing):
        try:
            function()
        except Exception as error:
            texts[function.__name__] = explain(error)
    assert texts == {
        "purpose": "a sentence\nand more",
        "accident": None,
        "missing": "/no/such/file: No such file or directory.",
    }
    assert explain(KeyError("x")) is None
    assert explain(ConfigError("said")) == "said"


def test_nearest_ignores_case_and_folders():
    assert nearest("elalora", ["AdaLoRA", "ElaLoRA"]) == "ElaLoRA"
    assert nearest("optim.AdmW", ["torch.optim.AdamW", "x.y.Other"]) == "torch.optim.AdamW"
    assert nearest("qqq", ["AdaLoRA"]) is None


def test_collect_steps_into_classes_as_jsonargparse_does(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "model:\n  class_path: CausalLM\n  init_args: {optimizer: {class_path: A, init_args: {lr: 1}}}\n"
    )
    tree, files, options = collect(
        ["--config", str(file), "--model.optimizer.lr=2", "--trainer.max_steps", "5"]
    )
    assert tree["model"]["init_args"]["optimizer"]["init_args"] == {"lr": "2"}
    assert tree["trainer"] == {"max_steps": "5"}
    assert tree["trainer"]["max_steps"].value == 5, (
        "an option may be a text or a number: its type decides"
    )
    assert files == [str(file)]
    key = ("model", "init_args", "optimizer", "init_args", "lr")
    assert options[key] == "--model.optimizer.lr"
    assert line_of(str(file), key) == 3


def test_another_class_forgets_the_old_arguments():
    tree = {"allocator": {"class_path": "ElaLoRA", "init_args": {"swaps": 4}}}
    errors.merge(tree, {"allocator": {"class_path": "AdaLoRA", "init_args": {"budget": 8}}})
    assert tree == {"allocator": {"class_path": "AdaLoRA", "init_args": {"budget": 8}}}
    errors.merge(tree, {"allocator": {"init_args": {"every": 3}}})
    assert tree["allocator"]["init_args"] == {"budget": 8, "every": 3}


def test_check_passes_what_is_right(config):
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

    from adaptrank.allocation import Allocator

    schema = {"model": LightningModule, "data": LightningDataModule, "allocator": Allocator}
    check(config, {**schema, "trainer": errors.Arguments(Trainer)})
    config["model"]["init_args"]["optimizer"] = "AdamW"
    config["model"]["init_args"]["optimizer"] = {"class_path": "AdamW", "init_args": {"lr": "1e-3"}}
    config["model"]["init_args"]["rank_pattern"] = {"q_proj": 2}
    config["trainer"]["devices"] = "auto"
    check(config, {**schema, "trainer": errors.Arguments(Trainer)})


def test_condense_keeps_the_innermost_reason():
    message = (
        'Parser key "model":\n  Does not validate against any of the Union subtypes\n  Errors:\n'
        "    - Parser key \"odd\":\n        Expected a <class 'int'>. Got value: x\n    - Expected a <class 'NoneType'>\n"
    )
    assert condense(message) == "odd: Expected a <class 'int'>. Got value: x"


def test_condense_tells_to_quote_a_string():
    message = (
        'Parser key "data":\n  - Problem with given class_path \'a.Data\':\n      Parser key "classes":\n'
        "        - Expected a <class 'str'>. Got value: False\n"
    )
    assert condense(message) == "classes: it must be a string (quote it). Got value: False"
    assert (
        condense("Problem with given class_path 'a.Data':\n")
        == "Problem with given class_path 'a.Data':"
    )


def test_long_lines_keep_their_ends():
    assert shorten("short") == "short"
    cut = shorten("At the beginning " + "of many words " * 40 + "comes the hint.")
    assert len(cut) <= 300
    assert cut.startswith("At the beginning of")
    assert cut.endswith("words comes the hint.")
    assert all(
        word in ("At", "the", "beginning", "of", "many", "words", "...", "comes", "hint.")
        for word in cut.split()
    )


def test_an_option_before_a_file_counts_no_more(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("trainer: {max_steps: 3}\n")
    options = collect(
        ["--trainer.max_steps", "5", "--trainer.devices", "1", "--config", str(file)]
    )[2]
    assert list(options) == [("trainer", "devices")]


def test_an_option_may_be_a_text_of_digits():
    from pathlib import Path

    tree = collect(
        [
            "--runs",
            "3",
            "--steps",
            "3",
            "--on",
            "true",
            "--rate",
            "0.5",
            "--either",
            "4",
            "--word",
            "no",
        ]
    )[0]
    kinds = {
        "runs": str,
        "steps": int,
        "on": bool,
        "rate": float,
        "either": int | None,
        "word": Path | str,
    }
    check(tree, kinds)
    with pytest.raises(ConfigError, match="must be true or false"):
        check(tree, {**kinds, "steps": bool})


def test_read_yaml_names_the_nearest_file(tmp_path):
    (tmp_path / "smoke.yaml").touch()
    with pytest.raises(ConfigError, match=r"did you mean .*smoke\.yaml"):
        read_yaml(str(tmp_path / "smok.yaml"))
    with pytest.raises(ConfigError, match="does not exist either"):
        read_yaml(str(tmp_path / "nowhere" / "smoke.yaml"))


def test_errors_import_nothing_heavy():
    """The module is used by light verbs, so that it must not bring torch along."""
    import subprocess

    code = "import sys, adaptrank.cli.errors, adaptrank.cli.help; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
