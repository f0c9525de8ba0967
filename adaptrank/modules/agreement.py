"""Agree on the conventions of training: those of the data, and those that an adapter recorded."""

import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from adaptrank._errors import UserError
from adaptrank.artifacts import conventions_of, read_adapter, record_conventions
from adaptrank.backbones import embedding_rows, position_limit

if TYPE_CHECKING:
    from adaptrank.modules.adapted import AdaptedModule

log = logging.getLogger("adaptrank")

READ_AT_MOST = 10_000
"""Number of lazily generated examples whose tokens are compared with the model."""

COMPARED = ("chat", "system", "prompt", "fields")
"""Conventions that are settings of the data. A model trained with others gives worse answers."""

UNSTATED = ("prompt", "fields")
"""Those that data without a statement may share, such as files that hold whole prompts."""


def trained_conventions(module: "AdaptedModule") -> dict[str, Any]:
    """Return the conventions that a module's model was trained with, or {} if none are known.

    Before the backbone is built they are those of the `adapter` to start from.
    """
    if module.backbone is not None:
        return conventions_of(module.backbone)
    if module.adapter is None:
        return {}
    recorded: dict[str, Any] = read_adapter(module.adapter).get("conventions", {})
    return recorded


def agree(module: "AdaptedModule") -> None:
    """Record the conventions of the data with the model, and warn where the model had others.

    What a model was trained with stays recorded until it trains on something else.

    Raises:
        UserError: if the data have tokens or positions that the model does not have.
    """
    trainer = module._trainer
    data = getattr(trainer, "datamodule", None)
    describe = getattr(data, "conventions", None)
    if describe is None or module.backbone is None:
        return
    check_vocabulary(module, data)
    check_positions(module, data)
    given: dict[str, Any] = {**describe(), **module.conventions()}
    trained = trained_conventions(module)
    for key in COMPARED:
        differs = key in trained and trained[key] != given.get(key)
        is_stated = key in given or key not in UNSTATED
        if differs and is_stated and (key, id(data)) not in module.warned:
            module.warned.add((key, id(data)))
            log.warning(
                "The adapter was trained with %s=%r, and the data have %r.",
                key,
                trained[key],
                given.get(key),
            )
    if trained and not getattr(trainer, "training", False):
        return
    stops = {**given.get("stop_tokens", {}), **trained.get("stop_tokens", {})}
    record_conventions(module.backbone, {**given, "stop_tokens": stops} if stops else given)


def check_vocabulary(module: "AdaptedModule", data: Any) -> None:
    """Refuse data with tokens that only the tokenizer has. The model has no embedding of them.

    Raises:
        UserError: names the first of the tokens, and what to set.
    """
    tokenizer, rows = data.tokenizer, embedding_rows(module.backbone)
    if tokenizer is None or rows is None or len(tokenizer) <= rows:
        return
    beyond = next((token for token in _token_ids(data) if token >= rows), None)
    if beyond is not None:
        raise UserError(
            f"The tokenizer of {module.backbone_name} has {len(tokenizer):,} tokens, and the model "
            f"has {rows:,}: it has no embedding of {tokenizer.convert_ids_to_tokens(beyond)!r} "
            f"({beyond}), which the data use. Set model.resize_tokens: true to add such rows, or "
            f"leave these tokens out."
        )


def check_positions(module: "AdaptedModule", data: Any) -> None:
    """Refuse examples that are longer than the positions of a model with a fixed number of them.

    Prompts to generate from are not counted. They are cut where an answer is generated.

    Raises:
        UserError: names the key that shortens them.
    """
    backbone = module.backbone
    if data.tokenizer is None or backbone is None:
        return
    has_decoder = bool(getattr(backbone.config, "is_encoder_decoder", False))
    sides = [("max_length", "input_ids", "encoder" if has_decoder else None)]
    if has_decoder:
        sides.append(("max_target_length", "target_ids", "decoder"))
    for key, field, part in sides:
        most = getattr(data, key, None)
        limit = position_limit(backbone, part)
        if most is None or limit is None or most <= limit:
            continue
        longest = max((len(text[field]) for text in _texts(data) if field in text), default=0)
        if longest > limit:
            raise UserError(
                f"An example has {longest:,} tokens, and {module.backbone_name} has {limit:,} "
                f"positions. Set data.{key} to {limit} or less."
            )


def _token_ids(data: Any) -> Iterator[int]:
    """Yield the padding's id, and the largest id of each encoded text."""
    yield data.pad_id
    for text in _texts(data):
        for key in ("input_ids", "prompt_ids", "target_ids"):
            if key in text and len(text[key]):
                yield int(text[key].max())


def _texts(data: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the encoded texts: examples, and the choices of each."""
    for examples in data.encoded.values():
        # Examples that are generated when they are read may be a hundred million.
        read = examples if isinstance(examples, list) else islice(examples, READ_AT_MOST)
        for example in read:
            yield from (example, *example.get("choices", ()))
