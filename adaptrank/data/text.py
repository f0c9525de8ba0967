"""Data from files and from the Hub, through `datasets`: which columns make a row, how sources mix, what validates."""

import difflib
import glob
import json
import math
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptrank._errors import UserError
from adaptrank.data.loader import rng
from adaptrank.data.task import CompletionTask, LabelTask, Row, Split

if TYPE_CHECKING:
    from datasets.arrow_dataset import Dataset

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
LABELS_FILE = "labels.json"
COMPLETION_FIELDS = ("prompt", "completion", "answer", "choices", "label", "messages")
LABEL_FIELDS = ("text", "text_pair", "label")


@dataclass
class Source:
    """A data set, and which of its columns are what.

    A field is the name of a column, or a format string over columns ("Question: {question}\\nAnswer:"; "{options[text]}" reaches
    inside one; "" is the empty text). Left out, it is the module's own setting, and then the column of the same name.

    Args:
        path: a file or a pattern of files (.json, .jsonl, .csv, .tsv, .parquet, also .gz), a folder with such files named
            after their splits, or the name of a data set on the Hub.
        name: configuration of a Hub data set.
        split: split to take, also a slice such as "train[:10%]"; None takes the one that the source serves as.
        weight: how often every row appears in an epoch: 2 is twice, 0.5 a seeded half of the rows.
    """

    path: str
    name: str | None = None
    split: str | None = None
    weight: float = 1.0
    prompt: str | None = None
    completion: str | None = None
    answer: str | None = None
    choices: str | None = None
    label: str | None = None
    messages: str | None = None
    text: str | None = None
    text_pair: str | None = None


if TYPE_CHECKING:
    Sources = str | Sequence[Source]
else:
    # jsonargparse takes a string for the path of a configuration wherever a list of classes may stand, reads the file and puts
    # its contents in place of the path: a CSV would be gone before we saw it. In place of a tuple it does not.
    Sources = str | tuple[Source, ...]


def closest(word: str, options: Iterable[str]) -> str:
    """Words for an error: the nearest option, if any is near."""
    near = difflib.get_close_matches(word, [str(o) for o in options], n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."


def builder_of(path: Path) -> str | None:
    """Name of the `datasets` builder that reads a file, by its ending; None for other files."""
    suffixes = [s for s in path.suffixes if s != ".gz"]
    return BUILDERS.get(suffixes[-1]) if suffixes and path.name != LABELS_FILE else None


def is_local(path: str) -> bool:
    """Whether a path means files of this machine rather than a name on the Hub, whether or not they exist."""
    where = Path(path).expanduser()
    looks = (
        path.startswith((".", "/", "~")) or glob.has_magic(path) or builder_of(where) is not None
    )
    return looks or where.exists()


def local_files(path: str, split: str) -> list[Path]:
    """Files of one split behind a file name, a pattern or a folder; [] for a folder that has other splits only.

    A folder in which no file is named after a split is all training data.

    Raises:
        FileNotFoundError: if nothing is there; the message names the nearest thing that is.
    """
    where = Path(path).expanduser()
    if glob.has_magic(path):
        found = sorted(p for p in map(Path, glob.glob(str(where), recursive=True)) if builder_of(p))
        if not found:
            raise FileNotFoundError(
                f"No file matches {path!r}; files read here end in {sorted(BUILDERS)}."
            )
        return found
    if where.is_file():
        return [where]
    if not where.is_dir():
        parent = where.parent
        there = sorted(p.name for p in parent.iterdir()) if parent.is_dir() else []
        hint = (
            closest(where.name, there)
            if there
            else f"; its folder {str(parent)!r} does not exist either."
        )
        raise FileNotFoundError(f"There is no {path!r}{hint}")
    files = sorted(p for p in where.iterdir() if builder_of(p))
    if not files:
        raise FileNotFoundError(
            f"The folder {path!r} has no data file; files read here end in {sorted(BUILDERS)}."
        )

    def names(p: Path, words: tuple[str, ...]) -> bool:
        return any(p.name.startswith((w + ".", w + "-", w + "_")) for w in words)

    mine = [p for p in files if names(p, SPLIT_NAMES.get(split, (split,)))]
    known = tuple(w for words in SPLIT_NAMES.values() for w in words)
    if not mine and split == "train":
        return [p for p in files if not names(p, known)]
    return mine


def load(source: Source, split: str) -> "Dataset | None":
    """Load one split of a source; None if the source has no such split (asked for by default, not by `source.split`).

    Raises:
        FileNotFoundError: if there is no such file, folder, or data set.
        ValueError: if `source.split` is not one of the source's splits.
    """
    from datasets.arrow_dataset import Dataset
    from datasets.exceptions import DatasetGenerationError
    from datasets.load import load_dataset
    from datasets.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    wanted = source.split or split
    name = wanted.split("[")[0]
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        if not is_local(source.path):
            return _load_from_hub(source, wanted)
        if source.split and not Path(source.path).expanduser().is_dir():
            name = "train"  # a file is one split, whatever it is called
            wanted = name + source.split[source.split.find("[") :] if "[" in source.split else name
        files = local_files(source.path, name)
        if not files:
            if source.split is None and split != "train":
                return None
            there = sorted(p.name for p in Path(source.path).expanduser().iterdir())
            raise UserError(f"The folder {source.path!r} has no {name!r} split; it holds {there}.")
        kinds = sorted({builder_of(p) or p.suffix for p in files})
        if len(kinds) > 1 or kinds[0] not in BUILDERS.values():
            raise UserError(
                f"{source.path!r} holds {kinds} files; give files of one kind, of {sorted(BUILDERS)}."
            )
        options: dict[str, Any] = {"sep": "\t"} if ".tsv" in files[0].suffixes else {}
        try:
            found = load_dataset(
                kinds[0], data_files={name: [str(p) for p in files]}, split=wanted, **options
            )
        except ValueError as error:
            raise UserError(
                f"No rows come from {source.path!r} as split {wanted!r}: {error}"
            ) from error
        except DatasetGenerationError as error:
            raise UserError(
                f"{source.path!r} cannot be read as {kinds[0]}: {error.__cause__ or error}"
            ) from error
        assert isinstance(found, Dataset)
        return found
    finally:
        if shown:
            enable_progress_bars()


def _load_from_hub(source: Source, wanted: str) -> "Dataset | None":
    from datasets.arrow_dataset import Dataset
    from datasets.inspect import get_dataset_split_names
    from datasets.load import load_dataset

    try:
        if source.split is None:
            names = get_dataset_split_names(source.path, source.name)
            if wanted not in names and wanted == "train":
                raise UserError(
                    f"{source.path!r} has no train split; set `split` to one of {names}."
                )
            if wanted not in names:
                return None
        found = load_dataset(source.path, source.name, split=wanted)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"There is no file or folder {source.path!r} here{_nearby(source.path)} As the name of a Hub data set it fails with: "
            f"{error}"
        ) from error
    assert isinstance(found, Dataset)
    return found


def _nearby(path: str) -> str:
    parent = Path(path).parent
    return closest(Path(path).name, (p.name for p in parent.iterdir())) if parent.is_dir() else "."


def reader(field: str, template: str, columns: list[str], path: str) -> Callable[[Row], Any]:
    """Make the function row -> value of a field, from a column's name or a format string over columns.

    Raises:
        ValueError: if a column does not exist; the message lists those that do.
    """
    if template == "":
        return lambda row: ""
    form = string.Formatter()
    try:
        parts = list(form.parse(template))
    except ValueError as error:
        raise UserError(
            f"{field}: {template!r} is no format string ({error}); double a brace to mean itself."
        ) from error
    gaps = [gap for _, gap, _, _ in parts if gap is not None]
    for column in [gap.split("[")[0].split(".")[0] for gap in gaps] or [template]:
        if column not in columns:
            hint = closest(column, columns)
            raise UserError(f"{field}: {path!r} has no column {column!r}, only {columns}{hint}")
    if not gaps:
        return lambda row: row[template]
    literal, gap, spec, conversion = parts[0]
    if len(parts) == 1 and gap is not None and not (literal or spec or conversion):
        return lambda row: form.get_field(gap, (), row)[0]
    return lambda row: form.vformat(template, (), row)


def mapped(
    data: "Dataset", source: Source, wanted: tuple[str, ...], required: tuple[str, ...]
) -> list[Row]:
    """Rows with the wanted fields, those that are None in a row left out.

    Raises:
        ValueError: if a required field has no column, or no value in some row.
    """
    columns = list(data.column_names)
    readers: dict[str, Callable[[Row], Any]] = {}
    for field in wanted:
        template = getattr(source, field)
        if template is not None or field in columns:
            readers[field] = reader(
                field, field if template is None else template, columns, source.path
            )
    for field in required:
        if field not in readers:
            raise UserError(
                f"{source.path!r} has no column {field!r}, only {columns}{closest(field, columns)} "
                f'Say how to make it, for example {field}: "{{{columns[0]}}}".'
            )
    rows = []
    for k, raw in enumerate(data):
        row = {f: v for f, read in readers.items() if (v := read(raw)) is not None}
        if absent := [f for f in required if f not in row]:
            raise UserError(
                f"Row {k} of {source.path!r} has no {absent[0]!r} (it is null); remove or fill such rows."
            )
        rows.append(row)
    return rows


def repeated(rows: list[Row], weight: float, *key: object) -> list[Row]:
    """Take every row `weight` times; of a fraction, a seeded sample in the order of the rows."""
    if weight <= 0:
        raise UserError(f"weight={weight} takes no row; use a positive one, or remove the source.")
    whole, rest = int(weight), round((weight - int(weight)) * len(rows))
    return rows * whole + [
        rows[i] for i in sorted(rng("weight", *key).sample(range(len(rows)), rest))
    ]


class _Sources:
    """Splits of one or more sources, mixed: what the two data modules below share."""

    def __init__(
        self,
        sources: Sources,
        validation: Sources | None,
        test: Sources | None,
        predict: Sources | None,
        val_fraction: float,
        seed: int,
        settings: dict[str, str | None],
    ) -> None:
        if not 0 < val_fraction < 1:
            raise UserError(
                f"val_fraction={val_fraction} is not a share; use a number between 0 and 1, such as 0.1."
            )
        if not sources:
            raise UserError(
                "`sources` is empty; name a data set, for example sources: [{path: data/train.jsonl}]."
            )
        given: dict[str, Sources | None] = {
            "train": sources,
            "val": validation,
            "test": test,
            "predict": predict,
        }
        self.by_split = {
            k: None if v is None else self._complete(v, settings) for k, v in given.items()
        }
        self.val_fraction, self.seed = val_fraction, seed

    @staticmethod
    def _complete(given: Sources, settings: dict[str, str | None]) -> list[Source]:
        listed = [Source(given)] if isinstance(given, str) else given
        unset: list[dict[str, Any]] = [
            {k: v for k, v in settings.items() if getattr(source, k) is None} for source in listed
        ]
        return [replace(source, **found) for source, found in zip(listed, unset, strict=True)]

    def parts(
        self, split: Split, read: Callable[["Dataset", Source], list[Row]]
    ) -> list[list[Row]] | None:
        """Rows of a split, source by source; None where the validation rows serve."""
        train = self.by_split["train"]
        assert train is not None
        if split == "train":
            cut = [self._cut(s, read) for s in train]
            return [
                repeated(rows, s.weight, self.seed, k)
                for k, ((rows, _), s) in enumerate(zip(cut, train, strict=True))
            ]
        own = self.by_split[split]
        if own is not None:
            name = {"val": "validation", "test": "test", "predict": "test"}[split]
            # A folder or a Hub name that serves as this split may hold it under its own name, or only as "train".
            loaded = [(s, load(s, name) or load(s, "validation") or load(s, "train")) for s in own]
            return [read(data, s) for s, data in loaded if data is not None]
        if split == "val":
            return [self._cut(s, read)[1] for s in train]
        return None

    def _cut(
        self, source: Source, read: Callable[["Dataset", Source], list[Row]]
    ) -> tuple[list[Row], list[Row]]:
        """Training and validation rows of a training source: its own validation split, or a seeded share of its rows."""
        data = load(source, "train")
        assert data is not None
        rows = read(data, source)
        if self.by_split["val"] is not None:
            return rows, []
        own = (
            load(source, "validation")
            if source.split is None and not self._is_file(source)
            else None
        )
        if own is not None:
            return rows, read(own, source)
        held = max(1, round(self.val_fraction * len(rows)))
        if held >= len(rows):
            raise UserError(
                f"{source.path!r} has {len(rows)} row(s), too few to hold {held} back for validation; set `validation`."
            )
        chosen = set(rng("validation", self.seed).sample(range(len(rows)), held))
        return [r for i, r in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]

    @staticmethod
    def _is_file(source: Source) -> bool:
        return is_local(source.path) and not Path(source.path).expanduser().is_dir()


class CausalLMData(CompletionTask):
    """Prompts and completions from files or the Hub, for causal language models.

    ```yaml
    data:
      class_path: CausalLMData
      init_args: {sources: data/gsm8k, max_length: 256}        # a folder with train.jsonl and validation.jsonl
    ```
    A row needs `prompt` and `completion`, or `choices` and `label` (the completion is then the right choice), or `messages`
    (a list of {role, content}). A completion begins with its own space and has no end token; both hold for the columns as well.

    Args:
        sources: what to train on: a path, or a list of `Source`, mixed by weight.
        validation: what to validate on; None takes the validation split of every training source, or, where it has none,
            `val_fraction` of its rows, chosen by the seed, which are then not trained on. `weight` has no meaning here.
        test: what `test` reads; None takes the validation rows.
        predict: what `predict` reads, needing prompts only; None takes the validation rows.
        val_fraction: share of the rows, between 0 and 1.
        prompt, completion, answer, choices, label, messages: fields for every source that does not set its own.
        kwargs: those of `CompletionTask`.

    Raises:
        FileNotFoundError: in `setup`, if there is no such file, folder or data set.
        ValueError: in `setup`, if a column is missing, or a label is none of the choices.
    """

    def __init__(
        self,
        sources: Sources,
        validation: Sources | None = None,
        test: Sources | None = None,
        predict: Sources | None = None,
        val_fraction: float = 0.1,
        prompt: str | None = None,
        completion: str | None = None,
        answer: str | None = None,
        choices: str | None = None,
        label: str | None = None,
        messages: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        settings = {"prompt": prompt, "completion": completion, "answer": answer}
        settings |= {"choices": choices, "label": label, "messages": messages}
        self._sources = _Sources(
            sources, validation, test, predict, val_fraction, self.seed, settings
        )

    def rows(self, split: Split) -> list[Row] | None:
        def read(data: "Dataset", source: Source) -> list[Row]:
            return completion_rows(data, source, complete=split != "predict")

        parts = self._sources.parts(split, read)
        return None if parts is None else [row for part in parts for row in part]


def completion_rows(data: "Dataset", source: Source, *, complete: bool = True) -> list[Row]:
    """Rows with prompt and completion (or messages), and what else the source has; `complete` False asks for a prompt only.

    Raises:
        ValueError: if a field is missing, or a label is none of the row's choices.
    """

    def has(field: str) -> bool:
        return getattr(source, field) is not None or field in data.column_names

    chosen = has("choices") and has("label")
    if has("messages") and source.prompt is None:
        required: tuple[str, ...] = ("messages",)
    else:
        required = ("prompt", "completion") if complete and not chosen else ("prompt",)
    rows = mapped(data, source, COMPLETION_FIELDS, required)
    for k, row in enumerate(rows):
        for field in ("prompt", "completion", "answer"):
            if field in row:
                row[field] = str(row[field])
        if "messages" in row and "prompt" in required:
            del row["messages"]
        if "choices" in row and "label" in row:
            row["choices"] = [str(c) for c in row["choices"]]
            row["label"] = choice_index(row["label"], row["choices"], f"Row {k} of {source.path!r}")
            row.setdefault("completion", " " + row["choices"][row["label"]])
        else:
            row.pop("choices", None), row.pop("label", None)
    return rows


def choice_index(label: Any, choices: list[str], where: str) -> int:
    """Index of the right choice from an index, a letter (A is the first), or the choice's text.

    Raises:
        ValueError: if the label is none of these.
    """
    if isinstance(label, str):
        if label in choices:
            return choices.index(label)
        label = (
            ord(label) - ord("A")
            if len(label) == 1 and label.isupper() and label.isascii()
            else label
        )
    if isinstance(label, int) and 0 <= label < len(choices):
        return label
    raise UserError(
        f"{where}: label {label!r} is none of its {len(choices)} choices; use 0 to {len(choices) - 1}, a letter or the text."
    )


class ClassificationData(LabelTask):
    """Texts, or pairs of texts, and their classes or scores, from files or the Hub.

    ```yaml
    data:
      class_path: ClassificationData
      init_args: {sources: data/trec}        # a folder with train.jsonl, validation.jsonl and labels.json
    ```
    A row needs `text` and `label`, and may have `text_pair`. Labels are names or indices of classes. The names of the
    classes are `classes`; or those in the `labels.json` (a list) beside the file; or those that the data set declares; or else the
    sorted different labels of the training rows.

    Sources with pairs and sources without are not mixed unasked, because a column of another name looks just the same: a source
    of single texts among pairs says so by `text_pair: ""`. A pair that is null or empty in a row makes a single text of it.

    Args:
        sources: what to train on: a path, or a list of `Source`, mixed by weight.
        validation, test, predict, val_fraction: as in `CausalLMData`; prediction needs no label.
        classes: names of the classes in the order of their indices.
        regression: labels are numbers to predict, such as 3.8, and not classes.
        text, text_pair, label: fields for every source that does not set its own.
        kwargs: those of `TaskData`.

    Raises:
        FileNotFoundError: in `setup`, if there is no such file, folder or data set.
        ValueError: in `setup`, if a column is missing, some sources have pairs and some have not, sources name different classes,
            or a label is none of them, or, for a regression, no number; at once, if a regression has `classes`.
    """

    def __init__(
        self,
        sources: Sources,
        validation: Sources | None = None,
        test: Sources | None = None,
        predict: Sources | None = None,
        val_fraction: float = 0.1,
        classes: list[str] | None = None,
        regression: bool = False,
        text: str | None = None,
        text_pair: str | None = None,
        label: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if regression and classes is not None:
            raise UserError(
                f"`regression` predicts a number, so there are no `classes` {classes}; remove one of the two."
            )
        self.regression = regression
        settings = {"text": text, "text_pair": text_pair, "label": label}
        self._sources = _Sources(
            sources, validation, test, predict, val_fraction, self.seed, settings
        )
        self._classes = classes
        self._derived: dict[Any, int] | None = (
            None  # label -> index, where the labels themselves are the names
        )

    @property
    def class_names(self) -> list[str] | None:
        return self._classes

    @property
    def num_classes(self) -> int | None:
        """Number of classes, known after `setup`; 1 for a regression."""
        return 1 if self.regression else super().num_classes

    def setup(self, stage: str | None = None) -> None:
        self._find_classes()
        super().setup(stage)

    def rows(self, split: Split) -> list[Row] | None:
        self._find_classes()
        paired: dict[bool, str] = {}  # whether rows have pairs -> a source where it is so

        def read(data: "Dataset", source: Source) -> list[Row]:
            rows = label_rows(data, source, labelled=split != "predict", regression=self.regression)
            for k, row in enumerate(rows):
                paired.setdefault("text_pair" in row, source.path)
                if split != "predict" and not self.regression:
                    row["label"] = self._index(row["label"], f"Row {k} of {source.path!r}")
            if len(paired) > 1:
                raise UserError(
                    f"{paired[True]!r} has pairs of texts, and {paired[False]!r} has no column for `text_pair`: name its column, "
                    f'or set `text_pair: ""` for that source if its texts stand alone.'
                )
            return rows

        parts = self._sources.parts(split, read)
        return None if parts is None else [row for part in parts for row in part]

    def _index(self, label: Any, where: str) -> int:
        names = self._classes
        assert names is not None
        if self._derived is not None:
            if label in self._derived:
                return self._derived[label]
        elif label in names:
            return names.index(label)
        elif isinstance(label, int) and 0 <= label < len(names):
            return int(label)
        shown = names if len(names) <= 20 else [*names[:20], "..."]
        hint = closest(label, names) if isinstance(label, str) else "."
        raise UserError(
            f"{where}: label {label!r} is none of the {len(names)} classes {shown}{hint}"
        )

    def _find_classes(self) -> None:
        if self.regression or self._classes is not None:
            return
        sources = self._sources.by_split["train"]
        assert sources is not None
        declared = {s.path: names for s in sources if (names := declared_classes(s)) is not None}
        if len({tuple(names) for names in declared.values()}) > 1:
            raise UserError(
                f"The sources name different classes: {declared}; give all of them in `classes`."
            )
        if declared:
            self._classes = next(iter(declared.values()))
            return
        parts = (
            self._sources.parts(
                "train", lambda data, source: label_rows(data, source, labelled=True)
            )
            or []
        )
        found = {row["label"] for part in parts for row in part}
        if any(isinstance(label, str) for label in found) and not all(
            isinstance(label, str) for label in found
        ):
            raise UserError(
                f"Some labels are names and some are numbers ({sorted(map(str, found))}); use one kind."
            )
        self._derived = {label: i for i, label in enumerate(sorted(found))}
        self._classes = [str(label) for label in self._derived]


def declared_classes(source: Source) -> list[str] | None:
    """Names of the classes from labels.json beside the files, or from the data set's own label type; None without either."""
    from datasets.features import ClassLabel

    if is_local(source.path):
        where = Path(source.path).expanduser()
        files = [where / "-"] if where.is_dir() else local_files(source.path, "train")
        beside = files[0].parent / LABELS_FILE
        if beside.is_file():
            names = json.loads(beside.read_text(encoding="utf-8"))
            if not isinstance(names, list):
                raise UserError(
                    f"{str(beside)!r} holds a {type(names).__name__}; write a list of names in the order of the labels."
                )
            return [str(name) for name in names]
    data = load(source, "train")
    feature = None if data is None else data.features.get((source.label or "label").strip("{}"))
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def label_rows(
    data: "Dataset", source: Source, *, labelled: bool, regression: bool = False
) -> list[Row]:
    """Rows with text, text_pair ("" where it is null) if the source has one, and, if `labelled`, the label as it stands in the data.

    Raises:
        ValueError: if a field is missing, or a label is neither a name nor a whole number; for a regression: if it is no number.
    """
    pairs = source.text_pair is not None or "text_pair" in data.column_names
    fields = LABEL_FIELDS if labelled else tuple(f for f in LABEL_FIELDS if f != "label")
    rows = mapped(data, source, fields, ("text", "label") if labelled else ("text",))
    for k, row in enumerate(rows):
        row |= {field: str(row[field]) for field in ("text", "text_pair") if field in row}
        if pairs:
            row.setdefault("text_pair", "")
        where = f"Row {k} of {source.path!r}"
        if regression and labelled:
            row["label"] = number(row["label"], where)
        elif isinstance(label := row.get("label"), bool | float):
            if not math.isfinite(label) or label != int(label):
                raise UserError(
                    f"{where}: label {label!r} is no class; use whole numbers or names, or `regression: true` to predict numbers."
                )
            row["label"] = int(label)
    return rows


def number(label: Any, where: str) -> float:
    """Read a label of a regression; a text that spells a number is one, as a file may hold nothing but texts.

    Raises:
        ValueError: if it is no finite number.
    """
    try:
        if not isinstance(label, bool) and math.isfinite(value := float(label)):
            return value
    except (TypeError, ValueError):
        pass
    raise UserError(
        f"{where}: label {label!r} is no number, and `regression` predicts one; leave `regression` out for classes."
    )
