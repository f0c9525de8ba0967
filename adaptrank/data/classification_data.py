"""Texts and their classes or scores, from files or the Hub."""

from typing import Any

from adaptrank.data.columns import read_fields
from adaptrank.data.label_form import LabelForm
from adaptrank.data.label_task import LabelTask
from adaptrank.data.labelled_data import REGRESSION, SINGLE_LABEL
from adaptrank.data.labelled_sources import LabelledSources
from adaptrank.data.mixing import SourceMix
from adaptrank.data.optional_fields import OptionalFields, has_field
from adaptrank.data.sources import Source, Sources
from adaptrank.data.tables import Table
from adaptrank.data.task import Row, Split


class ClassificationData(LabelTask, LabelledSources):
    """Texts, or pairs of texts, and their classes or scores, from files or the Hub.

    ```yaml
    data:
      class_path: ClassificationData
      init_args: {sources: data/trec}  # a folder: train.jsonl, validation.jsonl, labels.json
    ```
    A row needs `text` and `label`, and may have `text_pair`. Labels are names or indices of
    classes. The names of the classes are `classes`, or those in the `labels.json` (a list) beside
    the file, or those that the data set declares, or else the sorted different labels of the
    training rows. A label is the characters in the data, so that 01 and 1 are two classes. If it is
    none of the names, the characters of an integer are an index. Where a trained adapter goes on,
    its classes keep their numbers, by name.

    Sources with pairs and sources without are not mixed unasked, because a pair in a column of
    another name looks just like no pair. The same holds for splits, since a model that trained on
    pairs would be scored on single texts. A source of single texts among pairs says so by
    `text_pair: ""`. A pair that is null or empty in a row makes a single text of it.

    Args:
        sources: what to train on: a path, or a list of `Source`, mixed by weight.
        validation, test, predict, val_fraction: as in `CausalLMData`. Prediction needs no label.
        classes: names of the classes in the order of their indices.
        regression: labels are numbers to predict, such as 3.8, and not classes.
        multi_label: a row has any number of classes, as a list, or as a text with `separator`.
        labels: columns instead of `label`: one for each number of a regression, or with
            `multi_label` one for each class, of 0 and 1.
        separator: characters between the classes in the text of a `multi_label` label.
        stratify: hold back the same share of each class for validation.
        text, text_pair, label: fields for every source that does not set its own.
        null_is_empty: as in `CausalLMData`. A label is never null.
        kwargs: those of `TaskData`, and `examples_per_class`, as in `LabelledData`.

    Raises:
        FileNotFoundError: in `setup`, if there is no such file, folder or data set.
        UserError: if a regression has `classes`. In `setup`, if a column is missing, some sources
            or splits have pairs and some have not, sources name different classes, or a label is
            none of them, or no number for a regression.
    """

    def __init__(
        self,
        sources: Sources,
        validation: Sources | float | None = None,
        test: Sources | None = None,
        predict: Sources | None = None,
        val_fraction: float = 0.1,
        classes: list[str] | None = None,
        regression: bool = False,
        multi_label: bool = False,
        labels: list[str] | None = None,
        separator: str | None = None,
        stratify: bool = False,
        text: str | None = None,
        text_pair: str | None = None,
        label: str | None = None,
        null_is_empty: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.form = LabelForm(regression, multi_label, labels, separator, classes, stratify)
        settings = {
            "text": text,
            "text_pair": text_pair,
            "label": label,
            "null_is_empty": null_is_empty,
        }
        group = self.form.groups if stratify else None
        self._sources = SourceMix(
            sources, validation, test, predict, val_fraction, self.seed, settings, group
        )
        self._optional_fields = OptionalFields({"text_pair": "pairs of texts"})
        self.check_examples_per_class(self.problem == SINGLE_LABEL)

    @property
    def regression(self) -> bool:
        """Whether labels are numbers to predict."""
        return self.form.problem == REGRESSION

    def conventions(self) -> dict[str, Any]:
        return super().conventions() | self._optional_fields.conventions()

    def rows(self, split: Split) -> list[Row] | None:
        is_labelled = split != "predict"
        if is_labelled:
            self.find_classes()

        def read(table: Table, source: Source) -> list[Row]:
            rows = self.read_rows(table, source, is_labelled)
            if is_labelled:
                self.form.number(rows, table, source)
            return rows

        return self._sources.rows(split, read)

    def read_rows(self, table: Table, source: Source, is_labelled: bool) -> list[Row]:
        """Return rows with text, with text_pair if the source has pairs, and with parsed labels.

        A pair that is null is "".
        """
        self._optional_fields.check(table, source)
        has_pairs = has_field(table, source, "text_pair")
        labels = self.form.fields if is_labelled else ()
        fields, required = ("text", "text_pair", *labels), ("text", *labels)
        rows = read_fields(table, source, fields, required)
        if has_pairs:
            for row in rows:
                row.setdefault("text_pair", "")
        if is_labelled:
            self.form.parse(rows, table, source)
        return rows
