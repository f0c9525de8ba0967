"""The key `training_strategy`: its checks, `plan`, the files of a run, and the tables."""

import json
import re

import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from test_allocators import Toy, fit
from test_configs import CONFIGS, short
from test_strategies import LORA2

from adaptrank._errors import UserError
from adaptrank.allocation import ALLOCATORS
from adaptrank.cli import main
from adaptrank.cli.early_check import check_early
from adaptrank.cli.errors import ConfigError
from adaptrank.cli.participants import participants
from adaptrank.cli.signatures import PARAMETERIZATION, STRATEGY, class_names
from adaptrank.cli.verbs import methods
from adaptrank.reports.history import read_history
from adaptrank.reports.ranks import page
from adaptrank.strategies import (
    STRATEGIES,
    ChainOfLoRA,
    ReLoRA,
    Rounds,
    TrainingStrategy,
    beside_allocator,
    on_method,
)


@pytest.fixture
def configured(tiny_llama, tmp_path):
    """Write a short form of a shipped configuration, and return its file."""

    def write(name, strategy=None, **more):
        (file,) = (file for file in CONFIGS if file.stem == name)
        config = short(yaml.safe_load(file.read_text()), {"CausalLM": tiny_llama})
        config |= more
        if strategy is not None:
            config["training_strategy"] = strategy
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        return tmp_path / f"{name}.yaml"

    return write


def refused(capsys, verb, file, *more):
    with pytest.raises(SystemExit) as left:
        main([verb, "--config", str(file), *more])
    assert left.value.code == 2
    return " ".join(capsys.readouterr().err.split())


# ---- the key


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("ReLora", "there is no training strategy 'ReLora'. Did you mean 'ReLoRA'?"),
        ({"class_path": "Boosting"}, "there is no training strategy 'Boosting'. Known: Chain"),
        ("none", "For none, write null"),
        ({"class_path": "ReLoRA", "init_args": {"evry": 3}}, "Did you mean 'every'?"),
        ({"class_path": "ReLoRA", "init_args": {"every": "x"}}, "a whole number"),
        ({"class_path": "ReLoRA", "every": 3}, "belongs under init_args"),
    ],
)
def test_a_mistake_is_found_before_anything_is_imported(value, sentence, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"training_strategy": value}))
    with pytest.raises(ConfigError) as said:
        check_early("fit", ["--config", str(file)])
    assert sentence in " ".join(str(said.value).split())


def test_a_wrong_name_in_the_callbacks_is_found_too(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "ReLoRA"}]}}))
    check_early("fit", ["--config", str(file)])


def test_two_strategies_are_refused_wherever_they_stand():
    with pytest.raises(
        ConfigError, match=r"`training_strategy` is ReLoRA, and trainer.callbacks li"
    ):
        participants(None, None, ReLoRA(), [ChainOfLoRA()])
    with pytest.raises(ConfigError, match=r"lists ReLoRA, and trainer.callbacks lists ChainOfLoRA"):
        participants(None, None, None, [ReLoRA(), ChainOfLoRA()])
    with pytest.raises(UserError, match="ReLoRA and SoRA: its gates"):
        participants(ALLOCATORS["SoRA"](), None, ReLoRA(), [])
    strategy, allocator = ReLoRA(), ALLOCATORS["ElaLoRA"]()
    assert participants(allocator, None, strategy, []) == [allocator, strategy]


def test_bases_and_ledgers_are_no_names_to_choose():
    assert class_names(STRATEGY) == sorted(
        name for name, cls in STRATEGIES.items() if cls.__module__.startswith("adaptrank.")
    )
    assert "MergedUpdates" not in class_names(PARAMETERIZATION)


def test_transformers_trainer_gets_one_sentence():
    with pytest.raises(UserError, match="ReLoRA does not work in transformers' Trainer"):
        ReLoRA().on_init_end(None, None, None, model=None)


# ---- plan


def test_plan_tells_the_rounds_and_refuses_what_fit_refuses(configured, capsys):
    file = configured("pt_peft_llama")
    main(["plan", "--config", str(file), "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["training_strategy"] == "PTPEFT"
    spans = [(each["start"], each["end"]) for each in data["rounds"]]
    assert spans == [(0, 1), (1, 4)]
    assert data["rounds"][0]["trained"] == data["kinds"]["model"] < data["trainable"]
    assert data["rounds"][1]["trained"] == data["trainable"]
    strategy = {"class_path": "ChainOfLoRA", "init_args": {"links": 2, "ranks": [4, 1]}}
    file = configured("lora_llama", strategy)
    main(["plan", "--config", str(file)])
    said = capsys.readouterr().out
    first, second = re.findall(r"round +\d  steps (\d to \d) +([\d,]+) numbers train", said)
    assert (first[0], second[0]) == ("1 to 2", "3 to 4")
    trained = [int(each[1].replace(",", "")) for each in (first, second)]
    assert trained[0] == 4 * trained[1]
    file = configured("lora_llama", {"class_path": "ChainOfLoRA", "init_args": {"links": 9}})
    said = [refused(capsys, verb, file) for verb in ("plan", "fit")]
    assert said[0] == said[1]
    assert "9 rounds do not fit into a run of 4" in said[0]


# ---- a run


def test_a_run_leaves_its_rounds_and_says_what_trains_and_what_is_stored(
    configured, tmp_path, capsys
):
    file = configured("relora_llama")
    runs = ["--runs", str(tmp_path / "runs"), "--evaluate", "false"]
    main(["fit", "--config", str(file), *runs])
    said = capsys.readouterr().out
    folder = tmp_path / "runs" / "relora_llama" / "0"
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [(each["round"], each["step"]) for each in rounds] == [(0, 0), (1, 2)]
    summary = json.loads((folder / "summary.json").read_text())
    trained, stored = summary["rounds"]["trained"], summary["rounds"]["stored"]
    assert trained == [summary["trainable"]] * 2
    assert stored == 2 * summary["trainable"]  # the live update, and one that was merged
    assert f"ReLoRA: 2 rounds, {trained[0]:,} numbers train in a round, {stored:,} are sto" in said
    assert not any("merged" in axis for axis in json.loads((folder / "ranks.json").read_text()))
    # The file has a ledger, and loads beside the adapters of the configuration.
    main(["validate", "--config", str(file), "--adapter", str(folder / "adapter")])
    assert "perplexity" in capsys.readouterr().out
    # Without an allocator the report shows the rounds.
    history = read_history(folder)
    assert history.allocators == ["ReLoRA"]
    html = page(history, {}, "python -m adaptrank fit")
    assert "round 2 of 2 begins" in html
    assert "<h2>Rounds</h2>" in html
    broken = folder / "rounds.jsonl"
    broken.write_text('{"step": 0}\n')
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["report", str(folder)])
    assert "rounds.jsonl, line 1: the key 'round' is missing" in capsys.readouterr().err


def test_a_longer_run_crosses_the_border_at_which_the_shorter_one_ended(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    fit(Toy(LORA2), ReLoRA(every=2, restart_warmup=0), checkpoint, steps=4)
    resumed = ReLoRA(every=2, restart_warmup=0)
    fit(Toy(LORA2), resumed, steps=6, ckpt_path=tmp_path / "step=4.ckpt")
    assert [event["step"] for event in resumed.round_events] == [0, 2, 4]
    with pytest.raises(UserError, match="every: 2 there, 3 here; rounds that are over ended at"):
        fit(Toy(LORA2), ReLoRA(every=3, restart_warmup=0), ckpt_path=tmp_path / "step=4.ckpt")


def test_a_second_fit_of_one_module_finds_everything_trainable():
    """A strategy that freezes tensors in its last round lets them train again at its end."""

    class Half(TrainingStrategy, registered=False):
        """Freeze A in the second half."""

        def rounds(self, total_steps):
            return Rounds.of_count(2, total_steps)

        def arrange(self, number):
            for layer in self.layers.values():
                layer.A.requires_grad_(number == 0)

    model = Toy(LORA2)
    for _ in range(2):
        trainer = fit(model, Half(), steps=4)
        assert len(trainer.optimizers[0].param_groups[0]["params"]) == 6


# ---- tables


def test_methods_lists_strategies_and_what_they_fit(capsys):
    table = methods.read_table()
    assert {each["name"] for each in table["strategies"]} == set(class_names(STRATEGY))
    for name, cls in STRATEGIES.items():
        if not cls.__module__.startswith("adaptrank."):
            continue
        cells = table["strategy_methods"][name]
        assert cells == {nest: on_method(cls, *nest.split(" + ")) for nest in cells}
        cells = table["strategy_allocators"][name]
        assert cells == {each: beside_allocator(cls, ALLOCATORS[each]) for each in cells}
    assert table["strategy_methods"]["ReLoRA"]["LoRA"] == "works"
    refused = table["strategy_methods"]["ReLoRA"]["Prefix"]
    assert "<method>" in refused
    assert "it has no dense weight" in refused
    assert table["strategy_allocators"]["ReLoRA"]["SoRA"].startswith("its gates")
    main(["methods"])
    out = capsys.readouterr().out
    assert re.search(r"^  ReLoRA +stays +arXiv:2307.05695$", out, re.MULTILINE)
    main(["methods", "--pairs"])
    out = capsys.readouterr().out
    assert "Training strategies beside an allocator" in out
    assert max(map(len, out.splitlines())) <= 112
