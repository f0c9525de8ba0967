"""The task of completing prompts."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from adaptrank._errors import UserError
from adaptrank.data.chat_conversation import Conversation, conversation_of
from adaptrank.data.chat_encoding import ChatEncoder
from adaptrank.data.chat_format import ChatFormat
from adaptrank.data.collate import (
    IGNORED,
    Batch,
    causal_batch,
    predict_batch,
    validation_batch,
)
from adaptrank.data.documents import check_scores, encode_documents
from adaptrank.data.packed_task import PackedTask
from adaptrank.data.segments import (
    Segment,
    added_ids,
    as_int32,
    cut,
    encode_segments,
    token_ids,
)
from adaptrank.data.shortening import Shortener
from adaptrank.data.task import Row, Split
from adaptrank.data.template_names import check_chat_template

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

log = logging.getLogger(__name__)


class CompletionTask(PackedTask):
    """Prompts to complete.

    Rows have `prompt` and `completion`, or `messages` and perhaps `tools`. They may have `answer`,
    or `choices` and `label`. The training is on the completion only, with the tokenizer's end
    token after it. Rows may have `text` instead: all of its tokens are trained on, in blocks of
    `max_length`. Batches are `causal_batch` in training, `validation_batch` in validation and
    test, and `predict_batch` in prediction (see `adaptrank.data.collate`).

    In a conversation, the token with which the chat template ends a turn is trained on, and a
    template without such a token gets the tokenizer's end token after the last reply.

    Args:
        chat: put the prompt into the chat template as the user's turn, and the completion as the
            assistant's. Rows with `messages` are always conversations.
        chat_template: template of conversations, in place of the tokenizer's own: its text in
            Jinja, a file, or a name such as that of a template in TRL.
        kwargs: `packing`, and those of `TaskData`.

    Raises:
        UserError: if `chat_template` is a file that is missing, or no Jinja. In `setup`, if a
            template cannot render a conversation, or does not say exactly what its replies are, or
            if a row to predict has an empty prompt.
    """

    def __init__(
        self, *, chat: bool = False, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_chat_template(chat_template)
        self.chat = chat
        self.chat_template = chat_template
        # Format of the rows encoded so far: kinds (conversation or not), first system messages, ids
        # that end a completion, and a prompt to try the trained model with.
        self._kinds: set[bool] = set()
        self._systems: set[str | None] = set()
        self._end_ids_seen: set[int] = set()
        self._added: frozenset[int] | None = None
        self._first_prompt: str | None = None
        self._chats: ChatEncoder | None = None

    @property
    def example_prompt(self) -> str | None:
        """A prompt of the data, or in a conversation a user's message, to try the model with."""
        return self._first_prompt

    @property
    def prompt_template(self) -> str | None:
        """Format string over columns that makes the prompts, or None if rows have whole prompts."""
        return None

    @property
    def prompt_columns(self) -> list[dict[str, str | bool]]:
        """How the training sources make prompts of their columns, or [] where no source says so.

        There is one entry for each kind of source: {field of `Source`: its value}.
        """
        return []

    def conventions(self) -> dict[str, Any]:
        assert self.tokenizer is not None
        found: dict[str, Any] = {}
        if len(self._kinds) == 1:
            found["chat"] = True in self._kinds
        if True in self._kinds:
            found["chat_template"] = self._chat_encoder.chat_format.template.text
        if found.get("chat") and len(self._systems) == 1 and None not in self._systems:
            found["system"] = next(iter(self._systems))
        if self.prompt_template is not None:
            found["prompt"] = self.prompt_template
        if self.prompt_columns:
            found["columns"] = self.prompt_columns
        if self._end_ids_seen:
            ends = self.tokenizer.convert_ids_to_tokens(sorted(self._end_ids_seen))
            found["stop_tokens"] = self.token_table(*ends)
        if self.tokenizer.pad_token is not None:
            found["pad_token"] = self.token_table(self.tokenizer.pad_token)
        return found

    def collate(self, split: Split) -> Callable[[Sequence[Row]], Batch]:
        batches = {"train": causal_batch, "predict": predict_batch}
        return partial(batches.get(split, validation_batch), pad_id=self.pad_id)

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if stage == "predict":
            self._check_prompts()

    def predict_dataloader(self) -> "DataLoader[Row]":
        self._check_prompts()
        return super().predict_dataloader()

    def _check_prompts(self) -> None:
        """Raise if a row to predict has nothing to complete.

        Raises:
            UserError: naming the first row without a token.
        """
        examples = self.examples("predict")
        if not isinstance(examples, list):
            return
        if any("prompt_ids" not in example for example in examples):
            raise UserError(
                "Plain text has no prompt to complete. Give `predict` a source of prompts."
            )
        empty = [k for k, example in enumerate(examples) if not len(example["prompt_ids"])]
        if empty:
            raise UserError(
                f"Row {empty[0]} of the rows to predict has an empty prompt, and there is nothing "
                f"to complete ({len(empty)} of {len(examples)} rows). Remove or fill such rows."
            )

    def encode(self, rows: list[Row], split: Split) -> list[Row]:
        documents = [row["text"] for row in rows if "text" in row]
        if documents:
            prompts = [row for row in rows if "text" not in row]
            examples = self.encode(prompts, split) if prompts else []
            return examples + self._encode_documents(documents, split, examples)
        self._look_at(rows)
        if split == "predict":
            return self._encode_prompts(rows, split)
        rows, examples = self._encode_completions(rows, split)
        if split == "train":
            return examples
        for example, prompt in zip(examples, self._encode_prompts(rows), strict=True):
            example |= prompt
        has_answers = self._all_have("answer", rows, split, "exact match")
        if has_answers and self._has_prompts(examples, split):
            for example, row in zip(examples, rows, strict=True):
                example["answer"] = row["answer"]
        if self._all_have("choices", rows, split, "accuracy over choices"):
            assert self.tokenizer is not None
            shortener = Shortener(self.tokenizer, self.max_length)
            for example, row in zip(examples, rows, strict=True):
                example |= self._encode_choices(row, shortener)
        return examples

    def _has_prompts(self, examples: list[Row], split: Split) -> bool:
        """Tell whether some prompt has a token. Warn of those that have none."""
        count = sum(not len(example["prompt_ids"]) for example in examples)
        if count:
            log.warning(
                "%d of %d %s rows have an empty prompt, which nothing completes. They count in the "
                "loss, and not in the exact match.",
                count,
                len(examples),
                split,
            )
        return count < len(examples)

    def _all_have(self, field: str, rows: list[Row], split: Split, score: str) -> bool:
        """Tell whether all rows have a field. Warn if only some have it."""
        count = sum(field in row for row in rows)
        if 0 < count < len(rows):
            log.warning(
                "%d of %d %s rows have `%s`, so there is no %s.",
                count,
                len(rows),
                split,
                field,
                score,
            )
        return count == len(rows)

    def _look_at(self, rows: list[Row]) -> None:
        """Remember the format of the rows, for `conventions` and for a prompt to type."""
        if self.chat_template is not None and not any(map(self._is_chat, rows)):
            log.warning(
                "`chat_template` has no effect on rows that are no conversations. Set `chat: true` "
                "to make conversations of them."
            )
        for row in rows:
            self._kinds.add(self._is_chat(row))
            messages = row.get("messages") or []
            has_system = bool(messages) and messages[0]["role"] == "system"
            system = messages[0].get("content") if has_system else None
            self._systems.add(system if isinstance(system, str) else None)
            if self._first_prompt is None:
                asked = [
                    message.get("content") for message in messages if message["role"] == "user"
                ]
                prompt = row.get("prompt") or (asked[0] if len(asked) == 1 else None)
                self._first_prompt = prompt if isinstance(prompt, str) else None

    def _encode_documents(self, texts: list[str], split: Split, others: list[Row]) -> list[Row]:
        """Tokenize plain text: `input_ids` and `labels`, each (L,), of each block."""
        assert self.tokenizer is not None
        check_scores(others, split)
        self._kinds.add(False)
        if self.tokenizer.eos_token_id is not None:
            self._end_ids_seen.add(self.tokenizer.eos_token_id)
        return encode_documents(self.tokenizer, texts, self.max_length)

    # ---- the text of a row

    def _is_chat(self, row: Row) -> bool:
        return self.chat or "messages" in row

    def _segments(self, row: Row) -> list[Segment]:
        """Return the text of a row that is no conversation. The completion is trained on."""
        return [(row["prompt"], False), (row["completion"], True)]

    def _conversation(self, row: Row) -> Conversation:
        """Return the turns of a row that is a conversation."""
        messages = row.get("messages")
        if messages is None:
            messages = [{"role": "user", "content": row["prompt"]}]
            if "completion" in row:
                messages.append({"role": "assistant", "content": row["completion"].strip()})
        return conversation_of(messages, row.get("tools"))

    def _indices_by_kind(self, rows: list[Row]) -> tuple[list[int], list[int]]:
        """Return indices of the rows that are no conversations, and of those that are.

        The chat template gives a conversation its special tokens. The tokenizer gives them to other
        texts.
        """
        chats = [i for i, row in enumerate(rows) if self._is_chat(row)]
        texts = [i for i, row in enumerate(rows) if not self._is_chat(row)]
        return texts, chats

    @property
    def _chat_encoder(self) -> ChatEncoder:
        """The encoder of conversations, one for all splits."""
        assert self.tokenizer is not None
        if self._chats is None or self._chats.tokenizer is not self.tokenizer:
            chat_format = ChatFormat(self.tokenizer, self.chat_template)
            self._chats = ChatEncoder(self.tokenizer, chat_format, self.max_length)
        return self._chats

    # ---- tokens

    def _encode_prompts(self, rows: list[Row], split: Split | None = None) -> list[Row]:
        """Tokenize prompts for generation: `prompt_ids` (L,), and the text `prompt`.

        Args:
            rows: the rows.
            split: their split, if what is cut is reported.
        """
        examples: list[Row] = [{} for _ in rows]
        texts, chats = self._indices_by_kind(rows)
        cuts = self._encode_plain_prompts(rows, texts, examples)
        if chats:
            encoder = self._chat_encoder
            prompts = encoder.prompts([self._conversation(rows[i]) for i in chats])
            for i, (text, ids) in zip(chats, prompts, strict=True):
                examples[i] = {"prompt_ids": as_int32(ids), "prompt": rows[i].get("prompt", text)}
            cuts |= encoder.cuts.counts()
        if split is not None:
            self.report_cuts(split, len(rows), **cuts)
        return examples

    def _encode_plain_prompts(
        self, rows: list[Row], indices: list[int], examples: list[Row]
    ) -> dict[str, int]:
        """Tokenize prompts that are no conversations, and return the number of those cut."""
        assert self.tokenizer is not None
        bos = self.tokenizer.bos_token_id
        shortener = Shortener(self.tokenizer, self.max_length)
        texts = [shortener.prompt(str(rows[i]["prompt"]), special=True) for i in indices]
        encoded = token_ids(self.tokenizer, texts, special=True)
        count = 0
        for i, ids in zip(indices, encoded, strict=True):
            kept, _, part = cut(ids, [IGNORED] * len(ids), self.max_length, bos)
            count += bool(part)
            examples[i] = {"prompt_ids": as_int32(kept), "prompt": rows[i]["prompt"]}
        return {"prompts_cut_from_the_left": count}

    def _encode_completions(self, rows: list[Row], split: Split) -> tuple[list[Row], list[Row]]:
        """Tokenize prompts with completions: `input_ids` and `labels`, each (L,).

        Returns:
            The row of each example, and the examples. A conversation may have several examples, or
            none if it does not fit. The row then has the turns of its example.
        """
        texts, chats = self._indices_by_kind(rows)
        examples, cuts = self._encode_plain_completions(rows, texts)
        count = len(texts)
        if chats:
            several = self._encode_chats([rows[i] for i in chats], split)
            for k, row, example in several:
                examples.append((chats[k], row, example))
            # Examples are in the order of their rows.
            examples.sort(key=lambda entry: entry[0])
            cuts |= self._chat_encoder.cuts.counts()
            count += self._chat_encoder.cuts.examples
        self.report_cuts(split, count, **cuts)
        return [row for _, row, _ in examples], [example for _, _, example in examples]

    def _encode_plain_completions(
        self, rows: list[Row], indices: list[int]
    ) -> tuple[list[tuple[int, Row, Row]], dict[str, int]]:
        """Return (index, row, example) of rows that are no conversations, and how many are cut."""
        assert self.tokenizer is not None
        bos = self.tokenizer.bos_token_id
        shortener = Shortener(self.tokenizer, self.max_length)
        whole = (self._segments(rows[i]) for i in indices)
        segments = [shortener.segments(row, special=True) for row in whole]
        encoded = encode_segments(self.tokenizer, segments, special=True)
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        if indices:
            self._end_ids_seen |= self._added_ids().intersection(end)
        cuts = {"prompt": 0, "completion": 0}
        examples = []
        for i, (ids, labels) in zip(indices, encoded, strict=True):
            ids, labels, part = cut(ids + end, labels + end, self.max_length, bos)
            if part:
                cuts[part] += 1
            example = {"input_ids": as_int32(ids), "labels": as_int32(labels)}
            examples.append((i, rows[i], example))
        counts = {
            "prompts_cut_from_the_left": cuts["prompt"],
            "completions_cut_from_the_right": cuts["completion"],
        }
        return examples, counts

    def _encode_chats(self, rows: list[Row], split: Split) -> list[tuple[int, Row, Row]]:
        """Return (index, row, example) of all examples of conversations.

        Raises:
            UserError: if rows are tokenized when they are read, and one has several examples.
        """
        assert self.tokenizer is not None
        encoder = self._chat_encoder
        # An answer or choices belong to the last reply.
        is_scored = [split != "train" and bool({"answer", "choices"} & set(row)) for row in rows]
        conversations = [self._conversation(row) for row in rows]
        encoded = encoder.completions(conversations, is_scored)
        self._log(encoder.chat_format.take_notes(), split)
        if split in self._lazy and len(encoded) != len(rows):
            raise UserError(
                f"{len(rows)} conversations have {len(encoded)} examples, and rows that are "
                "tokenized when they are read have one each. Set `limit_train`, or give another "
                "template with `chat_template`."
            )
        examples = []
        for k, one in encoded:
            self._end_ids_seen |= self._added_ids().intersection(one.ends())
            row = rows[k]
            if "messages" in row:
                row = {**row, "messages": one.conversation.messages}
            example = {"input_ids": as_int32(one.ids), "labels": as_int32(one.labels)}
            examples.append((k, row, example))
        return examples

    def _added_ids(self) -> frozenset[int]:
        """Return the ids of tokens beside the text."""
        assert self.tokenizer is not None
        if self._added is None:
            self._added = added_ids(self.tokenizer)
        return self._added

    def _log(self, notes: list[str], split: Split) -> None:
        """Log notes about the conversations of a split."""
        if getattr(self.trainer, "is_global_zero", True):
            for note in notes:
                log.warning("%s data: %s", split, note)

    def _encode_choices(self, row: Row, shortener: Shortener) -> Row:
        """Tokenize every choice of a row, after its prompt."""
        if self._is_chat(row):
            encoded = self._chat_encoder.choices(self._conversation(row), row["choices"])
        else:
            encoded = self._encode_plain_choices(row, shortener)
        choices = []
        for text, (ids, labels) in zip(row["choices"], encoded, strict=True):
            choices.append(
                {"input_ids": as_int32(ids), "labels": as_int32(labels), "characters": len(text)}
            )
        return {"choices": choices, "target": row["label"]}

    def _encode_plain_choices(
        self, row: Row, shortener: Shortener
    ) -> list[tuple[list[int], list[int]]]:
        """Return ids and labels of a prompt with each choice.

        No end token follows the choice, because log p(choice | prompt) is compared.
        """
        assert self.tokenizer is not None
        bos = self.tokenizer.bos_token_id
        whole = ([(row["prompt"], False), (" " + choice, True)] for choice in row["choices"])
        segments = [shortener.segments(choice, special=True) for choice in whole]
        encoded = encode_segments(self.tokenizer, segments, special=True)
        return [cut(ids, labels, self.max_length, bos)[:2] for ids, labels in encoded]
