"""Inputs of a layer that each unit of an axis reads. Pure."""

import torch
from torch import Tensor

from adaptrank.axes import RankAxis


def unit_columns(axis: RankAxis) -> Tensor:
    """Return the indices of the inputs that each unit reads, (units, width)."""
    layer, name = axis.members[0]
    columns = torch.arange(layer.shape[1])
    if name in layer.input_factor:
        columns = layer.of_inputs(name, columns)
    columns = columns.cpu()
    if columns.dim() == 1:
        return columns.expand(len(axis), -1)
    return columns


def read_columns(axis: RankAxis) -> Tensor:
    """Return the different parts of the input that units read, in order, (parts, width)."""
    rows = unit_columns(axis).tolist()
    return torch.tensor(list(dict.fromkeys(map(tuple, rows))))


def part_of_units(axis: RankAxis) -> list[int]:
    """Return the row of `read_columns` that each unit reads."""
    index_of = {tuple(part): index for index, part in enumerate(read_columns(axis).tolist())}
    return [index_of[tuple(columns)] for columns in unit_columns(axis).tolist()]
