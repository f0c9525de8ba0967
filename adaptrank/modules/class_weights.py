"""Weights of classes in the loss, from a configuration or from how often each class occurs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrank._errors import UserError, did_you_mean
from adaptrank._options import NOT_NEGATIVE, check_number
from adaptrank.modules.problems import MultiLabel, Problem, Regression

ClassWeights = str | list[float] | dict[str, float]
"""The word "balanced", a weight for each class in order, or {name of a class: weight}."""

BALANCED = "balanced"


def check_class_weights(given: Any) -> None:
    """Check the form of the key `class_weights`, before there are classes.

    Raises:
        UserError: naming the value and what fits.
    """
    if given is None or given == BALANCED:
        return
    if isinstance(given, Mapping):
        numbers = {f"class_weights[{name}]": value for name, value in given.items()}
    elif isinstance(given, Sequence) and not isinstance(given, str):
        numbers = {f"class_weights[{index}]": value for index, value in enumerate(given)}
    else:
        raise UserError(
            f"class_weights={given!r} makes no sense. Give {BALANCED}, a list with a number for "
            "each class, or {name of a class: number}."
        )
    for name, value in numbers.items():
        check_number(name, value, NOT_NEGATIVE)
    if not any(numbers.values()):
        raise UserError(
            f"class_weights={given!r} leaves nothing to train on: no weight is above 0."
        )


def resolve_weights(
    given: ClassWeights, problem: Problem, names: Sequence[str] | None, counts: Tensor | None
) -> Tensor:
    """Return the weight of each class, (L,), of which the least above zero is 1.

    The weighted mean does not depend on their scale, and a sum of weights is then at least 1. For
    several labels the scale matters, since a weight multiplies the positive rows alone. There
    weights stay as they are.

    Args:
        given: key `class_weights`. Classes that a mapping leaves out have the weight 1. "balanced"
            is rows / (classes * rows of the class), as in scikit-learn, or for several labels the
            ratio of rows without a class to rows with it.
        problem: kind of the labels.
        names: names of the classes, or None.
        counts: number of training rows of each class, (L,). For several labels one row more, (2,
            L): those without the class come first. Needed for "balanced".

    Raises:
        UserError: if there is no weight for a class, or no class for a weight.
    """
    if isinstance(problem, Regression):
        raise UserError("class_weights are for classes, and a regression has none. Remove them.")
    if given == BALANCED:
        weights = _balance(problem, counts)
    elif isinstance(given, Mapping):
        weights = _by_name(given, problem.labels, names)
    else:
        weights = torch.tensor(given, dtype=torch.float32)
    if len(weights) != problem.labels:
        raise UserError(
            f"class_weights has {len(weights)} numbers, and there are {problem.labels} classes. "
            "Give one for each class."
        )
    if isinstance(problem, MultiLabel):
        return weights
    return weights / weights[weights > 0].min()


def _by_name(given: Mapping[str, float], labels: int, names: Sequence[str] | None) -> Tensor:
    known = list(names) if names is not None else [str(index) for index in range(labels)]
    weights = torch.ones(labels)
    for name, weight in given.items():
        # YAML reads the name 1 as a number.
        if str(name) not in known:
            raise UserError(
                f"class_weights names {str(name)!r}, which is none of the classes "
                f"{known[:20]}.{did_you_mean(str(name), known)}"
            )
        weights[known.index(str(name))] = weight
    return weights


def _balance(problem: Problem, counts: Tensor | None) -> Tensor:
    """Return weights by which each class counts alike. A class without a row has none."""
    if counts is None:
        raise UserError(
            "class_weights: balanced counts the classes of the training rows, and the data module "
            "counts none. Give a list with a number for each class."
        )
    values = counts.to(torch.float64)
    if isinstance(problem, MultiLabel):
        without, with_class = values
        weights = torch.where(with_class > 0, without / with_class.clamp(min=1), 1.0)
        # A class that each row has would not be trained on.
        return torch.where(weights > 0, weights, 1.0).float()
    present = values > 0
    weights = values.sum() / (present.sum() * values.clamp(min=1))
    return torch.where(present, weights, 0.0).float()
