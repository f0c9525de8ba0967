"""Labelled rows of sources, whose classes are found in the rows."""

from functools import partial

from adaptrank.data.label_form import LabelForm
from adaptrank.data.labelled_data import LabelledData
from adaptrank.data.mixing import SourceMix
from adaptrank.data.sources import Source
from adaptrank.data.tables import Table
from adaptrank.data.task import Row


class LabelledSources(LabelledData):
    """Labelled data from sources: the part that texts and images share.

    A subclass sets `form` and `_sources` in its constructor, and implements `read_rows`.
    """

    form: LabelForm
    """Form of the labels, and the names of the classes as soon as they are found."""
    _sources: SourceMix

    @property
    def problem(self) -> str:
        return self.form.problem

    @property
    def class_names(self) -> list[str] | None:
        return self.form.names

    @property
    def num_classes(self) -> int | None:
        """Number of classes, known after `setup`. It is 1 for a regression with one number."""
        return self.form.size

    def setup(self, stage: str | None = None) -> None:
        if self.needs_classes(stage):
            self.find_classes()
        super().setup(stage)

    def find_classes(self) -> None:
        """Find the names of the classes, unless they are known."""
        self.form.find_names(self._sources, partial(self.read_rows, is_labelled=True))

    def read_rows(self, table: Table, source: Source, is_labelled: bool) -> list[Row]:
        """Return the rows of a table, with parsed labels if `is_labelled`."""
        raise NotImplementedError
