"""What the command line shows of other libraries: errors, and nothing else; what adaptrank warns of is shown plainly."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out Lightning's tips and other libraries' deprecations; what we warn of is shown in plain sentences."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    log = logging.getLogger("adaptrank")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    propagate, log.propagate = log.propagate, False
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    try:
        with warnings.catch_warnings():
            warnings.formatwarning = lambda message, *_: f"{message}\n"
            for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", category)
            warnings.filterwarnings("ignore", module=r"(lightning|torch|transformers|jsonargparse)\b.*")
            yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagate
