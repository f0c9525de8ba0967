"""`generate`: complete prompts with an adapter, or with a merged model."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptrank._errors import UserError
from adaptrank.cli.errors import ConfigError, missing_file
from adaptrank.cli.options import BASE, TRUST

DESCRIPTION = """\
Complete prompts greedily, with an adapter on its base, or with a merged (or any other causal
language) model. A model with an encoder, such as T5, writes another text for each prompt. Without
--prompt and --file, every line of standard input is a prompt. \\n in a prompt is a line break. On a
terminal, words are shown as they come, unless beams are searched.

Prompts are put into the form of training, which the adapter records: its prompt template, and the
chat template. They end where training taught the model to end. --raw takes each prompt as it is."""
EMPTY = "An empty prompt has nothing to complete."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    model = "a run's adapter folder or its name on the Hub, a model's folder, or a model id"
    parser.add_argument("model", metavar="ADAPTER_OR_MODEL", help=model)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable")
    file = "one prompt a line; of a .jsonl file, the columns of training or the field `prompt`"
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
    prompts = read_prompts(options, form.template)
    tokenizer = stored.tokenizer()
    quantization = chosen_quantization(options.quantize, stored, dtype)
    backbones.read_options(device_map=options.device_map)
    model = stored.load(dtype, quantization=quantization, device_map=options.device_map)
    searches = (model.generation_config.num_beams or 1) > 1
    streams = sys.stdout.isatty() and not options.json and not searches
    for typed in prompts:
        prompt = form.fill(typed)
        if streams and stored.is_causal and not form.chat:
            print(prompt, end="", flush=True)
        text = complete(model, tokenizer, prompt, options.max_new_tokens, form, streams)
        if streams:
            continue
        if options.json:
            line = {"prompt": prompt, "completion": text}
            print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            print(prompt + text if stored.is_causal and not form.chat else text, flush=True)


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
class PromptForm:
    """The form into which prompts are put.

    Args:
        chat: put each prompt into the chat template.
        template: format string of training's prompts, or None to take prompts as they are.
        system: system message of a conversation.
    """

    chat: bool = False
    template: str | None = None
    system: str | None = None

    def fill(self, typed: str | Mapping[str, Any]) -> str:
        """Return the prompt for what was typed: a text, or {column: text}."""
        from adaptrank.data import fill_prompt

        if isinstance(typed, str):
            typed = typed.replace("\\n", "\n")
        if self.template is not None:
            return fill_prompt(self.template, typed)
        return typed if isinstance(typed, str) else str(typed["prompt"])

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """Return a prompt as a conversation."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": prompt}]


def prompt_form(options: argparse.Namespace, conventions: Mapping[str, Any]) -> PromptForm:
    """Return the form of prompts: what the options say, or else what training recorded."""
    if options.raw:
        return PromptForm(bool(options.chat), None, conventions.get("system"))
    chat = conventions.get("chat", False) if options.chat is None else options.chat
    return PromptForm(chat, conventions.get("prompt"), conventions.get("system"))


Typed = str | Mapping[str, Any]
"""A prompt as a person gives it: a text, or {column: text}."""


def read_prompts(options: argparse.Namespace, template: str | None = None) -> Iterable[Typed]:
    """Return the prompts of the options, of a file, or of standard input.

    Args:
        options: of the command line.
        template: format string of the prompts. Where it has several gaps, a text may be JSON.
    Raises:
        ConfigError: if there are two sources of prompts, or the file is wrong.
    """
    if options.prompt is not None and options.file is not None:
        raise ConfigError("--prompt and --file both give prompts. Take one.")
    if options.prompt is not None:
        if not all(options.prompt):
            raise ConfigError(EMPTY)
        return [_parse_columns(text, template) for text in options.prompt]
    if options.file is None:
        return (_parse_columns(text, template) for text in _standard_input())
    file = Path(options.file)
    if not file.is_file():
        raise ConfigError(missing_file(options.file, "file of prompts"))
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"--file {file} is not UTF-8. Save it as UTF-8.") from None
    lines = [line for line in text.split("\n") if line.strip()]
    if file.suffix != ".jsonl":
        return [_parse_columns(line, template) for line in lines]
    return [_row_of(line, template, file) for line in lines]


def _row_of(line: str, template: str | None, file: Path) -> Typed:
    """Return a line of a .jsonl file: its columns if the template reads them, or its `prompt`."""
    from adaptrank.data import gaps_of

    gaps = [] if template is None else gaps_of(template)
    try:
        row = json.loads(line)
        if gaps and all(gap in row for gap in gaps):
            columns: Mapping[str, Any] = row
            return columns
        return str(row["prompt"])
    except (json.JSONDecodeError, KeyError, TypeError):
        wanted = f"the fields {gaps}, or a field `prompt`" if gaps else "a field `prompt`"
        raise ConfigError(f"--file {file}: each line has to be JSON with {wanted}.") from None


def _parse_columns(text: str, template: str | None) -> Typed:
    """Return {column: text} where a template has several gaps and a text is JSON of them."""
    from adaptrank.data import gaps_of

    if template is None or len(gaps_of(template)) < 2 or not text.lstrip().startswith("{"):
        return text
    try:
        row = json.loads(text)
    except json.JSONDecodeError:
        return text
    return row if isinstance(row, dict) else text


def _standard_input() -> Iterator[str]:
    if sys.stdin.isatty():
        print("One prompt a line. Ctrl-D ends.", file=sys.stderr)
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\n")


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
    import torch
    from transformers import TextStreamer

    from adaptrank.backbones import before_end
    from adaptrank.data import render_chat, token_ids

    has_encoder = bool(getattr(model.config, "is_encoder_decoder", False))
    chat = form is not None and form.chat
    text = render_chat(tokenizer, form.messages(prompt), ask=True) if form and chat else prompt
    if has_encoder:
        encoded = tokenizer([text], verbose=False)["input_ids"]
    else:
        encoded = token_ids(tokenizer, [text], special=not chat)
    ids = torch.tensor(encoded, device=model.device)
    if not ids.shape[1]:
        raise ConfigError(EMPTY)
    streamer = None
    if show:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ends = stop_ids(model, tokenizer, chat)
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
