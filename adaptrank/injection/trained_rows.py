"""Rows of an embedding and of a head that train, while the other rows stay frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class TrainedRows(nn.Module):
    """A weight in which some rows are trained tensors: W'[i] = rows[k] for the k-th index i.

    It is a parametrization of PyTorch: the frozen weight W (m, n) stays the layer's own, and only
    rows (k, n) have gradients and optimizer state. Tied layers share one instance.

    Args:
        weight: the frozen weight (m, n), whose values the rows start from.
        indices: the k rows.
    """

    indices: Tensor

    def __init__(self, weight: Tensor, indices: Tensor) -> None:
        super().__init__()
        rows = weight.detach().index_select(0, indices).to(torch.float32)
        self.rows = nn.Parameter(rows)
        # The description of an adapter has the indices, so that no file can point elsewhere.
        self.register_buffer("indices", indices, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with the trained rows in it, (m, n)."""
        return weight.index_copy(0, self.indices, self.rows.to(weight.dtype))


def train_rows(model: Any, indices: Sequence[int], fresh_from: int | None = None) -> None:
    """Let some rows of a model's embedding train, and the same rows of its head.

    Args:
        model: a model of transformers.
        indices: ids of tokens.
        fresh_from: first row that the base's files do not have. The frozen values of these rows are
            set to zero, so that they do not depend on how rows are initialized.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    where = torch.tensor(list(indices), device=embedding.weight.device)
    trained = TrainedRows(embedding.weight, where)
    of_head = trained if head is None or is_tied else TrainedRows(head.weight, where)
    for layer, rows in ((embedding, trained), (head, of_head)):
        if layer is None:
            continue
        if fresh_from is not None:
            with torch.no_grad():
                layer.weight[fresh_from:] = 0
        layer.weight.requires_grad_(False)
        parametrize.register_parametrization(layer, "weight", rows, unsafe=True)


def trained_rows(model: nn.Module) -> dict[str, TrainedRows]:
    """Return path of the layer -> its trained rows, for each layer that has some."""
    found = {}
    for path, module in model.named_modules():
        rows = rows_of(module)
        if rows is not None:
            found[path] = rows
    return found


def rows_of(layer: nn.Module) -> TrainedRows | None:
    """Return the trained rows of a layer, or None if it has none."""
    tables = layer._modules.get("parametrizations")
    if not isinstance(tables, nn.ModuleDict) or "weight" not in tables:
        return None
    first = cast(Any, tables["weight"])[0]
    return first if isinstance(first, TrainedRows) else None


def row_modules(model: nn.Module) -> list[str]:
    """Return the paths of the modules that hold trained rows. Tied layers have one of them."""
    return [path for path, module in model.named_modules() if isinstance(module, TrainedRows)]


def fold_rows(model: nn.Module) -> None:
    """Write trained rows into the weights, so that the layers are plain ones again.

    Weights that were tied stay tied.
    """
    for path in trained_rows(model):
        layer = model.get_submodule(path)
        trains = cast(Any, layer).parametrizations.weight.original.requires_grad
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        cast(Tensor, layer.weight).requires_grad_(trains)


def plain_tensor_name(module: nn.Module, name: str) -> str | None:
    """Return the name that a tensor of a parametrization list has in the plain layer, or None.

    Args:
        module: any module.
        name: name of one of its parameters.
    """
    if not isinstance(module, parametrize.ParametrizationList) or name != "original":
        return None
    return "weight" if isinstance(module[0], TrainedRows) else None
