"""Short questions made by rules, without a download, to be classified by what they ask for.

Validation shares no template and no word with training, so that it measures the skill.
"""

from typing import Any

from adaptrank._errors import UserError
from adaptrank.data.label_task import LabelTask
from adaptrank.data.seeding import seeded_random
from adaptrank.data.task import Row, Split, check_size

TRAIN_QUESTIONS: dict[str, tuple[str, ...]] = {
    "person": (
        "Who wrote {work}?",
        "Who was the teacher of {man}?",
        "Who won the {prize}?",
        "Who is the wife of {man}?",
    ),
    "place": (
        "Where is {building}?",
        "Where was {man} born?",
        "Where do {animals} live?",
        "Where did the {event} begin?",
    ),
    "number": (
        "How many {animals} are there?",
        "How tall is {building}?",
        "How much does {food} cost?",
        "How old is {man}?",
    ),
    "time": (
        "When was {building} built?",
        "When did {man} die?",
        "When did the {event} end?",
        "When was {work} published?",
    ),
    "reason": (
        "Why do {animals} sleep?",
        "Why did the {event} start?",
        "Why is {food} healthy?",
        "Why was {man} arrested?",
    ),
    "meaning": (
        "What is a {word}?",
        "What does {word} mean?",
        "What is {food} made of?",
        "What are {animals}?",
    ),
}
"""Class -> templates. The question word gives the class away."""
VALIDATION_QUESTIONS: dict[str, tuple[str, ...]] = {
    "person": (
        "Name the author of {work}.",
        "Which actor played {man}?",
        "What is the name of the inventor of the {word}?",
    ),
    "place": (
        "In what country can one find {building}?",
        "Which city hosted the {event}?",
        "What continent is home to {animals}?",
    ),
    "number": (
        "What is the height of {building} in feet?",
        "Give the average weight of {animals}.",
        "What percentage ate {food}?",
    ),
    "time": (
        "In which year did {man} retire?",
        "What was the date of the {event}?",
        "Name the century in which {work} appeared.",
    ),
    "reason": (
        "What caused the {event}?",
        "Explain the cause of the decline of {animals}.",
        "For what reason did {man} resign?",
    ),
    "meaning": (
        "Define the word {word}.",
        "Give a short description of {animals}.",
        "Explain the term {word}.",
    ),
}
"""Class -> templates of validation questions.

The question word stands elsewhere, is missing, or is one that training ties to another class. A
model therefore has to know what an author, a river or a height is.
"""
TRAIN_WORDS: dict[str, tuple[str, ...]] = {
    "work": (
        "Hamlet",
        "War and Peace",
        "The Hobbit",
        "Emma",
        "Faust",
        "Dracula",
        "Moby Dick",
        "Ulysses",
    ),
    "man": ("Mozart", "Napoleon", "Einstein", "Lincoln", "Plato", "Picasso", "Newton", "Gandhi"),
    "prize": (
        "World Cup",
        "Nobel Prize in physics",
        "Tour de France",
        "Booker Prize",
        "Super Bowl",
    ),
    "building": (
        "the Eiffel Tower",
        "the Taj Mahal",
        "Big Ben",
        "the White House",
        "the Louvre",
        "the Kremlin",
    ),
    "animals": ("lions", "penguins", "bees", "elephants", "wolves", "sharks", "owls", "bats"),
    "event": (
        "French Revolution",
        "Cold War",
        "Great Depression",
        "Crusades",
        "Gold Rush",
        "Civil War",
    ),
    "food": ("bread", "cheese", "olive oil", "rice", "chocolate", "honey"),
    "word": ("prism", "glacier", "sonnet", "embargo", "molecule", "quorum", "fresco", "nebula"),
}
"""Gap of a template -> words that fill it in training."""
VALIDATION_WORDS: dict[str, tuple[str, ...]] = {
    "work": ("Don Quixote", "Jane Eyre", "The Odyssey", "Dune", "Middlemarch", "Candide"),
    "man": ("Beethoven", "Caesar", "Darwin", "Churchill", "Galileo", "Columbus"),
    "building": (
        "the Colosseum",
        "the Pentagon",
        "the Alhambra",
        "Windsor Castle",
        "the Parthenon",
    ),
    "animals": ("tigers", "dolphins", "ants", "kangaroos", "eagles", "camels"),
    "event": (
        "Olympic Games of antiquity",
        "Boer War",
        "Black Death",
        "Boston Tea Party",
        "Reformation",
    ),
    "food": ("yogurt", "potatoes", "salmon", "peanuts", "pasta"),
    "word": ("telescope", "parachute", "barometer", "turbine", "compass", "sextant"),
}
"""Gap of a template -> words that fill it in validation."""


class GeneratedQuestions(LabelTask):
    """Short questions, to be classified by what they ask for.

    The classes are person, place, number, time, reason and meaning. A row has `text` and `label`.
    Training and validation share neither templates nor the words filled in. The words that betray a
    class in training are missing or misleading in validation: a pretrained encoder generalizes, a
    bag of words does not. The test rows are the validation rows. Classes are balanced, and no
    question occurs twice.

    Args:
        train_size: number of training questions, at most 168.
        val_size: number of validation questions, at most 96.
        max_length: as in `TaskData`. 32 tokens hold every question.
        kwargs: those of `TaskData`.

    Raises:
        UserError: if a size is not positive, or more than there are different questions.
    """

    def __init__(
        self, train_size: int = 120, val_size: int = 72, *, max_length: int = 32, **kwargs: Any
    ) -> None:
        super().__init__(max_length=max_length, **kwargs)
        _check_number("train_size", train_size, TRAIN_QUESTIONS, TRAIN_WORDS)
        _check_number("val_size", val_size, VALIDATION_QUESTIONS, VALIDATION_WORDS)
        self.train_size = train_size
        self.val_size = val_size

    @property
    def class_names(self) -> list[str]:
        return list(TRAIN_QUESTIONS)

    def rows(self, split: Split) -> list[Row] | None:
        if split == "train":
            return self._draw(split, TRAIN_QUESTIONS, TRAIN_WORDS, self.train_size)
        if split == "val":
            return self._draw(split, VALIDATION_QUESTIONS, VALIDATION_WORDS, self.val_size)
        return None

    def _draw(
        self,
        split: Split,
        questions: dict[str, tuple[str, ...]],
        words: dict[str, tuple[str, ...]],
        size: int,
    ) -> list[Row]:
        """Draw different questions of one split, the same number of each class up to one."""
        generator = seeded_random("questions", split, self.seed)
        texts_by_class = [_all_texts(templates, words) for templates in questions.values()]
        class_count = len(texts_by_class)
        rows: list[Row] = []
        for label, texts in enumerate(texts_by_class):
            # The first classes get one more where the size is no multiple of their number.
            share = (size + class_count - 1 - label) // class_count
            rows += [{"text": text, "label": label} for text in generator.sample(texts, share)]
        generator.shuffle(rows)
        return rows


def _check_number(
    name: str, size: int, questions: dict[str, tuple[str, ...]], words: dict[str, tuple[str, ...]]
) -> None:
    """Raise if an argument asks for no question, or for more than there are."""
    check_size(name, size, 1, "leaves no question")
    most = len(questions) * min(len(_all_texts(texts, words)) for texts in questions.values())
    if size > most:
        raise UserError(
            f"{name}={size} asks for more questions than there are. Use {most} or fewer."
        )


def _all_texts(templates: tuple[str, ...], words: dict[str, tuple[str, ...]]) -> list[str]:
    """Return every filled-in template, sorted."""
    texts: set[str] = set()
    for template in templates:
        gap = template[template.index("{") + 1 : template.index("}")]
        texts.update(template.format_map({gap: word}) for word in words[gap])
    return sorted(texts)
