"""Recognize splits by the names of files, folders and splits of a data set."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adaptrank._errors import UserError

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": (
        "validation",
        "validate",
        "valid",
        "val",
        "dev",
        "development",
        "eval",
        "evaluation",
        "evaluate",
    ),
    "test": ("test", "testing"),
}
"""Split -> the words that name it, in any case."""

SPLIT_OF = {word: split for split, words in SPLIT_NAMES.items() for word in words}
"""Word -> the split that it names."""

COUNTS = re.compile(r"\d+|of|set")
"""Components at the end of a name that only count or describe, as in train-00000-of-00003."""


@dataclass(frozen=True)
class Origin:
    """Names by which the rows of a table were chosen, out of several files, folders or splits.

    Args:
        names: names of the chosen files, folders or splits. Empty where nothing had to be chosen.
        unread: names of data beside them that belong to no split.
        is_rest: whether the rows are those of files that no split claims.
    """

    names: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    is_rest: bool = False


def split_word(stem: str) -> str | None:
    """Return the split's word at the beginning or at the end of a name.

    The word is a component of its own: "gsm_train" and "TestData" have one, and "contest" has
    none. The result is None as well if the beginning and the end name different splits.

    Args:
        stem: a name without the ending of a file.
    """
    parts = _components(stem)
    while parts and COUNTS.fullmatch(parts[-1]):
        parts.pop()
    if not parts:
        return None
    first, last = _word_of(parts[0]), _word_of(parts[-1])
    if first and last and SPLIT_OF[first] != SPLIT_OF[last]:
        return None
    return first or last


def split_of(stem: str) -> str | None:
    """Return the split that a name belongs to, or None."""
    word = split_word(stem)
    return None if word is None else SPLIT_OF[word]


def has_split_word(stem: str) -> bool:
    """Tell whether some component of a name is a split's word."""
    return any(_word_of(part) for part in _components(stem))


def is_split_name(name: str) -> bool:
    """Tell whether a whole name is a split's word, such as "Training" or "test_set"."""
    word = re.sub(r"[\W_]*set$", "", name.lower())
    return word in SPLIT_OF


def is_named(stem: str, name: str) -> bool:
    """Tell whether a name begins or ends with the name of a split, as a component of its own."""
    stem, name = stem.lower(), name.lower()
    escaped = re.escape(name)
    return re.search(rf"^{escaped}(?![^\W_])|(?<![^\W_]){escaped}$", stem) is not None


def names_of_split(
    stems: Sequence[str],
    split: str,
    place: str,
    advice: str = "Give the path of one of them, or rename the others",
) -> list[int]:
    """Return the indices of the names that belong to a split.

    Args:
        stems: the names, without the endings of files.
        split: "train", "validation" or "test", or another name that stands in the names.
        place: path of the source, for the error.
        advice: what to do where several words name the split.

    Raises:
        UserError: if several words name the split, such as "dev" and "eval".
    """
    if split not in SPLIT_NAMES:
        return [k for k, stem in enumerate(stems) if is_named(stem, split)]
    chosen = [k for k, stem in enumerate(stems) if split_of(stem) == split]
    words = {split_word(stems[k]) for k in chosen}
    if len(words) > 1:
        raise UserError(
            f"{place!r} has its {split} split under several names: "
            f"{quoted(stems[k] for k in chosen)}. {advice}."
        )
    return chosen


def name_of_split(names: Sequence[str], split: str, place: str) -> str | None:
    """Return the name of a split among the splits of a data set, or None.

    Args:
        names: the splits of the data set. The name itself comes before words that mean the same.
        split: the split.
        place: path of the data set, for the error.

    Raises:
        UserError: if several of its names mean the split, such as "dev" and "eval".
    """
    if split in names or split not in SPLIT_NAMES:
        return split if split in names else None
    known = [name for name in names if is_split_name(name)]
    chosen = names_of_split(known, split, place, "Set `split` to one of them")
    return known[chosen[0]] if chosen else None


def quoted(names: Iterable[str]) -> str:
    """Return names in quotes, joined by commas."""
    return ", ".join(map(repr, names))


def _components(stem: str) -> list[str]:
    """Return the parts of a name between separators, and between a small and a capital letter."""
    parts = re.split(r"[\W_]+|(?<=[a-z0-9])(?=[A-Z])", stem)
    return [part.lower() for part in parts if part]


def _word_of(part: str) -> str | None:
    """Return the split's word that a component is, also in forms such as "train2" or "testset"."""
    word = re.sub(r"(set)?\d*$", "", part)
    return word if word in SPLIT_OF else None
