"""Conventions of training that a model needs in use: class names, chat format, stop tokens.

They are plain data. The data module states them, the adapter's file records them, and the model's
configuration carries what transformers has a place for.

| key | value |
| --- | --- |
| `class_names` | names of the classes, in the order of their indices |
| `problem` | `multi_label` or `regression`, where a label is not one class |
| `chat` | whether prompts stand in the chat template |
| `chat_template` | the chat template, where it was used |
| `system` | the system message, where all conversations had the same |
| `prompt` | the format string over columns that made the prompts |
| `columns` | how sources made prompts of columns: a list of {field of `Source`: its value} |
| `stop_tokens` | {token: id} of the tokens that were trained as an end |
| `pad_token` | {token: id} of the padding |
| `fields` | optional fields that the rows had, such as [text_pair] |
| `generation` | settings of generation, such as {num_beams: 4} |
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from adaptrank.backbones import chat_template_of, embedding_rows
from adaptrank.parameterizations import pretrained_part, wrappers

Conventions = dict[str, Any]

CONVENTIONS = "_adaptrank_conventions"
"""Attribute of a model: {name of an adapter: its conventions}."""

PROBLEM_TYPES = {"multi_label": "multi_label_classification", "regression": "regression"}
"""Kind of labels -> the word of transformers, by which its pipelines read the outputs."""

CONFIG_KEY = "adaptrank"
"""Key of a merged model's configuration for conventions that transformers has no place for."""

GENERATION_KEYS = (
    "num_beams",
    "length_penalty",
    "early_stopping",
    "no_repeat_ngram_size",
    "repetition_penalty",
    "min_new_tokens",
)
"""Settings of transformers' GenerationConfig that a file may carry."""

LARGEST_SETTING = 1 << 16
"""Largest number among them."""

PROMPT_KEYS = ("chat", "system", "prompt", "columns")
"""Keys about prompts, which a merged model's configuration carries."""


def record_conventions(
    model: nn.Module, conventions: Mapping[str, Any], names: Iterable[str] | None = None
) -> None:
    """Remember conventions with a model, for its adapter's file, and set them in its configuration.

    Args:
        model: any module that holds wrappers.
        conventions: see above. An empty mapping changes nothing.
        names: adapters that the conventions belong to. None means all.
    """
    if not conventions:
        return
    if names is None:
        names = {wrapper.name for wrapper in wrappers(model)}
    recorded = _all_recorded(model)
    recorded |= {name: dict(conventions) for name in names}
    owner = pretrained_part(model) or model
    owner.__dict__[CONVENTIONS] = recorded
    configure(model, conventions)


def conventions_of(model: nn.Module, names: Collection[str] | None = None) -> Conventions:
    """Return the recorded conventions of a model's adapters. Where they differ, a key is left out.

    Args:
        model: any module.
        names: names of the adapters. None means all.
    """
    recorded = _all_recorded(model)
    present = {wrapper.name for wrapper in wrappers(model)}
    chosen = [
        conventions
        for name, conventions in recorded.items()
        if (name in present if names is None else name in names)
    ]
    # Composing renames adapters, and merging removes them.
    chosen = chosen or list(recorded.values())
    return agreed(chosen)


def agreed(several: Iterable[Mapping[str, Any]]) -> Conventions:
    """Return the conventions that all of several adapters share."""
    first, *others = [*several] or [{}]
    shared = dict(first)
    for other in others:
        shared = {key: value for key, value in shared.items() if other.get(key) == value}
    return shared


def _all_recorded(model: nn.Module) -> dict[str, Conventions]:
    for module in model.modules():
        if CONVENTIONS in module.__dict__:
            recorded: dict[str, Conventions] = module.__dict__[CONVENTIONS]
            return recorded
    return {}


# ---- the configuration of a transformers model


def configure(model: nn.Module, conventions: Mapping[str, Any]) -> None:
    """Set class names, padding and stop tokens in a transformers model's configuration.

    Any other model stays as it is. Ids beyond the model's vocabulary are left out.
    """
    part: Any = pretrained_part(model)
    config = getattr(part, "config", None)
    if config is None:
        return
    class_names = conventions.get("class_names")
    if class_names and getattr(config, "num_labels", None) == len(class_names):
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: index for index, name in enumerate(class_names)}
    if problem_type := PROBLEM_TYPES.get(conventions.get("problem", "")):
        config.problem_type = problem_type
    known = embedding_rows(part) or 0
    pad_ids = [i for i in conventions.get("pad_token", {}).values() if i < known]
    stop_ids = [i for i in conventions.get("stop_tokens", {}).values() if i < known]
    generation = getattr(part, "generation_config", None)
    if pad_ids:
        config.pad_token_id = pad_ids[0]
        if generation is not None:
            generation.pad_token_id = pad_ids[0]
    if generation is not None:
        for key, value in conventions.get("generation", {}).items():
            setattr(generation, key, value)
    if stop_ids:
        for holder in filter(None, (config, generation)):
            holder.eos_token_id = _one_or_list([*stop_ids, *stop_ids_of(holder)])


def stop_ids_of(config: Any) -> list[int]:
    """Return the ids at which generation stops by a configuration, or [] if it names none."""
    ids = getattr(config, "eos_token_id", None)
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def _one_or_list(ids: Iterable[int]) -> int | list[int]:
    unique = list(dict.fromkeys(ids))
    return unique[0] if len(unique) == 1 else unique


def finish_configuration(model: nn.Module, tokenizer: Any, conventions: Mapping[str, Any]) -> None:
    """Put conventions into a merged model's configuration and its tokenizer, before both are saved.

    Args:
        model: the merged model.
        tokenizer: tokenizer of its base.
        conventions: of its adapter.
    """
    configure(model, conventions)
    use_chat_template(tokenizer, conventions)
    part: Any = pretrained_part(model)
    prompts = {key: conventions[key] for key in PROMPT_KEYS if key in conventions}
    if prompts and part is not None:
        setattr(part.config, CONFIG_KEY, prompts)


def prompt_conventions(config: Any) -> Conventions:
    """Return the conventions about prompts in the configuration of a merged model, or {}.

    Args:
        config: contents of its config.json.
    """
    stored = config.get(CONFIG_KEY) if isinstance(config, dict) else None
    if not isinstance(stored, dict):
        return {}
    kinds: dict[str, type] = {"chat": bool, "system": str, "prompt": str}
    read = {key: stored[key] for key, kind in kinds.items() if isinstance(stored.get(key), kind)}
    settings = stored.get("columns")
    if isinstance(settings, list) and all(map(are_prompt_settings, settings)):
        read["columns"] = settings
    return read


def are_prompt_settings(value: Any) -> bool:
    """Tell whether a value is an entry of `columns`: texts, and yes or no for `null_is_empty`."""
    if not isinstance(value, dict):
        return False
    return all(
        isinstance(setting, bool if field == "null_is_empty" else str)
        for field, setting in value.items()
    )


def use_chat_template(tokenizer: Any, conventions: Mapping[str, Any]) -> bool:
    """Give a tokenizer the recorded chat template. Return whether it had another one."""
    template = conventions.get("chat_template")
    if template is None:
        return False
    had = chat_template_of(tokenizer)
    if had != template:
        tokenizer.chat_template = template
    return had not in (None, template)
