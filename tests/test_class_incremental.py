"""Classes that arrive task after task: the data, the loss, the accuracy matrix and its report."""

import itertools
import json
from functools import partial

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from test_images import QUIET, folder_of_classes, ready

from adaptrank import Adapter
from adaptrank._errors import UserError
from adaptrank.cli import main
from adaptrank.data import GeneratedQuestions, HandwrittenDigits, ImageData
from adaptrank.data.class_tasks import deal_classes
from adaptrank.modules import ImageClassification, SequenceClassification, task_matrix
from adaptrank.modules.task_classes import only_own_task, only_seen
from adaptrank.modules.task_matrix import count_right
from adaptrank.modules.task_metrics import figures
from adaptrank.parameterizations import DecoupledLoRA, LoRA, wrappers
from adaptrank.reports.task_history import read_tasks
from adaptrank.strategies import SDLoRA

DIGITS = {"digits": [4, 5, 6, 7, 8, 9], "train_size": 42, "val_size": 24, "batch_size": 8}


def digits(**options):
    return HandwrittenDigits(**{**DIGITS, "tasks": 3, **options})


def classifier(backbone, method=LoRA, **options):
    options = {"schedule": "constant", "warmup": 0, **options}
    torch.manual_seed(3)
    return ImageClassification(
        backbone,
        adapters=[Adapter([partial(method, rank=2)], targets=["q_proj", "v_proj"])],
        dtype="fp32",
        **{"optimizer": partial(torch.optim.SGD, lr=0.5, momentum=0.9), **options},
    )


def quiet(*callbacks, **options):
    return Trainer(**{**QUIET, "max_epochs": 1, "callbacks": list(callbacks), **options})


# ---- which class is in which task


def test_classes_are_dealt_out_evenly_and_by_a_seed():
    names = list("abcdefg")
    assert deal_classes(names, 3, None) == [[0, 1, 2], [3, 4], [5, 6]]
    dealt = deal_classes(names, 3, 1)
    assert dealt == deal_classes(names, 3, 1) != deal_classes(names, 3, 2)
    assert sorted(index for task in dealt for index in task) == list(range(7))
    by_name = [["g", "a"], ["c", "b", "d"], ["f", "e"]]
    assert deal_classes(names, by_name, None) == [[6, 0], [2, 1, 3], [5, 4]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tasks": 1}, "tasks=1 is no sequence of tasks"),
        ({"tasks": [["4", "5"]]}, "two or more lists"),
        ({"tasks": [["4", "5"], ["5", "6"]]}, "names the class '5' twice"),
        ({"tasks": [["4", "5"], ["6", "7"]], "task_seed": 1}, "Leave one of the two out"),
        ({"tasks": None, "task_seed": 1}, "task_seed=1 is for classes that arrive in tasks"),
        ({"tasks": None, "epochs_per_task": 2}, "epochs_per_task=2 is for classes"),
        ({"epochs_per_task": 0}, "epochs_per_task=0 trains on nothing"),
        ({"epochs_per_task": 2, "steps_per_task": 3}, "Leave one of the two out"),
        ({"tasks": 4}, r"Task 3 of 4 has 1 class\(es\)"),
        ({"tasks": [["4", "5"], ["6", "7"]]}, r"4 of 6 classes, and \['8', '9'\] are in none"),
        ({"tasks": [["4", "5", "6"], ["7", "8", "1"]]}, "Task 2 of `tasks` names '1'"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence):
        ready(digits(**options))


def test_labels_that_are_no_classes_have_no_tasks(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "label": k}) + "\n" for k in range(6)))
    from adaptrank.data import ClassificationData

    data = ClassificationData(str(path), str(path), regression=True, tasks=2)
    with pytest.raises(UserError, match="the labels are regression"):
        data.task_steps()
    assert ClassificationData(str(path), tasks=2).task_of_class is None, "not known yet"


# ---- the order of training


def labels_of(loader):
    return [batch["labels"].tolist() for batch in loader]


def test_tasks_come_one_after_another_and_each_example_as_often_as_asked():
    data = ready(digits(epochs_per_task=2))
    assert data.task_classes == [["4", "5"], ["6", "7"], ["8", "9"]]
    assert data.task_of_class == [0, 0, 1, 1, 2, 2]
    loader = data.train_dataloader()
    batches = labels_of(loader)
    tasks = [{label // 2 for label in batch} for batch in batches]
    assert [min(task) for task in tasks] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(len(task) == 1 for task in tasks)
    assert data.task_steps() == [4, 4, 4]
    assert len(loader) == 12
    indices = [index for batch in loader.batch_sampler for index in batch]
    counts = torch.bincount(torch.tensor(indices) % 42)
    assert counts.tolist() == [2] * 42
    again = [list(map(list, loader.batch_sampler.batches_from(k))) for k in (0, 3, 4, 7, 11, 12)]
    assert all(rest == again[0][k:] for rest, k in zip(again, (0, 3, 4, 7, 11, 12), strict=True))
    first, second = again[0][:2], again[0][2:4]
    assert first != second, "each pass has an order of its own"
    assert sorted(i % 42 for b in first for i in b) == sorted(i % 42 for b in second for i in b)


def test_steps_instead_of_passes_and_steps_of_several_batches():
    assert ready(digits(steps_per_task=5)).task_steps() == [5, 5, 5]
    data = digits(epochs_per_task=3, batch_size=4)
    data.trainer = quiet(accumulate_grad_batches=4)
    ready(data)
    # 14 examples make 4 batches a pass, and 12 batches are 3 steps of 4.
    assert data.task_steps() == [3, 3, 3]
    data.batch_size = 5
    # 9 batches of three passes: the third step goes on into the fourth pass.
    assert data.task_steps() == [3, 3, 3]
    assert len(data.train_dataloader()) == 36


def test_processes_share_the_batches_of_a_task():
    data = ready(digits())

    class TwoProcesses:
        distributed_sampler_kwargs = {"rank": 0, "num_replicas": 2}
        overfit_batches = 0
        train_dataloader = None
        lightning_module = None
        max_epochs = 1

    shares = []
    for rank in range(2):
        trainer = TwoProcesses()
        trainer.distributed_sampler_kwargs = {"rank": rank, "num_replicas": 2}
        data.trainer = trainer
        shares.append([sorted(batch) for batch in data.train_dataloader().batch_sampler])
    assert len(shares[0]) == len(shares[1]) == 3
    for one, other in zip(*shares, strict=True):
        assert not set(one) & set(other)
        assert len(one) + len(other) == 14


def test_images_are_mirrored_anew_in_each_pass(tmp_path):
    path = folder_of_classes(tmp_path, dict.fromkeys("abcd", 8))
    options = {"tasks": 2, "epochs_per_task": 2, "batch_size": 16, "horizontal_flip": 0.5}
    loader = ready(ImageData(path, path, **options)).train_dataloader()
    batches = [batch["pixel_values"] for batch in loader]
    assert len(batches) == 4

    def images(batch):
        return {tuple(image.flatten().tolist()) for image in batch}

    assert images(batches[0]) != images(batches[1])


def test_the_validation_examples_of_a_task():
    data = ready(digits())
    sizes = [sum(map(len, labels_of(data.task_dataloader(task)))) for task in range(3)]
    assert sizes == [8, 8, 8]
    assert {label for batch in labels_of(data.task_dataloader(1)) for label in batch} == {2, 3}
    assert sum(map(len, labels_of(data.val_dataloader()))) == 24
    few = ready(digits(digits=[1, 2, 3, 4], tasks=[["1", "2"], ["3", "4"]], val_size=1))
    with pytest.raises(UserError, match="has no validation example"):
        [few.task_dataloader(task) for task in range(2)]


# ---- the run


@pytest.fixture(scope="module")
def sequence(tiny_vit, tmp_path_factory):
    """A whole run of SD-LoRA over three tasks, with a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("sequence")
    module, data = classifier(tiny_vit, DecoupledLoRA), digits(epochs_per_task=2)
    checkpoint = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"enable_checkpointing": True, "log_every_n_steps": 1}
    trainer = quiet(SDLoRA(), checkpoint, **options)
    heads = []
    step = module.on_train_batch_start

    def note(batch, batch_idx):
        heads.append(module.model.classifier.weight.detach().clone())
        return step(batch, batch_idx)

    module.on_train_batch_start = note
    trainer.fit(module, data)
    heads.append(module.model.classifier.weight.detach().clone())
    return module, data, trainer, heads, folder


def test_rows_of_the_head_move_in_their_own_task_alone(sequence):
    """A head with all classes from the start equals one that grows: other rows do not move."""
    *_, heads, _ = sequence
    assert len(heads) == 13
    for step, (before, after) in enumerate(itertools.pairwise(heads)):
        moved = (before != after).any(1).nonzero().flatten().tolist()
        task = step // 4
        assert moved == [2 * task, 2 * task + 1], f"step {step}"


def accuracy(module, data, task, seen):
    """The accuracy on the examples of a task, among the classes of `seen` tasks."""
    data.trainer = None
    rows = [row for row in data.examples("val") if row["label"] // 2 == task]
    pixels = torch.stack([row["pixel_values"] for row in rows])
    labels = torch.tensor([row["label"] for row in rows])
    module.eval()
    with torch.no_grad():
        logits = module({"pixel_values": pixels})[:, : 2 * seen]
    return float((logits.argmax(1) == labels).double().mean())


def test_the_matrix_is_that_of_an_evaluation_by_hand(sequence, tiny_vit):
    module, data, trainer, *_ = sequence
    matrix = task_matrix(trainer)
    assert [len(row) for row in matrix.rows] == [1, 2, 3]
    assert matrix.examples == [8, 8, 8]
    assert matrix.ends == [4, 8, 12]
    trainer_of_data = data.trainer
    by_hand = [accuracy(module, data, task, 3) for task in range(3)]
    data.trainer = trainer_of_data
    assert matrix.rows[2] == pytest.approx(by_hand)
    # After the second task the third one is not seen yet.
    second = classifier(tiny_vit, DecoupledLoRA)
    again = quiet(SDLoRA(), max_steps=8)
    other = digits(epochs_per_task=2)
    again.fit(second, other)
    assert task_matrix(again).rows == matrix.rows[:2]
    by_hand = [accuracy(second, other, task, 2) for task in range(2)]
    assert matrix.rows[1] == pytest.approx(by_hand)
    # Whatever the head says of classes that are not seen yet.
    second.model.classifier.bias.data[4:] += 100
    right, examples = count_right(second, next(iter(other.task_dataloader(0))), 2).tolist()
    assert (right, examples) == (8 * by_hand[0], 8)
    assert trainer.callback_metrics["tasks/average_accuracy"] == pytest.approx(
        sum(matrix.rows[2]) / 3
    )


@pytest.mark.parametrize("step", [2, 4, 9])
def test_resume_is_exact_inside_a_task_and_at_its_border(step, sequence, tiny_vit):
    module, _, trainer, _, folder = sequence
    resumed = classifier(tiny_vit, DecoupledLoRA)
    torch.rand(7)
    again = quiet(SDLoRA())
    path = folder / f"step={step}.ckpt"
    again.fit(resumed, digits(epochs_per_task=2), ckpt_path=path, weights_only=True)
    have, want = resumed.trained_state(), module.trained_state()
    assert have.keys() == want.keys()
    assert all(torch.equal(have[key], want[key]) for key in want)
    assert task_matrix(again).rows == task_matrix(trainer).rows
    assert wrappers(resumed.model)[0].mix.shape == (3, 4)


def test_evaluating_changes_neither_modes_nor_random_numbers(tiny_vit):
    states = []
    for limit in (1.0, 0):
        module = classifier(tiny_vit)
        quiet(limit_val_batches=limit).fit(module, digits())
        states.append((module.trained_state(), torch.random.get_rng_state()))
        assert module.training
    (one, random), (other, random_too) = states
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(random, random_too)


def test_texts_arrive_in_tasks_too(tiny_bert, caplog):
    module = SequenceClassification(tiny_bert, adapters=[Adapter([LoRA])], dtype="fp32")
    data = GeneratedQuestions(train_size=24, val_size=12, batch_size=8, tasks=3, task_seed=1)
    trainer = quiet()
    trainer.fit(module, data)
    assert [len(row) for row in task_matrix(trainer).rows] == [1, 2, 3]
    assert trainer.global_step == 3
    assert "Set model.schedule: constant" in caplog.text


def test_without_tasks_nothing_is_measured(tiny_vit):
    trainer = quiet(limit_val_batches=0, max_steps=1)
    module = classifier(tiny_vit)
    trainer.fit(module, HandwrittenDigits(**DIGITS))
    assert task_matrix(trainer) is None
    assert module.task_of_class is None


def test_a_run_that_is_longer_than_its_tasks_is_refused(tiny_vit, caplog):
    with pytest.raises(UserError, match="One epoch of the trainer is the whole sequence"):
        quiet(max_epochs=3).fit(classifier(tiny_vit), digits())
    with pytest.raises(UserError, match="The tasks have 6 optimizer steps, and the run has 9"):
        quiet(max_epochs=-1, max_steps=9).fit(classifier(tiny_vit), digits())
    trainer = quiet(max_epochs=-1, max_steps=3)
    trainer.fit(classifier(tiny_vit), digits())
    assert "after 3 of 6 steps, with 1 of 3 tasks trained whole" in caplog.text
    assert len(task_matrix(trainer).rows) == 1


# ---- figures and reports


def test_the_figures_are_those_of_their_papers():
    matrix = [[0.9], [0.6, 0.8], [0.7, 0.5, 0.9]]
    have = figures(matrix)
    assert have["average_accuracy"] == pytest.approx((0.7 + 0.5 + 0.9) / 3)
    assert have["average_incremental_accuracy"] == pytest.approx((0.9 + 0.7 + 0.7) / 3)
    assert have["forgetting"] == pytest.approx(((0.9 - 0.7) + (0.8 - 0.5)) / 2)
    assert have["backward_transfer"] == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2)
    assert figures([[0.9]]) == {"average_accuracy": 0.9, "average_incremental_accuracy": 0.9}
    helped = figures([[0.5], [0.8, 0.9]])
    assert helped["forgetting"] == pytest.approx(-0.3)
    assert figures([[None], [None, 0.5]]) == {}


@pytest.fixture(scope="module")
def run(tiny_vit, tmp_path_factory):
    """Folder of a run of sequential fine-tuning from the command line."""
    folder = tmp_path_factory.mktemp("run")
    config = {
        "model": {
            "class_path": "ImageClassification",
            "init_args": {
                "backbone": tiny_vit,
                "dtype": "fp32",
                "schedule": "constant",
                "adapters": [{"targets": ["q_proj"], "parameterization": ["LoRA"]}],
            },
        },
        "data": {"class_path": "HandwrittenDigits", "init_args": {**DIGITS, "tasks": 3}},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(folder / "c.yaml"), "--runs", str(folder / "runs")])
    return folder / "runs" / "c" / "0"


def test_a_run_writes_its_matrix_its_metrics_and_its_figures(run):
    tasks = json.loads((run / "tasks.json").read_text())
    rows = tasks["accuracy"]
    assert [len(row) for row in rows] == [1, 2, 3]
    assert tasks["steps"] == [2, 4, 6]
    assert tasks["classes"] == [["4", "5"], ["6", "7"], ["8", "9"]]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "tasks/average_accuracy" in line]
    assert [line["step"] for line in measured] == [2, 4, 6]
    assert measured[2]["tasks/accuracy_2"] == rows[2][1]
    after = json.loads((run / "summary.json").read_text())["after"]
    assert after["tasks/forgetting"] == pytest.approx(figures(rows)["forgetting"])
    # All classes are seen at the end, so the accuracy over all examples is that of the tasks.
    assert after["accuracy"] == pytest.approx(sum(rows[2]) / 3)


def test_the_report_of_a_run_without_an_allocator(run, capsys):
    capsys.readouterr()
    main(["report", str(run)])
    said = capsys.readouterr().out
    assert "index.html and 1 picture" in said
    assert "forgetting:" in said
    assert {file.name for file in (run / "report").iterdir()} == {"index.html", "tasks.png"}
    page = (run / "report" / "index.html").read_text()
    assert "average incremental accuracy" in page
    assert "data:image/png" in page
    assert "4, 5" in page
    main(["report", str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["accuracy"] == read_tasks(run).accuracy


def test_a_report_with_an_allocator_shows_the_tasks_beside_the_ranks(run, tmp_path):
    event = {"step": 0, "reason": "the start", "sizes": {"0.query:rank": 4}}
    (tmp_path / "ranks.jsonl").write_text(json.dumps(event) + "\n")
    (tmp_path / "tasks.json").write_text((run / "tasks.json").read_text())
    main(["report", str(tmp_path)])
    names = {file.name for file in (tmp_path / "report").iterdir()}
    assert {"tasks.png", "ranks.png", "index.html"} <= names
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<h2>Tasks</h2>" in page
    assert "backward transfer" in page


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": [[0.5, 0.5]]},
        {"accuracy": [["high"]]},
        {"accuracy": []},
        {"classes": "all"},
        {"figures": None},
    ],
)
def test_a_damaged_matrix_is_one_sentence(run, change, tmp_path):
    tasks = json.loads((run / "tasks.json").read_text())
    (tmp_path / "tasks.json").write_text(json.dumps({**tasks, **change}))
    with pytest.raises(UserError, match="The file is damaged"):
        read_tasks(tmp_path)


def test_outputs_are_masked_by_the_task_of_each_row():
    task_of_class = torch.tensor([0, 0, 1, 1, -1])
    output, labels = torch.randn(3, 5), torch.tensor([1, 2, -100])
    masked = only_own_task(output, labels, task_of_class)
    kept = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    assert torch.equal(masked.isfinite(), kept)
    assert torch.equal(masked[kept], output[kept])
    # Predictions also know a class that is in no task of these data.
    assert only_seen(output, task_of_class, 1).isfinite()[0].tolist() == [1, 1, 0, 0, 1]
    # `plan` computes without values.
    assert only_own_task(output.to("meta"), labels.to("meta"), task_of_class).is_meta
