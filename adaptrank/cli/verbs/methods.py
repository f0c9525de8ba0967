"""`methods`: list parameterizations, allocators, strategies and optimizers, and what fits what."""

import argparse
import inspect
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Parameterizations, allocators, training strategies and optimizers: formula, source, rank axes, cost,
and which of them fit each other."""

TABLE = Path(__file__).parents[1] / "methods_table.json"
"""Output of `methods --recompute --json`. A test compares it with the code."""

REFERENCE = 768
"""Sides of the linear layer that costs are stated for."""

REFERENCE_NAME = f"Linear of {REFERENCE} x {REFERENCE}"

PARAMETERIZATIONS_HEAD = f"""\
Parameterizations at their default arguments, and what they add to a frozen {REFERENCE_NAME}
in fp32: trained parameters; FLOPs of the products of a forward, for each token and once a call;
bytes that each token keeps for the backward pass. The numbers are those of closed formulas.
"measured" marks a number without a formula, or one that differs from it.
"""
ALLOCATORS_HEAD = """
Allocators move ranks, on anything that has a rank axis (--pairs shows which). A name in brackets
is a variant, which decides otherwise than the published method. rule=published decides as
published, and so does share=reference of GoRA.
"""
STRATEGIES_HEAD = """
Training strategies divide a run into rounds (key `training_strategy`). A function that stays is one
that no border between rounds changes, in evaluation mode.
"""
OPTIMIZERS_HEAD = """
Optimizers for adapters, beside all of PyTorch's (key `model.optimizer`).
"""
FOOT = """
Arguments: python -m adaptrank fit --allocator.help ElaLoRA
In YAML a class is named by `class_path: ElaLoRA`."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    pairs = "which allocator and which training strategy works on which parameterization"
    parser.add_argument("--pairs", action="store_true", help=pairs)
    parser.add_argument("--json", action="store_true", help="as JSON")
    anew = "measure anew, instead of reading the table that the package brings"
    parser.add_argument("--recompute", action="store_true", help=anew)


def run(options: argparse.Namespace) -> None:
    """Print the tables.

    They are read from the file that the package brings. Where a user's own classes are imported,
    they are computed.
    """
    data = compute() if options.modules or options.recompute else read_table()
    if options.json:
        print(json.dumps(data, indent=2))
    elif options.pairs:
        print(_pairs_table(data["pairs"]))
        print()
        of_strategies = {
            "Training strategies on a method": data["strategy_methods"],
            "Training strategies beside an allocator": data["strategy_allocators"],
        }
        print(_tables_with_reasons(of_strategies))
        if data["optimizer_methods"]:
            print()
            print(_tables_with_reasons({"Optimizers on a method": data["optimizer_methods"]}))
    else:
        print(PARAMETERIZATIONS_HEAD)
        print(_parameterizations_table(data["parameterizations"]))
        print(ALLOCATORS_HEAD)
        print(_allocators_table(data["allocators"]))
        print(STRATEGIES_HEAD)
        print(_strategies_table(data["strategies"]))
        if data["optimizers"]:
            print(OPTIMIZERS_HEAD)
            print(_optimizers_table(data["optimizers"]))
        print(FOOT)


def read_table() -> dict[str, Any]:
    """Return the table that the package brings, as `compute` made it."""
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def compute() -> dict[str, Any]:
    """Return all classes that are known, and which of them fit each other, as JSON-able data."""
    from adaptrank.allocation import ALLOCATORS
    from adaptrank.allocation.compatibility import nests
    from adaptrank.parameterizations import PARAMETERIZATIONS
    from adaptrank.strategies import STRATEGIES, beside_allocator, on_method

    methods = [describe_parameterization(cls) for cls in PARAMETERIZATIONS.values()]
    allocators = [describe_allocator(cls) for cls in ALLOCATORS.values()]
    # Hybrids stand below their parts. A user's own classes, from --import, are in the table, too.
    hybrids = [nest for nest in nests() if len(nest) > 1]
    rows = [*((method["name"],) for method in methods), *hybrids]
    pairs: dict[str, dict[str, str]] = {}
    for name, cls in ALLOCATORS.items():
        pairs[name] = {" + ".join(nest): cls.pair(*nest) for nest in rows}
    on_methods: dict[str, dict[str, str]] = {}
    beside: dict[str, dict[str, str]] = {}
    for name, strategy in STRATEGIES.items():
        on_methods[name] = {" + ".join(nest): on_method(strategy, *nest) for nest in rows}
        beside[name] = {key: beside_allocator(strategy, cls) for key, cls in ALLOCATORS.items()}
    return {
        "parameterizations": methods,
        "allocators": allocators,
        "pairs": pairs,
        "strategies": [describe_strategy(cls) for cls in STRATEGIES.values()],
        "strategy_methods": on_methods,
        "strategy_allocators": beside,
        **_optimizer_tables(rows),
    }


def describe_parameterization(cls: type[Any]) -> dict[str, Any]:
    """Return what a parameterization is, and what it costs on one layer, as JSON-able data.

    The layer is the reference, or the method's own example if it wraps something else. Costs are
    given as the closed formulas have them, and as they are measured.
    """
    import torch

    from adaptrank import testing
    from adaptrank.axes import cost_model, rank_axes

    holder = torch.nn.Module()
    linear = torch.nn.Linear(REFERENCE, REFERENCE)
    fits = cls.wraps(linear)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = holder.layer = cls(linear if fits else cls.example())
    sizes = {key: len(axis) for key, axis in rank_axes(holder).items()}
    parameters = cost_model(holder).total(sizes)
    # At its start a method may save less for the backward pass.
    testing.perturb(layer)
    closed = layer.cost()
    flops, flops_once, kept = testing.measure_cost(layer)
    cost = {
        "flops_per_token": _cost(closed and closed.flops, flops),
        "flops_per_call": _cost(closed and closed.flops_once, flops_once),
        "bytes_per_token": _cost(closed and 4 * closed.kept, 4 * kept),
    }
    return {
        "name": cls.__name__,
        "formula": _first_sentence(cls),
        "source": cls.source,
        "axes": {key.rpartition(":")[2]: size for key, size in sizes.items()},
        "wraps": cls.wraps_what(),
        "mergeable": layer.mergeable,
        "needs_weight": layer.reads_weight,
        "splits_fused": layer.reads_blocks,
        "shared": list(layer.shared),
        "starts_at_base": layer.starts_at_base,
        "reference": REFERENCE_NAME
        if fits
        else f"{type(layer.innermost).__name__}, its own example",
        "parameters": parameters,
        "cost": cost,
        "arguments": _arguments(cls, skip=1),
        "module": cls.__module__,
    }


def _cost(closed: int | None, measured: float) -> dict[str, Any]:
    whole = int(measured) if measured == int(measured) else measured
    return {"closed": closed, "measured": whole}


def describe_allocator(cls: type[Any]) -> dict[str, Any]:
    """Return what an allocator does and needs, as JSON-able data."""
    arguments = _arguments(cls)
    return {
        "name": cls.__name__,
        "title": cls.default_title(),
        "does": _first_sentence(cls),
        "source": cls.source,
        "score": _score(cls, arguments),
        "needs": sorted(cls.requires),
        "options": {name: sorted(needs) for name, needs in cls.options.items()},
        "exclusive": cls.exclusive,
        "moves": cls.moves,
        "arguments": arguments,
        "module": cls.__module__,
    }


def describe_strategy(cls: type[Any]) -> dict[str, Any]:
    """Return what a training strategy does, as JSON-able data."""
    return {
        "name": cls.__name__,
        "does": _first_sentence(cls),
        "source": cls.source,
        "preserves_function": cls.preserves_function,
        "arguments": _arguments(cls),
        "module": cls.__module__,
    }


def _score(cls: type[Any], arguments: Mapping[str, Any]) -> str:
    """Return the importance of an allocator, "its own", or "-" for a rank initializer."""
    from adaptrank.allocation import Policy

    if issubclass(cls, Policy) and cls.scores_by_name():
        return str(arguments.get("importance", cls.importance))
    return "its own" if cls.moves else "-"


def _optimizer_tables(rows: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return the optimizers of this library, and on which nests they work, as JSON-able data."""
    if find_spec("adaptrank.optimizers") is None:
        return {"optimizers": [], "optimizer_methods": {}}
    room = import_module("adaptrank.optimizers")
    described = [
        {
            "name": cls.__name__,
            "does": _first_sentence(cls),
            "source": cls.source,
            "arguments": _arguments(cls, skip=1),
            "module": cls.__module__,
        }
        for cls in room.OPTIMIZERS.values()
    ]
    pairs: dict[str, dict[str, str]] = {}
    for name, cls in room.OPTIMIZERS.items():
        pairs[name] = {" + ".join(nest): room.optimizer_pair(cls, *nest) for nest in rows}
    return {"optimizers": described, "optimizer_methods": pairs}


def _arguments(cls: type[Any], skip: int = 0) -> dict[str, Any]:
    """Return the arguments of a class with their defaults, as JSON-able data."""
    defaults = {}
    for parameter in list(inspect.signature(cls).parameters.values())[skip:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        default = None if parameter.default is parameter.empty else parameter.default
        plain = isinstance(default, str | int | float | None)
        defaults[parameter.name] = default if plain else repr(default)
    return defaults


def _first_sentence(cls: type[Any]) -> str:
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


# ---- tables


def _parameterizations_table(methods: list[dict[str, Any]]) -> str:
    rows = [("", "parameters", "FLOPs/token", "FLOPs/call", "bytes/token", "source")]
    for method in methods:
        costs = [_cost_cell(**cost) for cost in method["cost"].values()]
        parameters = f"{method['parameters']:,}"
        rows.append((method["name"], parameters, *costs, method["source"] or "-"))
    notes = [f"{method['formula']}\n{_properties(method)}" for method in methods]
    return _columns(rows, notes)


def _cost_cell(closed: int | None, measured: float) -> str:
    # The counter does not know fused attention, so that a measured 0 says nothing.
    if closed is None:
        return f"{measured:,} (measured)" if measured else "-"
    return f"{closed:,}" if closed == measured else f"{closed:,} (measured {measured:,})"


def _properties(method: dict[str, Any]) -> str:
    """Return a method's properties, joined by semicolons."""
    axes = ", ".join(f"{axis} {size}" for axis, size in method["axes"].items())
    words = [f"axes: {axes}" if axes else "no rank axis: a fixed cost", f"wraps {method['wraps']}"]
    words.append("merges" if method["mergeable"] else "does not merge")
    if method["needs_weight"]:
        words.append("needs W")
    if method["splits_fused"]:
        words.append("splits fused projections")
    if method["shared"]:
        words.append(f"shared: {', '.join(method['shared'])}")
    if not method["starts_at_base"]:
        words.append("does not start at the base")
    if method["reference"] != REFERENCE_NAME:
        words.append(f"costs are those on {method['reference']}")
    return "; ".join(words)


def _allocators_table(allocators: list[dict[str, Any]]) -> str:
    rows = [("", "score", "needs", "source")]
    for allocator in allocators:
        needs = ", ".join(allocator["needs"]) or "any axis"
        rows.append((allocator["title"], allocator["score"], needs, allocator["source"] or "-"))
    return _columns(rows, [allocator["does"] for allocator in allocators])


def _strategies_table(strategies: list[dict[str, Any]]) -> str:
    rows = [("", "function at a border", "source")]
    for strategy in strategies:
        stays = "stays" if strategy["preserves_function"] else "changes"
        rows.append((strategy["name"], stays, strategy["source"] or "-"))
    return _columns(rows, [strategy["does"] for strategy in strategies])


def _optimizers_table(optimizers: list[dict[str, Any]]) -> str:
    rows = [("", "source"), *((each["name"], each["source"] or "-") for each in optimizers)]
    return _columns(rows, [each["does"] for each in optimizers])


def _columns(rows: Sequence[tuple[str, ...]], notes: Sequence[str]) -> str:
    """Return aligned columns under a head, and below each other row its note, indented."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    indent = " " * 6
    lines = []
    for row, note in zip(rows, ["", *notes], strict=True):
        cells = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)]
        lines.append(f"  {'  '.join(cells)}".rstrip())
        for line in note.splitlines():
            lines += textwrap.wrap(line, 108, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


def _in_two_lines(name: str) -> tuple[str, str]:
    """Return a class name cut before its last word, so that a column is narrow: Ela, LoRA."""
    words = re.findall(r"LoRA|[A-Z][a-z]*", name)
    last = words[-1] if len(words) > 1 and len(words[-1]) > 1 else ""
    return name.removesuffix(last), last


def _pairs_table(pairs: Mapping[str, Mapping[str, str]]) -> str:
    """Return the table of pairs: a row for each nest of methods, a column for each allocator."""
    cells = {cell for works in pairs.values() for cell in works.values()}
    letters = _letters(cells - {"", "works"})
    lines = _grid(pairs, {"": "-", "works": "yes", **letters})
    lines.append(
        "\n  -  has no rank axis, or one that cannot do what the allocator needs; "
        "a run says which when it starts"
    )
    for option, letter in letters.items():
        lines.append(f"  {letter}  with {option} only: it cannot do what that option asks for")
    return "\n".join(lines)


def _tables_with_reasons(tables: Mapping[str, Mapping[str, Mapping[str, str]]]) -> str:
    """Return tables with a letter for each reason, and the reasons below them.

    Args:
        tables: title -> column -> row -> "works", or the reason why not.
    """
    reasons: set[str] = set()
    for columns in tables.values():
        for works in columns.values():
            reasons |= set(works.values()) - {"works"}
    letters = _letters(reasons)
    lines = []
    for title, columns in tables.items():
        lines += [f"  {title}", *_grid(columns, {"works": "yes", **letters}), ""]
    for reason, letter in letters.items():
        lines += textwrap.wrap(
            reason, 104, initial_indent=f"  {letter}  ", subsequent_indent="     "
        )
    return "\n".join(lines)


def _letters(texts: set[str]) -> dict[str, str]:
    """Return a letter for each text, which a table has in its place."""
    return {text: chr(ord("a") + position) for position, text in enumerate(sorted(texts))}


def _grid(columns: Mapping[str, Mapping[str, str]], marks: Mapping[str, str]) -> list[str]:
    """Return the lines of a table whose columns have their names in two lines.

    Args:
        columns: name of a column -> row -> cell.
        marks: cell -> what is printed.
    """
    rows = list(next(iter(columns.values())))
    width = max(map(len, rows))
    headers = {name: _in_two_lines(name) for name in columns}
    widths = {name: max(3, *map(len, header)) for name, header in headers.items()}
    lines = []
    for line in range(2):
        cells = [f"{headers[name][line]:{widths[name]}}" for name in columns]
        lines.append(f"  {'':{width}} {' '.join(cells)}".rstrip())
    for row in rows:
        cells = [f"{marks[works[row]]:{widths[name]}}" for name, works in columns.items()]
        lines.append(f"  {row:{width}} {' '.join(cells)}".rstrip())
    return lines
