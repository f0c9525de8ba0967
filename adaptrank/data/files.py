"""Load data sets from files, folders and the Hub as tables of exact texts."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaptrank._errors import UserError
from adaptrank.data.arrow_tables import ArrowPart, DatasetPart
from adaptrank.data.conll_files import read_conll, read_conllu
from adaptrank.data.locations import (
    KINDS,
    LABELS_FILE,
    is_local,
    kind_of,
    local_files,
    suggest_beside,
)
from adaptrank.data.sources import Source
from adaptrank.data.split_names import Origin, name_of_split
from adaptrank.data.tables import Part, Table, TextPart
from adaptrank.data.text_files import (
    Reader,
    lines,
    read_csv,
    read_json,
    read_lines,
    read_tsv,
    unreadable,
)
from adaptrank.data.values import JSON, as_text

log = logging.getLogger(__name__)

READERS: dict[str, Reader] = {
    "csv": read_csv,
    "tsv": read_tsv,
    "json": read_json,
    "text": read_lines,
    "conll": read_conll,
    "conllu": read_conllu,
}
"""Kind of a text file -> the function that reads it."""


def load_split(source: Source, split: str) -> Table | None:
    """Load one split of a source.

    The result is None if the source has no such split, unless `source.split` names it.

    Args:
        source: the source.
        split: the split to load if the source names none.

    Raises:
        FileNotFoundError: if there is no such file, folder, or data set.
        UserError: if `source.split` is not one of the source's splits, or data cannot be read.
    """
    with _progress_bars_hidden():
        if not is_local(source.path):
            return _load_from_hub(source, source.split or split)
        folder = Path(source.path).expanduser()
        if _is_saved(folder):
            return _load_saved(source, folder, split)
        return _load_files(source, split)


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


def _load_files(source: Source, split: str) -> Table | None:
    name, instruction = _split_of_files(source, split)
    files, origin = local_files(source.path, name)
    if not files:
        if source.split is None and split != "train":
            return None
        siblings = sorted(file.name for file in Path(source.path).expanduser().iterdir())
        raise UserError(f"The folder {source.path!r} has no {name!r} split. It holds {siblings}.")
    kind = _common_kind(source.path, files)
    parts = [_part(file, kind) for file in files]
    return take_rows(Table(parts, origin=origin), source.path, name, instruction)


def load_file(file: Path) -> Table:
    """Return the rows of one file, whatever split it holds.

    Raises:
        UserError: if the file cannot be read.
    """
    return Table([_part(file, _common_kind(str(file), [file]))])


def _part(file: Path, kind: str) -> Part:
    if kind in READERS:
        return TextPart(file, READERS[kind])
    return ArrowPart(file, kind)


def _split_of_files(source: Source, split: str) -> tuple[str, str]:
    """Return the name of the split that files are loaded as, and the rows to take of it.

    The two differ where `source.split` is a slice, such as "train[:10%]". A file is one split,
    whatever its name, and counts as "train".
    """
    instruction = source.split or split
    name, bracket, rest = instruction.partition("[")
    if source.split and not Path(source.path).expanduser().is_dir():
        name = "train"
        instruction = f"{name}{bracket}{rest}"
    return name, instruction


def _common_kind(path: str, files: list[Path]) -> str:
    """Return the kind of all files, or raise if they differ."""
    kinds = sorted({kind_of(file) or file.suffix for file in files})
    if len(kinds) > 1 or kinds[0] not in KINDS.values():
        raise UserError(
            f"{path!r} holds {kinds} files. Give files of one kind, of {sorted(KINDS)}."
        )
    return kinds[0]


def take_rows(whole: Table, path: str, name: str, instruction: str) -> Table:
    """Return the rows that a slice such as "train[:10%]" takes of a split.

    Raises:
        UserError: if there is no row, or if the slice is none.
    """
    from datasets.arrow_reader import ReadInstruction

    if not len(whole):
        raise UserError(f"No rows come from {path!r} as split {instruction!r}: it has none.")
    if instruction == name:
        return whole
    try:
        parsed: Any = ReadInstruction.from_spec(instruction)  # type: ignore[no-untyped-call]
        slices = parsed.to_absolute({name: len(whole)})
    except (ValueError, AssertionError) as error:
        raise UserError(f"No rows come from {path!r} as split {instruction!r}: {error}") from error
    ranges = [(part.from_ or 0, len(whole) if part.to is None else part.to) for part in slices]
    return Table(whole.parts, ranges, whole.origin)


# ---- folders written by `save_to_disk`


def _is_saved(folder: Path) -> bool:
    """Tell whether `save_to_disk` of the library `datasets` wrote a folder."""
    is_dataset = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return is_dataset or (folder / "dataset_dict.json").is_file()


def _load_saved(source: Source, folder: Path, split: str) -> Table | None:
    """Load a split of a folder that `save_to_disk` wrote. One data set is all training data."""
    from datasets.dataset_dict import DatasetDict
    from datasets.load import load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise unreadable(folder, "a saved data set", reason) from error
    instruction = source.split or split
    name = instruction.partition("[")[0]
    origin = Origin()
    if isinstance(loaded, DatasetDict):
        known = list(map(str, loaded))
        stored = name_of_split(known, name, source.path)
        data = None if stored is None else loaded[stored]
        origin = Origin(() if stored is None else (stored,))
    else:
        data = loaded if name == "train" else None
        known = ["train"]
    if data is None:
        if source.split is None and split != "train":
            return None
        raise UserError(f"The folder {source.path!r} has no {name!r} split, only {known}.")
    whole = Table([DatasetPart(data, source.path)], origin=origin)
    return take_rows(whole, source.path, name, instruction)


# ---- the Hub


def _load_from_hub(source: Source, split: str) -> Table | None:
    from datasets.arrow_dataset import Dataset
    from datasets.inspect import get_dataset_split_names
    from datasets.load import load_dataset

    try:
        if source.split is None:
            names = get_dataset_split_names(source.path, source.name)
            stored = name_of_split(names, split, source.path)
            if stored is None and split == "train":
                raise UserError(
                    f"{source.path!r} has no train split. Set `split` to one of {names}."
                )
            if stored is None:
                return None
            split = stored
        data = load_dataset(source.path, source.name, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"There is no file or folder {source.path!r} here.{suggest_beside(Path(source.path))} "
            f"As the name of a Hub data set it fails with: {error}"
        ) from error
    assert isinstance(data, Dataset)
    if data.info.builder_name in ("csv", "json"):
        name = split.partition("[")[0]
        is_one_split = all(part.strip().partition("[")[0] == name for part in split.split("+"))
        parts = _exact_parts_of_hub(source, name) if is_one_split else None
        if parts is not None:
            return take_rows(Table(parts, origin=Origin((name,))), source.path, name, split)
        log.warning(
            "%r is read by the library `datasets`, because its %s files have settings of their own "
            "or several splits are joined. It may take a text for a number or a date.",
            source.path,
            data.info.builder_name,
        )
    return Table([DatasetPart(data, source.path)], origin=Origin((split,)))


def _exact_parts_of_hub(source: Source, name: str) -> list[Part] | None:
    """Return the text files of a split on the Hub, or None if they have settings of their own.

    The library `datasets` guesses the types of values in such files.
    """
    from datasets.download.download_manager import DownloadManager
    from datasets.load import load_dataset_builder

    builder = load_dataset_builder(source.path, source.name)
    config: Any = builder.config
    separator = getattr(config, "sep", ",")
    if not _is_usual(config) or separator not in (",", "\t") or name not in config.data_files:
        return None
    kind = "tsv" if separator == "\t" else builder.name
    manager: Any = DownloadManager(dataset_name=builder.dataset_name)
    files = manager.download(list(config.data_files[name]))
    try:
        return [_part(Path(file), kind) for file in files]
    except UserError:
        # Such as an archive, which the library unpacks.
        return None


USUAL_SETTINGS: dict[str, tuple[Any, ...]] = {
    "encoding": ("utf-8",),
    "quotechar": ('"',),
    "header": ("infer", 0),
    "quoting": (0,),
    "skipfooter": (0,),
    "skipinitialspace": (False,),
    "doublequote": (True,),
}
"""Settings of files on the Hub -> values that mean plain CSV. All others have to be None."""
UNUSUAL_SETTINGS = (
    "features",
    "field",
    "names",
    "skiprows",
    "nrows",
    "usecols",
    "index_col",
    "comment",
    "escapechar",
    "dialect",
    "lineterminator",
)


def _is_usual(config: Any) -> bool:
    """Tell whether text files on the Hub have no settings of their own."""
    return all(
        getattr(config, field, None) in (None, *USUAL_SETTINGS.get(field, ()))
        for field in (*USUAL_SETTINGS, *UNUSUAL_SETTINGS)
    )


# ---- names of classes


def declared_classes(
    source: Source, load: Callable[[Source, str], Table | None] = load_split
) -> list[str] | None:
    """Return the names of the classes that a source declares, or None.

    They come from a labels.json beside the files, or from the data set's own label type.

    Args:
        source: the source.
        load: function that loads a split of it.

    Raises:
        UserError: if labels.json holds no list of names.
    """
    if is_local(source.path):
        names = _read_labels_file(source)
        if names is not None:
            return names
    table = load(source, "train")
    column = (source.label or "label").strip("{}")
    return None if table is None else table.class_names(column)


def _read_labels_file(source: Source) -> list[str] | None:
    """Return the names in labels.json beside the files, or None if there is no such file."""
    folder = Path(source.path).expanduser()
    if not folder.is_dir():
        folder = local_files(source.path, "train")[0][0].parent
    file = folder / LABELS_FILE
    if not file.is_file():
        return None
    advice = "Write a list of different names in the order of the labels"
    try:
        names = JSON.decode("".join(text for _, text in lines(file, "json")))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise unreadable(file, "json", f"{error}. {advice}") from error
    if not isinstance(names, list):
        kind = type(names).__name__
        raise UserError(f"{str(file)!r} holds a {kind}. {advice}.")
    try:
        texts = [as_text(name) for name in names]
    except TypeError as error:
        raise UserError(f"{str(file)!r} holds a name that is none ({error}). {advice}.") from error
    if len(set(texts)) < len(texts):
        raise UserError(f"{str(file)!r} names a class twice. {advice}.")
    return texts
