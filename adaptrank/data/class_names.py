"""Bring the class names of data together with those of a model that was trained before."""

import logging

from adaptrank._errors import UserError

log = logging.getLogger(__name__)

MOST_SHOWN = 20
"""Names of classes that a message lists."""


def merge_classes(trained: list[str], names: list[str]) -> list[str]:
    """Return names of classes in a trained model's numbering, so that its head fits the data.

    A class that the model has not seen takes the place of one that the data do not have. The log
    names both.

    Args:
        trained: names of the model's classes, in the order of its outputs.
        names: names of the classes of the data.

    Raises:
        UserError: if more classes are new than places are free.
    """
    new = [name for name in names if name not in trained]
    free = [name for name in trained if name not in names]
    if not new:
        return trained
    if len(new) > len(free):
        raise UserError(
            f"The model was trained on the classes {show(trained)}, and the data have "
            f"{show(names)}: it has no place for {show(new[len(free) :])}. Rename the labels, or "
            f"train a new adapter without `adapter`."
        )
    place_of = dict(zip(free, new, strict=False))
    log.warning(
        "The model was trained on the classes %s, and the data have %s. It was not trained on %s: "
        "scores mean nothing until it is, and %s.",
        show(trained),
        show(names),
        show(new),
        ", ".join(f"{name!r} has the output of {old!r}" for old, name in place_of.items()),
    )
    return [place_of.get(name, name) for name in trained]


def show(names: list[str]) -> str:
    """Return a list of names as text, the first ones of a long list."""
    return str(names if len(names) <= MOST_SHOWN else [*names[:MOST_SHOWN], "..."])
