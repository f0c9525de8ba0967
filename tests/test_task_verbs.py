"""Each task from a YAML file through the verbs: fit, validate, predict, plan, merge, export."""

import json

import pytest
import torch
import transformers
import yaml

from adaptrank import load_adapter
from adaptrank.artifacts import read_adapter
from adaptrank.cli import main

TASKS = {
    "TokenClassification": ("GeneratedSentences", "bert", "TOKEN_CLS"),
    "Seq2Seq": ("GeneratedDates", "t5", "SEQ_2_SEQ_LM"),
    "MultipleChoice": ("GeneratedChoices", "bert", None),
}
"""Module -> its data, the kind of its model, and PEFT's name of the task."""


@pytest.fixture(params=TASKS)
def run(request, tiny_bert, tiny_t5, tmp_path, monkeypatch):
    """A run of each task: (name of the module, folder of the run, its configuration)."""
    data, kind, _ = TASKS[request.param]
    config = {
        "model": {
            "class_path": request.param,
            "init_args": {
                "backbone": {"bert": tiny_bert, "t5": tiny_t5}[kind],
                "dtype": "fp32",
                "adapters": [
                    {"parameterization": [{"class_path": "LoRA", "init_args": {"rank": 2}}]}
                ],
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {
            "class_path": data,
            "init_args": {"batch_size": 4, "train_size": 12, "val_size": 6},
        },
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False},
    }
    if request.param == "Seq2Seq":
        config["model"]["init_args"]["max_new_tokens"] = 4
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "task.yaml"
    file.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(file)])
    return request.param, tmp_path / "runs" / "task" / "0", str(file)


def test_a_task_runs_through_all_verbs(run, tmp_path, capsys):
    name, folder, file = run
    adapter = str(folder / "adapter")
    given = ["--config", file, "--model.adapter", adapter]
    summary = json.loads((folder / "summary.json").read_text())
    capsys.readouterr()

    main(["validate", *given])
    validated = capsys.readouterr().out
    main(["test", *given])
    tested = capsys.readouterr().out
    assert f"loss {summary['after']['loss']:16.4f}".split()[1] in validated
    scored, *figures = validated.splitlines()[1:]
    assert tested.splitlines()[1:] == [f"{scored}, since no `test` source is given", *figures]

    main(["predict", *given, "--out", str(tmp_path / "p.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(lines) == 6

    main(["plan", "--config", file, "--json"])
    out = capsys.readouterr().out
    plan = json.loads(out[out.index("{") :])
    assert plan["trainable"] == summary["trainable"]

    main(["merge", adapter, "--out", str(tmp_path / "merged"), "--dtype", "fp32"])
    main(["export", adapter, "--out", str(tmp_path / "peft")])
    described = read_adapter(adapter)
    auto_class = getattr(transformers, described["base"]["auto_class"])
    assert auto_class.__name__ == HEADS[name]
    merged = auto_class.from_pretrained(tmp_path / "merged").eval()
    labels = described["base"].get("num_labels")
    more = {} if labels is None else {"num_labels": labels}
    base = described["base"]["name"]
    ours = load_adapter(auto_class.from_pretrained(base, **more), adapter).eval()
    inputs = sample(name)
    expected = ours(**inputs).logits
    torch.testing.assert_close(merged(**inputs).logits, expected)

    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["task_type"] == TASKS[name][2]
    peft = pytest.importorskip("peft")
    loaded = peft.PeftModel.from_pretrained(
        auto_class.from_pretrained(base, **more), tmp_path / "peft"
    )
    torch.testing.assert_close(loaded.eval()(**inputs).logits, expected)


HEADS = {
    "TokenClassification": "AutoModelForTokenClassification",
    "Seq2Seq": "AutoModelForSeq2SeqLM",
    "MultipleChoice": "AutoModelForMultipleChoice",
}


def sample(name):
    """Inputs for a model of each task."""
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    if name == "Seq2Seq":
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids[None] if name == "MultipleChoice" else ids}
