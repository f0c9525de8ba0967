"""`generate`: complete prompts with an adapter, or with a merged model."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from adaptrank.cli.errors import ConfigError, missing_file
from adaptrank.cli.options import BASE

DESCRIPTION = """\
Complete prompts greedily, with an adapter on its base, or with a merged (or any other causal
language) model. Without --prompt and --file, every line of standard input is a prompt. \\n in a
prompt is a line break. On a terminal, words are shown as they come."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    model = "a run's adapter folder, a model's folder, or a model id"
    parser.add_argument("model", metavar="ADAPTER_OR_MODEL", help=model)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable")
    file = "one prompt a line; of a .jsonl file, the field `prompt` of each line"
    parser.add_argument("--file", metavar="FILE", help=file)
    longest = "length of the longest answer, in tokens (64)"
    parser.add_argument("--max_new_tokens", type=int, default=64, metavar="N", help=longest)
    chat = "put each prompt into the tokenizer's chat template"
    parser.add_argument("--chat", action="store_true", help=chat)
    as_json = "a line of JSON for each prompt: prompt, completion"
    parser.add_argument("--json", action="store_true", help=as_json)
    parser.add_argument("--base", metavar="NAME", help=BASE)
    dtype = "of the weights: auto (bf16 where it is fast), fp32, bf16"
    parser.add_argument("--dtype", default="auto", help=dtype)


def run(options: argparse.Namespace) -> None:
    """Print a completion for each prompt."""
    from adaptrank import backbones
    from adaptrank.cli.loading import find_model

    if options.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens {options.max_new_tokens}: give 1 or more.")
    dtype = backbones.auto_dtype(options.dtype)
    stored = find_model(options.model, options.base)
    if not stored.is_causal:
        task = stored.auto_class.removeprefix("AutoModelFor")
        raise ConfigError(
            f"{stored.adapter} was trained for {task}, which completes no text. Use "
            f"`python -m adaptrank predict --model.adapter {stored.adapter} ...`."
        )
    prompts = read_prompts(options)
    tokenizer = backbones.load_tokenizer(stored.source)
    model = stored.load(dtype)
    streams = sys.stdout.isatty() and not options.json
    for given in prompts:
        prompt = given.replace("\\n", "\n")
        if streams and not options.chat:
            print(prompt, end="", flush=True)
        text = complete(model, tokenizer, prompt, options.max_new_tokens, options.chat, streams)
        if streams:
            continue
        if options.json:
            line = {"prompt": prompt, "completion": text}
            print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            print(text if options.chat else prompt + text, flush=True)


def read_prompts(options: argparse.Namespace) -> Iterable[str]:
    """Return the prompts of the options, of a file, or of standard input.

    Raises:
        ConfigError: if there are two sources of prompts, or the file is wrong.
    """
    if options.prompt is not None and options.file is not None:
        raise ConfigError("--prompt and --file both give prompts. Take one.")
    if options.prompt is not None:
        prompts: list[str] = options.prompt
        return prompts
    if options.file is None:
        return _standard_input()
    file = Path(options.file)
    if not file.is_file():
        raise ConfigError(missing_file(options.file, "file of prompts"))
    lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    if file.suffix != ".jsonl":
        return lines
    try:
        return [json.loads(line)["prompt"] for line in lines]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = f"--file {file}: each line has to be JSON with a field `prompt`."
        raise ConfigError(text) from None


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
    chat: bool = False,
    show: bool = False,
) -> str:
    """Return the greedy continuation of a prompt, without special tokens.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        prompt: the text to complete.
        max_new_tokens: length of the longest continuation.
        chat: whether the prompt is a user's message, in the tokenizer's chat template.
        show: whether words are printed as they come.
    """
    import torch
    from transformers import TextStreamer

    from adaptrank.data import render_chat, token_ids

    text = prompt
    if chat:
        text = render_chat(tokenizer, [{"role": "user", "content": prompt}], ask=True)
    ids = torch.tensor(token_ids(tokenizer, [text], special=not chat), device=model.device)
    if not ids.shape[1]:
        raise ConfigError("An empty prompt has nothing to complete.")
    streamer = None
    if show:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            streamer=streamer,
        )
    completion: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return completion
