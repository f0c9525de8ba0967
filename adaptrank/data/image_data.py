"""Images and their classes or scores, from folders, tables, arrays or the Hub."""

import os
from pathlib import Path
from typing import Any

from adaptrank._errors import UserError
from adaptrank.data.columns import read_fields
from adaptrank.data.image_sources import find_image, load_images
from adaptrank.data.image_task import ImageTask
from adaptrank.data.label_form import LabelForm
from adaptrank.data.labelled_data import SINGLE_LABEL
from adaptrank.data.labelled_sources import LabelledSources
from adaptrank.data.mixing import SourceMix
from adaptrank.data.sources import Source, Sources
from adaptrank.data.tables import Table
from adaptrank.data.task import Row, Split


class ImageData(ImageTask, LabelledSources):
    """Images and their classes or scores, from folders, tables, arrays or the Hub.

    ```yaml
    data:
      class_path: ImageData
      init_args: {sources: data/flowers}  # a folder: daisy/1.jpg, rose/2.jpg, ...
    ```
    A source is one of

    - a folder whose folders are named after the classes. It may hold folders of that form that are
      named after splits, such as Training and Testing.
    - a folder with a `metadata.csv` or `metadata.jsonl`, whose column `file_name` names the images.
    - a table (.csv, .jsonl, .parquet, ...) with a column of paths. A path begins in the folder of
      the table, or in the working directory.
    - an .npz file with an array of images (images, height, width[, channels]) and one of labels.
    - a folder that `save_to_disk` of `datasets` wrote, or a data set on the Hub, with a column of
      images.
    - for prediction also a folder of images, or one image.

    Images are decoded when they are read, turned as their EXIF orientation says, converted to RGB,
    and prepared by the model's own image processor. Labels are as in `ClassificationData`.

    Args:
        sources: what to train on: a path, or a list of `Source`, mixed by weight.
        validation, test, predict, val_fraction: as in `ClassificationData`. Prediction needs no
            label.
        classes, regression, multi_label, labels, separator: as in `ClassificationData`.
        stratify: hold back the same share of each class for validation. By default it does so for
            classes.
        image: column, or array, of the images, for every source that does not set its own.
        label: column, or array, of the labels, for every source that does not set its own.
        kwargs: those of `ImageTask`.

    Raises:
        FileNotFoundError: in `setup`, if there is no such file, folder or data set.
        UserError: in `setup`, if an image of a table does not exist, or a label is none of the
            classes. While reading, if an image cannot be decoded.
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
        stratify: bool | None = None,
        image: str | None = None,
        label: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        is_stratified = not regression if stratify is None else stratify
        self.form = LabelForm(regression, multi_label, labels, separator, classes, is_stratified)
        self._sources = SourceMix(
            sources,
            validation,
            test,
            predict,
            val_fraction,
            self.seed,
            {"image": image, "label": label},
            self.form.groups if is_stratified else None,
            load_images,
        )
        self.check_examples_per_class(self.problem == SINGLE_LABEL)

    def rows(self, split: Split) -> list[Row] | None:
        is_labelled = split != "predict"
        if is_labelled:
            self.find_classes()

        def read(table: Table, source: Source) -> list[Row]:
            rows = self.read_rows(table, source, is_labelled)
            if is_labelled:
                self.form.number(rows, table, source)
            for k, row in enumerate(rows):
                row["where"] = f"Row {k} of {source.path!r}"
                _locate(row, source)
            return rows

        return self._sources.rows(split, read)

    def read_rows(self, table: Table, source: Source, is_labelled: bool) -> list[Row]:
        """Return rows with image, and with parsed labels."""
        fields = ("image", *self.form.fields) if is_labelled else ("image",)
        if is_labelled and "label" in fields and table.column_names == ["image"]:
            raise UserError(
                f"{source.path!r} holds images without a class. Put them into a folder for each "
                "class, or write a metadata.csv with the columns file_name and label."
            )
        rows = read_fields(table, source, fields, fields)
        if is_labelled:
            self.form.parse(rows, table, source)
        return rows


def _locate(row: Row, source: Source) -> None:
    """Set the path of a row's image to the file that it means.

    Raises:
        UserError: if there is no such file.
    """
    path = row["image"]
    if not isinstance(path, str):
        return
    if not os.path.isfile(path):
        place = Path(source.path).expanduser()
        path = find_image(path, place if place.is_dir() else place.parent)
    if not os.path.isfile(path):
        raise UserError(
            f"{row['where']}: there is no image file {row['image']!r}. Paths begin in the folder "
            "of their table, or in the working directory."
        )
    row["image"] = path
