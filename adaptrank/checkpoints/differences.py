"""Differences between a run and its checkpoint, each as a clause, and the refusal that names them.

The functions are pure: plain values go in, and clauses come out.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from adaptrank._errors import ListedError

NONE = object()
"""Stands for a setting that one side does not have."""
MOST_TEXT = 80
"""Characters of a value in a sentence."""


class Difference(NamedTuple):
    """One setting that differs.

    Args:
        name: name of the setting, as the user types it.
        clause: what it is here and in the checkpoint.
    """

    name: str
    clause: str


def compare_settings(
    here: Mapping[str, Any],
    stored: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    of: str = "",
) -> list[Difference]:
    """Return the settings that differ.

    A setting that only one side knows differs unless it has its default value there: another
    version of the library may have added it.

    Args:
        here: settings of this run.
        stored: settings in the checkpoint.
        defaults: default values of the settings. A setting of one side that has none differs.
        of: words after the name, as in " of LoRA".
    """
    defaults = defaults or {}
    differences = []
    for name in dict.fromkeys([*here, *stored]):
        new = here.get(name, defaults.get(name, NONE))
        old = stored.get(name, defaults.get(name, NONE))
        if not equal(new, old):
            clause = f"{name}{of} is {spell(new)} here and {spell(old)} in the checkpoint"
            differences.append(Difference(name, clause))
    return differences


def equal(new: Any, old: Any) -> bool:
    """Return whether two plain values are equal. 1 and 1.0 are: files of YAML do not tell."""
    if new is NONE or old is NONE:
        return new is old
    if isinstance(new, bool) != isinstance(old, bool):
        return False
    return bool(new == old) or (new != new and old != old)


def spell(value: Any) -> str:
    """Return a value as a short text."""
    if value is NONE:
        return "not set"
    text = repr(value)
    return text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 4]} ..."


def refuse(differences: Sequence[Difference], what: str = "The checkpoint") -> NoReturn:
    """Refuse to resume, naming each difference.

    Args:
        differences: at least one.
        what: subject of the sentence.
    Raises:
        ListedError: always.
    """
    listed = "; ".join(dict.fromkeys(difference.clause for difference in differences))
    raise ListedError(f"{what} belongs to another run: {listed}.\n{WHAT_TO_TYPE}")


WHAT_TO_TYPE = (
    "Resume with the configuration of that run, start a new run from its adapter (model.adapter), "
    "or accept the changes: --accept_changes true, in Python accept_changes = True on the module "
    "(in a loop of your own: on the allocator)."
)
