"""A quick start and a quick end of commands that import PyTorch."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Within the block, let the garbage collector rest.

    Imports make many objects and little garbage. A collector that looks at all of them again and
    again takes a tenth of their time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@cache
def end_without_garbage_collection() -> None:
    """Spare the process its last garbage collection, which takes a second after such imports.

    Files that are left open in a cycle of objects would not be written to their end. So it is only
    for commands that write nothing.
    """
    atexit.register(gc.freeze)
