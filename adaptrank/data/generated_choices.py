"""Questions with choices, made by rules, without a download: which word is of a kind?

Validation shares no word with training, so that it measures what the encoder knows.
"""

from typing import Any

from adaptrank.data.arithmetic_problems import draw_distinct
from adaptrank.data.choice_task import ChoiceTask
from adaptrank.data.seeding import seeded_random
from adaptrank.data.task import Row, Split, check_size

QUESTIONS = {"train": "Which of these is {kind}?", "val": "Name {kind}."}
"""Split -> template of its questions."""

TRAIN_WORDS: dict[str, tuple[str, ...]] = {
    "an animal": ("tiger", "horse", "rabbit", "eagle", "salmon", "donkey", "goat", "whale"),
    "a fruit": ("apple", "banana", "cherry", "grape", "peach", "lemon", "mango", "plum"),
    "a tool": ("hammer", "saw", "drill", "wrench", "axe", "shovel", "pliers", "chisel"),
    "a country": ("France", "Brazil", "Japan", "Egypt", "Canada", "Norway", "India", "Chile"),
    "a colour": ("red", "blue", "green", "yellow", "purple", "black", "brown", "pink"),
    "an instrument": ("piano", "violin", "trumpet", "flute", "guitar", "harp", "drum", "cello"),
    "a job": ("teacher", "doctor", "farmer", "lawyer", "baker", "pilot", "nurse", "judge"),
    "a vehicle": ("car", "truck", "bicycle", "train", "boat", "tractor", "bus", "helicopter"),
}
"""Kind -> words of training questions."""

VALIDATION_WORDS: dict[str, tuple[str, ...]] = {
    "an animal": ("lion", "sheep", "monkey", "shark", "wolf", "camel"),
    "a fruit": ("strawberry", "pear", "pineapple", "apricot", "melon", "papaya"),
    "a tool": ("screwdriver", "spade", "pickaxe", "rake", "clamp", "crowbar"),
    "a country": ("Spain", "Mexico", "China", "Kenya", "Sweden", "Poland"),
    "a colour": ("white", "grey", "violet", "turquoise", "crimson", "beige"),
    "an instrument": ("clarinet", "saxophone", "banjo", "organ", "trombone", "oboe"),
    "a job": ("engineer", "carpenter", "dentist", "plumber", "soldier", "chemist"),
    "a vehicle": ("motorcycle", "ship", "airplane", "tram", "van", "submarine"),
}
"""Kind -> words of validation questions."""

FEWEST, MOST = 2, 5
"""Choices of a question."""


class GeneratedChoices(ChoiceTask):
    """Questions such as "Which of these is a tool?", with two to five words to choose from.

    A row has `question`, `choices` and `label`. There are eight kinds. Validation asks in other
    words, for words that training never shows: an encoder that knows the words answers, and a list
    of words does not help. The test rows are the validation rows. No row occurs twice.

    Args:
        train_size: number of training questions.
        val_size: number of validation questions.
        max_length: as in `TaskData`. 24 tokens hold every pair.
        kwargs: those of `TaskData`.

    Raises:
        UserError: if a size is not positive, or more than there are different questions.
    """

    def __init__(
        self, train_size: int = 240, val_size: int = 120, *, max_length: int = 24, **kwargs: Any
    ) -> None:
        super().__init__(max_length=max_length, **kwargs)
        check_size("train_size", train_size, 1, "leaves no question")
        check_size("val_size", val_size, 1, "leaves no question")
        self.train_size = train_size
        self.val_size = val_size

    def rows(self, split: Split) -> list[Row] | None:
        if split == "train":
            return self._draw(split, TRAIN_WORDS, self.train_size)
        if split == "val":
            return self._draw(split, VALIDATION_WORDS, self.val_size)
        return None

    def _draw(self, split: Split, words: dict[str, tuple[str, ...]], size: int) -> list[Row]:
        generator = seeded_random("choices", split, self.seed)

        def draw_row() -> Row:
            count = generator.randint(FEWEST, MOST)
            kinds = generator.sample(list(words), count)
            choices = [generator.choice(words[kind]) for kind in kinds]
            label = generator.randrange(count)
            question = QUESTIONS[split].format(kind=kinds[label])
            key = f"{question} {' '.join(choices)}"
            return {"question": question, "choices": choices, "label": label, "key": key}

        return draw_distinct(draw_row, "key", size, f"{split}_size")
