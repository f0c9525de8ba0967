"""Find the folders of splits in a folder of images."""

from collections.abc import Sequence
from pathlib import Path

from adaptrank.data.locations import kind_of
from adaptrank.data.split_names import (
    SPLIT_NAMES,
    Origin,
    is_split_name,
    names_of_split,
    split_of,
)


def folders_of_split(path: Path, name: str) -> list[Path]:
    """Return the folders of a split in a folder, or [] if there are none.

    Args:
        path: the folder of images.
        name: name of the split.
    Raises:
        UserError: if several words name the split, such as "dev" and "eval".
    """
    if name not in SPLIT_NAMES:
        return [child for child in visible_folders(path) if child.name.lower() == name.lower()]
    folders = split_folders(path)
    names = [folder.name for folder in folders]
    return [folders[k] for k in names_of_split(names, name, str(path))]


def split_folders(path: Path) -> list[Path]:
    """Return the folders in a folder that are splits rather than classes.

    A whole name counts, such as "Training". A class may be called "express_train". So names of
    which only a part names a split count where they name training data and another split.
    """
    folders = visible_folders(path)
    whole = [folder for folder in folders if is_split_name(folder.name)]
    if whole:
        return whole
    partly = [folder for folder in folders if split_of(folder.name) is not None]
    splits = {split_of(folder.name) for folder in partly}
    return partly if "train" in splits and len(splits) > 1 else []


def origin_of(path: Path, folders: Sequence[Path]) -> Origin:
    """Return the names of the folders of a split, and those of data beside all splits."""
    of_splits = split_folders(path)
    unread = [
        child.name
        for child in sorted(path.iterdir())
        if child not in of_splits and (_is_visible_folder(child) or _is_table(child))
    ]
    return Origin(tuple(folder.name for folder in folders), tuple(unread))


def _is_table(file: Path) -> bool:
    return kind_of(file) not in (None, "text") and not file.name.startswith(".")


def visible_folders(path: Path) -> list[Path]:
    """Return the folders in a folder, in order, without those whose name begins with a dot."""
    return [child for child in sorted(path.iterdir()) if _is_visible_folder(child)]


def _is_visible_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")
