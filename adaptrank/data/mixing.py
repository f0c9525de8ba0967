"""Mix the rows of several sources, and choose the rows that validate."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from adaptrank._errors import UserError
from adaptrank.data.files import load_split
from adaptrank.data.locations import is_file
from adaptrank.data.seeding import seeded_random
from adaptrank.data.sources import Source, Sources
from adaptrank.data.tables import Table
from adaptrank.data.task import Row, Split

ReadRows = Callable[[Table, Source], list[Row]]
"""Function (table, its source) -> rows of fields."""


class SourceMix:
    """The splits of one or more sources.

    Args:
        sources: what to train on.
        validation: what to validate on, or None for a validation split or a share of the rows.
        test: what to test on, or None for the validation rows.
        predict: what to predict, or None for the validation rows.
        val_fraction: share of the training rows that validate where there is nothing else.
        seed: seed of the shares and of fractional weights.
        settings: field -> template, and other settings, for every source without its own.

    Raises:
        UserError: if val_fraction is no share, a weight is not positive, or there is no source.
    """

    def __init__(
        self,
        sources: Sources,
        validation: Sources | None,
        test: Sources | None,
        predict: Sources | None,
        val_fraction: float,
        seed: int,
        settings: dict[str, Any],
    ) -> None:
        if not 0 < val_fraction < 1:
            raise UserError(
                f"val_fraction={val_fraction} is not a share. Use a number between 0 and 1, such "
                "as 0.1."
            )
        if not sources:
            raise UserError(
                "`sources` is empty. Name a data set, for example "
                "sources: [{path: data/train.jsonl}]."
            )
        self.training = _complete(sources, settings)
        self.by_split: dict[Split, list[Source] | None] = {"train": self.training}
        others: dict[Split, Sources | None] = {"val": validation, "test": test, "predict": predict}
        for split, given in others.items():
            self.by_split[split] = None if given is None else _complete(given, settings)
        self.val_fraction = val_fraction
        self.seed = seed

    def rows(self, split: Split, read: ReadRows) -> list[Row] | None:
        """Return the rows of a split, or None if the validation rows serve."""
        sources = self.by_split[split]
        if split == "train":
            return self._training_rows(read)
        if sources is not None:
            return _rows_of_split(sources, split, read)
        if split == "val":
            held_back = [self._train_and_validation(source, read)[1] for source in self.training]
            return _concatenate(held_back)
        return None

    def _training_rows(self, read: ReadRows) -> list[Row]:
        parts = [self._train_and_validation(source, read)[0] for source in self.training]
        weighted = [
            repeat_rows(rows, source.weight, self.seed, k)
            for k, (rows, source) in enumerate(zip(parts, self.training, strict=True))
        ]
        return _concatenate(weighted)

    def _train_and_validation(self, source: Source, read: ReadRows) -> tuple[list[Row], list[Row]]:
        """Return the training and the validation rows of a training source.

        The validation rows are its own validation split, or a seeded share of its rows.
        """
        data = load_split(source, "train")
        assert data is not None
        rows = read(data, source)
        if self.by_split["val"] is not None:
            return rows, []
        if source.split is None and not is_file(source.path):
            validation = load_split(source, "validation")
            if validation is not None:
                return rows, read(validation, source)
        return self._hold_back(rows, source)

    def _hold_back(self, rows: list[Row], source: Source) -> tuple[list[Row], list[Row]]:
        """Share rows out between training and validation, by the seed."""
        count = max(1, round(self.val_fraction * len(rows)))
        if count >= len(rows):
            raise UserError(
                f"{source.path!r} has {len(rows)} row(s), too few to hold {count} back for "
                "validation. Set `validation`."
            )
        held_back = set(seeded_random("validation", self.seed).sample(range(len(rows)), count))
        train = [row for i, row in enumerate(rows) if i not in held_back]
        return train, [rows[i] for i in sorted(held_back)]


def _complete(given: Sources, settings: dict[str, Any]) -> list[Source]:
    """Fill in the fields that sources leave out. A path is a source."""
    sources = [Source(given)] if isinstance(given, str) else given
    completed = []
    for source in sources:
        unset: dict[str, Any] = {
            field: template
            for field, template in settings.items()
            if getattr(source, field) is None
        }
        _check_weight(source.weight)
        completed.append(replace(source, **unset))
    return completed


def _check_weight(weight: float) -> None:
    if not 0 < weight < math.inf:
        raise UserError(
            f"weight={weight} takes no row. Use a positive number, or remove the source."
        )


def _rows_of_split(sources: list[Source], split: Split, read: ReadRows) -> list[Row]:
    """Return the rows of sources that were given for a split other than "train"."""
    name = {"val": "validation", "test": "test", "predict": "test"}[split]
    loaded = []
    for source in sources:
        # A folder or a Hub name may hold the split under its own name, or only as "train".
        names = (name, "validation", "train")
        tables = (load_split(source, name) for name in names)
        data = next((table for table in tables if table is not None), None)
        if data is not None:
            loaded.append((data, source))
    return _concatenate([read(data, source) for data, source in loaded])


def _concatenate(parts: list[list[Row]]) -> list[Row]:
    rows: list[Row] = []
    for part in parts:
        rows += part
    return rows


def repeat_rows(rows: list[Row], weight: float, *key: object) -> list[Row]:
    """Take every row `weight` times. A fraction takes a seeded sample, in the order of the rows.

    Args:
        rows: the rows.
        weight: a positive number.
        key: key of the random generator.

    Raises:
        UserError: if the weight is not positive.
    """
    _check_weight(weight)
    whole = int(weight)
    rest = round((weight - whole) * len(rows))
    sample = seeded_random("weight", *key).sample(range(len(rows)), rest)
    return rows * whole + [rows[i] for i in sorted(sample)]
