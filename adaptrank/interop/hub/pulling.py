"""Pull an adapter from the Hugging Face Hub."""

import os
import shutil
from pathlib import Path

from adaptrank.artifacts import (
    CONFIG,
    HUB_FILES,
    HubName,
    cached_adapter,
    download_adapter,
    hub_is_offline,
    hub_name,
    read_adapter,
    refuse_foreign_link,
)
from adaptrank.interop.hub.publishing import is_of_peft
from adaptrank.interop.peft import read_config


def pull_adapter(
    name: str | HubName,
    folder: str | os.PathLike[str] | None = None,
    snapshot: Path | None = None,
) -> Path:
    """Fetch an adapter from the Hub, and return the folder that holds it.

    It goes into the Hub's cache, where its name finds it from then on, without a network too. With
    HF_HUB_OFFLINE it is only looked for there.

    Args:
        name: the repository, as `user/name` or `user/name@revision`.
        folder: an empty folder for a copy. None returns the snapshot in the cache.
        snapshot: the snapshot in the cache, if it was fetched already.
    Raises:
        UserError: if the Hub refuses or cannot be reached, or what it has is no adapter.
    """
    if isinstance(name, str):
        name = hub_name(name)
    if snapshot is None:
        cached = cached_adapter(name) if hub_is_offline() else None
        snapshot = cached or download_adapter(name)
        check_adapter(snapshot)
    if folder is None:
        return snapshot
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in HUB_FILES:
        if (snapshot / file).is_file():
            # The cache holds links.
            refuse_foreign_link(snapshot / file)
            shutil.copyfile(snapshot / file, folder / file)
    return folder


def check_adapter(folder: Path) -> str:
    """Return whose adapter a folder holds, "adaptrank" or "peft". Its description is read.

    Raises:
        UserError: if it is damaged, or of a kind that is not read.
    """
    if is_of_peft(folder / CONFIG):
        read_config(folder)
        return "peft"
    read_adapter(folder)
    return "adaptrank"
