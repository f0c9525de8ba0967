"""Sentences of mistakes, on the command line in this process, and of single functions."""

import copy
import os
import sys

import pytest
import yaml
from lightning import LightningModule

from adaptrank import modules
from adaptrank._errors import UserError, nearest
from adaptrank.cli import main
from adaptrank.cli.errors import ConfigError, explain, shorten
from adaptrank.cli.given import locate, read_node
from adaptrank.cli.known_classes import one_of
from adaptrank.cli.wording import Report
from adaptrank.modules import CausalLM

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
    """Run a verb that must exit with 2 and leave no run folder, and return its short text."""
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
    "unknown key at the top": (
        ("modle",),
        1,
        ["key modle", "Did you mean 'model'", "c.yaml, line "],
    ),
    "unknown key of the trainer": (
        ("trainer", "max_step"),
        3,
        ["key trainer.max_step.", "'trainer.max_steps'"],
    ),
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
        ["'ElaLora'", "Did you mean 'ElaLoRA'"],
    ),
    "unknown method": ((*METHODS, 0), "HyperAdpat", ["'HyperAdpat'", "'HyperAdapt'", "DoRA"]),
    "unknown optimizer": (
        ("model", "init_args", "optimizer", "class_path"),
        "torch.optim.AdmW",
        ["no 'AdmW'", "'torch.optim.AdamW'"],
    ),
    "unknown optimizer of this library": (
        ("model", "init_args", "optimizer", "class_path"),
        "adaptrank.optimizers.LoRARite",
        ["no 'LoRARite'", "'adaptrank.optimizers.LoRARITE'", "ScaledAdamW"],
    ),
    "argument of an optimizer of this library": (
        ("model", "init_args", "optimizer"),
        {"class_path": "LoRARITE", "init_args": {"escapes": True}},
        ["init_args.escapes", "Did you mean 'escape'?", "LoRARITE accepts lr, betas"],
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
        ["'cosin'", "'linear'", "Did you mean 'cosine'"],
    ),
    "text for a number": (
        ("model", "init_args", "warmup"),
        "long",
        ["warmup is 'long'", "a number"],
    ),
    "text for a list": (METHODS, "LoRA", ["'LoRA'", "must be a list", "Write [LoRA]"]),
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
        ["batch_size=0", "Use 1 or more"],
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
        ["trainer.callbacks lists AdaLoRA", "Keep one"],
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
        (
            ["--tariner.max_steps", "3"],
            ["--tariner.max_steps", "Did you mean '--trainer.max_steps'"],
        ),
        (["--trainer.max_step=3"], ["--trainer.max_step.", "'--trainer.max_steps'"]),
        (["--model.backbon", "x"], ["--model.backbon", "'backbone'"]),
        (["--model.optimizer.lr", "x"], ["--model.optimizer.lr", "'x'", "a number"]),
        (["--allocator.swaps", "z"], ["--allocator.swaps", "'z'", "a whole number"]),
        (["--trainer.max_steps"], ["--trainer.max_steps", "a whole number"]),
        (["foo"], ["'foo' is no option"]),
        (["c.yaml"], ["'c.yaml' is no option", "Write --config c.yaml"]),
        (["--config"], ["--config needs a file"]),
        (["--config", "--trainer.max_steps", "3"], ["--config needs a file"]),
        (["--model.adapter", "c.yaml"], ["'c.yaml' is a file", "Name the folder"]),
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
        (["--config", "cc.yaml"], ["'cc.yaml'", "Did you mean 'c.yaml'"]),
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
    """A ZeroDivisionError while a user's class is built, and a ValueError in mid-training."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faulty_callbacks.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Early(Callback):\n"
        "    def __init__(self):\n"
        "        1 / 0\n"
        "class Late(Callback):\n"
        "    def on_train_batch_end(self, *_):\n"
        "        raise ValueError('deep in training')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config["model"]["init_args"]["adapters"][0]["targets"] = ["q_proj"]
    for name, expected in (("Early", "division by zero"), ("Late", "deep in training")):
        changed = put(
            config, ("trainer", "callbacks"), [{"class_path": f"faulty_callbacks.{name}"}]
        )
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(changed))
        with pytest.raises(Exception, match=expected):
            main(["fit", "--config", "c.yaml", "--evaluate", "false"])


def test_a_constructor_that_refuses_its_arguments_is_named(config, mistake, tmp_path, monkeypatch):
    """A ValueError of a user's own class, of a callback and of an optimizer that is built later."""
    (tmp_path / "own_refusals.py").write_text(
        "import torch\n"
        "from lightning.pytorch import Callback\n"
        "class Picky(Callback):\n"
        "    def __init__(self, size: str = 'seven'):\n"
        "        self.size = int(size)\n"
        "class Step(torch.optim.SGD):\n"
        "    def __init__(self, params, lr: float = 0.1):\n"
        "        raise TypeError('lr has to be a schedule')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    callback = put(config, ("trainer", "callbacks"), [{"class_path": "own_refusals.Picky"}])
    text = mistake(callback)
    assert "Picky: invalid literal for int() with base 10: 'seven'" in text
    assert "--debug" in text
    where = ("model", "init_args", "optimizer")
    text = mistake(put(config, where, {"class_path": "own_refusals.Step"}), "--evaluate", "false")
    assert "Step: lr has to be a schedule" in text


def test_an_unknown_verb(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["fitt"])
    assert leaving.value.code == 2
    assert "Did you mean 'fit'?" in capsys.readouterr().err


# ---- pure


def test_a_mistake_or_a_bug():
    def mistake():
        raise UserError("a sentence\nand more")

    def bug():
        int("seven")

    def missing():
        os.stat("/no/such/file")

    def missing_package():
        raise ImportError("Install the package.")

    def broken_import():
        import adaptrank.no_such_module  # noqa: F401

    texts = {}
    for function in (mistake, bug, missing, missing_package, broken_import):
        try:
            function()
        except Exception as error:
            texts[function.__name__] = explain(error)
    assert texts == {
        "mistake": "a sentence\nand more",
        "bug": None,
        "missing": "/no/such/file: No such file or directory.",
        "missing_package": "Install the package.",
        "broken_import": None,
    }
    assert explain(KeyError("x")) is None
    assert explain(ConfigError("said")) == "said"


def test_nearest_ignores_case_and_folders():
    assert nearest("elalora", ["AdaLoRA", "ElaLoRA"]) == "ElaLoRA"
    assert nearest("optim.AdmW", ["torch.optim.AdamW", "x.y.Other"]) == "torch.optim.AdamW"
    assert nearest("qqq", ["AdaLoRA"]) is None


def test_the_place_of_a_value_in_a_class(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "model:\n  class_path: CausalLM\n"
        "  init_args: {optimizer: {class_path: A, init_args: {lr: 1}}}\n"
    )
    args = ["--config", str(file), "--model.optimizer.lr=2", "--trainer.max_steps", "5"]
    entry = locate(args, ("model", "optimizer", "lr"), "2")
    assert entry.where == "--model.optimizer.lr"
    assert entry.key == ("model", "optimizer", "lr")
    entry = locate(args, ("model", "lr"), "1")
    assert entry.where == f"{file}, line 3"
    assert entry.key == ("model", "init_args", "optimizer", "init_args", "lr")
    assert entry.value == 1
    assert locate(args, ("trainer", "max_steps"), None).value == 5
    assert locate(args, ("trainer", "max_step"), None) is None


def parsed(config, capsys, tmp_path, *args):
    """The whole configuration, as the command would use it."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        main(["fit", "--config", str(tmp_path / "c.yaml"), *args, "--print_config"])
    said = capsys.readouterr()
    assert leaving.value.code == 0, said.err
    return yaml.safe_load(said.out)


def test_another_class_forgets_the_old_arguments(config, capsys, tmp_path):
    args = ["--allocator", "AdaLoRA", "--allocator.budget", "8", "--allocator.every", "3"]
    arguments = parsed(config, capsys, tmp_path, *args)["allocator"]["init_args"]
    assert arguments["budget"] == 8
    assert arguments["every"] == 3
    assert "swaps" not in arguments


def test_what_is_right_passes(config, capsys, tmp_path):
    parsed(config, capsys, tmp_path)
    arguments = config["model"]["init_args"]
    arguments["optimizer"] = "torch.optim.AdamW"
    parsed(config, capsys, tmp_path)
    arguments["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": "1e-3"}}
    arguments["rank_pattern"] = {"q_proj": 2}
    config["trainer"]["devices"] = "auto"
    made = parsed(config, capsys, tmp_path)
    assert made["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-3


def test_a_report_keeps_the_innermost_reason():
    message = (
        'Parser key "odd":\n  Does not validate against any of the Union subtypes\n  Errors:\n'
        "    - Expected a <class 'int'>. Got value: x\n    - Expected a <class 'NoneType'>\n"
        "  Given value type: <class 'list'>\n  Given value: ['x',\n  more of it]"
    )
    report = Report(message)
    assert report.names == ("odd",)
    assert report.reasons == ["Expected a <class 'int'>", "Expected a <class 'NoneType'>"]
    assert report.value == "x"


def test_a_report_of_one_line():
    report = Report("Parser key \"trainer.max_steps\": Expected a <class 'int'>. Got value: many")
    assert report.names == ("trainer", "max_steps")
    assert report.reasons == ["Expected a <class 'int'>"]
    assert report.value == "many"
    assert Report("unrecognized arguments: foo").reasons == ["unrecognized arguments: foo"]


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
    args = ["--trainer.max_steps", "5", "--trainer.devices", "1", "--config", str(file)]
    assert locate(args, ("trainer", "max_steps"), None).where == f"{file}, line 1"
    assert locate(args, ("trainer", "devices"), None).where == "--trainer.devices"


def test_an_option_may_be_a_text_of_digits(config, capsys, tmp_path, mistake):
    made = parsed(config, capsys, tmp_path, "--runs", "3", "--model.adapter", "4")
    assert made["runs"] == "3"
    assert made["model"]["init_args"]["adapter"] == "4"
    assert "must be true or false" in mistake(config, "--evaluate", "3")


def test_reading_a_file_names_the_nearest(tmp_path):
    (tmp_path / "smoke.yaml").touch()
    with pytest.raises(ConfigError, match=r"Did you mean .*smoke\.yaml"):
        read_node(str(tmp_path / "smok.yaml"))
    with pytest.raises(ConfigError, match="does not exist either"):
        read_node(str(tmp_path / "nowhere" / "smoke.yaml"))


def test_errors_import_nothing_heavy():
    """The module is used by light verbs, so that it must not bring torch along."""
    import subprocess

    code = "import sys, adaptrank.cli.errors, adaptrank.cli.help; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_classes_of_the_library_are_named_first():
    """Also beside many classes of a user, and where one of them derives from the library's."""
    users = [type(f"A{i}", (CausalLM,), {"__module__": "users"}) for i in range(20)]
    own, _, others = one_of(LightningModule).removeprefix("one of ").partition(", A0")
    assert {"CausalLM", "SequenceClassification"} <= set(own.split(", "))
    assert all(hasattr(modules, name) for name in own.split(", "))
    assert others
    assert users
