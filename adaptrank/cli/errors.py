"""Tell a user's mistake from a bug, and print the mistake in one to three lines."""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from adaptrank._errors import ListedError, UserError, UserTypeError, nearest

Key = tuple[str | int, ...]
"""Path of a value in a configuration, as in ("model", "init_args", "adapters", 0, "targets")."""


class ConfigError(UserError):
    """A mistake in a configuration or on the command line.

    Args:
        message: the whole sentence.
        key: path of the value in the configuration, where it has one.
    """

    def __init__(self, message: str, key: Key = ()) -> None:
        super().__init__(message)
        self.key = key


def debugging(args: Sequence[str] = ()) -> bool:
    """Return True if `--debug` or ADAPTRANK_DEBUG asks for tracebacks."""
    return "--debug" in args or os.environ.get("ADAPTRANK_DEBUG", "0") not in ("", "0")


def fail(text: str) -> NoReturn:
    """Print a mistake to standard error and exit with 2."""
    print(f"adaptrank: {text}", file=sys.stderr)
    raise SystemExit(2)


def explain(error: BaseException) -> str | None:
    """Return the text of a user's mistake, or None for a bug, which keeps its traceback.

    A mistake is a UserError, an OSError of a file, Lightning's MisconfigurationException, or an
    ImportError that was raised by hand to name a missing package. Errors of constructors that the
    configuration names become a UserError in `constructing`.
    """
    error = unwrap(error)
    if isinstance(error, UserError):
        return str(error) if isinstance(error, ConfigError | ListedError) else _sentence(error)
    if isinstance(error, OSError) and not isinstance(error, ChildProcessError | BrokenPipeError):
        return _sentence(error)
    # The interpreter names the module of an import that fails. A library's own sentence has none.
    if isinstance(error, ImportError) and error.name is None:
        return _sentence(error)
    if type(error).__name__ == "MisconfigurationException":
        return _sentence(error)
    return None


@contextmanager
def constructing(name: str) -> Iterator[None]:
    """Turn the ValueError or TypeError of a configured class's constructor into a UserError.

    Args:
        name: the class, as the sentence should name it.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        cause = unwrap(error)
        if isinstance(cause, UserError):
            raise
        text = f"{name}: {_sentence(cause)}\n--debug shows the traceback."
        if isinstance(cause, TypeError):
            raise UserTypeError(text) from error
        if isinstance(cause, ValueError):
            raise ConfigError(text) from error
        raise


def unwrap(error: BaseException) -> BaseException:
    """Return the exception of a constructor, taken out of the report that jsonargparse makes."""
    reports = ("Does not validate", "Problem with given class_path", "Parser key")
    while not isinstance(error, UserError) and str(error).lstrip().startswith(reports):
        inner = error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    return error


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and len(error.args) > 1:
        return f"{error.filename}: {error.strerror}."
    text = str(error)
    # A process that loads data sends its traceback as text, and the sentence is its last line.
    if text.startswith("Caught ") and "in DataLoader worker" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    lines = [shorten(line.strip()) for line in text.splitlines() if line.strip()]
    return "\n".join(lines[:3]) or type(error).__name__


def shorten(line: str, most: int = 300) -> str:
    """Cut the middle out of a long line: its beginning says what is wrong, its end what to do."""
    if len(line) <= most:
        return line
    half = (most - 5) // 2
    head, tail = line[:half], line[-half:]
    head = head.rpartition(" ")[0] or head
    tail = tail.partition(" ")[2] or tail
    return f"{head} ... {tail}"


def missing_file(path: str, kind: str) -> str:
    """Return the sentence for a file or folder that is missing, with the nearest name."""
    where = Path(path).expanduser()
    parent = where.parent
    if not parent.is_dir():
        return f"There is no {kind} {path!r}: its folder {str(parent)!r} does not exist either."
    looks_like_folder = not where.suffix
    names = (entry.name for entry in parent.iterdir() if entry.is_dir() == looks_like_folder)
    near = nearest(where.name, names)
    hint = f" Did you mean {str(parent / near)!r}?" if near else ""
    return f"There is no {kind} {path!r}.{hint}"


def a_checkpoint(path: str) -> str:
    """Return the sentence for a checkpoint where an adapter belongs."""
    file = Path(path)
    out = shlex.quote(str(file.with_suffix("")))
    return (
        f"{path!r} is a checkpoint. Make an adapter of it first: "
        f"python -m adaptrank extract {shlex.quote(path)} --out {out}"
    )
