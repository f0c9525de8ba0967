"""Prompts of `generate`: read them, put them into the form of training, and tokenize them."""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptrank.cli.errors import ConfigError, missing_file

EMPTY = "An empty prompt has nothing to complete."


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
            file, template=self.template, recorded=self.columns, chat=self.chat, raw=self.raw
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
