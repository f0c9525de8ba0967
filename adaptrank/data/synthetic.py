"""Data sets made by rules: no network, no download, and validation that rewards understanding over remembering."""

import random
from collections.abc import Callable
from typing import Any

from adaptrank._errors import UserError
from adaptrank.data.loader import rng
from adaptrank.data.task import CompletionTask, LabelTask, Row, Split

NAMES = (
    "Ana",
    "Ben",
    "Carl",
    "Dina",
    "Eva",
    "Finn",
    "Gina",
    "Hugo",
    "Ida",
    "Jack",
    "Kate",
    "Leo",
    "Mia",
    "Nora",
    "Paul",
    "Sam",
)
THINGS = (
    "apples",
    "books",
    "cards",
    "coins",
    "cups",
    "eggs",
    "keys",
    "lemons",
    "pens",
    "plates",
    "shells",
    "stamps",
    "toys",
)

# An expression in a, b, c -> what it is worth.
FORMS: dict[str, Callable[[int, int, int], int]] = {
    "{a} + {b}": lambda a, b, c: a + b,
    "{a} - {b}": lambda a, b, c: a - b,
    "{a} * {b}": lambda a, b, c: a * b,
    "{a} + {b} - {c}": lambda a, b, c: a + b - c,
    "{a} - {b} + {c}": lambda a, b, c: a - b + c,
    "{a} * {b} + {c}": lambda a, b, c: a * b + c,
    "{a} * {b} - {c}": lambda a, b, c: a * b - c,
}

TRAIN_PROBLEMS: dict[str, tuple[str, ...]] = {
    "{a} + {b}": (
        "{name} has {a} {thing} and buys {b} more. How many does {name} have now?",
        "There are {a} {thing} here and {b} in a box. How many in all?",
        "{name} found {a} {thing} and {other} found {b}. How many did they find together?",
        "A train carries {a} people and {b} get on. How many are on it now?",
        "{name} read {a} pages on Monday and {b} on Tuesday. How many pages is that?",
    ),
    "{a} - {b}": (
        "{name} had {a} {thing} and gave {b} to {other}. How many {thing} are left?",
        "A shop had {a} {thing} and sold {b} of them. How many remain?",
        "{name} is {a} years old, {other} is {b}. How many years apart are they?",
        "Of {a} {thing} in a basket, {b} are broken. How many are whole?",
        "{name} cuts {b} meters off a rope of {a}. How long is it now?",
    ),
    "{a} * {b}": (
        "{name} has {a} boxes with {b} {thing} in each. How many {thing} is that?",
        "One ticket costs {a} dollars. How many dollars do {b} tickets cost?",
        "There are {a} rows of {b} chairs. How many chairs are there?",
        "{name} runs {a} miles every day. How many miles does {name} run in {b} days?",
    ),
    "{a} + {b} - {c}": (
        "{name} had {a} {thing}, got {b} and lost {c}. How many now?",
        "A bus has {a} people. {b} get on, {c} off. How many stay?",
        "With {a} red and {b} blue {thing}, {name} sells {c}. How many stay?",
    ),
    "{a} - {b} + {c}": (
        "{name} had {a} coins, spent {b} and earned {c}. How many now?",
        "Of {a} birds, {b} fly off and {c} come. How many are there?",
    ),
    "{a} * {b} + {c}": (
        "{name} has {a} bags of {b} {thing} and {c} loose ones. How many?",
        "{a} pens at {b} dollars and a pad at {c}: what is the cost?",
    ),
    "{a} * {b} - {c}": (
        "{name} bakes {a} trays of {b} buns and eats {c}. How many stay?",
        "Of {a} packs of {b} {thing}, {c} are lost. How many are left?",
    ),
}

VALIDATION_PROBLEMS: dict[str, tuple[str, ...]] = {
    "{a} + {b}": (
        "A farmer picks {a} {thing} in the morning and {b} at night. What is the total?",
        "{name} scored {a} points, then another {b}. What is the final score?",
        "After {name} added {b} {thing} to a pile of {a}, how big was the pile?",
    ),
    "{a} - {b}": (
        "{name} needs {a} {thing} but owns only {b}. How many are missing?",
        "A jar held {a} {thing} until {other} took {b}. What does it hold now?",
        "It was {a} degrees at noon and fell by {b}. What was the temperature then?",
    ),
    "{a} * {b}": (
        "Each of {a} children brings {b} {thing}. How many {thing} do they bring?",
        "{name} fills {a} pages with {b} stamps per page. How many stamps is that?",
    ),
    "{a} + {b} - {c}": (
        "{name} picked {a} figs, then {b}, and ate {c}. How many remain?",
        "A class of {a} gains {b} pupils and loses {c}. How big is it?",
    ),
    "{a} - {b} + {c}": ("From {a} liters {name} uses {b}, then adds {c}. How much is in?",),
    "{a} * {b} + {c}": ("A hall has {a} rows of {b} seats plus {c}. How many seats?",),
    "{a} * {b} - {c}": ("{name} sews {a} shirts with {b} pins and drops {c}. How many hold?",),
}

VALIDATION_DIGITS = (1, 3, 6, 8)  # last digits of the numbers that only validation problems have


def is_validation_number(n: int) -> bool:
    """Tell to which side a number of a problem belongs: no number stands in problems of both sides."""
    return n % 10 in VALIDATION_DIGITS


class ArithmeticProblems(CompletionTask):
    """Arithmetic word problems in one or two steps, such as "Ana has 12 cups and buys 7 more. ..." -> " 12 + 7 = 19".

    Rows: prompt "Question: ...\\nAnswer:", completion " 12 + 7 = 19", answer "19". Training and validation share neither a
    template nor a number in a problem (results may coincide), so what validation measures is the skill. Numbers reach 49 in sums
    of one step, 12 in products; a row has at most 40 tokens, end included, where a tokenizer splits numbers into digits.
    The test rows are the validation rows. No problem occurs twice.

    Args:
        train_size: number of training problems.
        val_size: number of validation problems.
        max_length: as in `TaskData`; 64 tokens hold every problem.
        kwargs: those of `CompletionTask`.

    Raises:
        ValueError: if more problems are asked for than can be told apart.
    """

    def __init__(
        self, train_size: int = 2000, val_size: int = 200, *, max_length: int = 64, **kwargs: Any
    ) -> None:
        super().__init__(max_length=max_length, **kwargs)
        self.train_size, self.val_size = train_size, val_size

    def rows(self, split: Split) -> list[Row] | None:
        if split == "train":
            return self._draw(split, TRAIN_PROBLEMS, self.train_size)
        if split == "val":
            return self._draw(split, VALIDATION_PROBLEMS, self.val_size)
        return None

    def _draw(self, split: Split, problems: dict[str, tuple[str, ...]], size: int) -> list[Row]:
        generator = rng("arithmetic", split, self.seed)
        templates = [(form, text) for form, texts in problems.items() for text in texts]

        def row() -> Row:
            form, text = generator.choice(templates)
            a, b, c = operands(form, generator, validation=split == "val")
            name, other = generator.sample(NAMES, 2)
            question = text.format(
                a=a, b=b, c=c, name=name, other=other, thing=generator.choice(THINGS)
            )
            answer = str(FORMS[form](a, b, c))
            completion = f" {form.format(a=a, b=b, c=c)} = {answer}"
            return {
                "prompt": f"Question: {question}\nAnswer:",
                "completion": completion,
                "answer": answer,
            }

        return distinct(row, "prompt", size, f"{split}_size")


def operands(form: str, generator: random.Random, *, validation: bool) -> tuple[int, int, int]:
    """Draw a, b, c from the numbers of one side; the value of the expression and of its parts is at least 1."""
    numbers = [n for n in range(2, 50) if is_validation_number(n) is validation]
    digits, factors = [n for n in numbers if n < 10], [n for n in numbers if n <= 12]
    two_steps = "{c}" in form
    while True:
        if "*" in form:
            a, b = generator.choice(digits if two_steps else factors), generator.choice(digits)
        else:
            a, b = generator.choice(numbers), generator.choice(digits if two_steps else numbers)
        c = generator.choice(digits)
        if not ("- {b}" in form and a <= b) and FORMS[form](a, b, c) > 0:
            return a, b, c


def distinct(row: Callable[[], Row], key: str, size: int, argument: str) -> list[Row]:
    """Call `row` until `size` rows with different `key` are there."""
    found: dict[str, Row] = {}
    for _ in range(100 * size):
        if len(found) == size:
            break
        new = row()
        found.setdefault(new[key], new)
    else:
        if len(found) < size:
            raise UserError(
                f"{argument}={size}, but only about {len(found)} different rows can be made; ask for fewer."
            )
    return list(found.values())


# What is asked for -> templates. In training the question word gives it away; in validation it stands elsewhere, is missing,
# or is one that training ties to another class, so a model has to know what an author, a river or a height is.
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


class GeneratedQuestions(LabelTask):
    """Short questions, to be classified by what they ask for: person, place, number, time, reason or meaning.

    Rows: text, label. Training and validation share neither templates nor the words filled in, and the words that
    betray a class in training are missing or misleading in validation: a pretrained encoder generalizes, a bag of words
    does not. The test rows are the validation rows. Classes are balanced, and no question occurs twice.

    Args:
        train_size: number of training questions, at most 168.
        val_size: number of validation questions, at most 96.
        max_length: as in `TaskData`; 32 tokens hold every question.
        kwargs: those of `TaskData`.

    Raises:
        ValueError: if more questions are asked for than can be told apart.
    """

    def __init__(
        self, train_size: int = 120, val_size: int = 72, *, max_length: int = 32, **kwargs: Any
    ) -> None:
        super().__init__(max_length=max_length, **kwargs)
        self.train_size, self.val_size = train_size, val_size

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
        generator = rng("questions", split, self.seed)
        every = [
            sorted({t.format_map(w) for t in ts for w in fillings(t, words)})
            for ts in questions.values()
        ]
        most = len(every) * min(len(texts) for texts in every)
        if size > most:
            raise UserError(
                f"{split}_size={size} asks for more questions than there are; use {most} or fewer."
            )
        drawn: list[Row] = []
        for label, texts in enumerate(every):
            wanted = (size + len(every) - 1 - label) // len(every)
            drawn += [{"text": text, "label": label} for text in generator.sample(texts, wanted)]
        generator.shuffle(drawn)
        return drawn


def fillings(template: str, words: dict[str, tuple[str, ...]]) -> list[dict[str, str]]:
    """Every way to fill the one gap of a template."""
    gap = template[template.index("{") + 1 : template.index("}")]
    return [{gap: word} for word in words[gap]]
