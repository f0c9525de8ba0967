"""What tasks with labels share: metrics, class weights, several labels, numbers, splits."""

import json
import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
    MultilabelF1Score,
)
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_f1_score

from adaptrank import Adapter, load_adapter, save_adapter
from adaptrank._errors import UserError
from adaptrank.data import ClassificationData
from adaptrank.data.stratify import rarest, some_of_each, stratified_sample
from adaptrank.modules import CausalLM, SequenceClassification
from adaptrank.modules.class_weights import resolve_weights
from adaptrank.modules.label_metrics import Scores, read_requests
from adaptrank.modules.problems import MultiLabel, Regression, SingleLabel
from adaptrank.parameterizations import LoRA

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
WORDS = ("How many", "Answer the", "Question more")


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def texts(tmp_path, labels, name="t.jsonl", **columns):
    rows = []
    for k, label in enumerate(labels):
        rows.append({"text": f"{WORDS[k % 3]} {k % 10} {k // 10}", "label": label})
        rows[-1] |= {column: values[k] for column, values in columns.items()}
    return write(tmp_path / name, rows)


def made(backbone, **options):
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    return SequenceClassification(
        backbone, [Adapter([LoRA])], dtype="fp32", optimizer=optimizer, **options
    )


def logits_of(module, data):
    module.eval()
    with torch.no_grad():
        batches = list(data.val_dataloader())
        return (
            torch.cat([module(batch) for batch in batches]),
            torch.cat([batch["labels"] for batch in batches]),
        )


# ---- metrics


def scored(entries, problem, names=None, rows=48):
    """Return the values that the metrics of a configuration give, and what they were given."""
    scores = Scores(read_requests(entries), problem, names)
    generator = torch.Generator().manual_seed(1)
    output = torch.randn(rows, problem.labels, generator=generator)
    if isinstance(problem, SingleLabel):
        labels = torch.randint(problem.labels, (rows,), generator=generator)
    elif isinstance(problem, MultiLabel):
        labels = torch.randint(2, (rows, problem.labels), generator=generator)
    else:
        output = problem.shape_output(output)
        labels = output + torch.randn(output.shape, generator=generator)
    scores.update(output, labels)
    return {name: float(metric.compute()) for name, metric in scores.logged.items()}, output, labels


def test_a_class_of_torchmetrics_gets_the_number_of_classes_and_what_it_reads():
    path = "torchmetrics.classification."
    entries = [
        "accuracy",
        "calibration_error",
        {"class_path": f"{path}MulticlassF1Score", "init_args": {"average": "macro"}},
        {"class_path": "torchmetrics.F1Score", "name": "f1_micro", "init_args": {"top_k": 2}},
        "MulticlassCohenKappa",
    ]
    values, output, labels = scored(entries, SingleLabel(3))
    probabilities = output.softmax(-1)
    assert values["MulticlassF1Score"] == pytest.approx(
        float(multiclass_f1_score(probabilities, labels, 3, average="macro"))
    )
    assert values["f1_micro"] == pytest.approx(
        float(multiclass_f1_score(probabilities, labels, 3, average="micro", top_k=2))
    )
    assert values["calibration_error"] == pytest.approx(
        float(multiclass_calibration_error(probabilities, labels, 3))
    )
    assert values["accuracy"] == pytest.approx(float((output.argmax(-1) == labels).float().mean()))
    assert set(values) == {
        "accuracy", "calibration_error", "MulticlassF1Score", "f1_micro", "MulticlassCohenKappa",
    }  # fmt: skip


def test_two_classes_are_binary_unless_an_argument_speaks_of_several():
    entries = [
        {"class_path": "torchmetrics.F1Score", "name": "binary"},
        {"class_path": "torchmetrics.F1Score", "name": "macro", "init_args": {"average": "macro"}},
        "BinaryAUROC",
    ]
    values, output, labels = scored(["f1", *entries], SingleLabel(2))
    assert values["binary"] == values["f1"]
    assert values["macro"] == pytest.approx(
        float(multiclass_f1_score(output, labels, 2, average="macro"))
    )
    positive, negative = output.softmax(-1)[:, 1], labels == 0
    pairs = positive[~negative][:, None] - positive[negative][None]
    assert values["BinaryAUROC"] == pytest.approx(float((pairs > 0).float().mean()))


def test_a_metric_with_a_value_for_each_class_is_logged_by_their_names():
    entry = {"class_path": "MulticlassRecall", "name": "recall", "init_args": {"average": "none"}}
    values, output, labels = scored([entry], SingleLabel(3), ["a", "b", "c.d"])
    assert list(values) == ["recall_a", "recall_b", "recall_c.d"]
    chosen = output.argmax(-1)[labels == 1]
    assert values["recall_b"] == pytest.approx(float((chosen == 1).float().mean()))
    wrapped = {
        "class_path": "torchmetrics.ClasswiseWrapper",
        "init_args": {"metric": {"class_path": "MulticlassRecall", "init_args": {"average": None}}},
    }
    values, *_ = scored([wrapped], SingleLabel(3))
    assert len(values) == 3


def test_several_labels_and_numbers_have_their_own_metrics():
    values, output, labels = scored(
        ["f1", "exact_match", "calibration_error", "MultilabelAUROC"], MultiLabel(3)
    )
    f1 = MultilabelF1Score(3)
    assert values["f1"] == pytest.approx(float(f1(output.sigmoid(), labels)))
    exact = ((output > 0).long() == labels).all(-1).float().mean()
    assert values["exact_match"] == pytest.approx(float(exact))

    values, output, labels = scored(["rmse", "pearson", "mae"], Regression(1))
    assert values["rmse"] == pytest.approx(float((output - labels).square().mean().sqrt()))
    values, output, labels = scored(["rmse", "pearson"], Regression(2), ["x", "y"])
    assert values["rmse_y"] == pytest.approx(float((output - labels)[:, 1].square().mean().sqrt()))
    both = torch.stack([output[:, 0], labels[:, 0]])
    assert values["pearson_x"] == pytest.approx(float(torch.corrcoef(both)[0, 1]), abs=1e-5)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("acuracy", "Did you mean 'accuracy'"),
        ("torchmetrics.classification.MulticlasF1Score", "Did you mean 'MulticlassF1Score'"),
        ({"class_path": "torchmetrics.F2"}, "no metric 'torchmetrics.F2'"),
        ({"class_path": "no_such.Metric"}, "cannot be imported"),
        ({"class_path": "torch.nn.Linear"}, "is no metric"),
        ({"init_args": {}}, "Give a name, such as accuracy, or class_path"),
        ({"class_path": "MulticlassF1Score", "init_arg": {}}, "Did you mean 'init_args'"),
        ({"class_path": "MulticlassF1Score", "init_args": {"avrage": "macro"}}, "'average'"),
        ({"class_path": "MulticlassF1Score", "init_args": {"average": "x"}}, "average"),
        ({"class_path": "MulticlassConfusionMatrix"}, r"but \(3, 3\), which no log can hold"),
        ({"class_path": "MultilabelF1Score", "init_args": {"num_labels": 3}}, "does not fit"),
        ({"class_path": "BinaryF1Score"}, "does not fit single_label with 3"),
        ({"class_path": "torchmetrics.MeanSquaredError"}, "does not fit single_label"),
        ({"class_path": "MulticlassF1Score", "name": "loss"}, "the log has one"),
        ("pearson", r"'pearson' does not fit 3 label\(s\)\. Use accuracy, f1, matthews"),
    ],
)  # fmt: skip
def test_a_metric_that_does_not_fit_is_refused(entry, words):
    with pytest.raises(ValueError, match=words):
        Scores(read_requests([entry]), SingleLabel(3), None)


def test_names_in_the_log_differ():
    entries = ["f1", {"class_path": "MulticlassF1Score", "name": "f1"}]
    with pytest.raises(ValueError, match="Two metrics are called 'f1'"):
        read_requests(entries)
    with pytest.raises(ValueError, match="is no list"):
        read_requests("accuracy")


def test_metrics_are_those_of_the_whole_validation_set_and_are_reset(tiny_bert, tmp_path):
    data = ClassificationData(
        texts(tmp_path, [k % 3 for k in range(20)]),
        validation=texts(tmp_path, [k % 3 for k in range(7)], "v.jsonl"),
        batch_size=4,
    )
    recall = {"class_path": "MulticlassRecall", "name": "recall", "init_args": {"average": "none"}}
    module = made(tiny_bert, metrics=["accuracy", "calibration_error", recall])
    trainer = Trainer(**QUIET, max_epochs=2)
    trainer.fit(module, data)
    output, labels = logits_of(module, data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["loss"] == pytest.approx(float(F.cross_entropy(output, labels)), rel=1e-5)
    assert logged["accuracy"] == pytest.approx(float(MulticlassAccuracy(3, average="micro")(
        output, labels
    )))  # fmt: skip
    expected = MulticlassCalibrationError(3)(output.softmax(-1), labels)
    assert logged["calibration_error"] == pytest.approx(float(expected), abs=1e-6)
    for name in "012":
        chosen = output.argmax(-1)[labels == int(name)]
        assert logged[f"recall_{name}"] == pytest.approx(
            float((chosen == int(name)).float().mean())
        )


def test_a_metric_instance_comes_from_python(tiny_bert, tmp_path):
    data = ClassificationData(texts(tmp_path, [k % 3 for k in range(12)]), batch_size=4)
    module = made(tiny_bert, metrics=[MulticlassF1Score(3)])
    (result,) = Trainer(**QUIET).validate(module, datamodule=data, verbose=False)
    assert set(result) == {"loss", "MulticlassF1Score"}


# ---- class weights


def test_weights_by_name_by_list_and_balanced():
    counts = torch.tensor([6, 2, 0])
    names = ["a", "b", "1"]
    problem = SingleLabel(3)
    # scikit-learn: rows / (classes * rows of the class), of the classes that occur.
    balanced = resolve_weights("balanced", problem, names, counts)
    assert balanced.tolist() == [1, 3, 0]
    assert resolve_weights([2, 4, 1], problem, names, None).tolist() == [2, 4, 1]
    assert resolve_weights([1, 0.5, 0], problem, names, None).tolist() == [2, 1, 0]
    assert resolve_weights({"b": 3, 1: 2}, problem, names, None).tolist() == [1, 3, 2]
    several = resolve_weights("balanced", MultiLabel(2), None, torch.tensor([[6, 2], [2, 6]]))
    assert several.tolist() == pytest.approx([3, 1 / 3])
    with pytest.raises(ValueError, match=r"2 numbers, and there are 3 classes"):
        resolve_weights([1, 2], problem, names, None)
    with pytest.raises(ValueError, match=r"'aa', which is none .* Did you mean 'a'"):
        resolve_weights({"aa": 2}, problem, names, None)
    with pytest.raises(ValueError, match="counts none"):
        resolve_weights("balanced", problem, names, None)


@pytest.mark.parametrize("given", ["balance", 2, [1, -1], [0, 0], {"a": math.inf}, [True, 1]])
def test_weights_that_make_no_sense_are_refused_before_a_backbone_is_loaded(given):
    with pytest.raises(ValueError, match="class_weights"):
        made("no/such-model", class_weights=given)


def test_the_weighted_loss_is_that_of_torch_and_counts_balanced_rows(tiny_bert, tmp_path):
    labels = ["a"] * 9 + ["b"] * 3
    file = texts(tmp_path, labels)
    data = ClassificationData(file, validation=file, batch_size=5)
    module = made(tiny_bert, class_weights="balanced")
    (result,) = Trainer(**QUIET).validate(module, datamodule=data, verbose=False)
    output, targets = logits_of(module, data)
    weights = torch.tensor([12 / 18, 12 / 6])
    expected = F.cross_entropy(output, targets, weight=weights)
    assert result["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert module.chance().keys() == {"loss"}, "naming the most frequent class is no aim"


@pytest.mark.parametrize("weights", [[1.0, 5.0, 0.2], [0.01, 0.02, 0.03]])
def test_a_step_of_several_batches_is_the_weighted_mean_of_all_rows(tiny_bert, tmp_path, weights):
    file = texts(tmp_path, [0, 0, 1, 2, 2, 1, 0, 2])
    gradients = []
    for size, accumulate in ((8, 1), (2, 4)):
        data = ClassificationData(file, validation=file, batch_size=size)
        module = made(tiny_bert, class_weights=weights, num_labels=3)
        torch.manual_seed(0)
        module.configure_model()
        module.model.eval()  # without dropout
        module.optimizer = partial(torch.optim.SGD, lr=1.0)
        module.warmup, module.schedule = 0, "constant"
        trainer = Trainer(
            **QUIET, max_steps=1, accumulate_grad_batches=accumulate, limit_val_batches=0
        )
        trainer.fit(module, data)
        gradients.append(module.model.classifier.weight.detach().clone())
    torch.testing.assert_close(*gradients)


# ---- several labels, and numbers


def test_several_labels_train_predict_and_are_recorded(tiny_bert, tmp_path):
    sets = [["red"], ["red", "blue"], [], ["blue"]] * 5
    data = ClassificationData(texts(tmp_path, sets), multi_label=True, batch_size=4)
    module = made(tiny_bert, thresholds={"blue": 0.9})
    trainer = Trainer(**QUIET, max_epochs=1)
    trainer.fit(module, data)
    assert set(trainer.callback_metrics) >= {"loss", "f1", "exact_match"}
    assert module.label_names == ["blue", "red"]
    assert module.model.config.problem_type == "multi_label_classification"
    output, labels = logits_of(module, data)
    loss = F.binary_cross_entropy_with_logits(output, labels.float())
    assert float(trainer.callback_metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)

    save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    warm = SequenceClassification(tiny_bert, adapter=str(tmp_path / "adapter"), dtype="fp32")
    new = ClassificationData(
        "none.jsonl", predict=write(tmp_path / "p.jsonl", [{"text": "How"}]), multi_label=True
    )
    (batch,) = Trainer(**QUIET).predict(warm, new)
    (prediction,) = batch
    assert prediction["probabilities"].keys() == {"blue", "red"}
    chosen = [name for name, p in prediction["probabilities"].items() if p >= 0.5]
    assert prediction["names"] == chosen


def test_an_adapter_of_another_task_is_refused(tiny_bert, tiny_llama, tmp_path):
    trained = made(tiny_bert, num_labels=2)
    trained.configure_model()
    save_adapter(trained.model, tmp_path / "adapter", trained.describe_base())
    warm = CausalLM(tiny_llama, adapter=str(tmp_path / "adapter"), dtype="fp32")
    says = (
        "has trained 'classifier', which LlamaForCausalLM does not have. Its base was loaded by "
        "AutoModelForSequenceClassification, and CausalLM loads one by AutoModelForCausalLM."
    )
    with pytest.raises(UserError, match=re.escape(says)):
        warm.configure_model()


def test_labels_of_several_classes_in_every_form(tmp_path):
    rows = [{"text": "a", "label": "red; blue"}, {"text": "b", "label": ""}]
    rows += [{"text": "c", "label": "red"}]
    path = write(tmp_path / "s.jsonl", rows)
    data = ClassificationData(path, path, multi_label=True, separator=";")
    assert [row["label"] for row in data.rows("train")] == [[1, 1], [0, 0], [0, 1]]
    assert data.class_names == ["blue", "red"]

    columns = [{"text": "a", "toxic": 1, "rude": False}, {"text": "b", "toxic": "0", "rude": "1"}]
    path = write(tmp_path / "c.jsonl", columns)
    data = ClassificationData(path, path, multi_label=True, labels=["toxic", "rude"])
    assert [row["label"] for row in data.rows("train")] == [[1, 0], [0, 1]]
    assert data.class_names == ["toxic", "rude"]
    with pytest.raises(ValueError, match=r"has no column 'toxc', only .* Did you mean 'toxic'"):
        ClassificationData(path, path, multi_label=True, labels=["toxc", "rude"]).rows("train")


def test_several_numbers_are_predicted_by_name(tiny_bert, tmp_path):
    numbers = [k / 7 for k in range(16)]
    file = texts(tmp_path, numbers, height=numbers, width=numbers[::-1])
    data = ClassificationData(
        file, regression=True, labels=["height", "width"], batch_size=4, predict=file
    )
    module = made(tiny_bert)
    trainer = Trainer(**QUIET, max_epochs=1)
    trainer.fit(module, data)
    assert {"rmse_height", "pearson_width"} <= trainer.callback_metrics.keys()
    output, labels = logits_of(module, data)
    assert output.shape == labels.shape
    assert float(trainer.callback_metrics["loss"]) == pytest.approx(
        float(F.mse_loss(output, labels)), rel=1e-5
    )
    spread = torch.stack([b["labels"] for b in data.val_dataloader()][:1])[0]
    assert module.chance()["loss"] == pytest.approx(float(spread.var(0, correction=0).mean()))
    batch = trainer.predict(module, data)[0]
    assert batch[0].keys() == {"height", "width"}


def test_kinds_of_labels_that_contradict_each_other_are_refused(tiny_bert, tmp_path):
    data = ClassificationData(texts(tmp_path, [0, 1] * 8), batch_size=4)
    with pytest.raises(ValueError, match=r"are single_label, and model\.problem is regression"):
        Trainer(**QUIET).validate(made(tiny_bert, problem="regression"), datamodule=data)
    with pytest.raises(ValueError, match="problem='class' is unknown"):
        made(tiny_bert, problem="class")
    with pytest.raises(ValueError, match="a regression has none"):
        made(tiny_bert, problem="regression", class_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="thresholds"):
        made(tiny_bert, thresholds=[0.5, 1.5])
    with pytest.raises(ValueError, match="Remove one of the two"):
        ClassificationData("a.jsonl", regression=True, multi_label=True)
    with pytest.raises(ValueError, match="Remove one of the two"):
        ClassificationData("a.jsonl", regression=True, stratify=True)
    with pytest.raises(ValueError, match="several classes"):
        ClassificationData("a.jsonl", separator=";")
    with pytest.raises(ValueError, match="use `label` for one column"):
        ClassificationData("a.jsonl", labels=["a", "b"])


def test_a_dataloader_of_ones_own_gives_several_labels_with_unknown_ones(tiny_bert):
    module = made(tiny_bert, num_labels=3, problem="multi_label")
    batch = {
        "input_ids": torch.tensor([[3, 4], [5, 6]]),
        "attention_mask": torch.ones(2, 2, dtype=torch.long),
        "labels": torch.tensor([[1, 0, -100], [-100, 1, 1]]),
    }
    trainer = Trainer(**QUIET)
    (result,) = trainer.validate(module, DataLoader([batch], batch_size=None), verbose=False)
    with torch.no_grad():
        output = module.eval()(batch)
    known = batch["labels"] >= 0
    loss = F.binary_cross_entropy_with_logits(output[known], batch["labels"][known].float())
    assert result["loss"] == pytest.approx(float(loss), rel=1e-5)


# ---- predictions


def test_predictions_hold_probabilities_by_name(tiny_bert, tmp_path):
    file = texts(tmp_path, ["yes", "no", "no"] * 4)
    data = ClassificationData(file, validation=file, predict=file, batch_size=5)
    module = made(tiny_bert)
    trainer = Trainer(**QUIET, max_steps=1)
    trainer.fit(module, data)
    predictions = [line for batch in trainer.predict(module, data) for line in batch]
    output, _ = logits_of(module, data)
    for prediction, row in zip(predictions, output.softmax(-1).tolist(), strict=True):
        assert prediction["probabilities"] == pytest.approx({"no": row[0], "yes": row[1]}, abs=1e-6)
        assert prediction["name"] == ["no", "yes"][prediction["label"]]
        assert prediction["label"] == row.index(max(row))


def test_a_merged_adapter_tells_pipelines_what_kind_of_labels_it_has(tiny_bert, tmp_path):
    data = ClassificationData(texts(tmp_path, [0.5, 1.5] * 6), regression=True, batch_size=4)
    module = made(tiny_bert)
    Trainer(**QUIET, max_steps=1).fit(module, data)
    save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=1)
    load_adapter(model, tmp_path / "adapter")
    assert model.config.problem_type == "regression"


# ---- splits


def test_a_stratified_sample_has_the_share_of_each_group():
    groups = ["a"] * 70 + ["b"] * 20 + ["c"] * 9 + ["d"]
    drawn = stratified_sample(groups, 10, 0)
    assert len(drawn) == 10
    assert drawn == sorted(set(drawn))
    found = [groups[index] for index in drawn]
    assert [found.count(group) for group in "abcd"] == [7, 2, 1, 0]
    assert drawn == stratified_sample(groups, 10, 0)
    assert drawn != stratified_sample(groups, 10, 1)
    assert stratified_sample(["a", "b"], 1, 0) == [], "no group is drawn whole"
    assert stratified_sample(["a", "a", "b"], 2, 0) in ([0], [1])
    assert rarest([["x", "y"], ["x"], ["x"], []]) == ["y", "x", "x", None]


def test_some_rows_of_each_class_are_trained_on(tiny_bert, tmp_path, caplog):
    file = texts(tmp_path, ["a"] * 30 + ["b"] * 9 + ["c"] * 2)

    tokenizer = made(tiny_bert).tokenizer

    def labels(split, **options):
        data = ClassificationData(file, validation=file, examples_per_class=4, **options)
        data.tokenizer = tokenizer
        data.setup("fit")
        names = [data.class_names[example["label"]] for example in data.examples(split)]
        return [names.count(name) for name in "abc"], data.examples("train")

    counts, first = labels("train")
    assert counts == [4, 4, 2]
    assert "1 classes have fewer training rows, and keep all: c (2)." in caplog.text
    assert labels("val")[0] == [30, 9, 2]
    same, other = labels("train")[1], labels("train", seed=1)[1]
    ids = [[example["input_ids"].tolist() for example in rows] for rows in (first, same, other)]
    assert ids[0] == ids[1] != ids[2]
    # The rows of a class do not depend on the others.
    assert some_of_each(["a"] * 9, 3, 0) == some_of_each(["a"] * 9 + ["b"] * 5, 3, 0)[:3]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"examples_per_class": 0}, "examples_per_class=0 leaves no example"),
        ({"examples_per_class": 2.5}, "examples_per_class=2.5 is no whole number"),
        ({"examples_per_class": 2, "limit_train": 3}, "both limit the training rows"),
        ({"examples_per_class": 2, "regression": True}, "a row of this data has not exactly one"),
        ({"examples_per_class": 2, "multi_label": True}, "a row of this data has not exactly one"),
    ],
)
def test_rows_of_each_class_that_make_no_sense_are_refused(options, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence) as said:
        ClassificationData("a.jsonl", **options)
    assert "\n" not in str(said.value)


def test_validation_is_stratified_and_a_class_with_one_row_stays_in_training(tmp_path, caplog):
    file = texts(tmp_path, ["a"] * 30 + ["b"] * 9 + ["c"])
    data = ClassificationData(file, validation=0.2, stratify=True)
    labels = [data.class_names[row["label"]] for row in data.rows("val")]
    assert [labels.count(name) for name in "abc"] == [6, 2, 0]
    trained = [row["text"] for row in data.rows("train")]
    assert not {row["text"] for row in data.rows("val")} & set(trained)
    assert caplog.text.count("1 of 3 classes") == 1
    assert "have too few rows for one to validate, and stay in training: c." in caplog.text
    plain = ClassificationData(file, val_fraction=0.2)
    assert len(plain.rows("val")) == 8
    alone = texts(tmp_path, ["x", "y", "z"], "alone.jsonl")
    with pytest.raises(ValueError, match="each class has one row alone"):
        ClassificationData(alone, stratify=True).rows("train")
