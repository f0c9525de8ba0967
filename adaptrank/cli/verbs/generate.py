"""`generate`: complete prompts with an adapter, or with a merged model."""

import argparse
import json
import sys
from collections.abc import Iterable
from typing import Any

from adaptrank._errors import UserError
from adaptrank.cli.answer_room import Fitted, Room
from adaptrank.cli.errors import ConfigError
from adaptrank.cli.options import BASE, TRUST
from adaptrank.cli.prompt_form import (
    EncodedPrompt,
    Prompt,
    PromptForm,
    encode,
    prompt_form,
    read_prompts,
)

DESCRIPTION = """\
Complete prompts greedily, with an adapter on its base, or with a merged (or any other causal
language) model. A model with an encoder, such as T5, writes another text for each prompt. Without
--prompt and --file, every line of standard input is a prompt. \\n in a line or in --prompt is a
line break. On a terminal, words are shown as they come, unless beams are searched.

A --file of rows (.jsonl, .csv, .parquet, ...) is read as training and `predict` read it: with the
columns of training, as a format of CausalLMData, or with a column `prompt`.

Prompts are put into the form of training, which the adapter records: its prompt template, and the
chat template. They end where training taught the model to end. --raw takes each prompt as it is."""


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
    told = {""}
    for prompt, longest, change, sentence in fitted:
        # One sentence of each kind is enough.
        if change not in told:
            told.add(change)
            print(sentence, file=sys.stderr)
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
    fitted = Room.of(model, max_new_tokens).fit(encoded, tokenizer.bos_token_id)
    return answer(model, tokenizer, fitted.prompt, fitted.longest, show)


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
