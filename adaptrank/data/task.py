"""The LightningDataModule that every data set shares, and the two kinds of task: completing a prompt and naming a class."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from adaptrank._errors import UserError
from adaptrank.data.collate import (
    IGNORED,
    Batch,
    causal_batch,
    class_batch,
    predict_batch,
    validation_batch,
)
from adaptrank.data.loader import BatchOrder, ResumableLoader, rng

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


class TaskData(LightningDataModule, ABC):
    """Rows of text -> tokens -> batches, in an order that depends on nothing but (seed, epoch, index).

    The tokenizer is the LightningModule's (`trainer.lightning_module.tokenizer`), or what was assigned to `.tokenizer` before
    `setup`. Batches are dealt to several processes here, so `Trainer(use_distributed_sampler=...)` changes nothing in training,
    validation and test; prediction goes through a plain DataLoader, whose sampler Lightning replaces, so that
    prediction writers learn the indices.

    Args:
        batch_size: training examples a process and step.
        eval_batch_size: examples a process and validation, test or prediction step; None takes batch_size.
        max_length: most tokens an example may have; longer ones are cut, and counted in `truncated`.
        num_workers: processes that collate ahead.
        seed: decides every random choice made with the data, and no other one.
        group_by_length: train on batches of similar length, in shuffled order.
        limit_train: keep that many training rows, the first after a seeded shuffle.
        limit_val: the same for the validation rows.

    Raises:
        ValueError: if a size is not positive; in `setup`, if a split is empty or no tokenizer can be found.
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
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size}
        sizes |= {"limit_train": limit_train, "limit_val": limit_val}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise UserError(f"{name}={size} leaves no example; use 1 or more.")
        if max_length < 2:
            raise UserError(
                f"max_length={max_length} leaves no token to predict from another; use 2 or more."
            )
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.max_length = max_length
        self.num_workers = num_workers
        self.seed = seed
        self.group_by_length = group_by_length
        self.limit_train, self.limit_val = limit_train, limit_val
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.truncated: dict[str, int] = {}  # split -> number of rows that were cut
        self._examples: dict[Split, list[Row]] = {}
        self._restored: dict[str, Any] | None = None  # where the run that is resumed was

    @abstractmethod
    def rows(self, split: Split) -> list[Row] | None:
        """Rows of a split; None for test and predict means that the validation rows serve."""

    @abstractmethod
    def encode(self, rows: list[Row], split: Split) -> list[Row]:
        """Tokenize: one example with an `input_ids` (L,) tensor for every row (prediction: or a `prompt_ids` one)."""

    @abstractmethod
    def collate(self, split: Split) -> Callable[[Sequence[Row]], Batch]:
        """Give the function that makes a batch of examples of this split; it must pickle."""

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of their labels, known after `setup`; None where the task has no classes."""
        return None

    @property
    def num_classes(self) -> int | None:
        """Number of classes, known after `setup`; None where the task has no classes."""
        return None if self.class_names is None else len(self.class_names)

    def examples(self, split: Split) -> list[Row]:
        """Tokenized examples of a split: `setup` makes them, once."""
        if split not in self._examples:
            rows = self.rows(split)
            if rows is None:
                return self.examples("val")
            limit = {"train": self.limit_train, "val": self.limit_val}.get(split)
            if limit is not None and limit < len(rows):
                kept = list(rows)
                rng("limit", split, self.seed).shuffle(kept)
                rows = kept[:limit]
            if not rows:
                raise UserError(
                    f"{type(self).__name__} has no {split} rows; give it a source that has some."
                )
            self._examples[split] = self.encode(rows, split)
        return self._examples[split]

    def setup(self, stage: str | None = None) -> None:
        self._restored = (
            None  # a Trainer restores after this, so what is left here is another run's
        )
        if self.tokenizer is None:
            self.tokenizer = getattr(
                getattr(self.trainer, "lightning_module", None), "tokenizer", None
            )
        if self.tokenizer is None:
            raise UserError(
                f"{type(self).__name__} found no tokenizer: the LightningModule has none. Give it a `tokenizer` attribute, or "
                f"assign one before the run: data.tokenizer = AutoTokenizer.from_pretrained(...)."
            )
        longest = self.tokenizer.model_max_length  # a huge number where the model states none
        if self.max_length > longest:
            log.warning(
                "max_length=%d is more than the %d tokens this model can read.",
                self.max_length,
                longest,
            )
        for split in STAGES[stage]:
            self.examples(split)

    def state_dict(self) -> dict[str, Any]:
        """Where the training is in its epoch: the state of the loader that the Trainer trains on; {} before there is one."""
        loader = getattr(self.trainer, "train_dataloader", None)
        state = self._restored or (
            loader.state_dict() if isinstance(loader, ResumableLoader) else None
        )
        return {} if state is None else {"train": dict(state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the training of this run go on where that state was; see `adaptrank.data.loader` for why both keep it."""
        self._restored = state_dict.get("train")

    def _take_restored(self) -> dict[str, Any] | None:
        state, self._restored = self._restored, None
        return state

    def train_dataloader(self) -> ResumableLoader:
        # Lightning asks for the same batches in every epoch where it overfits some.
        shuffle = not getattr(self.trainer, "overfit_batches", 0)
        loader = self._loader(
            "train", self.batch_size, shuffle=shuffle, grouped=self.group_by_length
        )
        loader.trainer, loader.restored = self.trainer, self._take_restored
        before = getattr(self.trainer, "train_dataloader", None)
        if isinstance(
            before, ResumableLoader
        ):  # Lightning reloads: what it counts is as far off as it was
            loader.behind = before.behind
        return loader

    def val_dataloader(self) -> ResumableLoader:
        return self._loader("val", self.eval_batch_size)

    def test_dataloader(self) -> ResumableLoader:
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> "DataLoader[Row]":
        return DataLoader(
            self.examples("predict"),  # type: ignore[arg-type]  # a list has the two methods of a Dataset
            batch_size=self.eval_batch_size,
            collate_fn=self.collate("predict"),
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _loader(
        self, split: Split, size: int, *, shuffle: bool = False, grouped: bool = False
    ) -> ResumableLoader:
        examples = self.examples(split)
        share = getattr(self.trainer, "distributed_sampler_kwargs", None) or {}
        order = BatchOrder(
            len(examples),
            size,
            seed=self.seed,
            shuffle=shuffle,
            lengths=[len(e["input_ids"]) for e in examples] if grouped else None,
            rank=share.get("rank", 0),
            world_size=share.get("num_replicas", 1),
        )
        return ResumableLoader(examples, self.collate(split), order, num_workers=self.num_workers)

    @property
    def pad_id(self) -> int:
        """Id that fills the padding: the tokenizer's, or the end's, or 0; the attention mask says what is padding."""
        for name in ("pad_token_id", "eos_token_id"):
            if (token := getattr(self.tokenizer, name, None)) is not None:
                return int(token)
        return 0

    def report_cuts(self, split: Split, rows: int, **cut: int) -> None:
        """Keep and log how many rows were longer than max_length, by which part was cut."""
        self.truncated[split] = sum(cut.values())
        if self.truncated[split] and getattr(self.trainer, "is_global_zero", True):
            parts = ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in cut.items() if n)
            log.warning(
                "%d of %d %s rows exceed max_length=%d: %s.",
                sum(cut.values()),
                rows,
                split,
                self.max_length,
                parts,
            )


def tokens(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], *, special: bool
) -> list[list[int]]:
    """Token ids of every text; `special` lets the tokenizer add its beginning token, its end token is left away."""
    if not texts:
        return []
    found: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)[
        "input_ids"
    ]
    end = tokenizer.eos_token_id
    return [ids[:-1] if special and len(ids) > 1 and ids[-1] == end else ids for ids in found]


Segment = tuple[str, bool]  # a piece of text, and whether it is trained on


def encode_segments(
    tokenizer: "PreTrainedTokenizerBase", rows: list[list[Segment]], *, special: bool
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of texts made of segments; labels are -100 on what is not trained on.

    A segment is tokenized together with what stands before it, unless that would change the tokens before it: so the prompt
    has the ids that generation sees, and the rest is what the tokenizer makes of the whole text where the border allows it.
    """
    out: list[tuple[list[int], list[int]]] = [([], []) for _ in rows]
    text = ["" for _ in rows]
    for k in range(max((len(r) for r in rows), default=0)):
        here = [i for i, r in enumerate(rows) if k < len(r)]
        for i in here:
            text[i] += rows[i][k][0]
        joint = tokens(tokenizer, [text[i] for i in here], special=special)
        for i, ids in zip(here, joint, strict=True):
            before, labels = out[i]
            piece, trained = rows[i][k]
            if ids[: len(before)] == before:
                new = ids[len(before) :]
            else:
                new = tokens(tokenizer, [piece], special=False)[0]
            before += new
            labels += new if trained else [IGNORED] * len(new)
    return out


def cut(
    ids: list[int], labels: list[int], max_length: int, bos: int | None
) -> tuple[list[int], list[int], str]:
    """Shorten to max_length tokens: from the left up to the last completion, and only then from the right.

    A beginning-of-sequence token stays first. Returns ids, labels and what was cut: "", "prompt" or "completion".
    """
    excess = len(ids) - max_length
    if excess <= 0:
        return ids, labels, ""
    trained = [i for i, label in enumerate(labels) if label != IGNORED]
    start = (
        next((i for i in reversed(trained) if not i or labels[i - 1] == IGNORED), 0)
        if trained
        else len(ids)
    )
    left = max(
        0, min(excess, start - 1)
    )  # one token stays, for the completion to be predicted from
    keep = 1 if left and ids[0] == bos else 0
    ids, labels = ids[:keep] + ids[left + keep :], labels[:keep] + labels[left + keep :]
    return ids[:max_length], labels[:max_length], "completion" if left < excess else "prompt"


def render(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]], *, ask: bool = False
) -> str:
    """Render a conversation by the tokenizer's chat template; `ask` opens the assistant's turn."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "A chat was asked for, but this tokenizer has no chat template; take an Instruct model, or `chat: false`."
        )
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))


def chat_segments(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]]
) -> list[Segment]:
    """Render a conversation by the tokenizer's chat template; the assistant's turns, each with its end, are trained on.

    Raises:
        ValueError: if there is no template, no turn of the assistant, or the template rewrites earlier turns.
    """

    whole, done = render(tokenizer, messages), 0
    segments: list[Segment] = []
    end = tokenizer.eos_token
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opening, closing = (
            render(tokenizer, messages[:i], ask=True),
            render(tokenizer, messages[: i + 1]),
        )
        if not whole.startswith(opening) or not whole.startswith(closing):
            raise UserError(
                "The chat template renders a turn differently when others follow, so its tokens cannot be told apart; "
                "give conversations with one assistant turn, or `chat: false` with prompt and completion."
            )
        stop = len(closing)
        if end and (found := closing.rfind(end, len(opening))) >= 0:
            stop = found + len(
                end
            )  # nobody generates what a template writes after the end, a line break mostly
        segments += [(whole[done : len(opening)], False), (whole[len(opening) : stop], True)]
        done = stop
    if not segments:
        roles = sorted({m["role"] for m in messages})
        raise UserError(
            f"A conversation has no assistant turn to train on (its roles are {roles})."
        )
    return segments


class CompletionTask(TaskData):
    """Prompts to complete: rows have `prompt` and `completion` (or `messages`), and may have `answer`, or `choices` and `label`.

    Trains on the completion only, with the tokenizer's end token after it. Batches: training `causal_batch`, validation and test
    `validation_batch`, prediction `predict_batch` (see `adaptrank.data.collate`).

    Args:
        chat: put the prompt into the tokenizer's chat template as the user's turn, the completion as the assistant's.
            Rows with `messages` are always conversations.
        kwargs: those of `TaskData`.
    """

    def __init__(self, *, chat: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.chat = chat

    def collate(self, split: Split) -> Callable[[Sequence[Row]], Batch]:
        batches = {"train": causal_batch, "predict": predict_batch}
        return partial(batches.get(split, validation_batch), pad_id=self.pad_id)

    def encode(self, rows: list[Row], split: Split) -> list[Row]:
        assert self.tokenizer is not None
        if split == "predict":
            return self._encode_prompts(rows)
        examples = self._encode_completions(rows, split)
        if split == "train":
            return examples
        examples = [e | p for e, p in zip(examples, self._encode_prompts(rows), strict=True)]
        if self._all_or_none(rows, "answer", split, "exact match"):
            examples = [e | {"answer": r["answer"]} for e, r in zip(examples, rows, strict=True)]
        if self._all_or_none(rows, "choices", split, "accuracy over choices"):
            examples = [e | self._encode_choices(r) for e, r in zip(examples, rows, strict=True)]
        return examples

    def _segments(self, row: Row) -> list[Segment]:
        assert self.tokenizer is not None
        if "messages" in row:
            return chat_segments(self.tokenizer, row["messages"])
        if self.chat:
            turns = [("user", row["prompt"]), ("assistant", row["completion"].strip())]
            return chat_segments(self.tokenizer, [{"role": r, "content": c} for r, c in turns])
        return [(row["prompt"], False), (row["completion"], True)]

    def _prompt(self, row: Row) -> str:
        """All that stands before the last completion, as the model is given it."""
        assert self.tokenizer is not None
        if not self._is_chat(row):
            return str(row["prompt"])
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return render(self.tokenizer, before, ask=True)

    def _is_chat(self, row: Row) -> bool:
        return self.chat or "messages" in row

    def _by_kind(self, rows: list[Row]) -> list[tuple[bool, list[int]]]:
        """Rows that a chat template has given their special tokens, and rows that the tokenizer gives them to."""
        return [
            (kind, [i for i, r in enumerate(rows) if self._is_chat(r) is kind])
            for kind in (False, True)
        ]

    def _encode_prompts(self, rows: list[Row]) -> list[Row]:
        assert self.tokenizer is not None
        texts = [self._prompt(r) for r in rows]
        out: list[Row] = [{} for _ in rows]
        for kind, where in self._by_kind(rows):
            found = tokens(self.tokenizer, [texts[i] for i in where], special=not kind)
            for i, ids in zip(where, found, strict=True):
                kept, _, _ = cut(
                    ids, [IGNORED] * len(ids), self.max_length, self.tokenizer.bos_token_id
                )
                out[i] = {"prompt_ids": small(kept), "prompt": rows[i].get("prompt", texts[i])}
        return out

    def _encode_completions(self, rows: list[Row], split: Split) -> list[Row]:
        assert self.tokenizer is not None
        end, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        out: list[Row] = [{} for _ in rows]
        cuts = {"prompt": 0, "completion": 0}
        for kind, where in self._by_kind(rows):
            encoded = encode_segments(
                self.tokenizer, [self._segments(rows[i]) for i in where], special=not kind
            )
            for i, (ids, labels) in zip(where, encoded, strict=True):
                if not kind and end is not None:
                    ids, labels = [*ids, end], [*labels, end]
                ids, labels, part = cut(ids, labels, self.max_length, bos)
                if part:
                    cuts[part] += 1
                out[i] = {"input_ids": small(ids), "labels": small(labels)}
        self.report_cuts(
            split,
            len(rows),
            prompts_cut_from_the_left=cuts["prompt"],
            completions_cut_from_the_right=cuts["completion"],
        )
        return out

    def _encode_choices(self, row: Row) -> Row:
        assert self.tokenizer is not None
        rows: list[list[Segment]] = []
        for choice in row["choices"]:
            if self._is_chat(row):
                *before, (reply, _) = self._segments(row | {"completion": choice})
                # No end after a choice: what is compared is log p(choice | prompt).
                stop = reply.find(choice.strip()) + len(choice.strip())
                rows.append([*before, (reply[:stop], True)])
            else:
                rows.append([(row["prompt"], False), (" " + choice, True)])
        bos = self.tokenizer.bos_token_id
        choices = []
        for text, pair in zip(
            row["choices"],
            encode_segments(self.tokenizer, rows, special=not self._is_chat(row)),
            strict=True,
        ):
            ids, labels, _ = cut(*pair, self.max_length, bos)
            choices.append(
                {"input_ids": small(ids), "labels": small(labels), "characters": len(text)}
            )
        return {"choices": choices, "target": row["label"]}

    def _all_or_none(self, rows: list[Row], field: str, split: Split, score: str) -> bool:
        having = sum(field in r for r in rows)
        if 0 < having < len(rows):
            log.warning(
                "%d of %d %s rows have `%s`, so there is no %s.",
                having,
                len(rows),
                split,
                field,
                score,
            )
        return having == len(rows)


class LabelTask(TaskData):
    """Texts to classify: rows have `text`, perhaps `text_pair`, and `label`, the index of the class. Batches: `class_batch`.

    Either every row of a split has `text_pair` or none has: where a text has no second one, its pair is "", and it is
    encoded as a single text. A label that is a float is a number to predict, and stays one.
    """

    def collate(self, split: Split) -> Callable[[Sequence[Row]], Batch]:
        return partial(
            class_batch,
            pad_id=self.pad_id,
            pad_type_id=getattr(self.tokenizer, "pad_token_type_id", 0),
        )

    def encode(self, rows: list[Row], split: Split) -> list[Row]:
        assert self.tokenizer is not None
        bare = [k for k, r in enumerate(rows) if "text_pair" not in r]
        if 0 < len(bare) < len(rows):
            raise UserError(
                f"{len(bare)} of {len(rows)} {split} rows have no `text_pair`, the first of them "
                f'{rows[bare[0]]["text"][:60]!r}; give every row one, "" where there is no second text.'
            )
        limits: dict[str, Any] = {
            "truncation": True,
            "max_length": self.max_length,
            "verbose": False,
        }
        examples: list[Row] = [{} for _ in rows]
        long = 0
        for paired in (False, True):
            where = [i for i, r in enumerate(rows) if bool(r.get("text_pair")) is paired]
            if not where:
                continue
            pairs = [rows[i]["text_pair"] for i in where] if paired else None
            encoded = self.tokenizer([rows[i]["text"] for i in where], pairs, **limits)
            fields = [f for f in ("input_ids", "token_type_ids") if f in encoded]
            for k, i in enumerate(where):
                examples[i] = {f: small(encoded[f][k]) for f in fields}
                if "label" in rows[i]:
                    examples[i]["label"] = rows[i]["label"]
            long += sum(bool(e.overflowing) for e in encoded.encodings or [])
        self.report_cuts(split, len(rows), texts_cut=long)
        return examples


def small(ids: list[int]) -> Tensor:
    """Ids as int32: half the memory of int64; batches are int64 again."""
    return torch.tensor(ids, dtype=torch.int32)
