"""`generate`: complete prompts with an adapter, or with a merged model."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaptrank._errors import UserError
from adaptrank.cli.errors import ConfigError, missing_file
from adaptrank.cli.options import BASE, TRUST

DESCRIPTION = """\
Complete prompts greedily, with an adapter on its base, or with a merged (or any other causal
language) model. A model with an encoder, such as T5, writes another text for each prompt. Without
--prompt and --file, every line of standard input is a prompt. \\n in a line or in --prompt is a
line break. On a terminal, words are shown as they come, unless beams are searched.

A --file of rows (.jsonl, .csv, .parquet, ...) is read as training and `predict` read it: with the
columns of training, as a format of CausalLMData, or with a column `prompt`.

Prompts are put into the form of training, which the adapter records: its prompt template, and the
chat template. They end where training taught the model to end. --raw takes each prompt as it is."""
EMPTY = "An empty prompt has nothing to complete."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    model = "a run's adapter folder or its name on the Hub, a model's folder, or a model id"
    parser.add_argument("model", metavar="ADAPTER_OR_MODEL", help=model)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable")
    file = "one prompt a line, or rows with the columns of training or a column `prompt`"
    parser.add_argument("--file", metavar="FILE", help=file)
    longest = "length of the longest answer, in tokens (64)"
    parser.add_argument("--max_new_tokens", type=int, default=64, metavar="N", help=longest)
    chat = "put each prompt into the chat template, or not (as in training)"
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, default=None, help=chat)
    raw = "take each prompt as it is, without any template of training"
    parser.add_argument("--raw", action="store_true", help=raw)
    as_json = "a line of JSON for each prompt: prompt, completion"
    parser.add_argument("--json", action="store_true", help=as_json)
    parser.add_argument("--base", metavar="NAME", help=BASE)
    parser.add_argument("--trust_remote_code", action="store_true", help=TRUST)
    dtype = "of the weights: auto (bf16 where it is fast), fp32, bf16"
    parser.add_argument("--dtype", default="auto", help=dtype)
    quantize = "of the linear layers: nf4, int8 and others, or none (as in training)"
    parser.add_argument("--quantize", metavar="NAME", help=quantize)
    devices = "devices of the layers, such as auto or cuda:0 (the CPU)"
    parser.add_argument("--device_map", metavar="NAME", help=devices)


def run(options: argparse.Namespace) -> None:
    """Print a completion for each prompt."""
    from adaptrank import backbones
    from adaptrank.cli.loading import find_model

    if options.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens {options.max_new_tokens}: give 1 or more.")
    dtype = backbones.auto_dtype(options.dtype)
    stored = find_model(options.model, options.base, options.trust_remote_code)
    if not stored.writes_text:
        task = stored.auto_class.removeprefix("AutoModelFor")
        raise ConfigError(
            f"{stored.adapter} was trained for {task}, which completes no text. Use "
            f"`python -m adaptrank predict --model.adapter {stored.adapter} ...`."
        )
    form = prompt_form(options, stored.conventions)
    prompts = read_prompts(options, form)
    tokenizer = stored.tokenizer()
    encoded: Iterable[EncodedPrompt] = (
        encode(tokenizer, prompt, form, stored.is_causal) for prompt in prompts
    )
    is_complete = isinstance(prompts, list)
    if is_complete:
        # Whatever is wrong with a prompt is said before the model is loaded.
        encoded = list(encoded)
    quantization = chosen_quantization(options.quantize, stored, dtype)
    backbones.read_options(device_map=options.device_map)
    model = stored.load(dtype, quantization=quantization, device_map=options.device_map)
    searches = (model.generation_config.num_beams or 1) > 1
    streams = sys.stdout.isatty() and not options.json and not searches
    room = Room.of(model, options.max_new_tokens)
    fitted: Iterable[Fitted] = (room.fit(prompt, tokenizer.bos_token_id) for prompt in encoded)
    if is_complete:
        fitted = list(fitted)
    told: set[str] = set()
    for prompt, longest, note in fitted:
        # One sentence of each kind is enough.
        if note is not None and note[0] not in told:
            told.add(note[0])
            print(note[1], file=sys.stderr)
        is_continued = stored.is_causal and not prompt.chat
        if streams and is_continued:
            print(prompt.text, end="", flush=True)
        text = answer(model, tokenizer, prompt, longest, streams)
        if streams:
            continue
        if options.json:
            line = {"prompt": prompt.text, "completion": text}
            print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            print(prompt.text + text if is_continued else text, flush=True)


def chosen_quantization(given: str | None, stored: Any, dtype: Any) -> Any:
    """Return the quantization of the base: the given one, or else that of training.

    Args:
        given: value of --quantize, or None.
        stored: the model.
        dtype: dtype of the weights that are not quantized.
    """
    from adaptrank import backbones

    if given is not None:
        chosen = backbones.read_quantization(given)
        if chosen is not None:
            backbones.check_quantization(chosen, dtype)
        return chosen
    recorded = stored.quantization
    if recorded is None or recorded["type"] not in backbones.KINDS or stored.is_quantized:
        return None
    chosen = backbones.read_quantization(recorded)
    assert chosen is not None
    try:
        backbones.check_quantization(chosen, dtype)
    except UserError as error:
        raise ConfigError(f"{error} Or take the base as it is: --quantize none.") from None
    print(
        f"The base is loaded in {chosen.kind}, as in training. --quantize none takes it as it is.",
        file=sys.stderr,
    )
    return chosen


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model is given it, but for the chat template.

    Args:
        text: its text, or None for a conversation.
        messages: the turns of a conversation, or None.
        tools: JSON schemas of the tools of a conversation.
        place: where it stands, for errors, or "".
    """

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    place: str = ""


@dataclass(frozen=True)
class PromptForm:
    """The form into which prompts are put.

    Args:
        chat: put each prompt into the chat template.
        template: format string of training's prompts, or None to take prompts as they are.
        system: system message of a conversation.
        columns: how training made prompts of columns (see `adaptrank.artifacts.conventions`).
        raw: take prompts as they are.
        refuses_chat: conversations are not wanted.
    """

    chat: bool = False
    template: str | None = None
    system: str | None = None
    columns: Sequence[Mapping[str, Any]] = ()
    raw: bool = False
    refuses_chat: bool = False

    def typed(self, text: str) -> Prompt:
        """Return the prompt for a text that a person types, in which \\n is a line break.

        Where the template has several gaps, the text may be JSON of them.
        """
        from adaptrank.data import fill_prompt, gaps_of, read_columns

        if self.template is None:
            return Prompt(text.replace("\\n", "\n"))
        columns = None
        if len(gaps_of(self.template)) > 1 and text.lstrip().startswith("{"):
            columns = read_columns(text)
        given = text.replace("\\n", "\n") if columns is None else columns
        return Prompt(fill_prompt(self.template, given))

    def read(self, file: Path) -> list[Prompt]:
        """Return the prompts of a file of rows, as `predict` makes them.

        Raises:
            UserError: if the file cannot be read, or a row has no prompt.
            ConfigError: if a row is a conversation, and the chat template is not wanted.
        """
        from adaptrank.data import file_prompts

        rows = file_prompts(
            file, template=self.template, ways=self.columns, chat=self.chat, raw=self.raw
        )
        prompts = []
        for k, row in enumerate(rows):
            place = f"row {k} of {str(file)!r}"
            prompt = Prompt(row.get("prompt"), row.get("messages"), row.get("tools"), place)
            if prompt.messages is not None and self.refuses_chat:
                raise ConfigError(
                    f"--file: {place} is a conversation, which needs the chat template. Leave out "
                    f"{'--raw' if self.raw else '--no-chat'}."
                )
            prompts.append(prompt)
        return prompts

    def messages(self, prompt: str) -> list[dict[str, Any]]:
        """Return a prompt as a conversation."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": prompt}]


def prompt_form(options: argparse.Namespace, conventions: Mapping[str, Any]) -> PromptForm:
    """Return the form of prompts: what the options say, or else what training recorded."""
    system = conventions.get("system")
    if options.raw:
        return PromptForm(bool(options.chat), None, system, raw=True, refuses_chat=True)
    return PromptForm(
        conventions.get("chat", False) if options.chat is None else options.chat,
        conventions.get("prompt"),
        system,
        conventions.get("columns", ()),
        refuses_chat=options.chat is False,
    )


def read_prompts(options: argparse.Namespace, form: PromptForm) -> Iterable[Prompt]:
    """Return the prompts of the options, of a file, or of standard input.

    Args:
        options: of the command line.
        form: the form of the prompts.

    Raises:
        ConfigError: if there are two sources of prompts, or the file is wrong.
    """
    from adaptrank.data import is_table

    if options.prompt is not None and options.file is not None:
        raise ConfigError("--prompt and --file both give prompts. Take one.")
    if options.prompt is not None:
        if not all(options.prompt):
            raise ConfigError(EMPTY)
        return [form.typed(text) for text in options.prompt]
    if options.file is None:
        return (form.typed(text) for text in _standard_input())
    file = Path(options.file).expanduser()
    if not file.is_file():
        raise ConfigError(missing_file(options.file, "file of prompts"))
    if is_table(file):
        return form.read(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"--file {file} is not UTF-8. Save it as UTF-8.") from None
    return [form.typed(line) for line in text.split("\n") if line.strip()]


def _standard_input() -> Iterator[str]:
    if sys.stdin.isatty():
        print("One prompt a line. Ctrl-D ends.", file=sys.stderr)
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\n")


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as tokens.

    Args:
        text: its text. A conversation has that of the chat template.
        ids: token ids, at least one.
        chat: whether it stands in the chat template.
        place: where it stands, for errors, or "".
    """

    text: str
    ids: list[int]
    chat: bool
    place: str = ""


def encode(
    tokenizer: Any, prompt: Prompt, form: PromptForm, is_causal: bool = True
) -> EncodedPrompt:
    """Return a prompt as tokens.

    Args:
        tokenizer: the tokenizer.
        prompt: the prompt.
        form: whether a text is a user's message in a conversation.
        is_causal: False for a model with an encoder, which reads the tokenizer's end token.

    Raises:
        ConfigError: if the prompt has no tokens.
    """
    from adaptrank.data import render_prompt, token_ids

    messages = prompt.messages
    if messages is None and form.chat:
        messages = form.messages(prompt.text or "")
    is_chat = messages is not None
    text = prompt.text or ""
    if messages is not None:
        text = render_prompt(tokenizer, messages, prompt.tools)
    if is_causal:
        [ids] = token_ids(tokenizer, [text], special=not is_chat)
    else:
        [ids] = tokenizer([text], verbose=False)["input_ids"]
    if not ids:
        raise ConfigError(f"--file: {prompt.place}: {EMPTY}" if prompt.place else EMPTY)
    # A person who typed a message sees this message.
    shown = text if prompt.text is None else prompt.text
    return EncodedPrompt(shown, ids, is_chat, prompt.place)


Fitted = tuple[EncodedPrompt, int, tuple[str, str] | None]
"""A prompt that fits, the length of its longest answer, and a note (its kind, a sentence)."""


@dataclass(frozen=True)
class Room:
    """Room for prompts and answers by the positions of a model, None where they are not fixed.

    Args:
        prompt: positions for a prompt.
        answer: positions for an answer: the same ones, or those of a decoder.
        is_shared: whether prompt and answer share the positions.
        most: most tokens of an answer.
    """

    prompt: int | None
    answer: int | None
    is_shared: bool
    most: int

    @classmethod
    def of(cls, model: Any, most: int) -> "Room":
        """Return the room of a causal language model, or of one with an encoder."""
        from adaptrank.backbones import position_limit

        if getattr(model.config, "is_encoder_decoder", False):
            encoder, decoder = (position_limit(model, part) for part in ("encoder", "decoder"))
            return cls(encoder, decoder, False, most)
        limit = position_limit(model)
        return cls(limit, limit, True, most)

    def fit(self, prompt: EncodedPrompt, bos: int | None = None) -> Fitted:
        """Return a prompt that fits, the length of its longest answer, and a note or None.

        A prompt stays whole where it can, and its answer is shorter. A text that has more tokens
        than there are positions keeps its last ones.

        Args:
            prompt: the prompt.
            bos: id of the beginning-of-sequence token, which stays first.

        Raises:
            ConfigError: if a conversation, or what an encoder reads, has too many tokens.
        """
        count = len(prompt.ids)
        note = None
        if self.prompt is not None and count > self.prompt:
            place = prompt.place or "a prompt"
            have = f"has {count} tokens, and the model has {self.prompt} positions"
            if prompt.chat or not self.is_shared:
                raise ConfigError(f"{place[0].upper()}{place[1:]} {have}. Shorten it.")
            kept = max(self.prompt + 1 - self.most, self.prompt // 2, 1)
            ids = prompt.ids[-kept:]
            if prompt.ids[0] == bos:
                ids[0] = prompt.ids[0]
            prompt = replace(prompt, ids=ids)
            note = "cut", f"{place[0].upper()}{place[1:]} {have}. Its last {kept} tokens are read."
        if self.answer is None:
            return prompt, self.most, note
        # The last token of an answer is not read again.
        left = self.answer + 1 - len(prompt.ids) if self.is_shared else self.answer
        if left < self.most and note is None:
            note = (
                "short",
                (
                    f"The model has {self.answer} positions, so the answer to a prompt of {count} "
                    f"tokens has at most {left} and not --max_new_tokens {self.most}."
                ),
            )
        return prompt, min(self.most, left), note


def complete(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    form: PromptForm | None = None,
    show: bool = False,
) -> str:
    """Return the greedy continuation of a prompt, without special tokens.

    Args:
        model: a causal language model of transformers, or one with an encoder.
        tokenizer: its tokenizer.
        prompt: the text to complete.
        max_new_tokens: length of the longest continuation.
        form: whether the prompt is a user's message in a conversation. None means it is not.
        show: whether words are printed as they come.
    """
    is_causal = not getattr(model.config, "is_encoder_decoder", False)
    encoded = encode(tokenizer, Prompt(prompt), form or PromptForm(), is_causal)
    fitted, longest, _ = Room.of(model, max_new_tokens).fit(encoded, tokenizer.bos_token_id)
    return answer(model, tokenizer, fitted, longest, show)


def answer(
    model: Any, tokenizer: Any, prompt: EncodedPrompt, max_new_tokens: int, show: bool = False
) -> str:
    """Return the greedy continuation of a prompt in tokens, without special tokens.

    Args:
        model: a causal language model of transformers, or one with an encoder.
        tokenizer: its tokenizer.
        prompt: the prompt.
        max_new_tokens: length of the longest continuation.
        show: whether words are printed as they come.
    """
    import torch
    from transformers import TextStreamer

    from adaptrank.backbones import before_end

    has_encoder = bool(getattr(model.config, "is_encoder_decoder", False))
    ids = torch.tensor([prompt.ids], device=model.device)
    streamer = None
    if show:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ends = stop_ids(model, tokenizer, prompt.chat)
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends or None,
            streamer=streamer,
        )
    # A decoder of its own begins with a start token, and not with the prompt.
    start = 1 if has_encoder else ids.shape[1]
    generated = before_end(output[0, start:].tolist(), ends)
    completion: str = tokenizer.decode(generated, skip_special_tokens=True)
    return completion


def stop_ids(model: Any, tokenizer: Any, chat: bool) -> list[int]:
    """Return the ids at which a completion ends.

    They are those of the model's configuration, which holds the stop tokens of training, the
    tokenizer's end token, and in a conversation the token with which the chat template ends a turn.
    """
    from adaptrank.artifacts import stop_ids_of
    from adaptrank.data import end_of_turn

    ids = stop_ids_of(model.generation_config) or stop_ids_of(model.config)
    end = end_of_turn(tokenizer) if chat else None
    if end is not None:
        ids.append(tokenizer.convert_tokens_to_ids(end))
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return list(dict.fromkeys(ids))
