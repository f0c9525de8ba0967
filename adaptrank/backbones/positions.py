"""Find how many positions a model has, where it has a table of them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

SIZES = (
    "max_position_embeddings",
    "n_positions",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
)
"""Names under which configurations have the number of positions."""

MOST_SPARE_ROWS = 8
"""Rows that a table may have beyond the positions: OPT and BART have two."""

REBUILDING = ("make_weight", "make_weights")
"""Methods of tables that are made anew, and larger, when a position is beyond them."""

WITHOUT_TABLE = {"mpt": "max_seq_len"}
"""Type of a model that makes its ALiBi for a fixed length -> the name of this length."""


def position_limit(model: "nn.Module", part: str | None = None) -> int | None:
    """Return the number of positions that a model can read, or None if there is no fixed number.

    A model with learned positions, such as GPT-2 and OPT, has a row for each, and fails beyond the
    last one. Rotary and relative positions have no limit of this kind.

    Args:
        model: a model of transformers, also with adapters.
        part: "encoder" or "decoder" of a model that has both, or None for the whole model.
    """
    config = getattr(model, "config", None)
    sizes = _sizes(config)
    limits = []
    fixed = WITHOUT_TABLE.get(getattr(config, "model_type", ""))
    if fixed is not None:
        limits.append(int(getattr(config, fixed)))
    for name, module in model.named_modules():
        components = name.split(".")
        is_other_part = part is not None and part not in components
        # Towers of a model that reads images have tables of their own.
        if is_other_part or any("vision" in component for component in components):
            continue
        limits += _limits(module, components, sizes)
    return min(limits, default=None)


def longest_prompt(positions: int, most: int) -> int:
    """Return the most tokens that a long prompt keeps, so that its answer has room.

    A prompt and its answer may each have half of the positions. What one does not need, the other
    one gets. The last token of an answer is not read again, so T tokens and an answer of n tokens
    need T + n - 1 positions.

    Args:
        positions: number of positions, which prompt and answer share.
        most: most tokens of the answer.
    """
    return max(positions + 1 - most, positions // 2, 1)


def _sizes(config: Any) -> set[int]:
    """Return the numbers of positions that a configuration or a part of it names."""
    sizes = set()
    parts = [config, getattr(config, "encoder", None), getattr(config, "decoder", None)]
    find_text = getattr(config, "get_text_config", None)
    if find_text is not None:
        parts += [find_text(), find_text(decoder=True)]
    for each in parts:
        for name in SIZES:
            size = getattr(each, name, None)
            if isinstance(size, int):
                sizes.add(size)
    return sizes


def _limits(module: "nn.Module", components: list[str], sizes: set[int]) -> Iterator[int]:
    """Yield the numbers of positions of the tables that a module is or holds."""
    from torch import Tensor, nn

    if isinstance(module, nn.Embedding) and any(map(_means_positions, components)):
        if any(hasattr(module, method) for method in REBUILDING):
            return
        rows = module.num_embeddings
        if _fits(rows, sizes):
            yield rows - _first_row(module)
        return
    # GPT-J, CodeGen and CTRL have a tensor of sines and cosines.
    held = {**module._buffers, **module.__dict__}
    for name, table in held.items():
        is_table = isinstance(table, Tensor) and table.dim() == 2 and _means_positions(name)
        if is_table and table.is_floating_point() and _fits(len(table), sizes):
            yield len(table)


def _means_positions(name: str) -> bool:
    return name == "wpe" or ("pos" in name and "rel" not in name)


def _fits(rows: int, sizes: set[int]) -> bool:
    return any(size <= rows <= size + MOST_SPARE_ROWS for size in sizes)


def _first_row(table: "nn.Embedding") -> int:
    """Return the row of the first position. RoBERTa begins after the row of the padding."""
    offset = getattr(table, "offset", None)
    if isinstance(offset, int):
        return offset
    return 0 if table.padding_idx is None else table.padding_idx + 1
