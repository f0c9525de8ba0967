"""Load models without the progress bars and the log of transformers and huggingface_hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def silenced() -> Iterator[None]:
    """Silence progress bars and logs of transformers and huggingface_hub, then restore them."""
    import huggingface_hub.utils
    import transformers.utils

    hub: Any = huggingface_hub.utils
    log: Any = transformers.utils.logging
    level, hub_level = log.get_verbosity(), hub.logging.get_verbosity()
    bars, no_hub_bars = log.is_progress_bar_enabled(), hub.are_progress_bars_disabled()
    log.set_verbosity_error()
    hub.logging.set_verbosity_error()
    # transformers disables the Hub's progress bars together with its own.
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        hub.logging.set_verbosity(hub_level)
        if bars:
            log.enable_progress_bar()
        if no_hub_bars:
            hub.disable_progress_bars()
