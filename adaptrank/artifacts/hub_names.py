"""Names of adapters on the Hugging Face Hub: `user/name` or `user/name@revision`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from adaptrank._errors import UserError
from adaptrank.backbones import is_hub_id


@dataclass(frozen=True)
class HubName:
    """The name of a repository on the Hub.

    Args:
        repository: owner and name, `user/name`.
        revision: branch, tag or commit. None means the main branch.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def is_repository(name: str) -> bool:
    """Return whether a text has the form of a repository on the Hub, `name` or `user/name`."""
    return is_hub_id(name)


def parse_hub_name(name: str | os.PathLike[str]) -> HubName | None:
    """Return the name on the Hub that a text spells, or None if it spells none."""
    repository, at, revision = str(name).partition("@")
    if repository.count("/") != 1 or not is_hub_id(repository) or (at and not revision):
        return None
    return HubName(repository, revision or None)


def hub_name(text: str, revision: str | None = None) -> HubName:
    """Return the name on the Hub that a user typed.

    Args:
        text: `user/name` or `user/name@revision`.
        revision: a revision that was given beside it, or None.
    Raises:
        UserError: if it is no such name, or two revisions are given.
    """
    parsed = parse_hub_name(text)
    if parsed is None:
        hint = " It has no owner." if "/" not in text else ""
        raise UserError(
            f"{text!r} is no name on the Hub.{hint} Write user/name, or user/name@revision."
        )
    if revision is None:
        return parsed
    if parsed.revision not in (None, revision):
        raise UserError(
            f"{text!r} names the revision {parsed.revision!r}, and --revision says {revision!r}. "
            f"Give one."
        )
    return HubName(parsed.repository, revision)
