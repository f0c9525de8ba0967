"""The warning about an argument of an allocator that has another name now."""

import warnings


def warn_renamed(owner: str, previous: str, present: str) -> None:
    """Warn that an argument was given by its previous name.

    Args:
        owner: class of the allocator.
        previous: the argument as it was given, "name=value".
        present: the same in its present name.
    """
    warnings.warn(f"{owner}({previous}) is {owner}({present}) now; change it.", FutureWarning, 3)
