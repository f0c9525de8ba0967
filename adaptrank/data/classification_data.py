"""Texts and their classes or scores, from files or the Hub."""

import math
from typing import TYPE_CHECKING, Any

from adaptrank._errors import UserError, did_you_mean
from adaptrank.data.columns import read_fields
from adaptrank.data.files import declared_classes
from adaptrank.data.label_task import LabelTask
from adaptrank.data.mixing import SourceMix
from adaptrank.data.sources import Source, Sources
from adaptrank.data.task import Row, Split

if TYPE_CHECKING:
    from datasets.arrow_dataset import Dataset

MOST_SHOWN = 20
"""Names of classes that an error lists."""


class ClassificationData(LabelTask):
    """Texts, or pairs of texts, and their classes or scores, from files or the Hub.

    ```yaml
    data:
      class_path: ClassificationData
      init_args: {sources: data/trec}  # a folder: train.jsonl, validation.jsonl, labels.json
    ```
    A row needs `text` and `label`, and may have `text_pair`. Labels are names or indices of
    classes. The names of the classes are `classes`, or those in the `labels.json` (a list) beside
    the file, or those that the data set declares, or else the sorted different labels of the
    training rows. Where a trained adapter goes on, its classes keep their numbers, by name.

    Sources with pairs and sources without are not mixed unasked, because a pair in a column of
    another name looks just like no pair. A source of single texts among pairs says so by
    `text_pair: ""`. A pair that is null or empty in a row makes a single text of it.

    Args:
        sources: what to train on: a path, or a list of `Source`, mixed by weight.
        validation, test, predict, val_fraction: as in `CausalLMData`. Prediction needs no label.
        classes: names of the classes in the order of their indices.
        regression: labels are numbers to predict, such as 3.8, and not classes.
        text, text_pair, label: fields for every source that does not set its own.
        kwargs: those of `TaskData`.

    Raises:
        FileNotFoundError: in `setup`, if there is no such file, folder or data set.
        UserError: if a regression has `classes`. In `setup`, if a column is missing, some sources
            have pairs and some have not, sources name different classes, or a label is none of
            them, or no number for a regression.
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
                f"`regression` predicts a number, so there are no `classes` {classes}. Remove "
                "one of the two."
            )
        self.regression = regression
        settings = {"text": text, "text_pair": text_pair, "label": label}
        self._sources = SourceMix(
            sources, validation, test, predict, val_fraction, self.seed, settings
        )
        self._classes = classes
        # Label -> index, where the labels of the rows themselves are the names.
        self._index_of_label: dict[Any, int] | None = None

    @property
    def class_names(self) -> list[str] | None:
        return self._classes

    @property
    def num_classes(self) -> int | None:
        """Number of classes, known after `setup`. It is 1 for a regression."""
        return 1 if self.regression else super().num_classes

    def setup(self, stage: str | None = None) -> None:
        module = getattr(self.trainer, "lightning_module", None)
        # A trained model knows its classes. Prediction then needs no look at the training rows.
        if stage != "predict" or getattr(module, "class_names", None) is None:
            self._find_classes()
        super().setup(stage)

    def rows(self, split: Split) -> list[Row] | None:
        is_labelled = split != "predict"
        if is_labelled:
            self._find_classes()
        # Whether rows have pairs -> path of the first source where that is so.
        path_by_pairs: dict[bool, str] = {}

        def read(data: "Dataset", source: Source) -> list[Row]:
            rows = label_rows(data, source, labelled=is_labelled, regression=self.regression)
            for k, row in enumerate(rows):
                path_by_pairs.setdefault("text_pair" in row, source.path)
                if is_labelled and not self.regression:
                    row["label"] = self._class_index(row["label"], f"Row {k} of {source.path!r}")
            _check_all_or_no_pairs(path_by_pairs)
            return rows

        return self._sources.rows(split, read)

    # ---- classes

    def _class_index(self, label: Any, where: str) -> int:
        """Return the index of a label, which is a name or an index."""
        names = self._classes
        assert names is not None
        if self._index_of_label is not None:
            if label in self._index_of_label:
                return self._index_of_label[label]
        elif label in names:
            return names.index(label)
        elif isinstance(label, int) and 0 <= label < len(names):
            return int(label)
        shown = names if len(names) <= MOST_SHOWN else [*names[:MOST_SHOWN], "..."]
        hint = did_you_mean(label, names) if isinstance(label, str) else ""
        raise UserError(
            f"{where}: label {label!r} is none of the {len(names)} classes {shown}.{hint}"
        )

    def _find_classes(self) -> None:
        """Find the names of the classes, unless they are known."""
        if self.regression or self._classes is not None:
            return
        declared = self._declared_classes()
        if declared is not None:
            self._classes = declared
            return
        self._index_of_label = {label: i for i, label in enumerate(self._labels_of_rows())}
        self._classes = [str(label) for label in self._index_of_label]

    def _declared_classes(self) -> list[str] | None:
        """Return the names that the training sources declare, or None if none does."""
        by_path: dict[str, list[str]] = {}
        for source in self._sources.training:
            names = declared_classes(source)
            if names is not None:
                by_path[source.path] = names
        declared = list(by_path.values())
        if not declared:
            return None
        if any(names != declared[0] for names in declared):
            raise UserError(
                f"The sources name different classes: {by_path}. Give all of them in `classes`."
            )
        return declared[0]

    def _labels_of_rows(self) -> list[Any]:
        """Return the different labels of the training rows, sorted."""

        def read(data: "Dataset", source: Source) -> list[Row]:
            return label_rows(data, source, labelled=True)

        labels = {row["label"] for row in self._sources.rows("train", read) or []}
        names = {label for label in labels if isinstance(label, str)}
        if names and names != labels:
            shown = sorted(str(label) for label in labels)
            raise UserError(f"Some labels are names and some are numbers ({shown}). Use one kind.")
        return sorted(labels)


def _check_all_or_no_pairs(path_by_pairs: dict[bool, str]) -> None:
    """Raise if some sources have pairs of texts and some have not."""
    if len(path_by_pairs) > 1:
        raise UserError(
            f"{path_by_pairs[True]!r} has pairs of texts, and {path_by_pairs[False]!r} has no "
            "column for `text_pair`. Name its column, or set "
            '`text_pair: ""` for that source if its texts stand alone.'
        )


def label_rows(
    data: "Dataset", source: Source, *, labelled: bool, regression: bool = False
) -> list[Row]:
    """Return rows with text, with text_pair if the source has pairs, and with label if asked for.

    A pair that is null is "".

    Args:
        data: the data set.
        source: the source, which says how to read fields.
        labelled: read the label, as it stands in the data.
        regression: the label is a number to predict.

    Raises:
        UserError: if a field is missing, or a label is neither a name nor a whole number, or for a
            regression no number.
    """
    has_pairs = source.text_pair is not None or "text_pair" in data.column_names
    if labelled:
        rows = read_fields(data, source, ("text", "text_pair", "label"), ("text", "label"))
    else:
        rows = read_fields(data, source, ("text", "text_pair"), ("text",))
    for k, row in enumerate(rows):
        row["text"] = str(row["text"])
        if has_pairs:
            row["text_pair"] = str(row.get("text_pair", ""))
        if labelled:
            where = f"Row {k} of {source.path!r}"
            parse = parse_number if regression else parse_class
            row["label"] = parse(row["label"], where)
    return rows


def parse_class(label: Any, where: str) -> Any:
    """Return a label that names a class. A float or a boolean becomes an integer.

    Raises:
        UserError: if the label is a number that is not whole.
    """
    if not isinstance(label, bool | float):
        return label
    if not math.isfinite(label) or label != int(label):
        raise UserError(
            f"{where}: label {label!r} is no class. Use whole numbers or names, or "
            "`regression: true` to predict numbers."
        )
    return int(label)


def parse_number(label: Any, where: str) -> float:
    """Return the label of a regression as a number. A text that spells a number is one.

    Raises:
        UserError: if the label is no finite number.
    """
    try:
        value = math.nan if isinstance(label, bool) else float(label)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(
            f"{where}: label {label!r} is no number, and `regression` predicts one. Leave "
            "`regression` out for classes."
        )
    return value
