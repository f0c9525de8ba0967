"""Find the files behind a path: a file, a folder whose files are named by splits, or a pattern."""

import glob
from pathlib import Path

from adaptrank._errors import UserError, did_you_mean
from adaptrank.data.split_names import (
    Origin,
    has_split_word,
    names_of_split,
    quoted,
    split_of,
    split_word,
)

KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".conllu": "conllu",
}
"""Ending of a file -> its kind."""

COMPRESSED = (".gz", ".bz2", ".xz")
"""Endings that may follow the ending of a file."""

LABELS_FILE = "labels.json"
"""File beside the data that lists the names of the classes."""


def is_local(path: str) -> bool:
    """Tell whether a path means files rather than a name on the Hub, whether or not they exist."""
    file = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or glob.has_magic(path)
    return looks_local or kind_of(file) is not None or file.exists()


def is_file(path: str) -> bool:
    """Tell whether a path means a file or a pattern of files, rather than a folder or the Hub."""
    return is_local(path) and not Path(path).expanduser().is_dir()


def kind_of(file: Path) -> str | None:
    """Return the kind of a data file by its name, or None for a file that is no data."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    suffixes = [suffix for suffix in suffixes if suffix not in COMPRESSED]
    if not suffixes or file.name == LABELS_FILE:
        return None
    return KINDS.get(suffixes[-1])


def local_files(path: str, split: str) -> tuple[list[Path], Origin]:
    """Return the files of one split behind a file name, a folder or a pattern, and their origin.

    The list is empty for a folder that has other splits only. A folder in which no file is named
    after a split is all training data. A name that exists is no pattern, whatever its characters.

    Raises:
        FileNotFoundError: if nothing is there. The message names the nearest thing that is.
        UserError: if the names in a folder do not tell which files are training data.
    """
    file = Path(path).expanduser()
    if file.is_file():
        return [file], Origin()
    if file.is_dir():
        return _files_of_folder(path, file, split)
    if glob.has_magic(path):
        return _files_of_pattern(path, file), Origin()
    if not file.parent.is_dir():
        raise FileNotFoundError(
            f"There is no {path!r}. Its folder {str(file.parent)!r} does not exist either."
        )
    raise FileNotFoundError(f"There is no {path!r}.{suggest_beside(file)}")


def _files_of_pattern(path: str, pattern: Path) -> list[Path]:
    # The longest parent that exists is a name, and only the rest is a pattern.
    parent = next(parent for parent in pattern.parents if parent.is_dir())
    rest = str(pattern.relative_to(parent))
    matches = [parent / match for match in glob.glob(rest, root_dir=parent, recursive=True)]
    files = sorted(file for file in matches if kind_of(file) and file.is_file())
    if not files:
        raise FileNotFoundError(
            f"No file matches {path!r}. Files read here end in {sorted(KINDS)}."
        )
    return files


def _files_of_folder(path: str, folder: Path, split: str) -> tuple[list[Path], Origin]:
    files = [file for file in sorted(folder.iterdir()) if _is_data(file)]
    if not files:
        raise FileNotFoundError(
            f"The folder {path!r} has no data file. Files read here end in {sorted(KINDS)}."
        )
    stems = [stem_of(file) for file in files]
    chosen = [files[k] for k in names_of_split(stems, split, path)]
    rest = [file for file in files if split_of(stem_of(file)) is None]
    has_training = any(split_of(stem) == "train" for stem in stems)
    if chosen or split != "train":
        unread = [file.name for file in rest if has_training and file not in chosen]
        return chosen, Origin(_names(chosen), tuple(unread))
    if len(rest) == len(files) == 1:
        return rest, Origin()
    doubtful = [file for file in rest if has_split_word(stem_of(file))]
    if doubtful:
        names = _names(doubtful)
        example = next((name for name in names if "train" in name.lower()), names[0])
        raise UserError(
            f"The folder {path!r} has no file that is named after the train split, and "
            f"{quoted(names)} may belong to one. Begin or end such names with the word "
            "of one split, as in train.jsonl and gsm_test.jsonl, or give the path of one file, "
            f"such as {str(Path(path) / example)!r}."
        )
    is_rest = len(rest) < len(files)
    return rest, Origin(_names(rest) if is_rest else (), is_rest=is_rest)


def _names(files: list[Path]) -> tuple[str, ...]:
    return tuple(file.name for file in files)


def stem_of(file: Path) -> str:
    """Return the name of a data file without its ending, and without that of a compression."""
    stem = file.name
    for suffix in reversed(file.suffixes):
        if suffix.lower() not in (*KINDS, *COMPRESSED):
            break
        stem = stem.removesuffix(suffix)
    return stem


def _is_data(file: Path) -> bool:
    """Tell whether a file in a folder holds rows."""
    kind = kind_of(file)
    if kind is None or file.name.startswith(".") or not file.is_file():
        return False
    # A plain text beside the data is mostly a description of them.
    return kind != "text" or split_word(stem_of(file)) is not None


def suggest_beside(file: Path) -> str:
    """Suggest the file or folder with the nearest name in the same folder."""
    if not file.parent.is_dir():
        return ""
    return did_you_mean(file.name, sorted(sibling.name for sibling in file.parent.iterdir()))
