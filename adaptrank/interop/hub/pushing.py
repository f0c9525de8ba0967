"""Push an adapter to the Hugging Face Hub: its files and its card, in one commit."""

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adaptrank._errors import UserError
from adaptrank.artifacts import HubName, asking_hub, hub_is_offline, hub_name
from adaptrank.interop.hub.publishing import Publication, prepare

CARD = "README.md"

Readme = Literal["written", "kept", "none"]


@dataclass(frozen=True)
class Pushed:
    """An adapter that was pushed.

    Args:
        publication: what was pushed.
        address: page of the repository.
        commit: the commit, or the one that was there if nothing changed.
        readme: whether the card was "written", "kept" as it is on the Hub, or there is "none".
    """

    publication: Publication
    address: str
    commit: str
    readme: Readme


def push_adapter(
    folder: str | os.PathLike[str],
    name: str | HubName,
    *,
    base: str | None = None,
    private: bool = False,
    message: str | None = None,
    card: Callable[[Publication], str] | None = None,
    may_replace: Callable[[str], bool] | None = None,
    others: Mapping[str, Path] | None = None,
) -> Pushed:
    """Write an adapter into a repository on the Hub, in one commit.

    The repository and the branch are made if they do not exist. Only the tensors, the description
    and the card are pushed. A failure leaves the repository as it was, or empty.

    Args:
        folder: the adapter, of this library or in PEFT's format.
        name: the repository, and the branch to write, as `user/name` or `user/name@branch`.
        base: name of the base model on the Hub. None takes that in the adapter's file.
        private: whether only its owner can see a repository that is made now.
        message: message of the commit.
        card: makes the text of the card. None pushes no card.
        may_replace: tells of a card on the Hub whether it may be replaced. None keeps every card.
        others: name in the repository -> further file to push.
    Raises:
        FileNotFoundError: if there is no adapter in the folder.
        UserError: if the adapter is damaged, or the Hub refuses or cannot be reached.
    """
    if isinstance(name, str):
        name = hub_name(name)
    if hub_is_offline():
        raise UserError(
            f"{name} cannot be pushed: HF_HUB_OFFLINE forbids the network. Set HF_HUB_OFFLINE=0."
        )
    if name.revision is not None and re.fullmatch(r"[0-9a-f]{40}", name.revision):
        raise UserError(
            f"{name.revision} is a commit, which cannot be written. Name a branch with --revision."
        )
    with tempfile.TemporaryDirectory() as temporary:
        publication = prepare(Path(folder), Path(temporary) / "adapter", base)
        files = {file.name: file for file in sorted(publication.folder.iterdir())}
        files |= dict(others or {})
        # The card is made before anything is asked, so that a mistake in it leaves no repository.
        text = None if card is None else card(publication)
        with asking_hub(name, writes=True):
            return _commit(publication, files, text, name, private, message, may_replace)


def _commit(
    publication: Publication,
    files: Mapping[str, Path],
    card: str | None,
    name: HubName,
    private: bool,
    message: str | None,
    may_replace: Callable[[str], bool] | None,
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="adaptrank")
    _ensure_repository(api, name, private)
    readme: Readme = "none"
    operations = [CommitOperationAdd(path, str(file)) for path, file in files.items()]
    if card is not None:
        present = _present_card(name)
        keeps = present is not None and not (may_replace is not None and may_replace(present))
        readme = "kept" if keeps else "written"
        if not keeps:
            operations.append(CommitOperationAdd(CARD, card.encode()))
    commit = api.create_commit(
        name.repository,
        operations,
        commit_message=message or "Upload an adapter with adaptrank",
        revision=name.revision,
    )
    return Pushed(publication, f"{api.endpoint}/{name.repository}", str(commit.oid), readme)


def _ensure_repository(api: Any, name: HubName, private: bool) -> None:
    """Make the repository and the branch, if they do not exist."""
    api.create_repo(name.repository, private=private or None, exist_ok=True)
    # The Hub ignores `private` for a repository that is there already.
    if private and api.repo_info(name.repository).private is False:
        raise UserError(
            f"{name.repository} is there already, and everyone can see it: --private is for new "
            f"repositories. Make it private at {api.endpoint}/{name.repository}/settings first."
        )
    if name.revision not in (None, "main"):
        api.create_branch(name.repository, branch=name.revision, exist_ok=True)


def _present_card(name: HubName) -> str | None:
    """Return the card on the Hub, or None if there is none. The Hub's cache is left alone."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    with tempfile.TemporaryDirectory() as temporary:
        try:
            file = hf_hub_download(
                name.repository, CARD, revision=name.revision, local_dir=temporary
            )
        except (EntryNotFoundError, HfHubHTTPError) as error:
            if _is_missing(error):
                return None
            raise
        return Path(file).read_text(encoding="utf-8", errors="replace")


def _is_missing(error: BaseException | None) -> bool:
    """Return whether an error, or a cause of it, is the Hub's answer that there is no such file."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return bool(response.status_code == 404)
        error = error.__cause__ or error.__context__
    return False
