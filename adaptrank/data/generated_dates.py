"""Dates in words, made by rules, to be rewritten as numbers.

Validation shares no date with training.
"""

import datetime
from typing import Any

from adaptrank.data.arithmetic_problems import draw_distinct
from adaptrank.data.seeding import seeded_random
from adaptrank.data.seq2seq_task import Seq2SeqTask
from adaptrank.data.task import Row, Split, check_size

FORMS = (
    "{day} {month} {year}",
    "{month} {day}, {year}",
    "{short} {day} {year}",
    "the {ordinal} of {month} {year}",
)
"""Forms in which a date is written."""

MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
"""Names of the months. The language of the machine must not change them."""

FIRST_DAY = datetime.date(1900, 1, 1).toordinal()
LAST_DAY = datetime.date(2099, 12, 31).toordinal()
VALIDATION_EVERY = 5
"""Each fifth day is a date of validation, and the others are of training."""


class GeneratedDates(Seq2SeqTask):
    """Dates in words, such as "the 3rd of March 1987", to be rewritten as "1987-03-03".

    A row has `source` and `target`. The years are 1900 to 2099. A date of validation never occurs
    in training, and each of the four forms of a date occurs in both. The test rows are the
    validation rows.

    Args:
        train_size: number of training rows.
        val_size: number of validation rows.
        max_length: as in `TaskData`. 32 tokens hold every source, also as bytes.
        max_target_length: as in `Seq2SeqTask`. 16 tokens hold every target, also as bytes.
        kwargs: those of `Seq2SeqTask`.

    Raises:
        UserError: if a size is not positive, or more than there are different rows.
    """

    def __init__(
        self,
        train_size: int = 4000,
        val_size: int = 200,
        *,
        max_length: int = 32,
        max_target_length: int = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_length=max_length, max_target_length=max_target_length, **kwargs)
        check_size("train_size", train_size, 1, "leaves no date")
        check_size("val_size", val_size, 1, "leaves no date")
        self.train_size = train_size
        self.val_size = val_size

    def rows(self, split: Split) -> list[Row] | None:
        if split == "train":
            return self._draw(split, self.train_size)
        if split == "val":
            return self._draw(split, self.val_size)
        return None

    def _draw(self, split: Split, size: int) -> list[Row]:
        generator = seeded_random("dates", split, self.seed)
        is_validation = split == "val"
        days = [
            day
            for day in range(FIRST_DAY, LAST_DAY + 1)
            if (day % VALIDATION_EVERY == 0) is is_validation
        ]

        def draw_row() -> Row:
            date = datetime.date.fromordinal(generator.choice(days))
            return make_row(date, generator.choice(FORMS))

        return draw_distinct(draw_row, "source", size, f"{split}_size")


def make_row(date: datetime.date, form: str) -> Row:
    """Return the row of a date: `source` in words, and `target`, year-month-day in digits."""
    month = MONTHS[date.month - 1]
    source = form.format(
        day=date.day, ordinal=ordinal(date.day), month=month, short=month[:3], year=date.year
    )
    return {"source": source, "target": date.isoformat()}


def ordinal(day: int) -> str:
    """Return the ordinal number of a day of the month, such as "3rd"."""
    endings = {1: "st", 2: "nd", 3: "rd"}
    is_teen = 10 < day < 14
    return f"{day}{'th' if is_teen else endings.get(day % 10, 'th')}"
