"""Errors of loading, in one sentence in place of transformers' page of advice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from adaptrank._errors import UserError
from adaptrank.backbones.loading_options import LoadingOptions
from adaptrank.backbones.lookup import Source
from adaptrank.backbones.silence import silenced
from adaptrank.backbones.wheels import WHEELS, nearest_listed


@contextmanager
def loading(source: Source, kind: str, options: LoadingOptions) -> Iterator[None]:
    """Load in silence, and turn transformers' page of advice into one sentence for this source.

    Args:
        source: where the files come from.
        kind: "model", "tokenizer" or "configuration", for the sentence.
        options: how it is loaded.
    """
    try:
        with silenced():
            if source.kind == "hub":
                _check_hub_answers(source.path, source.revision)
            yield
    except OSError as error:
        if source.kind == "hub":
            raise OSError(_explain_hub_failure(source, kind, error)) from error
        raise OSError(_explain_local_failure(source, kind, error)) from error
    except (ValueError, ImportError) as error:
        sentence = _explain_options(source, kind, options, error)
        if sentence is None:
            raise
        raise UserError(sentence) from error


def _explain_options(
    source: Source, kind: str, options: LoadingOptions, error: Exception
) -> str | None:
    """Return the sentence for an option that does not fit the model, or None for another error."""
    if isinstance(error, UserError):
        return None
    text = str(error)
    if "trust_remote_code" in text and not options.trust_remote_code:
        return (
            f"The {kind} of {source.name} is Python code that comes with it ({source.path}), and "
            f"it is not run. Read it, and if you trust it, set model.trust_remote_code: true "
            f"(in a command such as generate or merge: --trust_remote_code)."
        )
    if options.attention is not None and re.search("attention|attn|flash|kernel", text.lower()):
        return (
            f"attn_implementation={options.attention} does not go with {source.name}: "
            f"{first_line(error)}"
        )
    return None


def _check_hub_answers(name: str, revision: str | None) -> None:
    """Raise at once if the Hub cannot be reached.

    `from_pretrained` would retry each of the files for half a minute.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision))
    except HfHubHTTPError:
        # The Hub answered. Whether it serves the model is for `from_pretrained` to find out.
        return
    # The class of the error depends on the HTTP client that huggingface_hub uses.
    except Exception as error:
        raise ConnectionError(f"the Hub cannot be reached: {first_line(error)}") from error


def _explain_local_failure(source: Source, kind: str, error: OSError) -> str:
    text = f"No {kind} loads from {source.describe()}: {first_line(error)}"
    if source.kind == "cache" and not source.wheel:
        return f"{text} (`hf download {source.name}` completes the copy)"
    return text


def _explain_hub_failure(source: Source, kind: str, error: OSError) -> str:
    tried = (
        f"No {kind} {source.name!r}: not a local folder, not in the local cache, in no installed "
        f"wheel, not on {_describe_hub(error)}."
    )
    if wheel := WHEELS.get(source.name):
        return f"{tried} Install it with `{wheel.install}`, or give a local folder."
    listed = nearest_listed(source.name)
    question = f" Did you mean {listed!r}?" if listed else ""
    return f"{tried} Give a local folder.{question}"


def _describe_hub(error: OSError) -> str:
    """Say why the Hub did not serve the model."""
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    causes = list(_causes(error))
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return "the Hub, which HF_HUB_OFFLINE forbids"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return "the Hub, which has no such model or asks for a login (`hf auth login`)"
    if isinstance(error, ConnectionError):
        return "the Hub, which cannot be reached"
    return f"the Hub ({first_line(error).rstrip('.')})"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and the chain of its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: BaseException) -> str:
    """Return the first line of an error, or its class if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
