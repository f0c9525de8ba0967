"""The LightningDataModule that all data sets share: rows of text -> tokens -> batches."""

import copy
import logging
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from adaptrank._errors import UserError, UserTypeError
from adaptrank.data.batch_order import BatchOrder
from adaptrank.data.collate import Batch
from adaptrank.data.content import content_hash
from adaptrank.data.lazy import LazyExamples
from adaptrank.data.loader import ResumableLoader
from adaptrank.data.seeding import seeded_random

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Row = dict[str, Any]
Split = Literal["train", "val", "test", "predict"]
STAGES: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
    None: ("train", "val", "test", "predict"),
}
"""Stage of the Trainer -> the splits that it reads."""


def check_size(name: str, size: Any, least: int, reason: str) -> None:
    """Raise if an argument is no integer, or below the least that makes sense.

    Args:
        name: name of the argument.
        size: its value. None is not checked.
        least: the least value.
        reason: what is wrong with a smaller value, for the error.
    """
    if size is None:
        return
    if isinstance(size, bool) or not isinstance(size, numbers.Integral):
        raise UserTypeError(f"{name}={size!r} is no whole number. Use {least} or more.")
    if size < least:
        raise UserError(f"{name}={size} {reason}. Use {least} or more.")


class TaskData(LightningDataModule, ABC):
    """Rows of text -> tokens -> batches, in an order that depends on (seed, epoch, index) only.

    The tokenizer is the LightningModule's (`trainer.lightning_module.tokenizer`), or the one that
    was assigned to `.tokenizer` before `setup`. Batches of training, validation and test are dealt
    to several processes here, so `Trainer(use_distributed_sampler=...)` changes nothing there.
    Prediction goes through a plain DataLoader. Lightning replaces its sampler, from which
    prediction writers learn the indices.

    Args:
        batch_size: training examples per process and step.
        eval_batch_size: examples per process and step of validation, test or prediction, by
            default batch_size.
        max_length: most tokens of an example. Longer ones are cut, and counted in `truncated`.
        num_workers: processes that collate ahead.
        seed: seed of every random choice about the data, and of nothing else.
        group_by_length: train on batches of similar length, in shuffled order.
        limit_train: number of training rows to keep, the first after a seeded shuffle.
        limit_val: the same for the validation rows.

    Raises:
        UserError: if a size is not a positive integer, or num_workers is negative. In `setup`, if a
            split is empty or there is no tokenizer.
    """

    def __init__(
        self,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 512,
        num_workers: int = 0,
        seed: int = 0,
        group_by_length: bool = False,
        limit_train: int | None = None,
        limit_val: int | None = None,
    ) -> None:
        super().__init__()
        check_size("batch_size", batch_size, 1, "leaves no example")
        check_size("eval_batch_size", eval_batch_size, 1, "leaves no example")
        check_size("limit_train", limit_train, 1, "leaves no example")
        check_size("limit_val", limit_val, 1, "leaves no example")
        check_size("max_length", max_length, 2, "leaves no token to predict from another")
        check_size("num_workers", num_workers, 0, "is no number of processes")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.max_length = max_length
        self.num_workers = num_workers
        self.seed = seed
        self.group_by_length = group_by_length
        self.limit_train = limit_train
        self.limit_val = limit_val
        self.tokenizer: PreTrainedTokenizerBase | None = None
        # Split -> number of rows that were cut.
        self.truncated: dict[str, int] = {}
        self._examples: dict[Split, Sequence[Row]] = {}
        # Splits whose rows are tokenized when they are read.
        self._lazy: set[str] = set()
        # State of the training loader in the run that is resumed.
        self._restored: dict[str, Any] | None = None

    # ---- the contract of a task

    @abstractmethod
    def rows(self, split: Split) -> Sequence[Row] | None:
        """Return the rows of a split, or None to use the validation rows for test or predict.

        A list is tokenized as a whole. Rows of another sequence, such as one that makes each row
        when it is read, are tokenized when they are read.
        """

    @abstractmethod
    def encode(self, rows: list[Row], split: Split) -> list[Row]:
        """Tokenize rows. Each example has a tensor `input_ids` (L,).

        Examples for prediction may have `prompt_ids` (L,) instead.
        """

    @abstractmethod
    def collate(self, split: Split) -> Callable[[Sequence[Row]], Batch]:
        """Return the function that makes a batch of examples of this split. It must pickle."""

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes by label, known after `setup`. None if the task has no classes."""
        return None

    @property
    def num_classes(self) -> int | None:
        """Number of classes, known after `setup`. None if the task has no classes."""
        return None if self.class_names is None else len(self.class_names)

    def conventions(self) -> dict[str, Any]:
        """Return conventions of the data that a trained model needs in use, known after `setup`.

        See `adaptrank.artifacts.conventions` for the keys.
        """
        return {}

    def token_table(self, *tokens: str) -> dict[str, int]:
        """Return {token: id} of tokens of the tokenizer."""
        assert self.tokenizer is not None
        ids: Any = self.tokenizer.convert_tokens_to_ids(list(tokens))
        return {token: int(number) for token, number in zip(tokens, ids, strict=True)}

    # ---- rows and tokens

    def examples(self, split: Split) -> Sequence[Row]:
        """Return the tokenized examples of a split, made once, or lazily (see `rows`)."""
        if split not in self._examples:
            rows = self.rows(split)
            if rows is None:
                return self.examples("val")
            rows = self.limit(rows, split)
            if not rows:
                raise UserError(
                    f"{type(self).__name__} has no {split} rows. Give it a source that has some."
                )
            self._examples[split] = self.encode_split(rows, split)
        return self._examples[split]

    def encode_split(self, rows: Sequence[Row], split: Split) -> Sequence[Row]:
        """Return the examples of all rows of a split."""
        if not isinstance(rows, list):
            return self._lazy_examples(rows, split)
        examples = self.encode(rows, split)
        if not examples:
            raise UserError(
                f"max_length={self.max_length} has no room for any of the {len(rows)} {split} "
                "rows. Raise it."
            )
        return examples

    @property
    def encoded(self) -> dict[Split, Sequence[Row]]:
        """Splits that are tokenized by now, with their examples."""
        return dict(self._examples)

    def _lazy_examples(self, rows: Sequence[Row], split: Split) -> LazyExamples:
        """Return examples that are tokenized when they are read."""
        self._lazy.add(split)
        # Encoding a row records its format in this object. A worker process cannot report it, so
        # the first row is encoded here.
        self.encode([rows[0]], split)
        # Processes that collate ahead get the examples, and must not get the Trainer with them.
        task = copy.copy(self)
        task.trainer = None
        task._examples = {}
        return LazyExamples(rows, partial(task.encode, split=split))

    def limit(self, rows: Sequence[Row], split: Split) -> Sequence[Row]:
        """Keep the first rows after a seeded shuffle, if there is a limit below their number."""
        limit = {"train": self.limit_train, "val": self.limit_val}.get(split)
        if limit is None or limit >= len(rows):
            return rows
        if not isinstance(rows, list):
            chosen = seeded_random("limit", split, self.seed).sample(range(len(rows)), limit)
            return [rows[index] for index in chosen]
        shuffled = list(rows)
        seeded_random("limit", split, self.seed).shuffle(shuffled)
        return shuffled[:limit]

    def setup(self, stage: str | None = None) -> None:
        # A Trainer restores after this call, so a state that is still here is another run's.
        self._restored = None
        self.find_preprocessor()
        for split in STAGES[stage]:
            self.examples(split)
        if stage == "predict" and "predict" not in self._examples:
            log.info("Predicts the validation rows, since no `predict` source is given.")

    def find_preprocessor(self) -> None:
        """Take what makes inputs of rows from the LightningModule, here the tokenizer.

        Raises:
            UserError: if it has none.
        """
        if self.tokenizer is None:
            module = getattr(self.trainer, "lightning_module", None)
            self.tokenizer = getattr(module, "tokenizer", None)
        if self.tokenizer is None:
            raise UserError(
                f"{type(self).__name__} found no tokenizer: the LightningModule has none. Give it "
                "a `tokenizer` attribute, or assign one before the run: "
                "data.tokenizer = AutoTokenizer.from_pretrained(...)."
            )
        # The number is huge where the model states none.
        longest = self.tokenizer.model_max_length
        if self.max_length > longest:
            log.warning(
                "max_length=%d is more than the %d tokens this model can read.",
                self.max_length,
                longest,
            )

    @property
    def pad_id(self) -> int:
        """Token id of the padding: the tokenizer's, or that of its end token, or 0.

        Padding is recognized by the attention mask, never by this id.
        """
        for name in ("pad_token_id", "eos_token_id"):
            token = getattr(self.tokenizer, name, None)
            if token is not None:
                return int(token)
        return 0

    def report_cuts(self, split: Split, rows: int, **counts: int) -> None:
        """Store and log how many rows were longer than max_length.

        Where rows are tokenized when they are read, the first batch with such rows is reported.

        Args:
            split: the split.
            rows: number of all rows.
            **counts: number of cut rows for each part, such as `texts_cut=3`.
        """
        total = sum(counts.values())
        was_reported = split in self._lazy and self.truncated.get(split)
        if split in self._lazy:
            self.truncated[split] = self.truncated.get(split, 0) + total
        else:
            self.truncated[split] = total
        if not total or was_reported or not getattr(self.trainer, "is_global_zero", True):
            return
        parts = [f"{count} {part.replace('_', ' ')}" for part, count in counts.items() if count]
        log.warning(
            "%d of %d %s rows exceed max_length=%d: %s.",
            total,
            rows,
            split,
            self.max_length,
            ", ".join(parts),
        )

    # ---- loaders

    def train_dataloader(self) -> ResumableLoader:
        # Where Lightning overfits some batches, it asks for the same ones in every epoch.
        shuffle = not getattr(self.trainer, "overfit_batches", 0)
        loader = self.make_loader(
            "train", self.batch_size, shuffle=shuffle, group_by_length=self.group_by_length
        )
        loader.trainer = self.trainer
        loader.restored = self._take_restored
        previous = getattr(self.trainer, "train_dataloader", None)
        # When Lightning reloads, its number of the epoch is as far off as it was.
        if isinstance(previous, ResumableLoader):
            loader.epoch_offset = previous.epoch_offset
        return loader

    def val_dataloader(self) -> ResumableLoader:
        return self.make_loader("val", self.eval_batch_size)

    def test_dataloader(self) -> ResumableLoader:
        return self.make_loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> "DataLoader[Row]":
        return DataLoader(
            self.examples("predict"),  # type: ignore[arg-type]  # a list suffices as a Dataset
            batch_size=self.eval_batch_size,
            collate_fn=self.collate("predict"),
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def batched(self, split: Split) -> tuple[Sequence[Row], Callable[[Sequence[Row]], Batch]]:
        """Return what the batches of a split are made of, and the function that makes them."""
        return self.examples(split), self.collate(split)

    def make_loader(
        self, split: Split, size: int, *, shuffle: bool = False, group_by_length: bool = False
    ) -> ResumableLoader:
        """Return a loader of this process's share of a split."""
        examples, collate = self.batched(split)
        is_lazy = isinstance(examples, LazyExamples)
        if is_lazy and group_by_length:
            raise UserError(
                f"group_by_length needs the length of all {len(examples)} examples, which are "
                "tokenized only when they are read. Leave it out, or set `limit_train`."
            )
        lengths = [len(example["input_ids"]) for example in examples] if group_by_length else None
        order = self.make_order(
            split,
            examples,
            batch_size=size,
            seed=self.seed,
            shuffle=shuffle,
            lengths=lengths,
            lazy=is_lazy,
            **self.share_of_process(),
        )
        return ResumableLoader(examples, collate, order, num_workers=self.num_workers)

    def make_order(self, split: Split, examples: Sequence[Row], **options: Any) -> BatchOrder:
        """Return which examples make which batch.

        Args:
            split: the split.
            examples: its examples, as `batched` returns them.
            options: further arguments of `BatchOrder`.
        """
        return BatchOrder(len(examples), **options)

    def share_of_process(self) -> dict[str, Any]:
        """Return the number of this process, `rank`, and that of all processes, `world_size`."""
        share = getattr(self.trainer, "distributed_sampler_kwargs", None) or {}
        return {"rank": share.get("rank", 0), "world_size": share.get("num_replicas", 1)}

    def describe_training(self) -> dict[str, Any]:
        """Return what the training batches and their order depend on, for the record of a run.

        Workers, processes and the place of files are left out.
        """
        examples = self.examples("train")
        return {
            "class": type(self).__name__,
            "content": content_hash(self.content()),
            "examples": len(examples),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "group_by_length": self.group_by_length,
        }

    def content(self) -> Sequence[Row]:
        """Return what identifies the training data: the examples."""
        return self.examples("train")

    # ---- resuming: see `adaptrank.data.loader` for why the loader and the data both keep a state

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the loader that the Trainer trains on, or {} before there is one."""
        loader = getattr(self.trainer, "train_dataloader", None)
        state = self._restored or None
        if state is None and isinstance(loader, ResumableLoader):
            state = loader.state_dict()
        return {"train": dict(state)} if state is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the training of this run go on where `state_dict` was."""
        self._restored = state_dict.get("train")

    def _take_restored(self) -> dict[str, Any] | None:
        """Return the restored state the first time, and None from then on."""
        state, self._restored = self._restored, None
        return state
