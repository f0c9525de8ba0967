"""A user's mistake as an exception class, and the nearest name for a word that was mistyped."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can mend: the command line prints its sentence without a traceback.

    The message says what arrived, what fits, and what to type.
    """


class UserTypeError(UserError, TypeError):
    """A user's mistake about a type: a layer of the wrong kind, an argument of the wrong class."""


class RunError(UserError, RuntimeError):
    """A run that cannot go on: the command prints its sentence, although training has begun."""


class ListedError(UserError):
    """A mistake whose sentence lists several details. The command line prints all of it."""


def nearest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Return the most similar name, ignoring case, or None if no name is similar.

    A dotted path is compared as a whole first, and by its last component second.
    """
    names = list(dict.fromkeys(known))
    for key in (str.lower, _last_component):
        keyed = {key(name): name for name in reversed(names)}
        close = difflib.get_close_matches(key(str(word)), keyed, n=1, cutoff=cutoff)
        if close:
            return keyed[close[0]]
    return None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest name, or "" if no name is similar."""
    name = nearest(word, known)
    return f" Did you mean {name!r}?" if name else ""


def some(names: Iterable[str], most: int = 8) -> str:
    """Return the first names joined by commas, and how many more there are."""
    listed = list(names)
    rest = len(listed) - most
    text = ", ".join(listed[:most])
    return f"{text} and {rest} more" if rest > 0 else text


def _last_component(name: str) -> str:
    return name.rpartition(".")[2].lower()
