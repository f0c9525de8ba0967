"""What `plan` tells is what a run does."""

import json
from pathlib import Path

import pytest
import yaml
from test_configs import CONFIGS, short

from adaptrank.cli import main


@pytest.fixture
def files(tiny_llama, tiny_bert, tmp_path):
    def made(name, **more):
        file = next(file for file in CONFIGS if file.stem == name)
        config = short(
            yaml.safe_load(file.read_text()),
            {"CausalLM": tiny_llama, "SequenceClassification": tiny_bert},
        )
        for key, value in more.items():
            config[key].setdefault("init_args", {}).update(value)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        return tmp_path / f"{name}.yaml"

    return made


def planned(file, capsys, *more):
    capsys.readouterr()
    main(["plan", "--config", str(file), "--json", *more])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "name", ["elalora_llama", "adalora_llama", "sora_llama", "hybrid_llama", "pica_llama", "smoke"]
)
def test_its_figures_are_those_of_the_run(name, files, tmp_path, capsys):
    file = files(name)
    data = planned(file, capsys)
    main(["fit", "--config", str(file), "--runs", str(tmp_path / "runs"), "--evaluate", "false"])
    folder = tmp_path / "runs" / name / "0"
    summary = json.loads((folder / "summary.json").read_text())
    ends_equal = name == "pica_llama"  # elsewhere ranks move
    if ends_equal:
        assert data["trainable"] == summary["trainable"]
    assert data["frozen_parameters"] == summary["parameters"] - summary["trainable"]
    assert data["bytes"]["optimizer"] == 2 * data["bytes"]["parameters"]
    if data["allocator"]:
        events = [json.loads(line) for line in (folder / "ranks.jsonl").read_text().splitlines()]
        assert data["units_at_start"] == events[0]["active"]
        assert data["budget"] == [
            [event["step"], event["budget"]] for event in events if event["step"]
        ]
    if ends_equal:
        size = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
        assert data["bytes"]["file"] < size < data["bytes"]["file"] + 2**16  # the header


def test_it_loads_no_weight_and_leaves_no_folder(files, tmp_path, capsys, monkeypatch):
    from adaptrank import backbones

    monkeypatch.setattr(backbones, "load_model", lambda *a, **k: pytest.fail("a weight was loaded"))
    monkeypatch.chdir(tmp_path)
    file = files("elalora_llama")
    main(["plan", "--config", str(file)])
    out = capsys.readouterr().out
    assert "ElaLoRA (two pools), " in out
    assert "trainable" in out
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"allocator": {"every": 90}}, "would never act"),
        ({"allocator": {"warmup": 3, "final": 3}}, "would never act"),
        (
            {"model": {"adapters": [{"targets": ["nowhere"], "parameterization": ["LoRA"]}]}},
            "nowhere",
        ),
        (
            {
                "model": {
                    "adapters": [{"targets": "all-linear", "parameterization": ["HyperAdapt"]}]
                }
            },
            "nothing to allocate",
        ),
    ],
)
def test_what_a_run_refuses_it_refuses_with_the_same_sentence(change, sentence, files, capsys):
    file = files("elalora_llama", **change)
    said = []
    for verb in ("plan", "fit"):
        with pytest.raises(SystemExit) as left:
            main([verb, "--config", str(file), *(["--evaluate", "false"] if verb == "fit" else [])])
        assert left.value.code == 2
        said.append(" ".join(capsys.readouterr().err.split()))
    assert sentence in said[0]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"budget": 3, "floor": 1}, "a budget of 3 ranks is below 14"),
        ({"budget": 14, "floor": 1}, "leaves the floor of 1 unit(s) to each of 14 axes"),
        (
            {"budget": 84},
            "would never act: it prunes to a budget, and this one leaves all as it is",
        ),
    ],
)
def test_a_budget_at_which_nothing_can_move(files, capsys, arguments, sentence):
    file = files("adalora_llama", allocator=arguments)
    with pytest.raises(SystemExit):
        main(["plan", "--config", str(file)])
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_without_a_configuration(capsys):
    with pytest.raises(SystemExit):
        main(["plan"])
    assert "plan needs a configuration" in capsys.readouterr().err
