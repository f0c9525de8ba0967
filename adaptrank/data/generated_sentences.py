"""Sentences made by rules, without a download, whose names, places and numbers are to be tagged.

Validation shares no template with training, and no name and no place that fills one.
"""

import random
from typing import Any

from adaptrank.data.arithmetic_problems import draw_distinct
from adaptrank.data.seeding import seeded_random
from adaptrank.data.task import Row, Split, check_size
from adaptrank.data.token_task import TokenTask

KINDS = ("PER", "LOC", "NUM")
"""Kinds of entities: people, places, numbers."""

TAGS = ["O", *(f"{begins}-{kind}" for kind in KINDS for begins in "BI")]
"""Names of the classes, in the order of their indices."""

TRAIN_SENTENCES = (
    "{PER} was born in {LOC} .",
    "{PER} moved from {LOC} to {LOC} with {NUM} children .",
    "The train to {LOC} leaves at {NUM} .",
    "{PER} and {PER} met in {LOC} .",
    "About {NUM} people live in {LOC} today .",
    "In {LOC} , {PER} opened {NUM} shops .",
    "{PER} bought {NUM} tickets and flew to {LOC} .",
    "After {NUM} years {PER} came home .",
    "The mayor of {LOC} thanked {PER} .",
    "{NUM} of the guests had never heard of {PER} .",
    "It rained in {LOC} for {NUM} days .",
    "My neighbour {PER} sells {NUM} kinds of bread .",
)
"""Templates of training sentences. A gap holds an entity, and words stand between spaces."""

VALIDATION_SENTENCES = (
    "Yesterday {PER} travelled through {LOC} .",
    "The road between {LOC} and {LOC} is {NUM} miles long .",
    "Doctor {PER} treated {NUM} patients in one night .",
    "Nobody in {LOC} believed what {PER} wrote .",
    "Exactly {NUM} letters reached {PER} last week .",
    "{LOC} lies north of {LOC} .",
    "Her teacher , {PER} , grew up near {LOC} .",
    "The team of {PER} lost by {NUM} points .",
)
"""Templates of validation sentences."""

TRAIN_WORDS: dict[str, tuple[str, ...]] = {
    "first": ("Anna", "David", "Maria", "Peter", "Susan", "Thomas", "Laura", "James", "Nina"),
    "last": ("Miller", "Brown", "Wilson", "Garcia", "Novak", "Schmidt", "Rossi", "Clark"),
    "LOC": (
        "London",
        "Berlin",
        "New York",
        "Spain",
        "South Africa",
        "Tokyo",
        "Chicago",
        "Costa Rica",
        "Rio de Janeiro",
        "Egypt",
    ),
}
"""Words that fill gaps in training."""

VALIDATION_WORDS: dict[str, tuple[str, ...]] = {
    "first": ("Emma", "Robert", "Julia", "Henry", "Carol", "Victor", "Alice", "George"),
    "last": ("Taylor", "Jackson", "Fischer", "Lopez", "Kowalski", "Bianchi", "Walker"),
    "LOC": (
        "Paris",
        "Madrid",
        "San Francisco",
        "Norway",
        "New Zealand",
        "Moscow",
        "Boston",
        "Sri Lanka",
        "Buenos Aires",
        "Kenya",
    ),
}
"""Words that fill gaps in validation."""

TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
UNITS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")


class GeneratedSentences(TokenTask):
    """Sentences, whose people, places and numbers are to be tagged (BIO).

    The classes are O, B-PER, I-PER, B-LOC, I-LOC, B-NUM and I-NUM. A row has `tokens` and `tags`.
    An entity has one to three words. Training and validation share neither templates nor names, so
    that a list of known names does not help. The test rows are the validation rows. No sentence
    occurs twice.

    Args:
        train_size: number of training sentences.
        val_size: number of validation sentences.
        max_length: as in `TaskData`. 48 pieces hold every sentence.
        kwargs: those of `TokenTask`.

    Raises:
        UserError: if a size is not positive, or more than there are different sentences.
    """

    def __init__(
        self, train_size: int = 200, val_size: int = 100, *, max_length: int = 48, **kwargs: Any
    ) -> None:
        super().__init__(max_length=max_length, **kwargs)
        check_size("train_size", train_size, 1, "leaves no sentence")
        check_size("val_size", val_size, 1, "leaves no sentence")
        self.train_size = train_size
        self.val_size = val_size

    @property
    def class_names(self) -> list[str]:
        return list(TAGS)

    def rows(self, split: Split) -> list[Row] | None:
        if split == "train":
            return self._draw(split, TRAIN_SENTENCES, TRAIN_WORDS, self.train_size)
        if split == "val":
            return self._draw(split, VALIDATION_SENTENCES, VALIDATION_WORDS, self.val_size)
        return None

    def _draw(
        self,
        split: Split,
        templates: tuple[str, ...],
        words: dict[str, tuple[str, ...]],
        size: int,
    ) -> list[Row]:
        generator = seeded_random("sentences", split, self.seed)

        def draw_row() -> Row:
            return make_row(generator.choice(templates), words, generator)

        return draw_distinct(draw_row, "text", size, f"{split}_size")


def make_row(template: str, words: dict[str, tuple[str, ...]], generator: random.Random) -> Row:
    """Return the row of a template with drawn entities: `tokens`, `tags` and the whole `text`."""
    tokens: list[str] = []
    tags: list[int] = []
    for part in template.split():
        if not part.startswith("{"):
            tokens.append(part)
            tags.append(TAGS.index("O"))
            continue
        kind = part.strip("{}")
        entity = _draw_entity(kind, words, generator).split()
        tokens += entity
        tags.append(TAGS.index(f"B-{kind}"))
        tags += [TAGS.index(f"I-{kind}")] * (len(entity) - 1)
    return {"tokens": tokens, "tags": tags, "text": " ".join(tokens)}


def _draw_entity(kind: str, words: dict[str, tuple[str, ...]], generator: random.Random) -> str:
    """Return the words of an entity, with spaces between them."""
    if kind == "LOC":
        return generator.choice(words["LOC"])
    if kind == "PER":
        first = generator.choice(words["first"])
        has_last = generator.random() < 0.7
        return f"{first} {generator.choice(words['last'])}" if has_last else first
    forms = (
        str(generator.randrange(2, 1000)),
        generator.choice(UNITS),
        f"{generator.choice(TENS)} {generator.choice(UNITS)}",
        f"{generator.choice(UNITS)} hundred",
    )
    return generator.choice(forms)
