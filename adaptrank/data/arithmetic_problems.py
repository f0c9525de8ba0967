"""Arithmetic word problems made by rules, without a download.

Validation shares no template and no number with training, so that it measures the skill.
"""

import itertools
import logging
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from adaptrank._errors import UserError
from adaptrank.data.completion_task import CompletionTask
from adaptrank.data.lazy import Computed, Permutation
from adaptrank.data.problem_space import Operands, ProblemSpace
from adaptrank.data.seeding import seeded_random
from adaptrank.data.task import Row, Split, check_size

log = logging.getLogger(__name__)

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

PROMPT = "Question: {question}\nAnswer:"
"""Format of all prompts."""
EXAMPLE = "Ann has 12 pears and buys 7 more. How many pears does Ann have now?"

FORMS: dict[str, Callable[[int, int, int], int]] = {
    "{a} + {b}": lambda a, b, c: a + b,
    "{a} - {b}": lambda a, b, c: a - b,
    "{a} * {b}": lambda a, b, c: a * b,
    "{a} + {b} - {c}": lambda a, b, c: a + b - c,
    "{a} - {b} + {c}": lambda a, b, c: a - b + c,
    "{a} * {b} + {c}": lambda a, b, c: a * b + c,
    "{a} * {b} - {c}": lambda a, b, c: a * b - c,
}
"""Expression in a, b, c -> its value."""

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
"""Expression -> texts of training problems."""

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
"""Expression -> texts of validation problems, none of which is a training text."""

VALIDATION_DIGITS = (1, 3, 6, 8)
"""Last digits of the numbers that only validation problems have."""

LARGEST_LIST = {"train": 1_000_000, "val": 80_000}
"""Split -> number of problems up to which they are drawn at once, as a list.

Half of all problems can be drawn without many repeats.
"""


def is_validation_number(n: int) -> bool:
    """Tell whether a number belongs to validation problems. The others belong to training."""
    return n % 10 in VALIDATION_DIGITS


class ArithmeticProblems(CompletionTask):
    """Arithmetic word problems in one or two steps.

    An example is "Ana has 12 cups and buys 7 more. ..." -> " 12 + 7 = 19". A row has the prompt
    "Question: ...\\nAnswer:", the completion " 12 + 7 = 19" and the answer "19". Training and
    validation share neither a template nor a number in a problem (results may coincide), so that
    validation measures the skill. Numbers reach 49 in sums of one step and 12 in products. A row
    has at most 40 tokens, end included, where a tokenizer splits numbers into digits. The test rows
    are the validation rows.

    There are about 4.5 million different training problems and 160 thousand validation problems. No
    problem occurs twice, unless more are requested than exist. Then the counts of two problems
    differ by at most one. A large set is made row by row while it is read, and takes no memory.

    Args:
        train_size: number of training problems.
        val_size: number of validation problems.
        max_length: as in `TaskData`. 64 tokens hold every problem.
        kwargs: those of `CompletionTask`.

    Raises:
        UserError: if a size is not a positive integer.
    """

    def __init__(
        self, train_size: int = 2000, val_size: int = 200, *, max_length: int = 64, **kwargs: Any
    ) -> None:
        super().__init__(max_length=max_length, **kwargs)
        check_size("train_size", train_size, 1, "leaves no problem")
        check_size("val_size", val_size, 1, "leaves no problem")
        self.train_size = train_size
        self.val_size = val_size

    @property
    def prompt_template(self) -> str:
        return PROMPT

    @property
    def example_prompt(self) -> str:
        return PROMPT.format(question=EXAMPLE)

    def rows(self, split: Split) -> Sequence[Row] | None:
        if split == "train":
            return self._problems(split, TRAIN_PROBLEMS, self.train_size)
        if split == "val":
            return self._problems(split, VALIDATION_PROBLEMS, self.val_size)
        return None

    def _problems(
        self, split: Split, problems: dict[str, tuple[str, ...]], size: int
    ) -> Sequence[Row]:
        if size > LARGEST_LIST[split]:
            return self._lazy_problems(split, problems, size)
        return self._draw(split, problems, size)

    def _draw(self, split: Split, problems: dict[str, tuple[str, ...]], size: int) -> list[Row]:
        """Draw different problems of one split."""
        generator = seeded_random("arithmetic", split, self.seed)
        templates = [(form, text) for form, texts in problems.items() for text in texts]

        def draw_row() -> Row:
            form, text = generator.choice(templates)
            operands = draw_operands(form, generator, validation=split == "val")
            name, other = generator.sample(NAMES, 2)
            return make_row(form, text, operands, name, other, generator.choice(THINGS))

        return draw_distinct(draw_row, "prompt", size, f"{split}_size")

    def _lazy_problems(
        self, split: Split, problems: dict[str, tuple[str, ...]], size: int
    ) -> Sequence[Row]:
        """Return the problems of one split in random order, each made when it is read."""
        space = ProblemSpace(
            problems, partial(all_operands, validation=split == "val"), NAMES, THINGS, make_row
        )
        if size > len(space):
            log.warning(
                "%s_size=%d is more than the %d different problems: each occurs %d times or once "
                "more.",
                split,
                size,
                len(space),
                size // len(space),
            )
        return Computed(size, ShuffledRows(space, seed_key=("arithmetic", split, self.seed)))


class ShuffledRows:
    """Function number of a row -> row of a problem. All problems occur before one occurs again.

    Args:
        space: the problems.
        seed_key: seed of their order.
    """

    def __init__(self, space: ProblemSpace, seed_key: tuple[object, ...]) -> None:
        self.space = space
        self.order = Permutation(len(space), *seed_key)

    def __call__(self, number: int) -> Row:
        return self.space.row(self.order[number % len(self.space)])


def make_row(form: str, text: str, operands: Operands, name: str, other: str, thing: str) -> Row:
    """Return the row of a problem: prompt, completion and answer."""
    a, b, c = operands
    question = text.format(a=a, b=b, c=c, name=name, other=other, thing=thing)
    answer = str(FORMS[form](a, b, c))
    return {
        "prompt": PROMPT.format(question=question),
        "completion": f" {form.format(a=a, b=b, c=c)} = {answer}",
        "answer": answer,
    }


def draw_operands(form: str, generator: random.Random, *, validation: bool) -> Operands:
    """Draw a, b, c for an expression. Its value and the values of its parts are at least 1.

    Args:
        form: a key of `FORMS`.
        generator: the random number generator.
        validation: draw from the numbers of validation problems, and not of training problems.
    """
    pools = _number_pools(form, validation)
    while True:
        a, b, c = (generator.choice(pool) for pool in pools)
        if _is_positive(form, (a, b, c)):
            return a, b, c


def all_operands(form: str, *, validation: bool) -> list[Operands]:
    """Return all a, b, c that `draw_operands` may draw. An expression without c has one c."""
    a, b, c = _number_pools(form, validation)
    if "{c}" not in form:
        c = c[:1]
    triples = itertools.product(a, b, c)
    return [triple for triple in triples if _is_positive(form, triple)]


def _is_positive(form: str, operands: Operands) -> bool:
    """Tell whether an expression's value and the values of its parts are at least 1."""
    a, b, c = operands
    is_negative_part = "- {b}" in form and a <= b
    return not is_negative_part and FORMS[form](a, b, c) > 0


def _number_pools(form: str, validation: bool) -> tuple[list[int], list[int], list[int]]:
    """Return the numbers from which a, b and c of an expression are drawn."""
    numbers = [n for n in range(2, 50) if is_validation_number(n) is validation]
    digits = [n for n in numbers if n < 10]
    factors = [n for n in numbers if n <= 12]
    is_product, has_two_steps = "*" in form, "{c}" in form
    if is_product and has_two_steps:
        return digits, digits, digits
    if is_product:
        return factors, digits, digits
    if has_two_steps:
        return numbers, digits, digits
    return numbers, numbers, digits


def draw_distinct(draw_row: Callable[[], Row], key: str, size: int, argument: str) -> list[Row]:
    """Draw rows until `size` of them differ in `key`.

    Args:
        draw_row: function that draws one row.
        key: field in which rows must differ.
        size: number of rows.
        argument: name of the argument that sets `size`, for the error.

    Raises:
        UserError: if 100 draws per row do not suffice.
    """
    rows: dict[str, Row] = {}
    for _ in range(100 * size):
        if len(rows) == size:
            break
        row = draw_row()
        rows.setdefault(row[key], row)
    if len(rows) < size:
        raise UserError(
            f"{argument}={size}, but only about {len(rows)} different rows can be made. Ask for "
            "fewer."
        )
    return list(rows.values())
