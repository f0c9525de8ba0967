"""Silence other libraries' tips and deprecations, and show the library's own warnings plainly."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from adaptrank.cli.verbosity import is_quiet, verbosity

NOISY = (
    "lightning.pytorch",
    "lightning.fabric",
    "lightning.pytorch.utilities.rank_zero",
    # transformers imports both where they are installed. They warn of kernels for other machines.
    "torchao",
    "bitsandbytes",
    # torch warns of how torchao registers its types.
    "torch.utils._pytree",
)
"""Loggers of which only errors are shown."""


@contextmanager
def quiet() -> Iterator[None]:
    """Show other libraries' errors only, and the library's own warnings as plain sentences.

    With `--verbose`, all that this library and Lightning log is shown, and every warning.
    """
    is_verbose = verbosity() == "verbose"
    noisy = [(logger, logger.level) for logger in map(logging.getLogger, NOISY)]
    for logger, _ in noisy:
        logger.setLevel(logging.INFO if is_verbose else logging.ERROR)
    # Data say how they were recognized and packed.
    notes = logging.getLogger("adaptrank.data")
    noisy.append((notes, notes.level))
    if not is_quiet():
        notes.setLevel(logging.INFO)
    log = logging.getLogger("adaptrank")
    own_level = log.level
    if is_verbose:
        log.setLevel(logging.DEBUG)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    propagate, log.propagate = log.propagate, False
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    foreign = r"(lightning|torch|transformers|jsonargparse)\b.*"
    try:
        with warnings.catch_warnings():
            warnings.formatwarning = lambda message, *_: f"{message}\n"
            for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", category)
            warnings.filterwarnings("ignore", module=foreign)
            if is_verbose:
                warnings.resetwarnings()
            yield
    finally:
        for logger, level in noisy:
            logger.setLevel(level)
        log.removeHandler(handler)
        log.setLevel(own_level)
        log.propagate = propagate
