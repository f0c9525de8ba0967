"""The parser of fit, validate, test and predict: jsonargparse, with short errors.

jsonargparse parses, checks types and finds what is wrong. It makes a parser for each class that
the configuration names, so `Parser.error` is called first on the parser of the innermost class.
That parser knows which arguments and which classes fit, and words the mistake. The parsers around
it add their keys.
"""

import copy
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

from adaptrank.cli.known_classes import class_of, known_classes, one_of
from adaptrank.cli.mistakes import NoClassError, ParsingError, UnknownKeyError
from adaptrank.cli.wording import Report, Wording

ACTIONS = ("help", "config", "print_config", "print_shtab")
"""Options that are no keys of a configuration."""

RUN_FOLDER = "<run folder>"
"""Value of a logger's `save_dir` that stands for the run folder, which is made later."""


class Parser(LightningArgumentParser):
    """Raises a ParsingError, instead of printing everything that would be right.

    Attributes:
        owner: the class that the parser is for, or None for the parser of a verb.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.owner: type | None = None

    def add_class_arguments(self, theclass: Any, nested_key: Any = None, **kwargs: Any) -> Any:
        """Remember the class that the parser is for."""
        if nested_key is None:
            self.owner = theclass
        added = super().add_class_arguments(theclass, nested_key, **kwargs)
        if nested_key is None and isinstance(theclass, type) and issubclass(theclass, Logger):
            self._log_into_run_folder()
        return added

    def _log_into_run_folder(self) -> None:
        """Let a logger that needs a folder write into that of the run, by default."""
        for action in self._actions:
            if action.dest == "save_dir" and action.required:
                action.required = False
                self.set_defaults({"save_dir": RUN_FOLDER})

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


def _inner_mistake(error: BaseException | None) -> ParsingError | None:
    """Return the mistake of the next inner parser among the causes of an error."""
    while error is not None and not isinstance(error, ParsingError):
        error = error.__cause__
    return error
