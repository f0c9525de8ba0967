"""A merged model in lm-evaluation-harness has the accuracy that we compute, on our own task."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptrank import adapt, save_adapter
from adaptrank.cli import main
from adaptrank.parameterizations import HyperAdapt
from adaptrank.testing import perturb

ROWS = [
    {"prompt": f"{a} + {b} =", "choices": [f"{a + b}", f"{a + b + 1}", f"{a}"], "label": 0}
    for a, b in ((1, 2), (3, 4), (2, 2), (5, 1), (4, 4), (1, 7), (6, 2), (3, 3))
]


@pytest.fixture
def task(tmp_path):
    """A folder with a task file and its data."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "sums.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "sums",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{prompt}}",
                "doc_to_choice": "choices",
                "doc_to_target": "label",
                "metric_list": [{"metric": "acc"}],
            }
        )
    )
    return folder


def accuracy(folder):
    """By hand: the choice with the largest log-probability after the prompt and a space."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    right = 0
    for row in ROWS:
        start = tokenizer(row["prompt"])["input_ids"]
        scores = []
        for choice in row["choices"]:
            ids = tokenizer(f"{row['prompt']} {choice}")["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
            scores.append(sum(float(logs[i - 1, ids[i]]) for i in range(len(start), len(ids))))
        right += max(range(3), key=lambda i: scores[i]) == row["label"]
    return right / len(ROWS)


def test_the_harness_reads_a_merged_model(tmp_path, task, tiny_llama, capsys):
    import lm_eval
    from lm_eval.tasks import TaskManager

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    adapt(model, "all-linear", HyperAdapt)
    perturb(model, 0.3)
    save_adapter(
        model, tmp_path / "adapter", {"name": str(tiny_llama), "auto_class": "AutoModelForCausalLM"}
    )
    main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")])
    capsys.readouterr()
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "merged"), "dtype": "float32", "device": "cpu"},
        tasks=["sums"],
        task_manager=TaskManager(include_path=str(task), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
    )
    assert found["results"]["sums"]["acc,none"] == accuracy(tmp_path / "merged")
