"""Load a pretrained model and its tokenizer quietly, with errors of one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptrank._errors import UserError
from adaptrank.backbones.lookup import Source
from adaptrank.backbones.silence import silenced
from adaptrank.backbones.wheels import WHEELS, nearest_listed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")

NO_PILLOW = "Images need Pillow. Install it with `pip install 'adaptrank[vision]'`."

UNSTATED_LENGTH = 10**20
"""Tokenizers of transformers state 1e30 tokens where no maximal length is known."""


def load_model(
    source: Source,
    auto_class: type[Any],
    dtype: torch.dtype,
    fresh_head: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load the model of `source` without progress bars and without a report on a new head.

    Args:
        source: result of `resolve`.
        auto_class: class of transformers that chooses the head, such as `AutoModelForCausalLM`.
        dtype: dtype of the weights. See `auto_dtype`.
        fresh_head: start a head anew whose weights differ in size, for example of a model that was
            fine-tuned on other classes.
        **kwargs: further arguments of `from_pretrained`, such as `num_labels=3`.

    Warns:
        UserWarning: if weights of the backbone itself are missing, so that they start random.

    Raises:
        OSError: if the files are missing, or the Hub cannot be reached or does not have the model.
        UserError: if weights differ in size from the requested model, for example after another
            `num_labels`, and `ignore_mismatched_sizes=True` was not given.
    """
    accepts_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
    with _loading(source, "model"):
        # Mismatched sizes are accepted here and refused below, in one sentence.
        model, info = auto_class.from_pretrained(
            source.path,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
    mismatched = sorted(info["mismatched_keys"])
    if fresh_head:
        backbone = f"{model.base_model_prefix}."
        mismatched = [entry for entry in mismatched if entry[0].startswith(backbone)]
    if not accepts_mismatch:
        _refuse_mismatch(source, mismatched)
    _warn_of_random_weights(source, auto_class, model, info["missing_keys"])
    result: PreTrainedModel = model
    return result


def _refuse_mismatch(source: Source, mismatched: list[tuple[str, Any, Any]]) -> None:
    """Raise if weights (key, stored shape, requested shape) differ in size."""
    if not mismatched:
        return
    key, stored, requested = mismatched[0]
    raise UserError(
        f"{source.name}: {key} is {tuple(stored)} in the checkpoint and {tuple(requested)} in the "
        f"requested model ({len(mismatched)} such). Pass ignore_mismatched_sizes=True to start "
        "them anew."
    )


def _warn_of_random_weights(
    source: Source, auto_class: type[Any], model: Any, missing_keys: Iterable[str]
) -> None:
    """Warn if weights of the backbone are missing from the checkpoint. A new head is expected."""
    prefix = model.base_model_prefix
    # A model without this attribute is the backbone itself.
    backbone = f"{prefix}." if hasattr(model, prefix) else ""
    missing = sorted(key for key in missing_keys if key.startswith(backbone))
    if missing:
        warnings.warn(
            f"{source.name}: {len(missing)} weights of the backbone are not in the checkpoint and "
            f"start random, {missing[0]} first. Check that {auto_class.__name__} fits this model.",
            stacklevel=3,
        )


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to `source`, ready for batches.

    A tokenizer without a padding token pads with its end-of-text token, or without one with its
    unknown token or its beginning token. Padding must therefore be
    masked by the attention mask, and never by its id. A tokenizer that states no maximal length
    takes the model's number of positions.

    Raises:
        OSError: as `load_model`.
    """
    from transformers import AutoConfig, AutoTokenizer

    with _loading(source, "tokenizer"):
        # Without files, AutoTokenizer would make up a tokenizer with an empty vocabulary.
        if source.kind != "hub" and not _has_tokenizer(Path(source.path)):
            raise FileNotFoundError(
                "it holds no tokenizer. Save one into it with `tokenizer.save_pretrained`."
            )
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.path)
        if tokenizer.model_max_length > UNSTATED_LENGTH:
            config = AutoConfig.from_pretrained(source.path).get_text_config()
            tokenizer.model_max_length = getattr(
                config, "max_position_embeddings", tokenizer.model_max_length
            )
    if tokenizer.pad_token is None:
        others = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
        tokenizer.pad_token = next((token for token in others if token is not None), None)
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def load_image_processor(source: Source) -> Any:
    """Load the image processor that belongs to `source`, in the form that needs Pillow alone.

    Raises:
        UserError: if Pillow is not installed.
        OSError: as `load_model`.
    """
    from transformers import AutoImageProcessor
    from transformers.utils import IMAGE_PROCESSOR_NAME

    if find_spec("PIL") is None:
        raise UserError(NO_PILLOW)
    with _loading(source, "image processor"):
        if source.kind != "hub" and not (Path(source.path) / IMAGE_PROCESSOR_NAME).is_file():
            raise FileNotFoundError(
                f"it holds no {IMAGE_PROCESSOR_NAME}. Save one into it, such as "
                "`ViTImageProcessorPil(size={'height': 224, 'width': 224}).save_pretrained(folder)`"
            )
        try:
            return AutoImageProcessor.from_pretrained(source.path, backend="pil")
        except ValueError as error:
            raise OSError(f"it has no image processor ({_first_line(error)})") from error


# ---- errors


@contextmanager
def _loading(source: Source, kind: str) -> Iterator[None]:
    """Load in silence, and turn transformers' page of advice into one sentence for this source.

    Args:
        source: where the files come from.
        kind: "model" or "tokenizer", for the sentence.
    """
    try:
        with silenced():
            if source.kind == "hub":
                _check_hub_answers(source.path)
            yield
    except OSError as error:
        if source.kind == "hub":
            raise OSError(_explain_hub_failure(source, kind, error)) from error
        raise OSError(_explain_local_failure(source, kind, error)) from error


def _check_hub_answers(name: str) -> None:
    """Raise at once if the Hub cannot be reached.

    `from_pretrained` would retry each of the files for half a minute.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except HfHubHTTPError:
        # The Hub answered. Whether it serves the model is for `from_pretrained` to find out.
        return
    # The class of the error depends on the HTTP client that huggingface_hub uses.
    except Exception as error:
        raise ConnectionError(f"the Hub cannot be reached: {_first_line(error)}") from error


def _explain_local_failure(source: Source, kind: str, error: OSError) -> str:
    text = f"No {kind} loads from {source.describe()}: {_first_line(error)}"
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
    return f"the Hub ({_first_line(error).rstrip('.')})"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and the chain of its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
