"""The order of the batches.

It is a pure function, exact across a resume, shared without overlap, and draws no global number.
"""

import itertools
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from adaptrank.data.batch_order import BatchOrder, rounds
from adaptrank.data.collate import (
    causal_batch,
    choice_batch,
    class_batch,
    mask,
    pad,
    prompt_batch,
    validation_batch,
)
from adaptrank.data.loader import ResumableLoader
from adaptrank.data.task import TaskData

EXAMPLES = [torch.tensor([float(i)]) for i in range(11)]


def loader(n=11, batch_size=2, workers=0, collate=torch.stack, **order):
    return ResumableLoader(
        EXAMPLES[:n], collate, BatchOrder(n, batch_size, **order), num_workers=workers
    )


def read(batches):
    return [batch.flatten().int().tolist() for batch in batches]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 16, 17, 50])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_example_is_dealt_once_and_every_process_has_as_many_batches(
    n, batch_size, world_size, grouped
):
    lengths = [i % 5 for i in range(n)] if grouped else None
    options = {"seed": 3, "epoch": 1, "lengths": lengths, "world_size": world_size}
    dealt = rounds(n, batch_size, **options)
    assert dealt == rounds(n, batch_size, **options)
    assert (
        len(dealt)
        == len(BatchOrder(n, batch_size, world_size=world_size))
        == -(-n // (batch_size * world_size))
    )
    assert all(len(r) == world_size and all(1 <= len(b) <= batch_size for b in r) for r in dealt)
    seen = Counter(i for r in dealt for b in r for i in b)
    assert set(seen) == set(range(n))
    too_few = n < world_size or (batch_size == 1 and n % world_size)
    assert seen.total() - n == ((-n) % world_size if too_few else 0)


def test_order_depends_on_seed_and_epoch_and_not_on_their_sum():
    orders = {(s, e): str(rounds(20, 4, seed=s, epoch=e)) for s in range(3) for e in range(3)}
    assert len(set(orders.values())) == 9
    assert rounds(5, 2, shuffle=False, epoch=3) == [[[0, 1]], [[2, 3]], [[4]]]


def test_grouped_batches_are_of_similar_length_in_random_order():
    lengths = [(i * 37) % 101 for i in range(256)]
    batches = [b[0] for b in rounds(256, 8, lengths=lengths)]
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) / len(
        batches
    )
    assert spread < 20  # of 100; in random batches it is near 80
    first = [lengths[b[0]] for b in batches]
    assert sum(a < b for a, b in itertools.pairwise(first)) < 24, (
        "of 31 neighbours about half ascend in a random order"
    )


def test_loader_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert len(list(loader())) == 6
    assert torch.equal(before, torch.get_rng_state())
    list(DataLoader(EXAMPLES))
    assert not torch.equal(before, torch.get_rng_state()), "the check itself has lost its sense"


def test_workers_give_the_same_batches():
    assert read(loader(workers=1)) == read(loader())


def test_state_names_the_batches_handed_out_and_skips_without_collating():
    collated = []

    def collate(examples):
        collated.append(len(examples))
        return torch.stack(examples)

    first = loader()
    first.set_epoch(2)
    seen = read(itertools.islice(iter(first), 4))
    rest = loader(collate=collate)
    rest.load_state_dict(first.state_dict())
    assert rest.state_dict() == first.state_dict()
    remaining = read(rest)
    assert len(collated) == 2
    whole = loader()
    whole.set_epoch(2)
    assert seen + remaining == read(whole)
    assert read(rest) == read(whole), "the state counts for one iteration only"


def test_state_of_another_epoch_skips_nothing():
    first = loader()
    list(itertools.islice(iter(first), 4))
    second = loader()
    second.load_state_dict(first.state_dict())
    second.set_epoch(1)
    assert len(read(second)) == 6


def test_resume_with_other_settings_says_so():
    first = loader()
    list(itertools.islice(iter(first), 2))
    other = loader(batch_size=3)
    other.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="batch_size 2 -> 3"):
        next(iter(other))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"rank": 2, "world_size": 2}, "Use 0 to 1"),
        ({"lengths": [1]}, "1 lengths"),
    ],
)
def test_orders_that_cannot_be(options, says):
    with pytest.raises(ValueError, match=says):
        BatchOrder(4, options.pop("batch_size", 2), **options)


class Recorder(LightningModule):
    """Records its batches, and has dropout, so that a stray random draw shows in the weights."""

    def __init__(self, **data):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(1, 4), nn.Dropout(), nn.Linear(4, 1))
        self.data, self.seen = data, []

    def train_dataloader(self):
        batches = loader(**self.data)
        batches.trainer = self.trainer
        return batches

    def val_dataloader(self):
        return loader(shuffle=False)

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, *batch.flatten().int().tolist()))
        torch.manual_seed(
            1000 * self.current_epoch + batch_idx
        )  # as if the global generator had been restored
        return self.layer(batch / 10).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Scheduled(Recorder):
    """Asks for the number of steps, as a schedule does.

    Lightning then builds the loader before it restores.
    """

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        steps = self.trainer.estimated_stepping_batches
        return [optimizer], [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
        ]


class Tensors(TaskData):
    """A data module of the same examples."""

    def __init__(self, **options):
        super().__init__(batch_size=2, **options)
        self.tokenizer = SimpleNamespace(model_max_length=512)

    def rows(self, split):
        return [{"input_ids": [0] * (1 + i % 4), "x": x} for i, x in enumerate(EXAMPLES)]

    def encode(self, rows, split):
        return rows

    def collate(self, split):
        return stacked


def stacked(rows):
    return torch.stack([row["x"] for row in rows])


def fit(path, module=None, ckpt=None, callbacks=(), data=None, **options):
    torch.manual_seed(0)
    module = module or Recorder()
    settings = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "accelerator": "cpu",
    }
    trainer = Trainer(default_root_dir=path, callbacks=list(callbacks), **settings, **options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module, trainer


def keep_all(path, **when):
    return ModelCheckpoint(path, filename="{epoch}-{step}", save_top_k=-1, **when)


SITUATIONS = {
    "each step": ({"max_epochs": 3}, {"every_n_train_steps": 1}),
    "each step, to a number of steps": ({"max_steps": 18}, {"every_n_train_steps": 1}),
    "accumulation": ({"max_epochs": 3, "accumulate_grad_batches": 2}, {"every_n_train_steps": 1}),
    "accumulation that does not divide the epoch": (
        {"max_epochs": 3, "accumulate_grad_batches": 4},
        {"every_n_train_steps": 1},
    ),
    "accumulation, to a number of steps": (
        {"max_steps": 9, "accumulate_grad_batches": 2},
        {"every_n_train_steps": 1},
    ),
    "limited epochs": ({"max_epochs": 3, "limit_train_batches": 4}, {"every_n_train_steps": 1}),
    "end of each epoch": ({"max_epochs": 3}, {"save_on_train_epoch_end": True}),
    "end of each epoch, to a number of steps": (
        {"max_steps": 18},
        {"save_on_train_epoch_end": True},
    ),
    "after each validation": (
        {"max_epochs": 3, "val_check_interval": 2},
        {"save_on_train_epoch_end": False},
    ),
    "no validation": ({"max_epochs": 3, "limit_val_batches": 0}, {"every_n_train_steps": 1}),
}


def checkpoints(folder, every):
    """Return checkpoints of three epochs in the order of their steps.

    Args:
        folder: folder of the checkpoints.
        every: whether to return all of them, or the first, those around the end of an epoch, one in
            the middle, and the last.
    """
    saved = sorted(folder.glob("*.ckpt"), key=lambda file: int(re.findall(r"\d+", file.stem)[-1]))
    assert len(saved) >= 3
    third = len(saved) // 3
    some = {0, third - 1, third, len(saved) // 2, len(saved) - 1}
    return saved if every else [saved[position] for position in sorted(some)]


def batches_before(checkpoint):
    """Return how many batches a checkpoint counts as done."""
    loops = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]
    return loops["epoch_loop.batch_progress"]["total"]["ready"]


def some_or_every(*cases):
    """Try every checkpoint of each case in `make tables`, and a few of them in `make test`."""
    params = []
    for case in cases:
        values, marks = (case.values, case.marks) if hasattr(case, "marks") else (case, ())
        name = "-".join(getattr(value, "__name__", value) for value in values)
        params.append(pytest.param(*values, False, id=name, marks=marks))
        params.append(pytest.param(*values, True, id=f"{name}-every", marks=pytest.mark.tables))
    return params


@pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # Lightning's advice about workers and checkpoint folders
@pytest.mark.parametrize(
    ("situation", "every"), some_or_every(*((situation,) for situation in SITUATIONS))
)
def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(situation, every, tmp_path):
    options, when = SITUATIONS[situation]
    whole, trainer = fit(tmp_path, callbacks=[keep_all(tmp_path / "all", **when)], **options)
    epochs = 3
    batches = trainer.num_training_batches
    assert len(whole.seen) == len(set(whole.seen)) == epochs * batches
    for ckpt in checkpoints(tmp_path / "all", every):
        resumed, _ = fit(tmp_path, ckpt=ckpt, **options)
        assert resumed.seen == whole.seen[batches_before(ckpt) :], ckpt.name
        for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


DATA = {
    **{situation: {} for situation in SITUATIONS},
    "workers": {"num_workers": 1},
    "grouped by length": {"group_by_length": True},
    "loaders made anew": {},
}
MORE = {
    "workers": (
        {"max_epochs": 3, "limit_train_batches": 2, "limit_val_batches": 0},
        {"every_n_train_steps": 1},
    ),
    "grouped by length": ({"max_epochs": 3}, {"every_n_train_steps": 1}),
    "loaders made anew": (
        {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1},
        {"every_n_train_steps": 1},
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("situation", "module", "every"),
    some_or_every(
        *((situation, Recorder) for situation in DATA),
        *((situation, Scheduled) for situation in list(DATA)[::4]),
        *(
            pytest.param(situation, Scheduled, marks=pytest.mark.tables)
            for number, situation in enumerate(DATA)
            if number % 4
        ),
    ),
)
def test_a_data_module_resumes_whenever_its_loader_is_built(situation, module, every, tmp_path):
    options, when = {**SITUATIONS, **MORE}[situation]
    keep = keep_all(tmp_path / "all", **when)
    whole, _ = fit(tmp_path, module(), data=Tensors(**DATA[situation]), callbacks=[keep], **options)
    for ckpt in checkpoints(tmp_path / "all", every):
        resumed, _ = fit(tmp_path, module(), data=Tensors(**DATA[situation]), ckpt=ckpt, **options)
        assert resumed.seen == whole.seen[batches_before(ckpt) :], ckpt.name


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("module", [Recorder, Scheduled])
@pytest.mark.parametrize("every", [0, 1])
def test_parts_of_a_run_on_a_data_module_are_the_run(every, module, tmp_path):
    """As above, where Lightning's own numbers of the epochs drift.

    Also with loaders made anew in every epoch.
    """
    options = {"limit_train_batches": 5, "reload_dataloaders_every_n_epochs": every}
    whole, _ = fit(tmp_path, module(), data=Tensors(), max_steps=27, **options)
    parts, ckpt = [], None
    for steps in (8, 15, 19, 27):
        part, trainer = fit(
            tmp_path, module(), data=Tensors(), ckpt=ckpt, max_steps=steps, **options
        )
        ckpt = tmp_path / f"{steps}.ckpt"
        trainer.save_checkpoint(ckpt)
        parts += part.seen
    assert [seen[1:] for seen in parts] == [seen[1:] for seen in whole.seen]


class SaveBefore(Callback):
    """Saves before a batch is used, which Lightning then counts as not done."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step:02}.ckpt")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.tables)])
def test_a_checkpoint_from_before_a_batch_repeats_that_batch(every, tmp_path):
    whole, _ = fit(
        tmp_path, Scheduled(), data=Tensors(), callbacks=[SaveBefore(tmp_path)], max_epochs=3
    )
    for ckpt in checkpoints(tmp_path, every):
        resumed, _ = fit(tmp_path, Scheduled(), data=Tensors(), ckpt=ckpt, max_epochs=3)
        assert resumed.seen == whole.seen[int(ckpt.stem) :], ckpt.name


class SaveAtStart(Callback):
    def __init__(self, file):
        self.file = file

    def on_train_start(self, trainer, pl_module):
        trainer.save_checkpoint(self.file)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_from_before_the_first_batch_of_a_resume_goes_on_there(tmp_path):
    whole, _ = fit(
        tmp_path,
        data=Tensors(),
        callbacks=[keep_all(tmp_path, every_n_train_steps=1)],
        max_epochs=3,
    )
    again = tmp_path / "again.ckpt"
    ckpt = next(tmp_path.glob("*step=8.ckpt"))
    fit(
        tmp_path,
        Scheduled(),
        data=Tensors(),
        ckpt=ckpt,
        callbacks=[SaveAtStart(again)],
        max_epochs=3,
    )
    for module in (
        Scheduled(),
        Recorder(),
    ):  # in the second, Lightning delivers the state of a loader that never began
        resumed, _ = fit(tmp_path, module, data=Tensors(), ckpt=again, max_epochs=3)
        assert resumed.seen == whole.seen[8:]


class ReadsAlong(Callback):
    """Reads a loader of its own, when the training begins and amid an epoch."""

    sizes = ()

    def read(self, trainer):
        self.sizes = (*self.sizes, len(list(trainer.datamodule.train_dataloader())))

    def on_fit_start(self, trainer, pl_module):
        self.read(trainer)

    def on_train_batch_end(self, trainer, *_):
        self.read(trainer)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("module", [Recorder, Scheduled])
def test_only_the_trainers_own_loader_goes_on_from_a_checkpoint(module, tmp_path):
    whole, _ = fit(
        tmp_path,
        data=Tensors(),
        callbacks=[keep_all(tmp_path, every_n_train_steps=1)],
        max_epochs=3,
    )
    ckpt = next(tmp_path.glob("*step=8.ckpt"))
    reads = ReadsAlong()
    resumed, _ = fit(tmp_path, module(), data=Tensors(), ckpt=ckpt, callbacks=[reads], max_epochs=3)
    assert resumed.seen == whole.seen[8:]
    assert set(reads.sizes) == {6}


class Refuses(Scheduled):
    def on_fit_start(self):
        raise RuntimeError("not today")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_fit_without_a_checkpoint_starts_fresh_whatever_was_restored_before(tmp_path):
    whole, _ = fit(
        tmp_path,
        data=Tensors(),
        callbacks=[keep_all(tmp_path, every_n_train_steps=1)],
        max_epochs=2,
    )
    ckpt = next(tmp_path.glob("*step=8.ckpt"))
    quiet = {
        "enable_progress_bar": False,
        "logger": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
    }
    data = Tensors()
    for use in ("resumed", "resumed in vain", "validated", "nothing left to train"):
        if use == "resumed":
            fit(tmp_path, Scheduled(), data=data, ckpt=ckpt, max_epochs=2)
        elif use == "resumed in vain":
            with pytest.raises(RuntimeError, match="not today"):
                fit(tmp_path, Refuses(), data=data, ckpt=ckpt, max_epochs=2)
        elif use == "validated":
            Trainer(**quiet).validate(Recorder(), data, ckpt_path=ckpt, verbose=False)
        else:
            fit(tmp_path, Scheduled(), data=data, ckpt=ckpt, max_steps=8)
        fresh, _ = fit(tmp_path, Scheduled(), data=data, max_epochs=2)
        assert fresh.seen == whole.seen, use


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_state_of_a_data_module_is_that_of_the_training():
    data = Tensors()
    assert data.state_dict() == {}
    data.load_state_dict({})
    assert data.state_dict() == {}
    data.load_state_dict({"train": {"epoch": 1, "position": 3, "order": {}}})
    assert data.state_dict() == {"train": {"epoch": 1, "position": 3, "order": {}}}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_half_a_run_and_the_rest_are_the_run(tmp_path):
    """2N steps at once, or N steps, an interruption in mid-epoch, and N steps more.

    With workers and batches by length.
    """
    options = {"lengths": [i % 4 for i in range(11)], "workers": 1}
    whole, _ = fit(tmp_path, Recorder(**options), max_steps=27, limit_train_batches=5)
    parts, ckpt = [], None
    for steps in (
        8,
        15,
        19,
        27,
    ):  # mid-epoch, border, mid-epoch, end: here Lightning's own numbers of the epochs drift
        part, trainer = fit(
            tmp_path, Recorder(**options), ckpt=ckpt, max_steps=steps, limit_train_batches=5
        )
        ckpt = tmp_path / f"{steps}.ckpt"
        trainer.save_checkpoint(ckpt)
        parts += part.seen
    assert [seen[1:] for seen in parts] == [seen[1:] for seen in whole.seen]


class Interrupt(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 9:
            raise ValueError("interrupted")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_exception_in_mid_epoch_loses_no_batch(tmp_path):
    whole, _ = fit(tmp_path, max_epochs=3)
    with pytest.raises(ValueError, match="interrupted"):
        fit(
            tmp_path,
            callbacks=[Interrupt(), keep_all(tmp_path / "all", every_n_train_steps=4)],
            max_epochs=3,
        )
    ckpt = next((tmp_path / "all").glob("*step=8.ckpt"))
    rest, _ = fit(tmp_path, ckpt=ckpt, max_epochs=3)
    assert rest.seen == whole.seen[8:]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_loader_read_by_hand_after_the_training_is_whole(tmp_path):
    module, trainer = fit(tmp_path, max_steps=9)
    assert len(list(module.train_dataloader())) == trainer.num_training_batches == 6


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_validation_in_between_changes_nothing(tmp_path):
    often, _ = fit(tmp_path, max_epochs=2, val_check_interval=1)
    never, _ = fit(tmp_path, max_epochs=2, limit_val_batches=0)
    assert often.seen == never.seen
    for a, b in zip(often.parameters(), never.parameters(), strict=True):
        assert torch.equal(a, b)


def example(prompt, completion, **more):
    ids = torch.tensor(prompt + completion)
    labels = torch.tensor([-100] * len(prompt) + completion)
    return {"input_ids": ids, "labels": labels, "prompt_ids": torch.tensor(prompt), **more}


def test_padding_is_told_by_length_and_not_by_its_id():
    end = 9  # also the padding, and in the middle of the prompt
    batch = causal_batch([example([1, 9, 2], [3, 9]), example([1], [9])], end)
    assert batch["input_ids"].tolist() == [[1, 9, 2, 3, 9], [1, 9, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 3, 9], [-100, 9, -100, -100, -100]]
    assert all(t.dtype == torch.long for t in batch.values())


def test_prompts_are_padded_on_the_left():
    batch = prompt_batch([example([1, 2, 9], [3]), example([4], [5])], 9)
    assert batch["prompt_ids"].tolist() == [[1, 2, 9], [9, 9, 4]]
    assert batch["prompt_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_padding_to_a_multiple_is_a_choice():
    rows = [torch.tensor([1, 2, 3])]
    assert pad(rows, 0).shape == (1, 3)
    assert pad(rows, 0, multiple_of=8).shape == mask(rows, multiple_of=8).shape == (1, 8)
    assert mask(rows, multiple_of=8).sum() == 3


def test_choices_are_rows_that_know_their_example():
    def choice(ids, characters):
        return {
            "input_ids": torch.tensor([1, *ids]),
            "labels": torch.tensor([-100, *ids]),
            "characters": characters,
        }

    a = example([1], [2], choices=[choice([2], 3), choice([3, 4], 8)], target=0)
    b = example([1], [5], choices=[choice([4], 1), choice([5], 2), choice([6], 4)], target=1)
    batch = choice_batch([a, b], 0)
    assert batch["group"].tolist() == [0, 0, 1, 1, 1]
    assert batch["characters"].tolist() == [3, 8, 1, 2, 4]
    assert batch["target"].tolist() == [0, 1]
    assert batch["labels"].tolist() == [
        [-100, 2, -100],
        [-100, 3, 4],
        [-100, 4, -100],
        [-100, 5, -100],
        [-100, 6, -100],
    ]
    assert "choices" in validation_batch([a, b], 0)
    assert set(validation_batch([a, example([1], [2])], 0)) == {
        "input_ids",
        "attention_mask",
        "labels",
    }


def test_class_batches_have_labels_and_types_where_examples_do():
    a, b = torch.tensor([1, 2]), torch.tensor([3])
    batch = class_batch(
        [
            {"input_ids": a, "token_type_ids": a, "label": 1},
            {"input_ids": b, "token_type_ids": b, "label": 0},
        ],
        7,
    )
    assert batch["input_ids"].tolist() == [[1, 2], [3, 7]]
    assert batch["token_type_ids"].tolist() == [[1, 2], [3, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert "labels" not in class_batch([{"input_ids": a}], 7)
