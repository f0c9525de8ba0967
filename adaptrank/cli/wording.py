"""Short sentences for what jsonargparse reports."""

import ast
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adaptrank._errors import did_you_mean, some
from adaptrank.cli.errors import shorten
from adaptrank.cli.known_classes import class_of, known_classes, one_of
from adaptrank.cli.mistakes import (
    MisfitError,
    MissingKeyError,
    NoClassError,
    ParsingError,
    UnknownKeyError,
)

if TYPE_CHECKING:
    from adaptrank.cli.parser import Parser

TYPES = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a string",
    "<class 'list'>": "a list",
    "<class 'collections.abc.Sequence'>": "a list",
    "<class 'dict'>": "a mapping",
    "<class 'NoneType'>": "null",
}
"""A type as jsonargparse prints it -> what fits, in words."""

KINDS = {"Participant": "Allocator", "TrainingStrategy": "training strategy"}
"""Name of a base class -> what users call its classes."""

REPETITIONS = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Given value type:",
    "Expected a path but",
    "Parser key",
)
"""Beginnings of lines that say nothing about the mistake itself."""


class Report:
    """jsonargparse's message taken apart.

    Attributes:
        names: the outermost key that the message names, split at its dots.
        reasons: the lines that say what is wrong.
        value: the wrong value as text, if the message gives one.
    """

    def __init__(self, message: str) -> None:
        key = re.search(r'^Parser key "([^"]+)"', message, re.MULTILINE)
        self.names = tuple(key[1].split(".")) if key else ()
        self.value: str | None = None
        self.reasons: list[str] = []
        # The value of a union stands at the end, and may have any number of lines.
        body, _, rest = message.partition("Given value: ")
        if rest:
            self.value = rest.splitlines()[0]
        for line in body.splitlines():
            self._add(re.sub(r'^Parser key "[^"]+": ', "", line.strip().removeprefix("- ")))

    def _add(self, line: str) -> None:
        reason, got, value = line.partition(". Got value: ")
        if got:
            # A value beside a reason is the innermost one, such as an item of a list.
            self.value = value
            self.reasons.insert(0, reason)
        elif line and not line.startswith(REPETITIONS):
            self.reasons.append(reason)


class Wording:
    """The mistake of a report, in the words of the parser that knows what fits.

    Args:
        parser: the parser that reports.
        report: its report.
    """

    def __init__(self, parser: "Parser", report: Report) -> None:
        self.parser = parser
        self.names = report.names
        self.reasons = report.reasons
        self.value = report.value
        self.base = class_of(parser.type_of(".".join(report.names)))
        name = "class" if self.base is None else self.base.__name__
        self.kind = KINDS.get(name, name)

    def mistake(self) -> ParsingError:
        """Return the mistake, by the first of the known reasons."""
        for pattern, word in REASONS:
            for reason in self.reasons:
                if match := re.match(pattern, reason):
                    return word(self, *match.groups())
        reason = shorten(next(iter(self.reasons), "it is not valid"))
        return ParsingError(f"KEY: {reason}" if self.names else reason, self.names)

    # ---- options

    def unknown_option(self, argument: str) -> ParsingError:
        """Word an argument that no parser takes."""
        option = argument.partition("=")[0]
        if option.endswith((".yaml", ".yml")):
            return ParsingError(f"{option!r} is no option. Write --config {option}")
        if not option.startswith("--"):
            return ParsingError(
                f"{option!r} is no option. Write --key value, such as --trainer.max_steps 100."
            )
        known = [f"--{key}" for key in self._keys()]
        return ParsingError(f"Unknown option {option}.{did_you_mean(option, known)}")

    def option_without_value(self, option: str) -> ParsingError:
        """Word an option at the end, or before the next option."""
        if option == "--config":
            return ParsingError("--config needs a file: --config FILE.yaml")
        fits = TYPES.get(str(self.parser.type_of(option.removeprefix("--"))))
        return ParsingError(f"{option} needs a value{f': {fits}' if fits else ''}.")

    # ---- keys

    def unknown_key(self, key: str) -> ParsingError:
        """Word a key that the parser does not take."""
        owner, known = self.parser.owner, self._keys()
        text = f"Unknown key KEY.{did_you_mean(key, known)}"
        if owner is not None and len(known) <= 20:
            text += f"\n{owner.__name__} accepts {some(known, 20)}."
        elif owner is None and "." not in key:
            text += f"\nKeys here: {some([k for k in known if '.' not in k], 20)}."
        return UnknownKeyError(text, (*self.names, *key.split(".")), owner=owner)

    def missing_keys(self, keys: str) -> ParsingError:
        """Word keys that have no default and no value."""
        missing = [key.rpartition(".")[2] for key in keys.split(", ")]
        owner = self.parser.owner
        if owner is not None:
            text = f"KEY is missing: {owner.__name__} cannot do without it."
            return MissingKeyError(text, (*self.names, missing[0]))
        return ParsingError(
            f"There is no {' and no '.join(map(repr, missing))}. Give --config FILE, "
            f"such as one of configs/, or --{missing[0]} CLASS."
        )

    def _keys(self) -> list[str]:
        """Return the parser's keys, and the groups that hold keys with dots."""
        keys = self.parser.keys()
        return list(dict.fromkeys([*(key.partition(".")[0] for key in keys), *keys]))

    # ---- classes

    def unknown_class(self, name: str) -> ParsingError:
        """Word the name of a class that does not exist."""
        hint = did_you_mean(name, known_classes(self.base))
        if name.lower() in ("none", "no", "off"):
            hint = " For none, write null."
        text = f"there is no {self.kind} {name!r}.{hint} Known: {one_of(self.base, '')}."
        return self._about_class(text, name)

    def not_in_module(self, module: str, name: str) -> ParsingError:
        """Word an import path whose last part does not exist."""
        known = [f"{module}.{each}" for each in dir(sys.modules.get(module))]
        hint = did_you_mean(f"{module}.{name}", known)
        return self._about_class(
            f"the module {module!r} has no {name!r}.{hint}", f"{module}.{name}"
        )

    def unknown_module(self, missing: str) -> ParsingError:
        """Word an import that failed: of the module that is named, or inside it."""
        given = re.search(r"given class_path '([^']+)'", "\n".join(self.reasons))
        path = given[1] if given else str(self.value)
        if not path.startswith(f"{missing}."):
            module = path.rpartition(".")[0]
            return self._about_class(f"importing {module!r} fails: no module {missing!r}.", path)
        hint = did_you_mean(missing, (file.stem for file in Path().glob("*.py")))
        text = (
            f"there is no module {missing!r}.{hint} A module of your own is looked for in the "
            f"folder you start from, and on PYTHONPATH."
        )
        return self._about_class(text, path)

    def wrong_class(self, path: str) -> ParsingError:
        """Word a class of another kind."""
        return self._about_class(f"{path} is no {self.kind}. Use {one_of(self.base)}.", path)

    def no_class(self) -> ParsingError:
        """Word a value that cannot name a class."""
        text = (
            f"KEY is VALUE. It must name a {self.kind}, {one_of(self.base)}, or be a mapping "
            f"with class_path and init_args."
        )
        return NoClassError(text, self.names)

    def _about_class(self, text: str, path: str) -> ParsingError:
        return ParsingError(f"KEY: {text}", self.names, path)

    # ---- values

    def wrong_type(self) -> ParsingError:
        """Word a value of a wrong type, or none of the choices."""
        types = re.findall(r"Expected an? (?!dot import)(.+)", "\n".join(self.reasons))
        other_types = [kind for kind in types if "Literal[" not in kind]
        words = list(dict.fromkeys(TYPES.get(kind, _short_name(kind)) for kind in other_types))
        if choices := _choices(types):
            hint = did_you_mean(str(self.value), choices)
            others = "".join(f", or {word}" for word in words if word != "null")
            text = f"KEY is VALUE. It must be one of {some(map(repr, choices), 20)}{others}.{hint}"
            return MisfitError(text, self.names, self.value)
        if "a number" in words and "a whole number" in words:
            words.remove("a whole number")
        fits = " or ".join(sorted(words, key=lambda word: word == "null"))
        return MisfitError(f"KEY is VALUE. It must be {fits}.", self.names, self.value)


def _choices(types: Sequence[str]) -> list[str]:
    """Return the choices of all `Literal[...]` among types."""
    choices: list[str] = []
    for kind in types:
        for listed in re.findall(r"Literal(\[.*\])", kind):
            choices += map(str, ast.literal_eval(listed))
    return choices


def _short_name(kind: str) -> str:
    """Return `<class 'a.b.C'>` as `C`."""
    return kind.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]


REASONS: tuple[tuple[str, Callable[..., ParsingError]], ...] = (
    (r"unrecognized arguments: (\S+)", Wording.unknown_option),
    (r"argument (?:-\w/)?(--\S+): expected one argument", Wording.option_without_value),
    (r".*[oO]ption '([^']+)'(?: is not accepted|$)", Wording.unknown_key),
    (r"the following arguments are required: (.+)", Wording.missing_keys),
    # A number fits better than any class, where both are allowed.
    (r"Expected a <class '(?:int|float)'>", Wording.wrong_type),
    (r"Expected a dot import path string: (.*)", Wording.unknown_class),
    (r".*module '([^']+)' has no attribute '([^']+)'", Wording.not_in_module),
    (r".*No module named '([^']+)'", Wording.unknown_module),
    (r"Import path (\S+) does not correspond to a subclass of", Wording.wrong_class),
    (r"Not a valid subclass of", Wording.no_class),
    (r"Expected an? ", Wording.wrong_type),
)
"""Reasons of jsonargparse, the most telling first -> the sentence."""
