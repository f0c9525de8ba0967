"""Amount of output: `--quiet`, `--verbose`, or the variable ADAPTRANK_LOG."""

import os
from collections.abc import Sequence

from adaptrank._errors import did_you_mean
from adaptrank.cli.errors import fail

VARIABLE = "ADAPTRANK_LOG"
LEVELS = ("quiet", "normal", "verbose")


def read_verbosity(args: Sequence[str]) -> list[str]:
    """Return the arguments without `--quiet` and `--verbose`, which set ADAPTRANK_LOG.

    Processes that the command starts inherit the variable. A wrong value exits with 2.
    """
    rest = [arg for arg in args if arg not in ("--quiet", "--verbose")]
    given = [arg.removeprefix("--") for arg in args if arg in ("--quiet", "--verbose")]
    if len(set(given)) > 1:
        fail("--quiet and --verbose contradict each other. Give one of them.")
    if given:
        os.environ[VARIABLE] = given[0]
    level = verbosity()
    if level not in LEVELS:
        hint = did_you_mean(level, LEVELS)
        fail(f"{VARIABLE}={level!r} is no level.{hint} Use one of {', '.join(LEVELS)}.")
    return rest


def verbosity() -> str:
    """Return the level: quiet, normal or verbose."""
    return os.environ.get(VARIABLE) or "normal"


def is_quiet() -> bool:
    """Return whether notes and progress are left out."""
    return verbosity() == "quiet"
