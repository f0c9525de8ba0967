"""Load images and their labels: folders of classes, tables of paths, arrays, and data sets.

A table of images has a column `image`, whose values `adaptrank.data.images.decode` takes.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adaptrank._errors import UserError, did_you_mean, some
from adaptrank.data.arrow_tables import ArrowPart, DatasetPart
from adaptrank.data.files import load_split, take_rows
from adaptrank.data.image_folders import (
    folders_of_split,
    origin_of,
    split_folders,
    visible_folders,
)
from adaptrank.data.images import ENDINGS, StoredImage, as_bytes
from adaptrank.data.locations import kind_of, suggest_beside
from adaptrank.data.sources import Source
from adaptrank.data.tables import Part, RawRow, Table
from adaptrank.data.values import Unquoted

log = logging.getLogger(__name__)

METADATA = "metadata"
"""Name of the table of an image folder, without its ending."""

FILE_NAME = "file_name"
"""Column of this table that holds the paths."""

IMAGE_ARRAYS = ("image", "images", "x", "X", "data", "x_train")
LABEL_ARRAYS = ("label", "labels", "y", "Y", "target", "y_train")
"""Names of arrays in an .npz file, where the source names none."""


def load_images(source: Source, split: str) -> Table | None:
    """Load one split of a source of images.

    The result is None if the source has no such split, unless `source.split` names it.

    Args:
        source: the source. A path leads to a folder whose folders are classes, a folder with a
            metadata.csv or .jsonl, a table with paths, an .npz file, an image, a folder that
            `save_to_disk` wrote, or a data set on the Hub.
        split: the split to load if the source names none.

    Raises:
        FileNotFoundError: if there is no such file, folder, or data set.
        UserError: if there is no image, or no such split.
    """
    path = Path(source.path).expanduser()
    instruction = source.split or split
    name = instruction.partition("[")[0]
    if path.suffix.lower() == ".npz" or path.suffix.lower() in ENDINGS:
        return _of_one_split(_parts_of_file(source, path), source, split)
    if path.is_dir():
        folders = folders_of_split(path, name)
        if folders:
            parts = _parts_of_folders(folders, source)
            if parts is not None:
                table = Table(parts, origin=origin_of(path, folders))
                return take_rows(table, source.path, name, instruction)
        elif split_folders(path):
            _check_split(source, path, name)
            return None
        else:
            parts = _parts_of_folder(path, source)
            if parts is not None:
                return _of_one_split(parts, source, split)
    loaded = load_split(source, split)
    return None if loaded is None else _with_images(loaded, source)


def _of_one_split(parts: Sequence[Part], source: Source, split: str) -> Table | None:
    """Return the table of a source that is all training data, or the slice that it asks for."""
    instruction = source.split or split
    name = instruction.partition("[")[0]
    if name != "train":
        if source.split is None:
            return None
        raise UserError(f"{source.path!r} has no {name!r} split. It is all training data.")
    return take_rows(Table(parts), source.path, name, instruction)


def _check_split(source: Source, path: Path, name: str) -> None:
    """Raise if a folder has to have a split that it does not have."""
    if source.split is not None or name == "train":
        found = sorted(child.name for child in path.iterdir() if child.is_dir())
        raise UserError(f"The folder {source.path!r} has no {name!r} split. It holds {found}.")


# ---- folders


def _parts_of_folders(folders: Sequence[Path], source: Source) -> list[Part] | None:
    """Return the images of the folders of a split, or None if one holds another kind of data."""
    several = [_parts_of_folder(folder, source) for folder in folders]
    parts: list[Part] = []
    for found in several:
        if found is None:
            return None
        parts += found
    return parts


def _parts_of_folder(folder: Path, source: Source) -> list[Part] | None:
    """Return the images of a folder, or None if it holds tables or another kind of data.

    Raises:
        UserError: if it holds folders, and no image in them.
    """
    metadata = [file for file in sorted(folder.iterdir()) if _is_metadata(file)]
    if metadata:
        table = load_split(Source(str(metadata[0])), "train")
        assert table is not None
        return [_PathPart(part, folder, source.image) for part in table.parts]
    labelled = _labelled_files(visible_folders(folder))
    if labelled:
        return [FilePart([file for file, _ in labelled], [label for _, label in labelled])]
    images = [file for file in sorted(folder.iterdir()) if _is_image(file)]
    return [FilePart(images, None)] if images else None


def _is_metadata(file: Path) -> bool:
    return file.name.partition(".")[0].lower() == METADATA and kind_of(file) is not None


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in ENDINGS and file.is_file() and not file.name.startswith(".")


def _labelled_files(classes: Sequence[Path]) -> list[tuple[Path, str]]:
    """Return (image, name of its class's folder) of folders of classes, in a fixed order.

    Files that are no images by their ending are left out, and the log names them.
    """
    labelled: list[tuple[Path, str]] = []
    others: list[str] = []
    for folder in classes:
        for file in sorted(folder.rglob("*")):
            if _is_image(file):
                labelled.append((file, folder.name))
            elif file.is_file() and not file.name.startswith("."):
                others.append(str(file))
    if labelled and others:
        log.warning(
            "%d files in folders of classes are no images by their ending, and are left out: %s.",
            len(others),
            some(others, 3),
        )
    return labelled


def find_image(path: str, folder: Path) -> str:
    """Return the path of an image that begins in a folder, or else in the working directory."""
    within = folder / path
    is_elsewhere = not within.is_file() and Path(path).is_file()
    return path if is_elsewhere else str(within)


# ---- parts


class FilePart(Part):
    """Image files, and the class of each.

    Args:
        files: the images.
        labels: name of the class of each, or None if there are none.
    """

    def __init__(self, files: Sequence[Path], labels: Sequence[str] | None) -> None:
        super().__init__(["image"] if labels is None else ["image", "label"], len(files))
        self.files = files
        self.labels = labels

    def rows(self, columns: Sequence[str]) -> Iterator[RawRow]:
        for k, file in enumerate(self.files):
            label = {} if self.labels is None else {"label": self.labels[k]}
            yield {"image": str(file), **label}

    def place(self, k: int) -> str:
        return repr(str(self.files[k]))


class ArrayPart(Part):
    """Images in an array, and the class of each.

    Args:
        images: (images, height, width[, channels]), uint8.
        labels: (images,) or (images, labels), or None.
        names: names of the two columns.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None,
        names: tuple[str, str] = ("image", "label"),
    ) -> None:
        super().__init__(names[: 1 if labels is None else 2], len(images))
        self.images = images
        self.labels = labels
        self.names = names

    def rows(self, columns: Sequence[str]) -> Iterator[RawRow]:
        image, label = self.names
        for k in range(self.count):
            named = {} if self.labels is None else {label: _characters(self.labels[k])}
            yield {image: StoredImage(self.images, k), **named}


def _characters(value: Any) -> Any:
    """Return a value of an array as characters: a number is `Unquoted`, a vector is a list."""
    if isinstance(value, np.ndarray):
        return [_characters(member) for member in value]
    if isinstance(value, np.bool_):
        return bool(value)
    return str(value) if isinstance(value, str) else Unquoted(value.item())


class _PathPart(Part):
    """Rows of a table whose paths begin in a folder, or in the working directory.

    Args:
        part: the rows.
        folder: the folder.
        image: column of the paths. None takes `image`, or else `file_name`, which is then called
            `image`.
    """

    def __init__(self, part: Part, folder: Path, image: str | None) -> None:
        self.column = image or ("image" if "image" in part.columns else FILE_NAME)
        self.is_renamed = image is None and self.column == FILE_NAME in part.columns
        super().__init__([*part.columns, *(["image"] if self.is_renamed else [])], part.count)
        self.part = part
        self.folder = folder

    def rows(self, columns: Sequence[str]) -> Iterator[RawRow]:
        wanted = [*columns, FILE_NAME] if self.is_renamed else columns
        for row in self.part.rows(wanted):
            path = row.get(self.column)
            if isinstance(path, str):
                row = {**row, self.column: find_image(path, self.folder)}
            yield {**row, "image": row.get(FILE_NAME)} if self.is_renamed else row

    def place(self, k: int) -> str:
        return self.part.place(k)

    def class_names(self, column: str) -> list[str] | None:
        return self.part.class_names(column)


class _DatasetImages(Part):
    """Rows of a data set of the library `datasets` with a column of images.

    Args:
        part: the data set.
        columns: columns that hold images.
    """

    def __init__(self, part: DatasetPart, columns: Sequence[str]) -> None:
        from datasets import Image

        super().__init__(part.columns, part.count)
        self.part = part
        self.holders: Mapping[str, Any] = {
            name: _Column(part.data.select_columns([name]).cast_column(name, Image(decode=False)))
            for name in columns
        }

    def rows(self, columns: Sequence[str]) -> Iterator[RawRow]:
        plain = [name for name in columns if name not in self.holders]
        for k, row in enumerate(self.part.rows(plain)):
            images = {name: StoredImage(self.holders[name], k) for name in self.holders}
            yield {**row, **images}

    def class_names(self, column: str) -> list[str] | None:
        return self.part.class_names(column)


class _Column:
    """Values of the one column of a data set, by index."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.name = data.column_names[0]

    def __getitem__(self, index: int) -> Any:
        return self.data[index][self.name]


def _with_images(table: Table, source: Source) -> Table:
    """Return a table whose images can be decoded."""
    return Table([_decodable(part, source) for part in table.parts], table.ranges, table.origin)


def _decodable(part: Part, source: Source) -> Part:
    if isinstance(part, ArrowPart) and part.kind == "parquet":
        columns = [field.name for field in part.schema if _holds_images(field.type)]
        part = _read_parquet(part) if columns else part
    if isinstance(part, DatasetPart):
        from datasets import Image

        kinds = part.data.features.items()
        columns = [name for name, kind in kinds if isinstance(kind, Image) or _is_pair(kind)]
        return _DatasetImages(part, columns) if columns else part
    file = getattr(part, "file", None)
    return part if file is None else _PathPart(part, Path(file).parent, source.image)


def _holds_images(kind: Any) -> bool:
    """Tell whether an Arrow type is that of images: the bytes of a file, and its path."""
    import pyarrow.types as types

    return types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}


def _is_pair(kind: Any) -> bool:
    return isinstance(kind, dict) and kind.keys() == {"bytes", "path"}


def _read_parquet(part: ArrowPart) -> DatasetPart:
    """Return the rows of a Parquet file as a data set, with the undecoded images in memory."""
    from datasets.arrow_dataset import Dataset
    from datasets.table import InMemoryTable
    from pyarrow import parquet

    table: Any = parquet.read_table(part.file)  # type: ignore[no-untyped-call]
    return DatasetPart(Dataset(InMemoryTable(table)), str(part.file))


# ---- single files


def _parts_of_file(source: Source, path: Path) -> list[Part]:
    """Return the images of an .npz file, or an image.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it cannot be read, or holds no such array.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {source.path!r}.{suggest_beside(path)}")
    if path.suffix.lower() != ".npz":
        return [FilePart([path], None)]
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = _array(arrays, source.image, IMAGE_ARRAYS, "image", source.path)
            has_labels = any(name in arrays.files for name in LABEL_ARRAYS)
            labels = None
            if has_labels or source.label is not None:
                labels = _array(arrays, source.label, LABEL_ARRAYS, "label", source.path)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{source.path!r} cannot be read as an .npz file ({reason}).") from error
    if labels is not None and len(labels) != len(images):
        raise UserError(
            f"{source.path!r} has {len(images)} images and {len(labels)} labels. Save one label "
            "for each image."
        )
    names = (source.image or "image", source.label or "label")
    images = as_bytes(images, f"The array of images in {source.path!r}")
    return [ArrayPart(images, labels, names)]


def _array(
    arrays: Any, given: str | None, usual: Sequence[str], field: str, path: str
) -> np.ndarray:
    """Return the array that a source names, or one with a usual name."""
    names = usual if given is None else (given,)
    name = next((name for name in names if name in arrays.files), None)
    if name is None:
        hint = "" if given is None else did_you_mean(given, arrays.files)
        raise UserError(
            f"{path!r} has no array for `{field}`, only {arrays.files}.{hint} Name it, for example "
            f"{field}: {arrays.files[0] if arrays.files else 'images'}."
        )
    array: np.ndarray = arrays[name]
    return array
