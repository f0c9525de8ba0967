"""Load a pretrained model and its tokenizer quietly, with errors of one sentence."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptrank._errors import UserError
from adaptrank.backbones.kept_layers import layers_to_keep, warn_of_plain_weights
from adaptrank.backbones.loading_errors import first_line, loading
from adaptrank.backbones.loading_options import LoadingOptions
from adaptrank.backbones.lookup import Source
from adaptrank.backbones.quantization import check_quantization, quantizer_config, steady

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("adaptrank")

TrainedModules = Callable[[Any], tuple[Collection[str], Collection[str]]]
"""Model -> paths of its heads, and of other modules that train whole."""

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")

NO_PILLOW = "Images need Pillow. Install it with `pip install 'adaptrank[vision]'`."

UNSTATED_LENGTH = 10**20
"""Tokenizers of transformers state 1e30 tokens where no maximal length is known."""


def load_model(
    source: Source,
    auto_class: type[Any],
    dtype: torch.dtype,
    options: LoadingOptions | None = None,
    kept: TrainedModules | None = None,
    device: torch.device | None = None,
    fresh_head: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load the model of `source` without progress bars and without a report on a new head.

    Args:
        source: result of `resolve`.
        auto_class: class of transformers that chooses the head, such as `AutoModelForCausalLM`.
        dtype: dtype of the weights. See `auto_dtype`.
        options: quantization, attention, devices, and whether code of the model is run.
        kept: model without weights -> (heads, other modules that train whole), as paths. A
            quantization leaves heads as they are, and that of a language model in any case.
        device: where quantized weights go, unless the options have a device map.
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
    options = options or LoadingOptions()
    arguments = options.arguments()
    if options.quantization is not None:
        config = load_config(source, options, **kwargs)
        skipped = _layers_to_keep(source, auto_class, config, options, kept)
        arguments |= _quantizing(options, dtype, skipped, device)
    with loading(source, "model", options):
        # Mismatched sizes are accepted here and refused below, in one sentence.
        model, info = auto_class.from_pretrained(
            source.path,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_revision(source),
            **arguments,
            **kwargs,
        )
    mismatched = sorted(info["mismatched_keys"])
    if fresh_head:
        backbone = f"{model.base_model_prefix}."
        mismatched = [entry for entry in mismatched if entry[0].startswith(backbone)]
    if not accepts_mismatch:
        _refuse_mismatch(source, mismatched)
    _warn_of_random_weights(source, auto_class, model, info["missing_keys"])
    if options.quantization is not None:
        steady(model)
        warn_of_plain_weights(model)
    result: PreTrainedModel = model
    return result


def load_config(source: Source, options: LoadingOptions | None = None, **kwargs: Any) -> Any:
    """Load the configuration of the model of `source`.

    Raises:
        OSError: as `load_model`.
        UserError: if the model comes with code of its own, and the options do not trust it.
    """
    options = options or LoadingOptions()
    with loading(source, "configuration", options):
        return _read_config(source, options, **kwargs)


def _read_config(source: Source, options: LoadingOptions, **kwargs: Any) -> Any:
    from transformers import AutoConfig

    trusted = options.trust_remote_code
    return AutoConfig.from_pretrained(
        source.path, trust_remote_code=trusted, **_revision(source), **kwargs
    )


def model_on_meta(
    source: Source, auto_class: Any, config: Any, options: LoadingOptions | None = None
) -> Any:
    """Build the model of a configuration without memory for its weights."""
    import torch

    options = options or LoadingOptions()
    attention = {} if options.attention is None else {"attn_implementation": options.attention}
    with loading(source, "model", options), torch.device("meta"):
        return auto_class.from_config(
            config, trust_remote_code=options.trust_remote_code, **attention
        )


def _layers_to_keep(
    source: Source,
    auto_class: type[Any],
    config: Any,
    options: LoadingOptions,
    kept: TrainedModules | None,
) -> list[str]:
    """Return the paths of the linear layers that a quantization leaves as they are.

    Raises:
        UserError: if the model is quantized already, or no layer is left to quantize.
    """
    assert options.quantization is not None
    check_unquantized(source, config)
    model = model_on_meta(source, auto_class, config, options)
    heads, trained = ([], []) if kept is None else kept(model)
    return layers_to_keep(model, options.quantization, heads, trained)


def check_unquantized(source: Source, config: Any) -> None:
    """Refuse to quantize a model that is quantized already.

    Args:
        source: where the model comes from, for the error.
        config: its configuration.
    Raises:
        UserError: naming the method by which it is quantized.
    """
    present = getattr(config, "quantization_config", None)
    if present is not None:
        method = present.get("quant_method") if isinstance(present, dict) else None
        by = f" by {method}" if method else ""
        raise UserError(
            f"{source.name} is quantized already{by}: leave model.quantize out, or name its "
            f"unquantized form."
        )


def _quantizing(
    options: LoadingOptions, dtype: torch.dtype, skipped: list[str], device: torch.device | None
) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantize the model."""
    assert options.quantization is not None
    check_quantization(options.quantization, dtype)
    config = quantizer_config(options.quantization, dtype, skipped)
    arguments: dict[str, Any] = {"quantization_config": config}
    # The quantizer of torchao works on any device, and that of bitsandbytes asks for one.
    if options.device_map is None and device is not None and options.quantization.kind != "int8":
        arguments["device_map"] = {"": device}
    return arguments


def _revision(source: Source) -> dict[str, str]:
    """Return the argument `revision` for a model that is on the Hub."""
    is_remote = source.kind == "hub" and source.revision is not None
    return {"revision": source.revision} if is_remote and source.revision else {}


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


def load_tokenizer(
    source: Source, options: LoadingOptions | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to `source`, ready for batches.

    A tokenizer without a padding token pads with its end-of-text token, or without one with its
    unknown token or its beginning token. Padding must therefore be
    masked by the attention mask, and never by its id. A tokenizer that states no maximal length
    takes the model's number of positions. Tokens that the options add get the next ids.

    Raises:
        OSError: as `load_model`.
    """
    from transformers import AutoTokenizer

    options = options or LoadingOptions()
    with loading(source, "tokenizer", options):
        # Without files, AutoTokenizer would make up a tokenizer with an empty vocabulary.
        if source.kind != "hub" and not _has_tokenizer(Path(source.path)):
            raise FileNotFoundError(
                "it holds no tokenizer. Save one into it with `tokenizer.save_pretrained`."
            )
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=options.trust_remote_code, **_revision(source)
        )
        if tokenizer.model_max_length > UNSTATED_LENGTH:
            config = _read_config(source, options).get_text_config()
            tokenizer.model_max_length = getattr(
                config, "max_position_embeddings", tokenizer.model_max_length
            )
    if tokenizer.pad_token is None:
        others = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
        tokenizer.pad_token = next((token for token in others if token is not None), None)
    if options.added_tokens:
        _add_tokens(tokenizer, options.added_tokens, source)
    return tokenizer


def _add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str], source: Source) -> None:
    """Add tokens to a tokenizer. They are no special ones, so that generated text shows them."""
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    for token in tokens:
        if token in known:
            log.warning("added_tokens: %r is a token of %s already.", token, source.name)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])


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
    with loading(source, "image processor", LoadingOptions()):
        if source.kind != "hub" and not (Path(source.path) / IMAGE_PROCESSOR_NAME).is_file():
            raise FileNotFoundError(
                f"it holds no {IMAGE_PROCESSOR_NAME}. Save one into it, such as "
                "`ViTImageProcessorPil(size={'height': 224, 'width': 224}).save_pretrained(folder)`"
            )
        try:
            auto_class: Any = AutoImageProcessor
            return auto_class.from_pretrained(source.path, backend="pil")
        except ValueError as error:
            raise OSError(f"it has no image processor ({first_line(error)})") from error
