"""Output of fit, validate, test and predict: metrics, predictions, and commands to type next."""

import inspect
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_only

from adaptrank._errors import UserError
from adaptrank._files import write_text
from adaptrank.artifacts import quantization_of
from adaptrank.cli.verbosity import is_quiet
from adaptrank.data import TaskData, fill_prompt
from adaptrank.modules import AdaptedModule
from adaptrank.parameterizations import wrapped_layers

LONGEST_PROMPT = 240
"""Characters of the longest prompt in a printed command. A longer one goes into a file."""
MOST_PROMPTS = 64
"""Rows of the validation set among which a prompt for a command is looked for."""
PROMPTS = "prompts.jsonl"
"""File of a run with a prompt that is too long for a command."""


@rank_zero_only
def say(text: str) -> None:
    """Print from the first process only."""
    print(text, flush=True)


def note(text: str) -> None:
    """Print what is not a result, from the first process only. `--quiet` leaves it out."""
    if not is_quiet():
        say(text)


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Return logged metrics as plain numbers."""
    return {name: float(value) for name, value in metrics.items()}


def metric_names(module: LightningModule, logged: Iterable[str]) -> tuple[str, ...]:
    """Return names of metrics in the order to show them: the module's choice first."""
    first = tuple(getattr(module, "metrics_shown", ()))
    return (*first, *(name for name in logged if name not in first))


def table(values: dict[str, float], names: Sequence[str]) -> str:
    """Return metrics, one a line."""
    shown = [name for name in names if name in values]
    width = max(map(len, shown), default=0)
    return "\n".join(f"  {name:{width}} {values[name]:10.4f}" for name in shown)


def predictions(batches: Sequence[Any], names: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Yield one JSON-able mapping for each example.

    Args:
        batches: what `predict_step` returned, batch by batch.
        names: class names, for predictions that are numbers of classes.
    """
    for batch in batches:
        for value in batch if isinstance(batch, list | tuple) else [batch]:
            if isinstance(value, torch.Tensor):
                value = value.tolist()
            if isinstance(value, dict):
                yield value
            elif names and isinstance(value, int):
                yield {"label": value, "name": names[value]}
            else:
                yield {"prediction": value}


def run_name(config: Any) -> str:
    """Return the name of a configuration's runs.

    It is the file's name, or for the config.yaml in a run folder the name of that run.
    """
    if config is None:
        return "run"
    path = Path(str(config))
    folder = path.absolute().parent
    return folder.parent.name if path.stem == "config" and folder.name.isdigit() else path.stem


def class_names(module: object, data: object) -> Sequence[str] | None:
    """Return the names of the classes in the model's numbering, or None if nobody names them."""
    for owner, attribute in (
        (module, "class_names"),
        (data, "model_classes"),
        (data, "class_names"),
    ):
        names: Sequence[str] | None = getattr(owner, attribute, None)
        if names:
            return names
    return None


def next_commands(folder: Path, module: LightningModule, data: object = None) -> str:
    """Return the commands that make sense after a run, ready to paste.

    The commands can only build the library's own modules again. Of another module the adapter is
    loaded in Python.

    Args:
        folder: the run folder.
        module: the trained module.
        data: the data module of the run.
    """
    layers = wrapped_layers(module)
    if not layers:
        kind, place = type(module).__name__, shlex.quote(str(folder))
        return f"No adapter saved: {kind} holds no adapted layer. Run folder: {place}"
    adapter = shlex.quote(str(folder / "adapter"))
    lines = [f"Adapter saved: {adapter}"]
    if not isinstance(module, AdaptedModule):
        load = f"adaptrank.load_adapter(model, {str(folder / 'adapter')!r})"
        return f"{lines[0]}\n  load:     {load}"
    trust = " --trust_remote_code" if module.loading.trust_remote_code else ""
    if hasattr(module, "complete"):
        prompt = prompt_options(data, folder)
        lines.append(f"  generate: python -m adaptrank generate {adapter} {prompt}{trust}")
    is_stored_quantized = _is_stored_quantized(module)
    mergeable = all(wrapper.mergeable for layer in layers.values() for wrapper in layer.nest)
    if mergeable and not is_stored_quantized:
        merged = shlex.quote(str(folder / "merged"))
        lines.append(f"  merge:    python -m adaptrank merge {adapter} --out {merged}{trust}")
    # fast_dev_run writes no configuration.
    if (folder / "config.yaml").is_file():
        config = shlex.quote(str(folder / "config.yaml"))
        command = f"python -m adaptrank fit --config {config} --model.adapter {adapter}"
        # A rank pattern would be applied to the loaded adapter, and undo the allocator's moves.
        pattern = " --model.rank_pattern null" if module.rank_pattern else ""
        if not hasattr(module, "complete"):
            predict = command.replace("adaptrank fit", "adaptrank predict", 1)
            takes_file = "predict" in inspect.signature(type(data)).parameters
            file = " --data.predict FILE" if takes_file else ""
            lines.append(f"  predict:  {predict}{pattern}{file}")
        lines.append(f"  go on:    {command}{pattern}")
    lines += _about_quantization(module, mergeable)
    return "\n".join(lines)


def _is_stored_quantized(module: AdaptedModule) -> bool:
    """Return whether the base is quantized in its files, so that nothing can be merged into it."""
    return module.loading.quantization is None and quantization_of(module) is not None


def _about_quantization(module: AdaptedModule, mergeable: bool) -> list[str]:
    """Return what the commands do with a base that is quantized."""
    if _is_stored_quantized(module):
        return ["The base is quantized in its files. To merge, name its plain form: merge --base."]
    quantization = module.loading.quantization
    if quantization is None:
        return []
    used = f"The base was loaded in {quantization.kind}"
    if hasattr(module, "complete"):
        used += ", and so it is by generate"
    if mergeable:
        used += ". merge takes it as it is stored, in its own dtype"
    return [f"{used}."]


def prompt_options(data: object, folder: Path | None = None) -> str:
    """Return the options of `generate` for a prompt of a run's data, in the run's format.

    The prompt is one of the validation set. Where all of its prompts are too long for a command,
    one goes into a file.

    The adapter records the format as well, so most of them only show what holds by default.

    Args:
        data: the data module of the run.
        folder: the run folder, for a file with a prompt.
    """
    prompts = validation_prompts(data)
    fitting = [text for text in prompts if len(text) <= LONGEST_PROMPT and "\\n" not in text]
    example: str | None = getattr(data, "example_prompt", None)
    prompt = next(iter([*fitting, *prompts]), example)
    template: str | None = getattr(data, "prompt_template", None)
    describe: Callable[[], dict[str, Any]] = getattr(data, "conventions", dict)
    chat = " --chat" if describe().get("chat") else ""
    if prompt is None:
        return f"--prompt TEXT{chat}"
    raw = ""
    if template is not None:
        try:
            raw = "" if fill_prompt(template, prompt) == prompt else " --raw"
        except UserError:
            raw = " --raw"
    if len(prompt) <= LONGEST_PROMPT and "\\n" not in prompt:
        return f"--prompt {quote(prompt)}{chat}{raw}"
    if folder is None or not folder.is_dir():
        return f"--prompt TEXT{chat}{raw}"
    file = folder / PROMPTS
    write_text(file, json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n")
    # The file has a whole prompt, and a template may read a column of the same name.
    whole = "" if template is None else " --raw"
    return f"--file {shlex.quote(str(file))}{chat}{whole}"


def validation_prompts(data: object) -> list[str]:
    """Return the prompts of the first rows of the validation set, [] where there are none.

    The prompt of a conversation is its first message of a user.
    """
    if not isinstance(data, TaskData):
        return []
    try:
        rows = data.rows("val") or []
    except (OSError, UserError):
        # The files of the data are gone by now.
        return []
    prompts = [_prompt_of(rows[number]) for number in range(min(len(rows), MOST_PROMPTS))]
    return [prompt for prompt in prompts if prompt]


def _prompt_of(row: Mapping[str, Any]) -> str | None:
    """Return the prompt of a row, or None if it has none that a person would type."""
    messages = row.get("messages") or []
    asked = [message.get("content") for message in messages if message.get("role") == "user"]
    prompt = row.get("prompt") or next(iter(asked), None)
    return prompt if isinstance(prompt, str) else None


def quote(text: str) -> str:
    """Quote a text for a shell, with line breaks as \\n, in double quotes if they can hold it."""
    escaped = text.replace("\n", "\\n")
    return shlex.quote(escaped) if re.search(r'["$`!\\]', text) else f'"{escaped}"'


def resume_command(folder: Path, step: int) -> str:
    """Return the command that resumes an interrupted run, if there is a checkpoint."""
    lines = [f"\nInterrupted at step {step}."]
    if (folder / "adapter").is_dir():
        lines[0] += f" Adapter saved: {shlex.quote(str(folder / 'adapter'))}"
    checkpoints = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda f: f.stat().st_mtime)
    if checkpoints:
        config = shlex.quote(str(folder / "config.yaml"))
        checkpoint = shlex.quote(str(checkpoints[-1]))
        command = f"python -m adaptrank fit --config {config} --ckpt_path {checkpoint}"
        lines.append(f"  resume:   {command}")
    return "\n".join(lines)
