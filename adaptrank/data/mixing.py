"""Mix the rows of several sources, and choose the rows that validate."""

import logging
import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptrank._errors import UserError, some
from adaptrank.data.files import load_split
from adaptrank.data.locations import is_file
from adaptrank.data.seeding import seeded_random
from adaptrank.data.sources import Source, Sources
from adaptrank.data.split_names import quoted
from adaptrank.data.stratify import stratified_sample
from adaptrank.data.tables import Table
from adaptrank.data.task import Row, Split

log = logging.getLogger(__name__)

ReadRows = Callable[[Table, Source], list[Row]]
"""Function (table, its source) -> rows of fields."""

LoadSplit = Callable[[Source, str], Table | None]
"""Function (source, name of a split) -> its table, or None if the source has no such split."""

GroupRows = Callable[[list[Row]], Sequence[Hashable]]
"""Function rows -> the group of each, such as its class."""


class SourceMix:
    """The splits of one or more sources.

    Args:
        sources: what to train on.
        validation: what to validate on, or None for a validation split or a share of the rows. A
            number such as 0.1 is that share.
        test: what to test on, or None for the validation rows.
        predict: what to predict, or None for the validation rows.
        val_fraction: share of the training rows that validate where there is nothing else.
        seed: seed of the shares and of fractional weights.
        settings: field -> template, and other settings, for every source without its own.
        group: function by whose groups rows are held back for validation in proportion, or None to
            draw them from all rows alike.
        load: function that loads a split of a source.

    Raises:
        UserError: if val_fraction is no share, a weight is not positive, or there is no source.
    """

    def __init__(
        self,
        sources: Sources,
        validation: Sources | float | None,
        test: Sources | None,
        predict: Sources | None,
        val_fraction: float,
        seed: int,
        settings: dict[str, Any],
        group: GroupRows | None = None,
        load: LoadSplit = load_split,
    ) -> None:
        validation, val_fraction = _sources_or_share(validation, val_fraction)
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
        self.group = group
        self.load = load
        # Messages that were logged. The rows of a source are shared out twice.
        self._said: set[str] = set()

    def all_sources(self) -> list[Source]:
        """Return the sources of all splits."""
        return [source for sources in self.by_split.values() for source in sources or []]

    def rows(self, split: Split, read: ReadRows) -> list[Row] | None:
        """Return the rows of a split, or None if the validation rows serve."""
        sources = self.by_split[split]
        if split == "train":
            return self._training_rows(read)
        if sources is not None:
            return self._rows_of_split(sources, split, read)
        if split == "val":
            held_back = [self._train_and_validation(source, read)[1] for source in self.training]
            return _concatenate(held_back)
        return None

    def _rows_of_split(self, sources: list[Source], split: Split, read: ReadRows) -> list[Row]:
        """Return the rows of sources that were given for a split other than "train"."""
        name = {"val": "validation", "test": "test", "predict": "test"}[split]
        loaded = []
        for source in sources:
            # A folder or a Hub name may hold the split under its own name, or only as "train".
            for serving in dict.fromkeys((name, "validation", "train")):
                data = self._load(source, serving)
                if data is None:
                    continue
                if serving != name and data.origin.names:
                    key = "validation" if split == "val" else split
                    self._tell_once(
                        f"`{key}` reads {quoted(data.origin.names)} of {source.path!r}, which has "
                        f"no {name} split."
                    )
                loaded.append((data, source))
                break
        return _concatenate([read(data, source) for data, source in loaded])

    def _load(self, source: Source, split: str) -> Table | None:
        """Load a split of a source. Say once which data of a folder are not read, or are a rest."""
        table = self.load(source, split)
        if table is None or source.split is not None:
            return table
        origin = table.origin
        if origin.unread:
            self._tell_once(
                f"{source.path!r} holds data that no split is named after, which are not read: "
                f"{quoted(origin.unread)}."
            )
        if origin.is_rest:
            self._tell_once(
                f"No data of {source.path!r} are named after the train split. Those that are named "
                f"after no split are trained on: {quoted(origin.names)}.",
                logging.INFO,
            )
        return table

    def _tell_once(self, message: str, level: int = logging.WARNING) -> None:
        """Log a message, unless it was logged before."""
        if message not in self._said:
            self._said.add(message)
            log.log(level, "%s", message)

    def rows_of_classes(self, read: ReadRows) -> list[Row]:
        """Return the rows by which classes are found: all that train.

        Where rows are held back by their classes, these have to be known before. Then they are
        those of all rows.
        """
        if self.group is None:
            return self.rows("train", read) or []
        tables = [(self._load(source, "train"), source) for source in self.training]
        return _concatenate([read(table, source) for table, source in tables if table is not None])

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
        data = self._load(source, "train")
        assert data is not None
        rows = read(data, source)
        if self.by_split["val"] is not None:
            return rows, []
        if source.split is None and not is_file(source.path):
            validation = self._load(source, "validation")
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
        if self.group is None:
            drawn = seeded_random("validation", self.seed).sample(range(len(rows)), count)
        else:
            drawn = self._draw_stratified(rows, self.group, count, source)
        held_back = set(drawn)
        train = [row for i, row in enumerate(rows) if i not in held_back]
        return train, [rows[i] for i in sorted(held_back)]

    def _draw_stratified(
        self, rows: list[Row], group: GroupRows, count: int, source: Source
    ) -> list[int]:
        """Draw the rows that validate, from each class in proportion. Say which have none."""
        groups = group(rows)
        drawn = stratified_sample(groups, count, self.seed)
        if not drawn:
            raise UserError(
                f"No row of {source.path!r} can be held back for validation: each class has one "
                "row alone. Set `validation`, or `stratify: false`."
            )
        known = {groups[index] for index in drawn}
        missing = [str(name) for name in dict.fromkeys(groups) if name not in known]
        if missing:
            message = (
                f"{len(missing)} of {len(set(groups))} classes of {source.path!r} have too few "
                f"rows for one to validate, and stay in training: {some(missing, 5)}."
            )
            self._tell_once(message)
        return drawn


def _sources_or_share(
    validation: Sources | float | None, val_fraction: float
) -> tuple[Sources | None, float]:
    """Return the validation sources, and the share of the rows that validate without any.

    A number such as 0.1 in place of sources is that share. So is its text, unless there is a file
    of that name.

    Raises:
        UserError: if the share is not between 0 and 1.
    """
    name, share = "val_fraction", val_fraction
    if isinstance(validation, str) and not Path(validation).exists():
        with suppress(ValueError):
            validation = float(validation)
    if isinstance(validation, int | float):
        name, share, validation = "validation", validation, None
    if not 0 < share < 1:
        raise UserError(
            f"{name}={share} is not a share. Use a number between 0 and 1, such as 0.1."
        )
    return validation, share


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
