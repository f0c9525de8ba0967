"""What the command line shows of other libraries: errors, and nothing else; what adaptrank warns of is shown plainly."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out Lightning's tips and other libraries' deprecations; what we warn of is shown in plain sentences."""
    names = (
        "lightning.pytorch",
        "lightning.fabric",
        "lightning.pytorch.utilities.rank_zero",
        "torchao",  # transformers imports both where they are installed, and they warn of kernels for other machines
        "bitsandbytes",
        "torch.utils._pytree",  # and torch of how torchao registers its types
    )
    theirs = [(logger, logger.level) for logger in map(logging.getLogger, names)]
    for logger, _ in theirs:
        logger.setLevel(logging.ERROR)
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
            warnings.filterwarnings(
                "ignore", module=r"(lightning|torch|transformers|jsonargparse)\b.*"
            )
            yield
    finally:
        for logger, level in theirs:
            logger.setLevel(level)
        log.removeHandler(handler)
        log.propagate = propagate
