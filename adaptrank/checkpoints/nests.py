"""Nests of a model by layer, as plain values, and how two models differ in them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from adaptrank import artifacts
from adaptrank._errors import some
from adaptrank.checkpoints.differences import Difference, compare_settings
from adaptrank.checkpoints.plain_values import constructor_defaults, plain
from adaptrank.parameterizations import PARAMETERIZATIONS

Nest = Sequence[Mapping[str, Any]]
"""Class, arguments and adapter name of each wrapper, innermost first."""


def describe_nests(model: nn.Module) -> list[dict[str, Any]]:
    """List the different nests of a model in plain values, as a file's description does."""
    described: list[dict[str, Any]] = plain(artifacts.describe_nests(model, None))
    return described


def compare_nests(
    here: Sequence[Mapping[str, Any]], stored: Sequence[Mapping[str, Any]]
) -> list[Difference]:
    """Return how two lists of nests differ: methods, their arguments, and the layers.

    Args:
        here: nests of this run's model, [{"nest", "layers"}].
        stored: nests in the checkpoint.
    """
    new, old = _by_layer(here), _by_layer(stored)
    differences = []
    for side, paths in (("here", new.keys() - old.keys()), ("there", old.keys() - new.keys())):
        if paths:
            where = "has an adapter here and none" if side == "here" else "has none here and one"
            others = "" if len(paths) == 1 else f" (and {len(paths) - 1} more)"
            clause = f"{min(paths)}{others} {where} in the checkpoint"
            differences.append(Difference("targets", clause))
    common = [path for path in new if path in old]
    places: dict[Difference, list[str]] = {}
    for path in common:
        for difference in _compare_nest(new[path], old[path]):
            places.setdefault(difference, []).append(path)
    for difference, differing in places.items():
        where = "" if len(differing) == len(common) else f" (at {some(differing, 2)})"
        differences.append(Difference(difference.name, difference.clause + where))
    return differences


def _by_layer(entries: Sequence[Mapping[str, Any]]) -> dict[str, Nest]:
    return {path: entry["nest"] for entry in entries for path in entry["layers"]}


def _compare_nest(new: Nest, old: Nest) -> list[Difference]:
    classes_new, classes_old = _classes(new), _classes(old)
    if classes_new != classes_old:
        clause = f"the method is {classes_new} here and {classes_old} in the checkpoint"
        return [Difference("parameterization", clause)]
    differences = []
    for mine, theirs in zip(new, old, strict=True):
        name = mine["class"]
        known = name in PARAMETERIZATIONS
        defaults = constructor_defaults(PARAMETERIZATIONS[name]) if known else {}
        of = f" of {name}" if len(new) > 1 else ""
        differences += compare_settings(
            plain(mine["init_args"]), plain(theirs["init_args"]), defaults, of
        )
        differences += compare_settings({"name": mine["name"]}, {"name": theirs["name"]}, of=of)
    return differences


def _classes(nest: Nest) -> str:
    return " on ".join(wrapper["class"] for wrapper in reversed(nest))
