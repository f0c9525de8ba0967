"""Errors of the Hugging Face Hub, as one sentence each."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from adaptrank._errors import UserError
from adaptrank.artifacts.hub_names import HubName

NO_NETWORK = ("ConnectError", "TimeoutException", "ConnectTimeout", "ReadTimeout", "ProxyError")
"""Names of the classes of errors of HTTP clients that mean: nobody answers."""


@contextmanager
def asking_hub(name: HubName, writes: bool = False) -> Iterator[None]:
    """Turn an error of the Hub, or of the way to it, into one sentence. Bars are for terminals.

    Args:
        name: the repository that is read or written.
        writes: whether it is written.
    Raises:
        UserError: for every error that the user can mend.
    """
    try:
        with _bars_on_terminals():
            yield
    except UserError:
        raise
    except Exception as error:
        text = next(filter(None, (_sentence(cause, name, writes) for cause in _chain(error))), None)
        if text is None:
            raise
        raise UserError(text) from error


def hub_is_offline() -> bool:
    """Return whether the user forbids the network, by HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Show the Hub's progress bars on a terminal only, and errors only of its log."""
    import huggingface_hub.utils

    hub: Any = huggingface_hub.utils
    hides = not sys.stderr.isatty() and not hub.are_progress_bars_disabled()
    if hides:
        hub.disable_progress_bars()
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        if hides:
            hub.enable_progress_bars()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the causes of an error, the first one first, and the error itself last."""
    if error is not None:
        yield from _chain(error.__cause__ or error.__context__)
        yield error


def _sentence(error: BaseException, name: HubName, writes: bool) -> str | None:
    """Return the sentence of one error, or None if it says nothing about the Hub."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        verb = "pushed" if writes else "fetched"
        return f"{name} cannot be {verb}: HF_HUB_OFFLINE forbids the network. Set HF_HUB_OFFLINE=0."
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, name, writes)
    names = [cls.__name__ for cls in type(error).__mro__]
    if any(known in names for known in NO_NETWORK) or isinstance(error, ConnectionError):
        return (
            f"The Hub at {constants.ENDPOINT} cannot be reached ({_reason(error)}). "
            f"{_unwritten(name) if writes else f'{name} is not in the cache.'}"
        )
    if isinstance(error, ValueError) and "metadata in README.md" in str(error):
        reason = " ".join(str(error).split())
        return f"The Hub refuses the card of {name}: {reason} {_unwritten(name)}"
    return None


def _reason(error: BaseException) -> str:
    """Return the class of an error, and the beginning of what it says."""
    said = " ".join(str(error).split()).rstrip(".")[:120]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _refusal(error: Any, name: HubName, writes: bool) -> str:
    """Return the sentence of an answer that refuses."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{name.repository}"
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: ask for access at {page}, and log in with `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return f"{name.repository} has no revision {name.revision or 'main'!r} on the Hub."
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{name} on the Hub lacks a file that an adapter has."
    if writes and status in (401, 403):
        return (
            f"The Hub does not let you write {name} ({status}): log in with `hf auth login`, "
            f"with a token that may write there. {_unwritten(name)}"
        )
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return (
            f"The Hub has no repository {name.repository}, or it is private ({status}): check the "
            f"name, or log in with `hf auth login`."
        )
    if status in (401, 403):
        return f"The Hub does not let you read {name} ({status}): log in with `hf auth login`."
    if writes and status in (409, 412):
        return f"{name} changed on the Hub meanwhile ({status}). Push again. {_unwritten(name)}"
    if status == 429:
        return (
            f"The Hub asks for a pause (429): try again later. {_unwritten(name, writes)}".strip()
        )
    if status >= 500:
        return (
            f"The Hub fails to answer for {name} ({status}): try again later. "
            f"{_unwritten(name, writes)}"
        ).strip()
    reason = " ".join(str(error.server_message or error).split())[:200]
    return f"The Hub refuses {name} ({status}): {reason} {_unwritten(name, writes)}".strip()


def _unwritten(name: HubName, writes: bool = True) -> str:
    return f"Nothing was written to {name}." if writes else ""
