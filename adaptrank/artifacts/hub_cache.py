"""Adapters by their name on the Hugging Face Hub: looked up in its cache, or downloaded into it."""

from __future__ import annotations

import os
from pathlib import Path

from adaptrank._errors import UserError, did_you_mean
from adaptrank.artifacts.file_names import CONFIG, PICKLED, WEIGHTS
from adaptrank.artifacts.hub_errors import asking_hub, hub_is_offline
from adaptrank.artifacts.hub_names import HubName, parse_hub_name

HUB_FILES = (WEIGHTS, CONFIG, "README.md", "config.yaml")
"""Files of an adapter on the Hub. Other files of its repository are not downloaded."""

SHARED_BLOBS = ".huggingface-shared-blobs"
"""File that marks the folder in which the Hub's cache keeps the files of several repositories."""


def locate_adapter(name: str | os.PathLike[str]) -> Path:
    """Return the folder of an adapter, by its path or by its name on the Hub.

    A local folder comes first. Then `user/name` or `user/name@revision` is looked for in the Hub's
    cache, and used as it is there. Last it is downloaded into that cache, unless HF_HUB_OFFLINE
    forbids it, or the name begins with a folder that is here. A text that is no such name is
    returned as a path.

    Raises:
        FileNotFoundError: if neither a folder nor the cache has it, and the Hub is not asked.
        UserError: if the Hub refuses, or what it has is no adapter in safetensors.
    """
    folder = Path(name).expanduser()
    if folder.exists() or folder.is_symlink():
        return folder
    on_hub = parse_hub_name(name)
    if on_hub is None:
        return folder
    cached = cached_adapter(on_hub)
    if cached is not None:
        return cached
    owner = Path(on_hub.repository).parent
    if owner.is_dir():
        hint = did_you_mean(str(name), (str(entry) for entry in owner.iterdir()))
        raise FileNotFoundError(
            f"There is no adapter {str(name)!r} in the folder {str(owner)!r}, and none in the "
            f"Hub's cache.{hint} `python -m adaptrank pull {on_hub}` asks the Hub."
        )
    if hub_is_offline():
        raise FileNotFoundError(
            f"There is no adapter {str(name)!r}: it is no folder, it is not in the Hub's cache, "
            f"and HF_HUB_OFFLINE forbids to ask the Hub."
        )
    return download_adapter(on_hub)


def cached_adapter(name: HubName) -> Path | None:
    """Return the snapshot of an adapter in the Hub's cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name.repository, WEIGHTS, revision=name.revision)
    return Path(file).parent if isinstance(file, str) else None


def download_adapter(name: HubName) -> Path:
    """Download the files of an adapter into the Hub's cache, and return its snapshot there.

    Without a network, a snapshot that is complete in the cache is returned.

    Raises:
        UserError: if the Hub refuses or cannot be reached, or has no adapter in safetensors there.
    """
    from huggingface_hub import snapshot_download

    with asking_hub(name):
        folder = Path(
            snapshot_download(
                name.repository, revision=name.revision, allow_patterns=list(HUB_FILES)
            )
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(_explain_no_adapter(name))
    return folder


def is_adapter_on_hub(name: HubName) -> bool:
    """Return whether the Hub has an adapter of this name. It is asked, which needs a network.

    A pickled adapter counts: loading it says why it is refused.
    """
    files = _files_on_hub(name)
    return WEIGHTS in files or PICKLED in files


def _files_on_hub(name: HubName) -> list[str]:
    from huggingface_hub import HfApi

    with asking_hub(name):
        files: list[str] = HfApi().list_repo_files(name.repository, revision=name.revision)
    return files


def _explain_no_adapter(name: HubName) -> str:
    """Return the sentence for a repository without an adapter in safetensors."""
    files = _files_on_hub(name)
    if PICKLED in files:
        return (
            f"{name} on the Hub has its adapter as a pickle alone, {PICKLED}, which is never "
            f"loaded. Ask its owner for {WEIGHTS}."
        )
    if "config.json" in files:
        return f"{name} on the Hub is a model and no adapter: it has no {WEIGHTS}."
    return f"{name} on the Hub is no adapter: it has no {WEIGHTS}."


def refuse_foreign_link(file: Path) -> None:
    """Refuse a file that is a symbolic link, unless it is one of the Hub's cache.

    The Hub's cache is made of links: `models--USER--NAME/snapshots/COMMIT/FILE` leads to a file in
    `models--USER--NAME/blobs`, which may lead to one in the cache's shared `blobs`. A link that
    leaves these folders is refused.

    Raises:
        UserError: if the link may lead anywhere.
    """
    if file.is_symlink() and not _stays_in_cache(file):
        raise UserError(
            f"{file} is a symbolic link, which may lead anywhere; copy the file itself."
        )


def _stays_in_cache(link: Path) -> bool:
    snapshot = link.parent.resolve()
    repository = snapshot.parent.parent
    if snapshot.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    target = link.resolve()
    folders = [repository / "blobs"]
    shared = repository.parent / "blobs"
    if (shared / SHARED_BLOBS).is_file():
        folders.append(shared)
    return target.is_file() and any(folder in target.parents for folder in folders)


def shown_adapter(folder: Path) -> str:
    """Return a folder as text. A snapshot in the Hub's cache is shown as `user/name@commit`."""
    repository = folder.parent.parent
    kind, _, name = repository.name.partition("--")
    if folder.parent.name != "snapshots" or kind != "models" or not name:
        return str(folder)
    return f"{name.replace('--', '/', 1)}@{folder.name[:12]}"
