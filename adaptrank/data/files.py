"""Read data sets from files, folders and the Hub, through the library `datasets`."""

import glob
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptrank._errors import UserError, did_you_mean
from adaptrank.data.sources import Source

if TYPE_CHECKING:
    from datasets.arrow_dataset import Dataset

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
"""Ending of a file -> the builder of `datasets` that reads it."""

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""Split -> the words with which the names of its files begin."""

LABELS_FILE = "labels.json"
"""File beside the data that lists the names of the classes."""


def load_split(source: Source, split: str) -> "Dataset | None":
    """Load one split of a source.

    The result is None if the source has no such split, unless `source.split` names it.

    Args:
        source: the source.
        split: the split to load if the source names none.

    Raises:
        FileNotFoundError: if there is no such file, folder, or data set.
        UserError: if `source.split` is not one of the source's splits.
    """
    with _progress_bars_hidden():
        if is_local(source.path):
            return _load_files(source, split)
        return _load_from_hub(source, source.split or split)


@contextmanager
def _progress_bars_hidden() -> Iterator[None]:
    """Hide the progress bars of `datasets`, and show them again if they were shown."""
    from datasets.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    were_shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            enable_progress_bars()


# ---- files


def is_local(path: str) -> bool:
    """Tell whether a path means files rather than a name on the Hub, whether or not they exist."""
    file = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or glob.has_magic(path)
    return looks_local or builder_of(file) is not None or file.exists()


def is_file(path: str) -> bool:
    """Tell whether a path means a file or a pattern of files, rather than a folder or the Hub."""
    return is_local(path) and not Path(path).expanduser().is_dir()


def builder_of(file: Path) -> str | None:
    """Return the builder that reads a file, or None for a file that is no data."""
    suffixes = [suffix for suffix in file.suffixes if suffix != ".gz"]
    if not suffixes or file.name == LABELS_FILE:
        return None
    return BUILDERS.get(suffixes[-1])


def local_files(path: str, split: str) -> list[Path]:
    """Return the files of one split behind a file name, a pattern or a folder.

    The list is empty for a folder that has other splits only. A folder in which no file is named
    after a split is all training data.

    Raises:
        FileNotFoundError: if nothing is there. The message names the nearest thing that is.
    """
    file = Path(path).expanduser()
    if glob.has_magic(path):
        return _files_of_pattern(path, str(file))
    if file.is_file():
        return [file]
    if file.is_dir():
        return _files_of_folder(path, file, split)
    if not file.parent.is_dir():
        raise FileNotFoundError(
            f"There is no {path!r}. Its folder {str(file.parent)!r} does not exist either."
        )
    raise FileNotFoundError(f"There is no {path!r}.{_suggest_beside(file)}")


def _files_of_pattern(path: str, pattern: str) -> list[Path]:
    candidates = [Path(match) for match in glob.glob(pattern, recursive=True)]
    files = sorted(file for file in candidates if builder_of(file))
    if not files:
        raise FileNotFoundError(
            f"No file matches {path!r}. Files read here end in {sorted(BUILDERS)}."
        )
    return files


def _files_of_folder(path: str, folder: Path, split: str) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if builder_of(file))
    if not files:
        raise FileNotFoundError(
            f"The folder {path!r} has no data file. Files read here end in {sorted(BUILDERS)}."
        )
    named = [file for file in files if _is_named(file, SPLIT_NAMES.get(split, (split,)))]
    if named or split != "train":
        return named
    known_words = [word for words in SPLIT_NAMES.values() for word in words]
    return [file for file in files if not _is_named(file, known_words)]


def _is_named(file: Path, words: Sequence[str]) -> bool:
    """Tell whether a file's name begins with one of the words, and a separator after it."""
    return any(file.name.startswith((f"{word}.", f"{word}-", f"{word}_")) for word in words)


def _suggest_beside(file: Path) -> str:
    """Suggest the file or folder with the nearest name in the same folder."""
    if not file.parent.is_dir():
        return ""
    return did_you_mean(file.name, sorted(sibling.name for sibling in file.parent.iterdir()))


def _load_files(source: Source, split: str) -> "Dataset | None":
    from datasets.arrow_dataset import Dataset
    from datasets.exceptions import DatasetGenerationError
    from datasets.load import load_dataset

    name, instruction = _split_of_files(source, split)
    files = local_files(source.path, name)
    if not files:
        if source.split is None and split != "train":
            return None
        siblings = sorted(file.name for file in Path(source.path).expanduser().iterdir())
        raise UserError(f"The folder {source.path!r} has no {name!r} split. It holds {siblings}.")
    builder = _common_builder(source.path, files)
    options: dict[str, Any] = {"sep": "\t"} if ".tsv" in files[0].suffixes else {}
    data_files = {name: [str(file) for file in files]}
    try:
        data = load_dataset(builder, data_files=data_files, split=instruction, **options)
    except ValueError as error:
        raise UserError(
            f"No rows come from {source.path!r} as split {instruction!r}: {error}"
        ) from error
    except DatasetGenerationError as error:
        raise UserError(
            f"{source.path!r} cannot be read as {builder}: {error.__cause__ or error}"
        ) from error
    assert isinstance(data, Dataset)
    return data


def _split_of_files(source: Source, split: str) -> tuple[str, str]:
    """Return the name of the split that files are loaded as, and the instruction for `datasets`.

    The two differ where `source.split` is a slice, such as "train[:10%]". A file is one split,
    whatever its name, and counts as "train".
    """
    instruction = source.split or split
    name, bracket, rest = instruction.partition("[")
    if source.split and not Path(source.path).expanduser().is_dir():
        name = "train"
        instruction = f"{name}{bracket}{rest}"
    return name, instruction


def _common_builder(path: str, files: list[Path]) -> str:
    """Return the builder that reads all files, or raise if there is no such one."""
    kinds = sorted({builder_of(file) or file.suffix for file in files})
    if len(kinds) > 1 or kinds[0] not in BUILDERS.values():
        raise UserError(
            f"{path!r} holds {kinds} files. Give files of one kind, of {sorted(BUILDERS)}."
        )
    return kinds[0]


# ---- the Hub


def _load_from_hub(source: Source, split: str) -> "Dataset | None":
    from datasets.arrow_dataset import Dataset
    from datasets.inspect import get_dataset_split_names
    from datasets.load import load_dataset

    try:
        if source.split is None:
            names = get_dataset_split_names(source.path, source.name)
            if split not in names and split == "train":
                raise UserError(
                    f"{source.path!r} has no train split. Set `split` to one of {names}."
                )
            if split not in names:
                return None
        data = load_dataset(source.path, source.name, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"There is no file or folder {source.path!r} here.{_suggest_beside(Path(source.path))} "
            f"As the name of a Hub data set it fails with: {error}"
        ) from error
    assert isinstance(data, Dataset)
    return data


# ---- names of classes


def declared_classes(source: Source) -> list[str] | None:
    """Return the names of the classes that a source declares, or None.

    They come from a labels.json beside the files, or from the data set's own label type.

    Raises:
        UserError: if labels.json holds no list.
    """
    from datasets.features import ClassLabel

    if is_local(source.path):
        names = _read_labels_file(source)
        if names is not None:
            return names
    data = load_split(source, "train")
    column = (source.label or "label").strip("{}")
    feature = None if data is None else data.features.get(column)
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def _read_labels_file(source: Source) -> list[str] | None:
    """Return the names in labels.json beside the files, or None if there is no such file."""
    folder = Path(source.path).expanduser()
    if not folder.is_dir():
        folder = local_files(source.path, "train")[0].parent
    file = folder / LABELS_FILE
    if not file.is_file():
        return None
    names = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(names, list):
        raise UserError(
            f"{str(file)!r} holds a {type(names).__name__}. Write a list of names in the order of "
            "the labels."
        )
    return [str(name) for name in names]
