"""The parser of fit, validate, test and predict: jsonargparse, with short errors.

jsonargparse parses, checks types and finds what is wrong. It makes a parser for each class that
the configuration names, so `Parser.error` is called first on the parser of the innermost class.
That parser knows which arguments and which classes fit, and words the mistake. The parsers around
it add their keys.
"""

import ast
import copy
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from lightning.pytorch.cli import LightningArgumentParser

from adaptrank._errors import did_you_mean, some
from adaptrank.cli.errors import shorten
from adaptrank.cli.mistakes import MisfitError, MissingKeyError, NoClassError, ParsingError

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

ACTIONS = ("help", "config", "print_config", "print_shtab")
"""Options that are no keys of a configuration."""


class Parser(LightningArgumentParser):
    """Raises a ParsingError instead of printing everything that would be right. No abbreviated keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.owner: type | None = None

    def add_class_arguments(self, theclass: Any, nested_key: Any = None, **kwargs: Any) -> Any:
        """Remember the class that the parser is for."""
        if nested_key is None:
            self.owner = theclass
        return super().add_class_arguments(theclass, nested_key, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the innermost parser's mistake with the keys of this one, or word a new one."""
        report = Report(message)
        mistake = _inner_mistake(ex)
        if mistake is None:
            raise Wording(self._of_the_verb(), report).mistake() from ex
        raise self._around(mistake, report.names) from ex

    def _of_the_verb(self) -> "Parser":
        """Return the parser that has the arguments: the verb's, if this one only picks the verb."""
        if self._subcommands_action is None:
            return self
        parser: Parser = self._subcommands_action.choices[self.args[0]]
        return parser

    def _around(self, mistake: ParsingError, names: tuple[str, ...]) -> ParsingError:
        """Return the mistake of an inner parser with the keys of this one in front."""
        base = class_of(self.type_of(".".join(names)))
        # Without a class_path jsonargparse takes the base class, and refuses its arguments.
        if isinstance(mistake, UnknownKeyError) and mistake.owner is base and known_classes(base):
            return NoClassError(f"KEY has no class_path. Name a class, {one_of(base)}.", names)
        # A copy: the inner one is among its causes.
        outer = copy.copy(mistake)
        outer.names = (*names, *mistake.names)
        return outer

    def keys(self) -> list[str]:
        """Return the keys that the parser takes."""
        keys = [action.dest for action in self._actions]
        return [key for key in keys if key.rpartition(".")[2] not in ACTIONS]

    def type_of(self, key: str) -> Any:
        """Return the type of a key, or None if it has none."""
        action = next((a for a in self._actions if a.dest == key), None)
        return getattr(action, "_typehint", None)


class UnknownKeyError(ParsingError):
    """A key that a class does not take."""

    owner: type | None = None


def _inner_mistake(error: BaseException | None) -> ParsingError | None:
    """Return the mistake of the next inner parser among the causes of an error."""
    while error is not None and not isinstance(error, ParsingError):
        error = error.__cause__
    return error


class Report:
    """jsonargparse's message taken apart.

    Attributes:
        names: the outermost key that the message names, split at its dots.
        reasons: the lines that say what is wrong, without the repetitions around them.
        value: the wrong value as text, if the message gives one.
    """

    STRUCTURE = (
        "Does not validate against",
        "Subtypes:",
        "Errors:",
        "Given value type:",
        "Expected a path but",
        "Parser key",
    )

    def __init__(self, message: str) -> None:
        lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
        keys = [key for line in lines for key in re.findall(r'^Parser key "([^"]+)"', line)]
        self.names = tuple(keys[0].split(".")) if keys else ()
        self.value: str | None = None
        self.reasons: list[str] = []
        for line in lines:
            line = re.sub(r'^Parser key "[^"]+": ', "", line)
            given = line.removeprefix("Given value: ")
            if given != line:
                self.value = given if self.value is None else self.value
                break
            # A value beside a reason is the innermost one, such as an item of a list.
            reason, got, value = line.partition(". Got value: ")
            if got:
                self.value = value
                self.reasons.insert(0, reason)
            elif line and not line.startswith(self.STRUCTURE):
                self.reasons.append(reason)

    def search(self, pattern: str) -> tuple[str, ...] | None:
        """Return the groups of the first reason that a pattern matches from its beginning."""
        for reason in self.reasons:
            match = re.match(pattern, reason)
            if match:
                return match.groups()
        return None


class Wording:
    """The sentence for a report, by the parser that knows what fits."""

    def __init__(self, parser: Parser, report: Report) -> None:
        self.parser = parser
        self.report = report
        self.key = ".".join(report.names)
        self.base = class_of(parser.type_of(self.key))

    def mistake(self) -> ParsingError:
        """Return the mistake with its sentence."""
        for word in (self._argument, self._key, self._number, self._class, self._type):
            mistake = word()
            if mistake is not None:
                return mistake
        reason = shorten(next(iter(self.report.reasons), "it is not valid"))
        return ParsingError(f"KEY: {reason}" if self.key else reason, self.report.names)

    def _argument(self) -> ParsingError | None:
        """Word a command line that is no sequence of options with values."""
        if match := self.report.search(r"unrecognized arguments: (\S+)"):
            option = match[0].partition("=")[0]
            if option.endswith((".yaml", ".yml")):
                return ParsingError(f"{option!r} is no option. Write --config {option}")
            if not option.startswith("--"):
                return ParsingError(
                    f"{option!r} is no option. Write --key value, such as --trainer.max_steps 100."
                )
            known = [f"--{key}" for key in self._with_groups()]
            return ParsingError(f"Unknown option {option}.{did_you_mean(option, known)}")
        if match := self.report.search(r"argument (?:-\w/)?(--\S+): expected one argument"):
            option = match[0]
            if option == "--config":
                return ParsingError("--config needs a file: --config FILE.yaml")
            fits = TYPES.get(str(self.parser.type_of(option.removeprefix("--"))))
            return ParsingError(f"{option} needs a value{f': {fits}' if fits else ''}.")
        return None

    def _key(self) -> ParsingError | None:
        """Word an unknown key, or a missing one."""
        owner = self.parser.owner
        if match := self.report.search(r".*[oO]ption '([^']+)'(?: is not accepted|$)"):
            known = self._with_groups()
            text = f"Unknown key KEY.{did_you_mean(match[0], known)}"
            if owner is not None and len(known) <= 20:
                text += f"\n{owner.__name__} accepts {some(known, 20)}."
            elif owner is None and "." not in match[0]:
                text += f"\nKeys here: {some([k for k in known if '.' not in k], 20)}."
            names = (*self.report.names, *match[0].split("."))
            mistake = UnknownKeyError(text, names)
            mistake.owner = owner
            return mistake
        if match := self.report.search(r"the following arguments are required: (.+)"):
            missing = [key.rpartition(".")[2] for key in match[0].split(", ")]
            if owner is not None:
                text = f"KEY is missing: {owner.__name__} cannot do without it."
                return MissingKeyError(text, (*self.report.names, missing[0]))
            return ParsingError(
                f"There is no {' and no '.join(map(repr, missing))}. Give --config FILE, "
                f"such as one of configs/, or --{missing[0]} CLASS."
            )
        return None

    def _with_groups(self) -> list[str]:
        """Return the parser's keys, and the groups that hold keys with dots."""
        keys = self.parser.keys()
        return list(dict.fromkeys([*(key.partition(".")[0] for key in keys), *keys]))

    def _number(self) -> ParsingError | None:
        """Word a value that should be a number, whatever classes would fit as well."""
        numbers = r"Expected a <class '(int|float)'>"
        return self._type() if self.report.search(numbers) else None

    def _class(self) -> ParsingError | None:
        """Word a class that does not exist, or that does not fit."""
        kind = "class" if self.base is None else self.base.__name__
        text = None
        if match := self.report.search(r"Expected a dot import path string: (.*)"):
            (name,) = match
            null = name.lower() in ("none", "no", "off")
            hint = (
                " For none, write null." if null else did_you_mean(name, known_classes(self.base))
            )
            text = f"there is no {kind} {name!r}.{hint} Known: {one_of(self.base, '')}."
            return self._class_mistake(text, name)
        if match := self.report.search(r".*module '([^']+)' has no attribute '([^']+)'"):
            module, name = match
            there = [f"{module}.{each}" for each in dir(sys.modules.get(module))]
            hint = did_you_mean(f"{module}.{name}", there)
            text = f"the module {module!r} has no {name!r}.{hint}"
            return self._class_mistake(text, f"{module}.{name}")
        if match := self.report.search(r".*No module named '([^']+)'"):
            return self._module(match[0])
        if match := self.report.search(r"Import path (\S+) does not correspond to a subclass of"):
            text = f"{match[0]} is no {kind}. Use {one_of(self.base)}."
            return self._class_mistake(text, match[0])
        if self.report.search(r"Not a valid subclass of") is not None:
            text = f"KEY is VALUE. It must name a {kind}, {one_of(self.base)}, or be a mapping "
            return NoClassError(f"{text}with class_path and init_args.", self.report.names)
        return None

    def _module(self, missing: str) -> ParsingError:
        """Word an import that failed: of the module that is named, or inside it."""
        given = self.report.search(r"Problem with given class_path '([^']+)'")
        path = given[0] if given else str(self.report.value)
        if not path.startswith(f"{missing}."):
            text = f"importing {path.rpartition('.')[0]!r} fails: No module named {missing!r}."
            return self._class_mistake(text, path)
        here = [file.stem for file in Path().glob("*.py")]
        text = f"there is no module {missing!r}.{did_you_mean(missing, here)} "
        text += "A module of your own is looked for in the "
        return self._class_mistake(f"{text}folder you start from, and on PYTHONPATH.", path)

    def _class_mistake(self, text: str, name: str) -> ParsingError:
        return ParsingError(f"KEY: {text}", self.report.names, name)

    def _type(self) -> ParsingError | None:
        """Word a value of a wrong type, and the nearest of the choices."""
        types = re.findall(r"Expected an? (?!dot import)(.+)", "\n".join(self.report.reasons))
        if not types:
            return None
        value = self.report.value
        if choices := _choices(types):
            fits = f"one of {some(map(repr, choices), 20)}.{did_you_mean(str(value), choices)}"
            return MisfitError(f"KEY is VALUE. It must be {fits}", self.report.names, value)
        words = list(dict.fromkeys(TYPES.get(kind, _short_name(kind)) for kind in types))
        if "a number" in words and "a whole number" in words:
            words.remove("a whole number")
        fits = " or ".join(sorted(words, key=lambda word: word == "null"))
        return MisfitError(f"KEY is VALUE. It must be {fits}.", self.report.names, value)


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


def class_of(kind: Any) -> type | None:
    """Return the class whose subclasses fit a type: of `list[Callable[[A], B]] | None` B."""
    if isinstance(kind, type) and not get_args(kind):
        return None if kind.__module__ == "builtins" else kind
    classes = (class_of(part) for part in get_args(kind))
    return next((cls for cls in classes if cls is not None), None)


def subclasses(base: type | None) -> list[type]:
    """Return the public, concrete classes under a base that are known by now, and the base."""
    if base is None:
        return []
    found = [base]
    for cls in found:
        children: list[type] = type.__subclasses__(cls)
        found += [child for child in children if child not in found]
    return [cls for cls in found if _is_public(cls)]


def _is_public(cls: type) -> bool:
    foreign = cls.__module__.startswith(
        ("lightning.pytorch.demos", "lightning.pytorch.cli", "adaptrank.cli", "unittest")
    )
    hidden = cls.__name__.startswith("_") or "<locals>" in cls.__qualname__
    return not (foreign or hidden or inspect.isabstract(cls))


def known_classes(base: type | None) -> list[str]:
    """Return the names of the classes under a base."""
    return [cls.__name__ for cls in subclasses(base) if cls is not base]


def one_of(base: type | None, words: str = "one of ") -> str:
    """Return "one of A, B, C": the classes under a base that no other class derives from."""
    leaves = {c.__name__ for c in subclasses(base) if c is not base and not c.__subclasses__()}
    return words + some(sorted(leaves), 12)
