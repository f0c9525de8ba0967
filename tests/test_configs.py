"""Every configuration that ships, for a few steps on a tiny model."""

import inspect
import json
import math
from pathlib import Path

import pytest
import yaml

from adaptrank import ALLOCATORS, load_adapter
from adaptrank.axes import rank_axes
from adaptrank.cli import main
from adaptrank.parameterizations import wrapped_layers

CONFIGS = sorted(Path(__file__).parents[1].joinpath("configs").glob("*.yaml"))
STEPS = 4
SHORT_ROUNDS = {"every": 2, "restart_warmup": 1, "links": 2}
"""Arguments of training strategies under which a run of four steps has two rounds."""


def short(config, backbones):
    """The same run on a tiny model of its kind, with less data, fewer steps and early events."""
    task = config["model"]["class_path"].rpartition(".")[2]
    arguments = config["model"]["init_args"]
    arguments["backbone"] = backbones[task]
    arguments["dtype"] = "fp32"
    config["data"].setdefault("init_args", {}).update(
        batch_size=4, train_size=8 * STEPS, val_size=4
    )
    if "tasks" in config["data"]["init_args"]:
        # Two tasks, with a border in the middle, and examples of both to measure.
        config["data"]["init_args"].update(val_size=20, tasks=2, epochs_per_task=1)
        config["data"]["init_args"].update(train_size=4 * STEPS)
    config["trainer"] = {
        **config["trainer"],
        "max_epochs": None,
        "max_steps": STEPS,
        "accelerator": "cpu",
    }
    config["trainer"].update(enable_progress_bar=False, log_every_n_steps=1)
    for key in ("allocator", "initial_ranks"):
        if config.get(key):
            schedule = config[key].setdefault("init_args", {})
            known = inspect.signature(ALLOCATORS[config[key]["class_path"]]).parameters
            schedule.update({name: 1 for name in ("every", "warmup", "final") if name in known})
            schedule.pop("budget", None)  # is that of the large model
    if config.get("training_strategy"):
        rounds = config["training_strategy"].setdefault("init_args", {})
        for name, few in SHORT_ROUNDS.items():
            if name in rounds:
                rounds[name] = few
    return config


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_configuration_trains_and_leaves_an_adapter(
    file, tiny_llama, tiny_bert, tiny_vit, tiny_t5, tmp_path
):
    import transformers

    backbones = {
        "CausalLM": tiny_llama,
        "SequenceClassification": tiny_bert,
        "TokenClassification": tiny_bert,
        "MultipleChoice": tiny_bert,
        "Seq2Seq": tiny_t5,
        "ImageClassification": tiny_vit,
    }
    config = short(yaml.safe_load(file.read_text(encoding="utf-8")), backbones)
    (tmp_path / file.name).write_text(yaml.safe_dump(config))
    main(
        [
            "fit",
            "--config",
            str(tmp_path / file.name),
            "--runs",
            str(tmp_path / "runs"),
            "--evaluate",
            "false",
        ]
    )
    folder = tmp_path / "runs" / file.stem / "0"

    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train_loss"] for line in logged if "train_loss" in line]
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses))
    if config.get("allocator"):
        assert (folder / "ranks.jsonl").read_text(), "no event"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == STEPS

    described = json.loads((folder / "adapter" / "adapter_config.json").read_text())["base"]
    labels = {key: described[key] for key in ("num_labels",) if key in described}
    auto_class = getattr(transformers, described["auto_class"])
    model = auto_class.from_pretrained(config["model"]["init_args"]["backbone"], **labels)
    load_adapter(model, folder / "adapter")
    assert len(wrapped_layers(model)) == sum(
        kind["count"] for kind in summary["layers"] if kind["method"] != "trained whole"
    )
    assert sum(len(axis) for axis in rank_axes(model).values()) == summary["ranks"]
