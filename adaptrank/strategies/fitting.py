"""Table of the training strategies that work on each method, and beside each allocator.

The answers are the refusals themselves: a strategy prepares an example, or is asked about an
allocator with default arguments.
"""

import re
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

from adaptrank._errors import UserError
from adaptrank.allocation import Participant
from adaptrank.parameterizations import PARAMETERIZATIONS
from adaptrank.strategies.strategy import TrainingStrategy

T = TypeVar("T")

WORKS = "works"
NO_DEFAULTS = "its arguments have no defaults to try"
METHOD = "<method>"
"""Stands for the names of the methods in a reason, so that equal reasons are equal texts."""


def on_method(strategy: type[TrainingStrategy], *methods: str) -> str:
    """Return what becomes of a strategy on a parameterization or a nest, all at their defaults.

    Args:
        strategy: class of the strategy.
        methods: class names of a nest, innermost first.
    Returns:
        "works", or the reason of the refusal, in which `METHOD` stands for the names.
    """
    asked = _with_defaults(strategy)
    if asked is None:
        return NO_DEFAULTS
    try:
        asked.prepare(_example(methods, strategy.beside))
    except UserError as error:
        return _without_names(str(error), methods)
    return WORKS


def beside_allocator(strategy: type[TrainingStrategy], allocator: type[Participant]) -> str:
    """Return "works", or why a strategy refuses an allocator, both at their defaults."""
    asked, beside = _with_defaults(strategy), _with_defaults(allocator)
    if asked is None or beside is None:
        return NO_DEFAULTS
    return asked.refuses_allocator(beside) or WORKS


def _with_defaults(cls: type[T]) -> T | None:
    """Return an object with default arguments, or None for a user's class without them."""
    try:
        return cls()
    except TypeError:
        return None


def _example(methods: Iterable[str], beside: Iterable[str]) -> nn.Module:
    """Return a model with a nest on the example of its innermost method, and others beside it."""
    first, *others = methods
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = PARAMETERIZATIONS[first](PARAMETERIZATIONS[first].example())
        for name in others:
            layer = PARAMETERIZATIONS[name](layer)
        model = nn.Module()
        model.layer = layer
        for number, name in enumerate(beside):
            method = PARAMETERIZATIONS[name]
            model.add_module(f"beside_{number}", method(method.example()))
    return model


def _without_names(sentence: str, methods: Iterable[str]) -> str:
    """Return a refusal without the path of the example, its methods' names, and the advice."""
    reason = sentence.removeprefix("layer: ").split(";")[0]
    for name in methods:
        reason = re.sub(rf"\b{name}\b", METHOD, reason)
    return reason
