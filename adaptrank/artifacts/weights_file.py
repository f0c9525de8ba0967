"""The safetensors file of an adapter's folder: found, opened, and of a size that can be read."""

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.artifacts.file_names import WEIGHTS
from adaptrank.artifacts.hub_cache import locate_adapter, refuse_foreign_link
from adaptrank.artifacts.strict_json import is_plain_text

LARGEST_HEADER = 1 << 25
"""Largest number of bytes of a safetensors header."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)
"""Types of numbers that adapters are stored in. Buffers of modules may have others."""


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of an open file, by key. A tensor is read when it is asked for."""

    def __init__(self, file: Path, handle: Any) -> None:
        self.file = file
        self._handle = handle
        self._keys = dict.fromkeys(handle.keys())

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        tensor: Tensor = self._handle.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor, which is not read."""
        return tuple(self._handle.get_slice(key).get_shape())

    @property
    def metadata(self) -> dict[str, str]:
        """The texts in the header."""
        return self._handle.metadata() or {}

    def check(self) -> None:
        """Refuse keys that are no names.

        A tensor may hold no number: its axis has no units.
        """
        for key in self:
            if not is_plain_text(key, 4096):
                raise UserError(f"{self.file} is damaged: the key of a tensor in it is no name.")


@contextmanager
def open_weights(file: Path) -> Iterator[StoredTensors]:
    """Open a safetensors file.

    Raises:
        UserError: if it is damaged.
    """
    try:
        _check_header(file)
        with safe_open(file, framework="pt") as handle:
            yield StoredTensors(file, handle)
    except SafetensorError as error:
        reason = (str(error).splitlines() or ["it cannot be read"])[0][:200]
        raise UserError(f"{file} is damaged: {_printable(reason)}.") from None


def _check_header(file: Path) -> None:
    """Refuse a header that would take absurd memory, before it is read."""
    with file.open("rb") as opened:
        start = opened.read(8)
    size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if size > LARGEST_HEADER:
        raise UserError(
            f"{file} is damaged: its header says that it has {size:,} bytes, and "
            f"{LARGEST_HEADER:,} are the most."
        )


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def find_weights(folder: str | os.PathLike[str]) -> Path:
    """Return the safetensors file of an adapter.

    Args:
        folder: its folder, or its name on the Hub, see `locate_adapter`.
    Raises:
        FileNotFoundError: says what is in its place.
        UserError: if it is a symbolic link that leaves the Hub's cache.
    """
    folder = locate_adapter(folder)
    file = folder / WEIGHTS
    if folder.is_file() and folder.suffix == ".ckpt":
        raise FileNotFoundError(
            f"{str(folder)!r} is a checkpoint; make an adapter of it: "
            f"python -m adaptrank extract {folder} --out {folder.with_suffix('')}"
        )
    if folder.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} is a file; an adapter is a folder with {WEIGHTS} in it, unpacked."
        )
    refuse_foreign_link(file)
    if not file.is_file():
        raise FileNotFoundError(
            f"No adapter at {str(folder)!r}: it has no {WEIGHTS}.{_hint_at_other_files(folder)}"
        )
    return file


def _hint_at_other_files(folder: Path) -> str:
    if (folder / "adapter" / WEIGHTS).is_file():
        return f" Did you mean {folder / 'adapter'}?"
    files = list(folder.iterdir()) if folder.is_dir() else []
    checkpoints = [file for file in files if file.suffix == ".ckpt"]
    if checkpoints:
        return (
            f" {checkpoints[0].name} is a checkpoint: make an adapter of it with "
            f"python -m adaptrank extract {checkpoints[0]} --out FOLDER."
        )
    pickled = [file.name for file in files if file.suffix in (".bin", ".pt")]
    return f" {pickled[0]} is a pickle, which is never loaded as an adapter." if pickled else ""
