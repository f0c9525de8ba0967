"""The description in an adapter's file: its form, whoever wrote it, and a digest of the whole file.

Text goes in, and plain data come out, of which every type has been checked. Nothing is built or
allocated here.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.artifacts.conventions import (
    GENERATION_KEYS,
    LARGEST_SETTING,
    PROBLEM_TYPES,
    are_prompt_settings,
)
from adaptrank.artifacts.strict_json import JsonError, is_plain_text, parse_json

FORMAT_VERSION = 2
"""Version 2 has a digest. Files of version 1, which have none, are read as well."""

MOST_PARTS = 64
"""Largest number of parts of a fused layer, and of stop tokens."""

LONGEST_TEXT = 1 << 17
"""Characters of the longest chat template or prompt template."""

MOST_TOKENS = 1 << 16
"""Largest number of added tokens, and of rows of an embedding that train alone."""

DEEPEST_NEST = 16
"""Largest number of classes that one adapter puts on one layer."""

MOST_ADAPTERS = 4096
"""Largest number of adapters side by side on one layer."""

LONGEST_NAME = 1024
"""Largest number of characters of a name or a path."""

TAKEN_NAMES = frozenset({"weight", "bias", "names", "plain", "fused", "join", "training"})
"""Names that a part of a fused layer cannot have."""


def digest_of(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of a file's contents: 32 hexadecimal characters.

    It covers the description without its own digest, and name, dtype, shape and bytes of every
    tensor.
    """
    digest = hashlib.blake2b(digest_size=16)
    described = {key: value for key, value in description.items() if key != "digest"}
    digest.update(json.dumps(described, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"\n{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def parse(text: str, file: Path) -> dict[str, Any]:
    """Return the description in a file's header, checked.

    Raises:
        ValueError: in one sentence, for anything that `save_adapter` would not have written.
    """
    try:
        description: Any = parse_json(text)
    except JsonError as error:
        raise UserError(f"{file} is damaged: of the description in its header, {error}.") from None
    check(description, file)
    checked: dict[str, Any] = description
    return checked


def check(description: Any, file: Path) -> None:
    """Raise an error if data do not have the form of a description; see `parse`."""
    try:
        _check_version(description, file)
        _check_base(description.get("base"))
        _check_adapters(description.get("adapters"))
        _check_tables(description)
        _check_names(description.get("trained_modules"))
        _check_references(description)
        _check_conventions(description.get("conventions", {}))
        _need(_is_map(description.get("run", {}), _is_fact), "run is no table of facts")
    except _DamageError as damage:
        raise UserError(f"{file} is damaged: {damage}.") from None


class _DamageError(Exception):
    """The first part of a description that has not the right form."""


def _need(holds: bool, problem: str) -> None:
    if not holds:
        raise _DamageError(problem)


def _check_version(description: Any, file: Path) -> None:
    _need(isinstance(description, dict), "its description is no table of keys")
    version = description.get("format_version")
    _need(_is_count(version) and version >= 1, "it does not say what format it has")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{file} has format {version}; this version of adaptrank reads up to {FORMAT_VERSION}: "
            f"pip install --upgrade adaptrank."
        )
    has_digest = isinstance(description.get("digest"), str)
    _need(version == 1 or has_digest, "it has no digest")


def _check_base(base: Any) -> None:
    known = isinstance(base, dict) and isinstance(base.get("fingerprint"), str)
    _need(known, "it does not say what base it was made for")
    for key in ("name", "source", "auto_class", "fingerprint"):
        fits = base.get(key) is None or is_plain_text(base[key], LONGEST_NAME)
        _need(fits, f"base.{key} is no text of one line")
    for key in ("fingerprint_beside_linear", "revision"):
        fits = base.get(key) is None or is_plain_text(base[key], LONGEST_NAME)
        _need(fits, f"base.{key} is no text of one line")
    _check_quantization(base.get("quantization"))
    _check_tokens(base)
    rows = base.get("vocabulary")
    _need(rows is None or _is_count(rows), "base.vocabulary is no number")
    labels = base.get("num_labels")
    _need(labels is None or _is_count(labels), "base.num_labels is no number")


def _check_quantization(quantization: Any) -> None:
    if quantization is None:
        return
    fits = isinstance(quantization, dict) and is_plain_text(quantization.get("type"), 64)
    _need(fits, "base.quantization has no type")
    double = quantization.get("double_quant", True)
    _need(isinstance(double, bool), "base.quantization.double_quant is no yes or no")
    known = quantization.keys() <= {"type", "double_quant"}
    _need(known, "base.quantization is more than its type and double_quant")


def _check_tokens(base: Mapping[str, Any]) -> None:
    """Refuse added tokens and trained rows that are no tokens with their ids, or no rows."""
    tokens = base.get("added_tokens", {})
    fits = _is_map(tokens, _is_count) and len(set(tokens.values())) == len(tokens)
    _need(fits and len(tokens) <= MOST_TOKENS, "base.added_tokens are no tokens with their ids")
    rows = base.get("trained_rows", [])
    fits = _are_indices(rows) and len(rows) <= MOST_TOKENS
    _need(fits, "base.trained_rows are no numbers of rows")


def _check_adapters(adapters: Any) -> None:
    _need(isinstance(adapters, list) and bool(adapters), "it describes no adapter")
    paths: set[str] = set()
    for entry in adapters:
        _need(isinstance(entry, dict), "an adapter is no table of keys")
        nest = entry.get("nest")
        _need(isinstance(nest, list) and bool(nest), "an adapter has no classes")
        for wrapper in nest:
            _need(_is_wrapper(wrapper), "a class is not described by class, name and init_args")
        _check_nest(nest)
        layers = entry.get("layers")
        _need(
            _is_map(layers, _is_shape) and bool(layers),
            "the layers of an adapter are not given with their shapes",
        )
        _need(paths.isdisjoint(layers), "it describes a layer twice")
        paths |= layers.keys()


def _check_nest(nest: list[dict[str, Any]]) -> None:
    """Refuse a nest that is too deep. Any number of adapters may stand side by side."""
    names = [wrapper["name"] for wrapper in nest]
    together = [name for name, _ in groupby(names)]
    depths = Counter(names)
    _need(len(depths) == len(together), "the classes of an adapter are not next to each other")
    _need(len(depths) <= MOST_ADAPTERS, f"a layer has more than {MOST_ADAPTERS:,} adapters")
    deepest = max(depths.values())
    _need(
        deepest <= DEEPEST_NEST, f"an adapter nests {deepest} classes, and {DEEPEST_NEST} is most"
    )


def _check_names(trained: Any) -> None:
    fits = isinstance(trained, list) and all(is_plain_text(name) for name in trained)
    _need(fits and len(set(trained)) == len(trained), "trained_modules are no names")


def _check_references(description: Mapping[str, Any]) -> None:
    """Refuse tables that name a layer which no adapter of the file wraps."""
    paths = {path for entry in description["adapters"] for path in entry["layers"]}
    for key in description["ranks"]:
        _need(
            place_of(key, paths)[0] in paths, f"it states a rank for {key}, which it does not adapt"
        )
    tied = description["tied"]
    for key, owner in tied.items():
        _need(owner not in tied and owner != key, f"it ties {key} to a tensor that is tied itself")
    named = [*paths, *description["trained_modules"]]
    for path in description.get("split", {}):
        used = any(name.startswith(f"{path}.") for name in named)
        _need(used, f"it splits {path} into parts that it does not use")


def place_of(key: str, paths: Collection[str]) -> tuple[str, str]:
    """Return (path of the layer, name of the axis) of an axis key.

    Where a nest has an axis of one name twice, the position in the nest stands behind the path.

    Args:
        key: key of an axis.
        paths: paths of all adapted layers.
    """
    owner, _, axis = key.rpartition(":")
    path, _, position = owner.rpartition(".")
    behind = owner not in paths and position.isdecimal()
    return (path if behind else owner), axis


def _check_tables(description: Mapping[str, Any]) -> None:
    tables: tuple[tuple[str, Callable[[Any], bool], bool], ...] = (
        ("ranks", _is_count, True),
        ("tied", is_plain_text, True),
        ("split", _are_names, False),
        ("pruned", _are_indices, False),
    )
    for key, fits, required in tables:
        table = description.get(key, None if required else {})
        _need(_is_map(table, fits), f"{key} is not what it should be")


def _check_conventions(conventions: Any) -> None:
    _need(isinstance(conventions, dict), "its conventions are no table of keys")
    for key in ("chat_template", "system", "prompt"):
        text = conventions.get(key, "")
        fits = isinstance(text, str) and len(text) <= LONGEST_TEXT
        _need(fits, f"conventions.{key} is no short text")
    _need(isinstance(conventions.get("chat", False), bool), "conventions.chat is no yes or no")
    settings = conventions.get("columns", [])
    fits = (
        isinstance(settings, list)
        and len(settings) <= MOST_PARTS
        and all(map(_are_short_settings, settings))
    )
    _need(fits, "conventions.columns are no settings of sources")
    for key in ("stop_tokens", "pad_token"):
        tokens = conventions.get(key, {})
        fits = _is_map(tokens, _is_count) and len(tokens) <= MOST_PARTS
        _need(fits, f"conventions.{key} are no tokens with their ids")
    settings = conventions.get("generation", {})
    fits = _is_map(settings, _is_setting) and settings.keys() <= set(GENERATION_KEYS)
    _need(fits, "conventions.generation are no settings of generation")
    names = conventions.get("class_names", [])
    fits = isinstance(names, list) and all(isinstance(name, str) for name in names)
    _need(fits and len(set(names)) == len(names), "conventions.class_names are no different names")
    fields = conventions.get("fields", [])
    fits = isinstance(fields, list) and all(isinstance(field, str) for field in fields)
    _need(fits and len(fields) <= MOST_PARTS, "conventions.fields are no names")
    problem = conventions.get("problem", "regression")
    _need(problem in [*PROBLEM_TYPES], "conventions.problem is no kind of labels")


def _is_fact(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _are_short_settings(settings: Any) -> bool:
    """Tell whether a value says how prompts are made of columns."""
    if not are_prompt_settings(settings):
        return False
    return all(is_plain_text(key, LONGEST_NAME) for key in settings) and all(
        len(text) <= LONGEST_TEXT for text in settings.values() if isinstance(text, str)
    )


def _is_setting(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST_SETTING


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) in (0, 2) and all(map(_is_count, value))


def _is_map(value: Any, fits: Callable[[Any], bool]) -> bool:
    if not isinstance(value, dict) or not all(map(fits, value.values())):
        return False
    return all(is_plain_text(key, LONGEST_NAME) for key in value)


def _is_wrapper(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and is_plain_text(value.get("class"))
        and is_plain_text(value.get("name"))
        and isinstance(value.get("init_args"), dict)
    )


def _are_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= MOST_PARTS
        and len(set(map(str, value))) == len(value)
        and all(is_plain_text(name, 64) and name.isidentifier() for name in value)
        and not any(name in TAKEN_NAMES or hasattr(nn.Module, name) for name in value)
    )


def _are_indices(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value)) and len(set(value)) == len(value)
