"""Make room for the answers of a batch where a model has a fixed number of positions."""

import torch
from torch import Tensor

from adaptrank.backbones import longest_prompt


def cut_prompts(
    ids: Tensor, mask: Tensor, positions: int, most: int, bos: int | None
) -> tuple[Tensor, Tensor]:
    """Return prompts (B, L) and their mask, with the last tokens of those that are too long.

    L is at most `longest_prompt(positions, most)`. A beginning-of-sequence token stays first.

    Args:
        ids: (B, T) prompts, padded on the left.
        mask: (B, T), 0 on padding.
        positions: number of positions of the model.
        most: most tokens of an answer.
        bos: id of the beginning-of-sequence token, or None.
    """
    length = ids.shape[1]
    kept = longest_prompt(positions, most)
    if length <= kept:
        return ids, mask
    lengths = mask.sum(1)
    first = ids.gather(1, (length - lengths).clamp(max=length - 1).unsqueeze(1)).squeeze(1)
    ids, mask = ids[:, -kept:].clone(), mask[:, -kept:]
    if bos is not None:
        is_cut = lengths > kept
        ids[:, 0] = torch.where(is_cut & (first == bos), first, ids[:, 0])
    return ids, mask


def rows_with_room(mask: Tensor, positions: int, most: int) -> list[tuple[list[int], int]]:
    """Return (rows, tokens of their answers): all rows with room for `most`, and each other row.

    Args:
        mask: (B, L) mask of the prompts, 0 on padding.
        positions: number of positions of the model.
        most: most tokens of an answer.
    """
    rooms = [positions + 1 - length for length in mask.sum(1).tolist()]
    whole = [row for row, room in enumerate(rooms) if room >= most]
    groups = [(whole, most)] if whole else []
    return groups + [([row], room) for row, room in enumerate(rooms) if room < most]
