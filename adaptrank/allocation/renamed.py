"""An argument of an allocator that was given by its previous name."""

import warnings
from typing import TypeVar

from adaptrank._errors import UserError

Value = TypeVar("Value")


def renamed_rule(owner: str, previous: str, value: Value, rule: Value, default: Value) -> Value:
    """Return the rule that an argument with a previous name asks for, and warn about the name.

    Args:
        owner: class of the allocator.
        previous: the argument as it was given, "name=value".
        value: the rule that it stands for.
        rule: the argument `rule`.
        default: default of `rule`.
    Raises:
        UserError: if `rule` was given as well, and asks for another one.
    """
    if rule not in (default, value):
        raise UserError(
            f"{owner}: {previous} means rule={value!r}, and rule={rule!r} was given as well; leave "
            f"{previous} out."
        )
    warnings.warn(
        f"{owner}({previous}) is {owner}(rule={value!r}) now; change it.", FutureWarning, 3
    )
    return value
