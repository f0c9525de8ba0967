"""Options and errors of the verbs beside fit, validate, test and predict.

Each of these verbs is a file in `verbs/` with a DESCRIPTION, `add_options(parser)` and
`run(options)`. What is heavy is imported in `run`, so that help is there at once.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from adaptrank._errors import did_you_mean
from adaptrank.cli import errors

# `import` is a word that Python keeps for itself.
FILES = {"import": "import_"}

BASE = "the base model; by default the one that the adapter's file names"
FORCE = "replace a folder that is not empty"
ADAPTER = (
    "a run's adapter folder, or its name on the Hub, user/name[@revision]. `--adapter ADAPTER` is "
    "the same"
)
TRUST = "run Python code that comes with the base; read it first"


class OptionParser(argparse.ArgumentParser):
    """Says what is wrong in a line or two, with the nearest option."""

    def check_options(self, args: Sequence[str]) -> None:
        """Refuse misspelt options. argparse would first report options that are missing."""
        known = list(self._option_string_actions)
        for arg in args:
            name = arg.partition("=")[0]
            if arg.startswith("--") and name not in known:
                hint = did_you_mean(name, known)
                errors.fail(f"unknown option {name}.{hint} `{self.prog} --help` lists them.")

    def adapters_first(self, args: Sequence[str]) -> list[str]:
        """Return arguments in which each `--adapter NAME` is a positional one, in front.

        fit, validate, test and predict take `--adapter`. It means the same wherever a verb takes
        adapters.
        """
        takes_adapters = any(
            not action.option_strings and str(action.metavar).startswith("ADAPTER")
            for action in self._actions
        )
        if not takes_adapters:
            return list(args)
        adapters, others = [], []
        rest = list(args)
        while rest:
            name, equals, value = rest.pop(0).partition("=")
            if name != "--adapter":
                others.append(f"{name}{equals}{value}")
            elif equals or rest:
                adapters.append(value if equals else rest.pop(0))
            else:
                self.error("--adapter needs a value")
        return [*adapters, *others]

    def error(self, message: str) -> NoReturn:
        """Print a mistake and exit with 2."""
        errors.fail(f"{message}. `{self.prog} --help` shows how.")


def make_parser(verb: str, description: str) -> OptionParser:
    """Return the parser of a verb, with the options that all verbs have."""
    parser = OptionParser(
        prog=f"python -m adaptrank {verb}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    modules = "import your own module first, so that its classes are known (repeatable)"
    parser.add_argument(
        "--import", dest="modules", action="append", default=[], metavar="MODULE", help=modules
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake, too")
    return parser


def run_verb(verb: str, args: Sequence[str]) -> None:
    """Parse the options of a verb and run it.

    A mistake prints its sentence and exits with 2. A bug keeps its traceback.
    """
    from adaptrank.cli.quiet import quiet

    module = importlib.import_module(f"adaptrank.cli.verbs.{FILES.get(verb, verb)}")
    parser = make_parser(verb, module.DESCRIPTION)
    module.add_options(parser)
    args = parser.adapters_first(args)
    if getattr(module, "TAKES_KEYS", False):
        options, keys = parser.parse_known_args(args)
        options.keys = keys
    else:
        parser.check_options(args)
        options = parser.parse_args(args)
    try:
        with quiet():
            import_modules(options.modules)
            module.run(options)
    except BrokenPipeError:
        # `| head` closed the pipe. What Python flushes at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        raise SystemExit(1) from None
    except Exception as error:
        text = errors.explain(error)
        if text is None or errors.debugging() or options.debug:
            raise
        errors.fail(text)


def import_modules(modules: Iterable[str]) -> None:
    """Import a user's own modules.

    Raises:
        ConfigError: if there is no such module.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            is_there = error.name is None or not f"{module}.".startswith(f"{error.name}.")
            # The module itself imports something that is missing.
            if is_there:
                raise
            hint = did_you_mean(module, (file.stem for file in Path().glob("*.py")))
            raise errors.ConfigError(
                f"--import: there is no module {module!r}.{hint} It is looked for in the folder "
                f"you start from, and on PYTHONPATH."
            ) from None
