import json
import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_auroc

from adaptrank.data import GeneratedChoices, MultipleChoiceData
from adaptrank.modules import Adapter, MultipleChoice
from adaptrank.modules.choice_scores import Choices
from adaptrank.modules.label_metrics import Scores, read_requests
from adaptrank.parameterizations import LoRA
from adaptrank.testing import perturb

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}
ROWS = [
    {"question": "How many ?", "choices": ["1", "2 and 3", "9"], "label": 2},
    {"question": "Question", "choices": ["more", "now"], "label": 0},
]


def chooser(folder, **arguments):
    return MultipleChoice(folder, [Adapter([partial(LoRA, rank=2)])], dtype="fp32", **arguments)


def rows_data(tmp_path, rows=ROWS, **arguments):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return MultipleChoiceData(str(file), validation=str(file), **{"batch_size": 2, **arguments})


def labels_of(data):
    return [(row["label"], row["choices"]) for row in data.rows("val")]


@pytest.fixture
def module(tiny_bert):
    module = chooser(tiny_bert)
    module.configure_model()
    perturb(module.model)
    return module.eval().requires_grad_(False)


# ---- the scores


def test_scores_are_those_of_the_model(module, tmp_path):
    """Choices that a row does not have are not computed, and change nothing."""
    data = rows_data(tmp_path)
    data.tokenizer = module.tokenizer
    data.setup("fit")
    batch = data.collate("val")(data.examples("val"))
    assert batch["choice_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    scores = module(batch)
    assert scores[1, 2] == -torch.inf
    for row, example in enumerate(data.examples("val")):
        alone = data.collate("val")([example])
        keys = ("input_ids", "attention_mask")
        expected = module.model(**{key: alone[key] for key in keys}).logits[0]
        torch.testing.assert_close(scores[row, : len(expected)], expected)


def test_the_evaluation_reports_loss_accuracy_and_calibration(module, tmp_path):
    data = rows_data(tmp_path, batch_size=1)
    (result,) = Trainer(**QUIET).validate(module, datamodule=data, verbose=False)
    batches = [data.collate("val")([example]) for example in data.examples("val")]
    logs = [module(batch)[0].log_softmax(-1) for batch in batches]
    right = [int(log.argmax()) == row["label"] for log, row in zip(logs, ROWS, strict=True)]
    losses = [-float(log[row["label"]]) for log, row in zip(logs, ROWS, strict=True)]
    assert result["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert result["accuracy"] == sum(right) / 2
    assert 0 <= result["calibration_error"] <= 1
    assert module.chance() == {"loss": pytest.approx((math.log(3) + math.log(2)) / 2)}


# ---- metrics


def validated(module, data):
    (result,) = Trainer(**QUIET).validate(module, datamodule=data, verbose=False)
    return result


def test_metrics_are_names_and_classes_to_which_a_place_is_a_class(tiny_bert, tmp_path):
    """Questions of a batch have fewer choices than the longest one, and no place is left out."""
    rows = [{**ROWS[k % 2], "label": k // 2 % 2} for k in range(8)]
    top = {"class_path": "MulticlassAccuracy", "name": "top_2"}
    top["init_args"] = {"top_k": 2, "average": "micro"}
    recall = {"class_path": "torchmetrics.Recall", "init_args": {"average": "none"}}
    module = chooser(tiny_bert, metrics=["accuracy", top, recall, "BinaryAUROC"])
    data = rows_data(tmp_path, rows, batch_size=1)
    result = validated(module, data)
    assert {*result} == {
        "loss", "accuracy", "top_2", "Recall_0", "Recall_1", "Recall_2", "BinaryAUROC",
    }  # fmt: skip
    module.eval()
    scores = [module(data.collate("val")([example]))[0] for example in data.examples("val")]
    chosen = [int(row.argmax()) for row in scores]
    is_right = torch.tensor([k == row["label"] for k, row in zip(chosen, rows, strict=True)])
    assert result["accuracy"] == pytest.approx(float(is_right.float().mean()))
    labels = torch.tensor([row["label"] for row in rows])
    ranks = [int((row > row[k]).sum()) for row, k in zip(scores, labels, strict=True)]
    assert result["top_2"] == pytest.approx(sum(rank < 2 for rank in ranks) / 8)
    assert result["Recall_1"] == pytest.approx(float(is_right[labels == 1].float().mean()))
    confidence = torch.stack([row.softmax(-1).max() for row in scores]).detach()
    assert result["BinaryAUROC"] == pytest.approx(float(binary_auroc(confidence, is_right.long())))


def test_metrics_follow_data_whose_questions_have_more_choices(tiny_bert, tmp_path):
    module = chooser(tiny_bert, metrics=["MulticlassF1Score"])
    short = rows_data(tmp_path, [ROWS[1], ROWS[1]])
    validated(module, short)
    assert module.choices.labels == 2
    assert validated(module, rows_data(tmp_path))
    assert module.choices.labels == 3


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (["f1"], "'f1' does not fit 3 choices. Use accuracy, calibration_error"),
        (["acuracy"], "Did you mean 'accuracy'"),
        (["MulticlassConfusionMatrix"], "which no log can hold"),
        (["torchmetrics.MeanSquaredError"], "does not fit multiple_choice with 3 choices"),
    ],
)
def test_a_metric_that_does_not_fit_choices_is_refused(metrics, said):
    with pytest.raises(ValueError, match=said):
        Scores(read_requests(metrics), Choices(3), None)


def test_a_class_has_to_know_how_many_choices_there_are():
    module = chooser("no backbone of this name", metrics=["MulticlassF1Score"])
    with pytest.raises(ValueError, match="Give it a property `num_choices`"):
        Trainer(**QUIET).validate(module, DataLoader([{}]))


def test_predictions_have_probabilities(module, tmp_path):
    data = rows_data(tmp_path, predict=str(tmp_path / "rows.jsonl"))
    ((first, second),) = Trainer(**QUIET).predict(module, datamodule=data)
    assert len(first["probabilities"]) == 3
    assert len(second["probabilities"]) == 2
    assert sum(second["probabilities"]) == pytest.approx(1, abs=1e-5)
    best = max(range(3), key=lambda k: first["probabilities"][k])
    assert (first["label"], first["choice"]) == (best, ROWS[0]["choices"][best])


def test_batches_of_another_task_are_refused(tiny_bert):
    from adaptrank.data import GeneratedQuestions

    data = GeneratedQuestions(batch_size=2, train_size=6, val_size=6)
    with pytest.raises(ValueError, match=r"\(rows, choices, tokens\).*MultipleChoiceData"):
        Trainer(**QUIET, max_steps=1).fit(chooser(tiny_bert), datamodule=data)


# ---- data


@pytest.mark.parametrize(
    ("choices", "label", "index"),
    [
        (["x", "y", "z"], 1, 1),
        (["x", "y", "z"], "B", 1),
        (["x", "y", "z"], "c", 2),
        (["x", "y", "z"], "y", 1),
        (["x", "y", "z"], "1", 1),
        ({"text": ["x", "y"], "label": ["A", "B"]}, "B", 1),
        ({"text": ["x", "y"], "label": ["1", "2"]}, "2", 1),
        ([{"label": "A", "text": "x"}, {"label": "B", "text": "y"}], "B", 1),
        (["x", "", "z"], 2, 1),
    ],
)
def test_a_label_is_a_number_a_letter_a_name_or_a_text(tmp_path, choices, label, index):
    rows = [{"question": "q", "choices": choices, "label": label}, {**ROWS[0], "label": 0}]
    (found, texts), _ = labels_of(rows_data(tmp_path, rows))
    assert found == index
    assert "" not in texts


def test_numbers_count_from_one_where_training_shows_it(tmp_path):
    rows = [{**ROWS[0], "label": "3"}, {**ROWS[1], "label": "1"}]
    assert [label for label, _ in labels_of(rows_data(tmp_path, rows))] == [2, 0]
    rows = [{**ROWS[0], "label": 2}, {**ROWS[1], "label": 2}]
    assert [label for label, _ in labels_of(rows_data(tmp_path, rows))] == [1, 1]
    rows = [{**ROWS[0], "label": 2}, {**ROWS[0], "label": 1}]
    assert [label for label, _ in labels_of(rows_data(tmp_path, rows))] == [2, 1]
    from_one = rows_data(tmp_path, rows, count_from=1)
    assert [label for label, _ in labels_of(from_one)] == [1, 0]


def test_choices_may_stand_in_columns(tmp_path):
    (tmp_path / "a.csv").write_text("ctx,a,b,c,gold\nthe,1,2,,b\nnow,3,4,5,2\n")
    file = str(tmp_path / "a.csv")
    data = MultipleChoiceData(
        file, validation=file, context="ctx", choices=["a", "b", "c"], label="gold"
    )
    assert labels_of(data) == [(1, ["1", "2"]), (2, ["3", "4", "5"])]
    assert [row["context"] for row in data.rows("val")] == ["the", "now"]


@pytest.mark.parametrize(
    ("row", "arguments", "said"),
    [
        ({"label": "D"}, {}, "Row 0 .* label 'D' is none of its 3 choices. Use 0 to 2, a letter"),
        ({"label": 0}, {"count_from": 1}, "label 0 is none of its 3 choices. Use 1 to 3"),
        ({"choices": "a or b"}, {}, "choices is 'a or b'. Give a list of texts"),
        ({"choices": ["", ""], "label": 0}, {}, "has no choice with a text"),
        ({"choices": [["a"], "b"]}, {}, "a list is no text, and every choice"),
        ({"label": None}, {}, "Row 0 .* has no 'label'"),
        ({}, {"count_from": 2}, "count_from=2 is no number of a first choice"),
        ({}, {"choices": ["a"]}, "leaves nothing to choose"),
        ({}, {"question": "missing"}, "no column 'missing'"),
    ],
)
def test_damaged_rows_are_refused_by_name(tmp_path, row, arguments, said):
    with pytest.raises(ValueError, match=said):
        rows_data(tmp_path, [{**ROWS[0], **row}], **arguments).rows("val")


def test_a_pair_holds_context_question_and_choice(module, tmp_path):
    from adaptrank.data.choice_task import pair_of

    assert pair_of({"question": "q"}, "c") == ("q", "c")
    assert pair_of({"question": "q", "context": "t"}, "c") == ("t", "q c")
    assert pair_of({"question": "", "context": "t"}, "c") == ("t", "c")


def test_generated_choices_share_no_word():
    data = GeneratedChoices(train_size=200, val_size=100)
    words = {}
    for split in ("train", "val"):
        rows = data.rows(split)
        assert {len(row["choices"]) for row in rows} == {2, 3, 4, 5}
        words[split] = {word for row in rows for word in row["choices"]}
    assert not words["train"] & words["val"]
