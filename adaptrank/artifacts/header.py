"""The description in an adapter's file: what it must look like, whoever wrote it, and a digest of all that the file says.

Text in, plain data out, of which every type has been looked at; nothing is built or allocated here.
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
"""2 has a digest; files of version 1, which have none, are read."""
MOST_PARTS = 64


def digest_of(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """A hash of the description but for its own digest, and of name, dtype, shape and bytes of every tensor: 32 hex characters."""
    found = hashlib.blake2b(digest_size=16)
    known = {key: value for key, value in description.items() if key != "digest"}
    found.update(json.dumps(known, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        found.update(f"\n{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return found.hexdigest()


def parse(text: str, file: Path) -> dict[str, Any]:
    """The description of a file, checked.

    Raises:
        ValueError: in a sentence that says what is wrong, for anything that `save_adapter` would not have written.
    """
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise UserError(f"{file} is damaged: the description in its header is no JSON.") from None
    check(found, file)
    description: dict[str, Any] = found
    return description


def check(found: Any, file: Path) -> None:
    """Whether data are a description of an adapter; see `parse`."""

    def need(true: bool, what: str) -> None:
        if not true:
            raise UserError(f"{file} is damaged: {what}.")

    need(isinstance(found, dict), "its description is no table of keys")
    version = found.get("format_version")
    need(_is_count(version) and version >= 1, "it does not say what format it has")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{file} has format {version}; this version of adaptrank reads up to {FORMAT_VERSION}: pip install --upgrade adaptrank."
        )
    need(version == 1 or isinstance(found.get("digest"), str), "it has no digest")
    base = found.get("base")
    need(
        isinstance(base, dict) and isinstance(base.get("fingerprint"), str),
        "it does not say what base it was made for",
    )
    for key in ("name", "source", "auto_class"):
        need(base.get(key) is None or isinstance(base[key], str), f"base.{key} is no text")
    need(
        base.get("num_labels") is None or _is_count(base["num_labels"]),
        "base.num_labels is no number",
    )
    adapters = found.get("adapters")
    need(isinstance(adapters, list) and bool(adapters), "it describes no adapter")
    for entry in adapters:
        need(isinstance(entry, dict), "an adapter is no table of keys")
        nest, layers = entry.get("nest"), entry.get("layers")
        need(isinstance(nest, list) and bool(nest), "an adapter has no classes")
        for wrapper in nest:
            need(
                isinstance(wrapper, dict)
                and isinstance(wrapper.get("class"), str)
                and isinstance(wrapper.get("name"), str)
                and isinstance(wrapper.get("init_args"), dict),
                "a class is not described by class, name and init_args",
            )
        need(_is_map(layers, _is_shape), "the layers of an adapter are not given with their shapes")
    for key, fits, must in (
        ("ranks", _is_count, True),
        ("tied", lambda value: isinstance(value, str), True),
        ("split", _are_names, False),
        ("pruned", _are_indices, False),
    ):
        need(_is_map(found.get(key, None if must else {}), fits), f"{key} is not what it should be")
    trained = found.get("trained_modules")
    need(
        isinstance(trained, list) and all(isinstance(name, str) for name in trained),
        "trained_modules are no names",
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) in (0, 2) and all(map(_is_count, value))


def _is_map(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(fits, value.values()))


def _are_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= MOST_PARTS
        and len(set(map(str, value))) == len(value)
        and all(isinstance(name, str) and name.isidentifier() for name in value)
    )


def _are_indices(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value)) and len(set(value)) == len(value)
