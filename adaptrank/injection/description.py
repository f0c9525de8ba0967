"""Description of what trains in a model: kinds of layers, their methods, and whole modules."""

import html
from typing import NamedTuple

from torch import nn

from adaptrank.axes import rank_axes
from adaptrank.injection.left_out import left_out_weights, summary
from adaptrank.injection.paths import last_name
from adaptrank.injection.trained_rows import row_modules
from adaptrank.layers import count_numbers
from adaptrank.parameterizations import adapter_parameters, named_layers, wrapped_layers

WHOLE = "trained whole"
"""Name in the place of a method for a module that trains whole, such as a classifier."""
TOKEN_ROWS = "rows of added tokens"
"""Name in the place of a method for an embedding whose rows of added tokens train."""


class KindRow(NamedTuple):
    """A kind of layer: its last name, number of layers, methods, and trainable parameters."""

    kind: str
    layers: int
    methods: str
    trainable: int


class Description(str):
    """A text that a prompt of Python and a notebook show as it is."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """Return the text for a notebook."""
        return f"<pre>{html.escape(self)}</pre>"


def by_layer(model: nn.Module) -> dict[str, int]:
    """Return the number of trainable parameters in each adapted layer that has any.

    A tied parameter counts in the first layer that has it.
    """
    counts: dict[str, int] = {}
    seen: set[int] = set()
    for path, layer in wrapped_layers(model).items():
        for wrapper in layer.nest:
            for _, parameter in wrapper.own_parameters():
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    counts[path] = counts.get(path, 0) + parameter.numel()
    return counts


def parameter_table(model: nn.Module) -> list[KindRow]:
    """Return one row for each kind of layer, in the model's order.

    A kind is the last component of the path. The last rows are modules that train whole. A tied
    tensor counts in the first row that has it.
    """
    trainable = by_layer(model)
    rows: dict[tuple[str, str], tuple[int, int]] = {}
    for path, layer in wrapped_layers(model).items():
        methods = " on ".join(type(wrapper).__name__ for wrapper in reversed(layer.nest))
        kind = last_name(path) or type(layer.innermost).__name__
        row = kind, methods
        layers, parameters = rows.get(row, (0, 0))
        rows[row] = layers + 1, parameters + trainable.get(path, 0)

    adapter_ids = {id(parameter) for parameter in adapter_parameters(model)}
    of_tokens = set(row_modules(model))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in adapter_ids:
            holder = name.rpartition(".")[0]
            row = holder, WHOLE
            if holder in of_tokens:
                row = holder.partition(".parametrizations.")[0], TOKEN_ROWS
            _, parameters = rows.get(row, (0, 0))
            rows[row] = 1, parameters + parameter.numel()
    return [
        KindRow(kind, layers, methods, count) for (kind, methods), (layers, count) in rows.items()
    ]


def describe(model: nn.Module) -> Description:
    """Return the trainable parameters of each kind of wrapped layer, and of the head.

    Each line has the kind, the number of layers, the methods and the trainable parameters. A kind
    is the last component of the path. Modules that train whole follow, then the total, and weights
    that cannot be wrapped, such as those of experts, with their share of the parameters.
    """
    rows = parameter_table(model)
    wrapped = any(row.methods not in (WHOLE, TOKEN_ROWS) for row in rows)
    width = max((len(row.kind) for row in rows), default=0)
    methods = max((len(_methods(row)) for row in rows), default=0)
    lines = [f"{row.kind:{width}}  {_methods(row):{methods}} {row.trainable:14,}" for row in rows]
    if rows:
        lines.append(_total(model, rows))
    if wrapped:
        lines += summary(left_out_weights(named_layers(model)), model)
    return Description("\n".join(lines))


def _methods(row: KindRow) -> str:
    return row.methods if row.methods in (WHOLE, TOKEN_ROWS) else f"{row.layers:3} x {row.methods}"


def _total(model: nn.Module, rows: list[KindRow]) -> str:
    """Return the sum of the rows, its share of all parameters, and the ranks."""
    trainable = sum(row.trainable for row in rows)
    parameters = sum(count_numbers(parameter) for parameter in model.parameters())
    share = f" ({trainable / parameters:.2%})" if parameters else ""
    ranks = sum(len(axis) for axis in rank_axes(model).values())
    suffix = f", {ranks:,} ranks" if ranks else ""
    return f"trainable {trainable:,} of {parameters:,} parameters{share}{suffix}"
