"""Mistakes that are found before PyTorch is imported, and what is left to the parser."""

import inspect
import json

import pytest
import yaml
from lightning.pytorch import Trainer

import adaptrank.modules
from adaptrank import ALLOCATORS, PARAMETERIZATIONS
from adaptrank._errors import UserError
from adaptrank.allocation import CONTROLS
from adaptrank.cli.dispatch import main, prepare
from adaptrank.cli.early_check import RUN_KEYS, VERB_KEYS, check_early
from adaptrank.cli.errors import ConfigError
from adaptrank.cli.list_items import expand_items
from adaptrank.cli.signatures import (
    ALLOCATOR,
    DATA,
    MODEL,
    PARAMETERIZATION,
    TRAINER,
    accepts,
    class_names,
    dataclass_signature,
    signature,
)
from adaptrank.cli.train import AdaptrankCLI
from adaptrank.cli.verbosity import read_verbosity
from adaptrank.modules import Adapter


def arguments(cls, skip=0):
    """The arguments that a class takes, with those that it hands to its bases."""
    names = {}
    for base in cls.__mro__:
        own = base.__dict__.get("__init__")
        if own is None or base is object:
            continue
        parameters = list(inspect.signature(own).parameters.values())[1:]
        plain = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        names |= dict.fromkeys(plain)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return set(list(names)[skip:])


def shipped(registry):
    return {n: c for n, c in registry.items() if c.__module__.startswith("adaptrank.")}


def test_the_sources_tell_the_arguments_of_every_class():
    for kind, registry, skip in (
        (PARAMETERIZATION, PARAMETERIZATIONS, 1),
        (ALLOCATOR, {**ALLOCATORS, **CONTROLS}, 0),
    ):
        classes = shipped(registry)
        assert set(class_names(kind)) == set(classes)
        for name, cls in classes.items():
            found = signature(kind, name)
            assert set(found.arguments) == arguments(cls, skip), name
            assert not found.is_open, name
    for kind, room in ((MODEL, adaptrank.modules), (DATA, adaptrank.data)):
        for name in class_names(kind):
            cls = getattr(room, name, None)
            if cls is not None:
                assert set(signature(kind, name).arguments) == arguments(cls), name
    assert set(signature(TRAINER, "Trainer").arguments) == arguments(Trainer)
    assert list(dataclass_signature("modules", "Adapter").arguments) == list(
        inspect.signature(Adapter).parameters
    )


@pytest.mark.parametrize("verb", VERB_KEYS)
def test_the_keys_of_a_verb_are_those_of_its_parser(verb):
    keys = {}

    class Looking(AdaptrankCLI):
        def parse_arguments(self, parser, args):
            keys.update(dict.fromkeys(self._parser(verb).keys()))
            raise UserError("enough")

    with pytest.raises(UserError, match="enough"):
        Looking(verb, [])
    tops = {key.partition(".")[0] for key in keys}
    assert tops | {"config"} == {*RUN_KEYS, *VERB_KEYS[verb]}


ENTRY = {"targets": ["q_proj"], "parameterization": [{"class_path": "LoRA"}]}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text_or_config):
        text = text_or_config
        if not isinstance(text, str):
            text = yaml.safe_dump(text, sort_keys=False)
        (tmp_path / "c.yaml").write_text(text)
        return "c.yaml"

    return write


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"trainer": {"max_stps": 3}}, "Unknown key trainer.max_stps. Did you mean"),
        ({"trainer": {"max_steps": [3]}}, "trainer.max_steps is [3]. It must be a whole number"),
        (
            {
                "trainer": {
                    "callbacks": [{"class_path": "EarlyStopping", "init_args": {"moniter": 1}}]
                }
            },
            "'monitor'",
        ),
        ({"model": {"class_path": "CausalML"}}, "Did you mean 'CausalLM'"),
        ({"model": {"class_path": "CausalLM", "backbone": "x"}}, "one level deeper"),
        (
            {
                "model": {
                    "class_path": "adaptrank.modules.CausalLM",
                    "init_args": {"adapters": [{**ENTRY, "target": "x"}]},
                }
            },
            "Unknown key model.init_args.adapters[0].target. Did you mean 'targets'",
        ),
        (
            {
                "model": {
                    "class_path": "CausalLM",
                    "init_args": {
                        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"momentun": 1}}
                    },
                }
            },
            "Did you mean 'momentum'",
        ),
        (
            {"data": {"class_path": "ArithmeticProblems", "init_args": {"batch_size": "x"}}},
            "a whole",
        ),
    ],
)
def test_a_mistake_has_its_file_and_line(config, sentence, file):
    with pytest.raises(ConfigError, match=r"^c\.yaml, line \d+: ") as refused:
        check_early("fit", ["--config", file(config)])
    assert sentence in str(refused.value)


def test_what_is_not_certain_is_left_to_the_parser(file):
    """Classes of others, classes from another file, anchors, and texts that are numbers."""
    text = """
model:
  class_path: my_models.Mine
  init_args: {anything: 1}
data: {init_args: {batch_sise: 3}}
allocator: {init_args: {swaps: 4}}
trainer:
  max_steps: "8"
  logger: {class_path: theirs.Logger, init_args: {x: 1}}
  callbacks: [{class_path: theirs.Callback, init_args: {x: 1}}, AdaLoRA]
"""
    check_early("fit", ["--config", file(text), "--trainer.devices", "auto"])
    anchored = """
model:
  class_path: CausalLM
  init_args:
    adapters:
      - &entry {targets: [q_proj], parameterization: [LoRA]}
      - {<<: *entry, name: other}
"""
    check_early("fit", ["--config", file(anchored), "--model.warmup", "1e-1"])
    check_early("fit", ["--allocator", "null", "--model.help", "CausalLM", "--print_config"])


def test_an_option_of_the_class_of_an_earlier_file(file):
    args = ["--config", file({"allocator": {"class_path": "AdaLoRA"}})]
    check_early("fit", [*args, "--allocator.budget", "8"])
    check_early("fit", [*args, "--allocator", "ElaLoRA", "--allocator.swaps", "8"])
    with pytest.raises(ConfigError, match=r"--allocator\.swaps: Unknown key"):
        check_early("fit", [*args, "--allocator.swaps", "8"])


def test_an_environment_variable_that_names_no_key(monkeypatch):
    monkeypatch.setenv("ADAPTRANK_FIT__TRAINER__MAX_STEPS", "3")
    check_early("fit", [])
    monkeypatch.setenv("ADAPTRANK_FIT__TRAINER__MAX_STPES", "3")
    with pytest.raises(ConfigError, match=r"names no key of fit. Did you mean '.*__MAX_STEPS'"):
        check_early("fit", [])
    monkeypatch.delenv("ADAPTRANK_FIT__TRAINER__MAX_STPES")
    monkeypatch.setenv("ADAPTRANK_FIT__MODEL__BACKBONE", "x")
    with pytest.raises(ConfigError, match="gives a class as a whole"):
        check_early("fit", [])


def test_the_environment_gives_keys_and_options_override_it(file, monkeypatch, capsys):
    monkeypatch.setenv("ADAPTRANK_FIT__TRAINER__MAX_STEPS", "3")
    monkeypatch.setenv("ADAPTRANK_FIT__RUNS", "elsewhere")
    data = "{class_path: ArithmeticProblems, init_args: {batch_size: 2}}"
    monkeypatch.setenv("ADAPTRANK_FIT__DATA", data)
    model = {"class_path": "CausalLM", "init_args": {"backbone": "x", "adapters": [ENTRY]}}
    args = ["fit", "--config", file({"model": model}), "--runs", "here", "--print_config"]
    with pytest.raises(SystemExit):
        main(args)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["max_steps"] == 3
    assert printed["data"]["init_args"]["batch_size"] == 2
    assert printed["runs"] == "here"


def test_one_item_of_a_list(file):
    model = {"class_path": "CausalLM", "init_args": {"adapters": [ENTRY, {**ENTRY, "name": "b"}]}}
    config = ["--config", file({"model": model})]
    for key in ("model.adapters.1.parameterization.0.rank", "model.adapters.1.rank"):
        *_, option, value = expand_items([*config, f"--{key}", "8"])
        assert option == "--model.adapters"
        first, second = json.loads(value)
        assert first == ENTRY
        assert second["parameterization"] == [{"class_path": "LoRA", "init_args": {"rank": 8}}]
    assert expand_items([*config, "--trainer.max_steps", "8"])[-1] == "8"
    for option, sentence in (
        ("--model.adapters.2.rank", "the list there has 2 item"),
        ("--trainer.callbacks.0", "there is no list 'trainer.callbacks' before this option"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            expand_items([*config, f"{option}=8"])
    assert accepts("LoRA", "rank")
    assert not accepts("LoRA", "rnak")


def test_verbosity(monkeypatch, capsys):
    monkeypatch.setenv("ADAPTRANK_LOG", "")
    assert read_verbosity(["fit", "--quiet", "--runs", "x"]) == ["fit", "--runs", "x"]
    assert read_verbosity(["fit"]) == ["fit"]
    for args, level, sentence in (
        (["fit", "--quiet", "--verbose"], "", "contradict"),
        (["fit"], "loud", "Use one of quiet, normal, verbose"),
    ):
        monkeypatch.setenv("ADAPTRANK_LOG", level)
        with pytest.raises(SystemExit):
            read_verbosity(args)
        assert sentence in capsys.readouterr().err


def test_a_mistake_of_the_command_line_exits_with_2(file, capsys):
    with pytest.raises(SystemExit) as leaving:
        prepare("fit", ["--config", "missing.yaml"])
    assert leaving.value.code == 2
    assert "no configuration file 'missing.yaml'" in capsys.readouterr().err


@pytest.mark.parametrize("first", ["data", "model", "allocator"])
def test_an_option_may_name_another_class_than_the_file(first, tmp_path):
    """In the short form and in the long one. What follows belongs to the class of the option."""
    file = tmp_path / "a.yaml"
    others = {
        "data": ("ArithmeticProblems", "CausalLMData", "sources"),
        "model": ("CausalLM", "SequenceClassification", "num_labels"),
        "allocator": ("AdaLoRA", "ElaLoRA", "swaps"),
    }
    old, new, argument = others[first]
    file.write_text(json.dumps({first: {"class_path": old}}))
    for form in ([f"--{first}", new], [f"--{first}.class_path", new]):
        for level in ("", "init_args."):
            option = f"--{first}.{level}{argument}"
            check_early("fit", ["--config", str(file), *form, option, "3"])
            with pytest.raises(ConfigError, match="Unknown key"):
                check_early("fit", ["--config", str(file), option, "3"])
            with pytest.raises(ConfigError, match="Unknown key"):
                check_early("fit", ["--config", str(file), *form, f"{option}x", "3"])
    with pytest.raises(ConfigError, match=f"Did you mean '{new}'"):
        check_early("fit", ["--config", str(file), f"--{first}.class_path", f"{new}x"])
