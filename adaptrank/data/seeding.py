"""Random number generators that depend on a key and on nothing else."""

import random


def seeded_random(*key: object) -> random.Random:
    """Return a generator seeded by `key`.

    It is the same on every machine, and independent of every global generator.
    """
    return random.Random(repr(key))
