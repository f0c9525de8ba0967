"""The description in an adapter's file: its form, whoever wrote it, and a digest of the whole file.

Text goes in, and plain data come out, of which every type has been checked. Nothing is built or
allocated here.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptrank._errors import UserError

FORMAT_VERSION = 2
"""Version 2 has a digest. Files of version 1, which have none, are read as well."""

MOST_PARTS = 64
"""Largest number of parts of a fused layer, and of stop tokens."""

LONGEST_TEXT = 1 << 17
"""Characters of the longest chat template or prompt template."""


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
        description: Any = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise UserError(f"{file} is damaged: the description in its header is no JSON.") from None
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
        _check_conventions(description.get("conventions", {}))
        _need(_is_list_of_text(description.get("trained_modules")), "trained_modules are no names")
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
    for key in ("name", "source", "auto_class"):
        _need(base.get(key) is None or isinstance(base[key], str), f"base.{key} is no text")
    rows = base.get("vocabulary")
    _need(rows is None or _is_count(rows), "base.vocabulary is no number")
    labels = base.get("num_labels")
    _need(labels is None or _is_count(labels), "base.num_labels is no number")


def _check_adapters(adapters: Any) -> None:
    _need(isinstance(adapters, list) and bool(adapters), "it describes no adapter")
    for entry in adapters:
        _need(isinstance(entry, dict), "an adapter is no table of keys")
        nest = entry.get("nest")
        _need(isinstance(nest, list) and bool(nest), "an adapter has no classes")
        for wrapper in nest:
            _need(_is_wrapper(wrapper), "a class is not described by class, name and init_args")
        _need(
            _is_map(entry.get("layers"), _is_shape),
            "the layers of an adapter are not given with their shapes",
        )


def _check_tables(description: Mapping[str, Any]) -> None:
    tables: tuple[tuple[str, Callable[[Any], bool], bool], ...] = (
        ("ranks", _is_count, True),
        ("tied", _is_text, True),
        ("split", _are_names, False),
        ("pruned", _are_indices, False),
    )
    for key, fits, required in tables:
        table = description.get(key, None if required else {})
        _need(_is_map(table, fits), f"{key} is not what it should be")


def _check_conventions(conventions: Any) -> None:
    _need(isinstance(conventions, dict), "its conventions are no table of keys")
    for key in ("chat_template", "system", "prompt"):
        value = conventions.get(key, "")
        _need(_is_text(value) and len(value) <= LONGEST_TEXT, f"conventions.{key} is no short text")
    _need(isinstance(conventions.get("chat", False), bool), "conventions.chat is no yes or no")
    for key in ("stop_tokens", "pad_token"):
        tokens = conventions.get(key, {})
        _need(
            _is_map(tokens, _is_count) and len(tokens) <= MOST_PARTS,
            f"conventions.{key} are no tokens with their ids",
        )
    names = conventions.get("class_names", [])
    fits = _is_list_of_text(names) and len(set(names)) == len(names)
    _need(fits, "conventions.class_names are no different names")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) in (0, 2) and all(map(_is_count, value))


def _is_map(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(fits, value.values()))


def _is_wrapper(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("class"), str)
        and isinstance(value.get("name"), str)
        and isinstance(value.get("init_args"), dict)
    )


def _are_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= MOST_PARTS
        and len(set(map(str, value))) == len(value)
        and all(isinstance(name, str) and name.isidentifier() for name in value)
    )


def _are_indices(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value)) and len(set(value)) == len(value)
