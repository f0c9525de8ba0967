"""All different arithmetic problems of one split, each computed from its number."""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

Operands = tuple[int, int, int]

MakeRow = Callable[[str, str, Operands, str, str, str], dict[str, str]]
"""Function (expression, text, operands, name, other name, thing) -> row."""


@dataclass
class _Template:
    """The problems of one text: every choice of operands and words that it has gaps for."""

    form: str
    text: str
    operands: list[Operands]
    names: int
    others: int
    things: int

    @property
    def size(self) -> int:
        return prod((len(self.operands), self.names, self.others, self.things))


class ProblemSpace:
    """All different problems of some templates.

    Args:
        problems: expression -> texts.
        operands_of: function expression -> all of its operands.
        names: names of people. Two in one problem differ.
        things: names of things.
        make_row: function that makes the row of a problem.
    """

    def __init__(
        self,
        problems: Mapping[str, Sequence[str]],
        operands_of: Callable[[str], list[Operands]],
        names: Sequence[str],
        things: Sequence[str],
        make_row: MakeRow,
    ) -> None:
        self.names = names
        self.things = things
        self.make_row = make_row
        self.templates: list[_Template] = []
        for form, texts in problems.items():
            operands = operands_of(form)
            self.templates += [self._template(form, text, operands) for text in texts]
        self.ends = list(itertools.accumulate(template.size for template in self.templates))

    def _template(self, form: str, text: str, operands: list[Operands]) -> _Template:
        has_name = "{name}" in text
        return _Template(
            form,
            text,
            operands,
            names=len(self.names) if has_name else 1,
            # The two names of a text differ.
            others=len(self.names) - has_name if "{other}" in text else 1,
            things=len(self.things) if "{thing}" in text else 1,
        )

    def __len__(self) -> int:
        return self.ends[-1]

    def row(self, number: int) -> dict[str, str]:
        """Return the row of a problem. Two numbers below the length have different rows."""
        k = bisect_right(self.ends, number)
        template = self.templates[k]
        number -= self.ends[k] - template.size
        number, thing = divmod(number, template.things)
        number, other = divmod(number, template.others)
        number, name = divmod(number, template.names)
        # The other name is counted from the first one on, so that it is another one.
        other_name = self.names[(name + 1 + other) % len(self.names)]
        operands = template.operands[number]
        names = (self.names[name], other_name)
        return self.make_row(template.form, template.text, operands, *names, self.things[thing])
