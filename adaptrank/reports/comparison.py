"""The table of a study: means over seeds, and tests against the baseline. Needs SciPy."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]
"""One method with one allocator at one budget, over all seeds."""

MEANS = (
    "num_trainable_params",
    "train_time",
    "accelerator_memory_max",
    "file_size",
    "units_final",
    "units_peak",
)
"""Fields of a result whose mean over seeds is a field of the row."""

COLUMNS = (
    "method",
    "allocator",
    "budget",
    "trainable",
    "trainable peak",
    "units",
    "units peak",
    "lr",
    "selected on",
    "reported on",
    "metric",
    "against baseline",
    "95 % interval",
    "p",
    "time",
    "memory",
    "file",
)

COLUMNS_BEFORE_METRIC = COLUMNS.index("metric") - 3
"""Columns between those that name a row, which are three, and the metric."""

UNCOMPARED: Row = {
    "difference": None,
    "difference_deviation": None,
    "interval": None,
    "p": None,
}
"""Fields of a row that is compared with nothing."""

SPECTRA = {"rank": "rank of D", "effective_rank": "effective rank", "relative": "|D| / |W|"}
"""Measure of a layer's change -> column that has its mean over layers and seeds."""

GIB, MEGABYTE = 2**30, 1e6
FLOAT32_EPSILON = 2.0**-23
"""Relative rounding of the metrics, which a run logs in float32."""


def rows(record: Mapping[str, Any]) -> list[Row]:
    """Return one row for each method, allocator, budget and point of the grid.

    A row has means and standard deviations over seeds. Its differences from the baseline pair runs
    of one seed at one budget: their mean, standard deviation and 95 % interval, and a paired
    t-test. All of these but the mean are None for fewer than two pairs. Interval and p are None
    where all differences are equal, up to the rounding of float32, because a t-test makes
    certainty of that.

    Args:
        record: results of a study, as `run_study` returns them.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for result in record["results"]:
        values = tuple(map(repr, (result.get("grid") or {}).items()))
        key = (result["method"], result["allocator"], result["budget"], values)
        groups.setdefault(key, []).append(result)
    table = [_summarized(results, record["metric"]) for results in groups.values()]
    for row in table:
        row |= _compared(row, _baseline_row(table, row["against"] or record["baseline"], row))
    return table


def column_names(record: Mapping[str, Any]) -> list[str]:
    """Return the heads of the columns, with the metric by its own name."""
    names = [record["metric"] if name == "metric" else name for name in COLUMNS]
    return [*names, *SPECTRA.values()] if record.get("spectra") else names


def cells(row: Row, record: Mapping[str, Any]) -> list[str]:
    """Return a row as texts, in the order of `COLUMNS`."""
    allocator = "-" if row["allocator"] == "none" else row["allocator"]
    method = ", ".join([row["method"], *grid_texts(row["grid"])])
    place = [method, allocator, _whole(row["budget"])]
    if "metric" not in row:
        dashes = len(column_names(record)) - len(place) - COLUMNS_BEFORE_METRIC - 1
        failed = f"{row['failed']} failed"
        return [*place, *["-"] * COLUMNS_BEFORE_METRIC, failed, *["-"] * dashes]
    spectra = [_text(row[name], ".3g") for name in SPECTRA] if record.get("spectra") else []
    return [
        *place,
        _whole(row["num_trainable_params"]),
        _whole(row["num_trainable_params_peak"]),
        _whole(row["units_final"] or None),
        _whole(row["units_peak"] or None),
        _text(row["lr"], "g"),
        record["selected_on"] or "-",
        record["reported_on"],
        _metric_text(row),
        _difference_text(row),
        _interval_text(row),
        _text(row["p"], ".3f"),
        f"{row['train_time']:.0f} s",
        f"{row['accelerator_memory_max'] / GIB:.2f} GiB",
        f"{row['file_size'] / MEGABYTE:.2f} MB",
        *spectra,
    ]


def row_label(row: Row) -> str:
    """Return the method, its allocator if it has one, and its values of the grid."""
    allocator = [] if row["allocator"] == "none" else [row["allocator"]]
    return ", ".join([row["method"], *allocator, *grid_texts(row.get("grid") or {})])


def setting_label(row: Mapping[str, Any]) -> str:
    """Return method, allocator and budget of a row or of a trial."""
    budget = "" if row["budget"] is None else f", {row['budget']:,}"
    return f"{row_label(dict(row))}{budget}"


def grid_texts(grid: Mapping[str, Any]) -> list[str]:
    """Return "rank=4" for each key of a grid, by the shortest name that no other key has."""
    keys = [key.split(".") for key in grid]
    texts = []
    for parts, value in zip(keys, grid.values(), strict=True):
        length = 1
        while length < len(parts) and [k[-length:] for k in keys].count(parts[-length:]) > 1:
            length += 1
        texts.append(f"{'.'.join(parts[-length:])}={_value_text(value)}")
    return texts


def _value_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict) and isinstance(value.get("class_path"), str):
        return str(value["class_path"].rpartition(".")[2])
    return "none" if value is None else str(value)


def pareto(points: Sequence[tuple[float, float]], mode: str) -> list[tuple[float, float]]:
    """Return the Pareto-optimal (cost, metric) pairs, sorted by cost.

    Args:
        points: pairs of a cost, of which less is better, and a metric.
        mode: "max" if more of the metric is better, "min" if less is.
    """
    sign = 1 if mode == "max" else -1
    best = -math.inf
    front: list[tuple[float, float]] = []
    for cost, metric in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if sign * metric > best:
            best = sign * metric
            front.append((cost, metric))
    return front


def _summarized(results: Sequence[Row], metric: str) -> Row:
    """Return the row of all seeds, still without a comparison."""
    first = results[0]
    successful = [
        result
        for result in results
        if result["status"] == "success" and metric in result["metrics"]
    ]
    row: Row = {
        "method": first["method"],
        "allocator": first["allocator"],
        "budget": first["budget"],
        "grid": first.get("grid") or {},
        "against": first.get("against"),
        "lr": first["lr"],
        "seeds": len(successful),
        "failed": len(results) - len(successful),
        "values": {result["seed"]: result["metrics"][metric] for result in successful},
    }
    if not successful:
        return row
    values = row["values"].values()
    row["metric"] = statistics.mean(values)
    row["deviation"] = statistics.stdev(values) if len(successful) > 1 else None
    for name in MEANS:
        row[name] = statistics.mean(result[name] for result in successful)
    row["num_trainable_params_peak"] = statistics.mean(map(_trainable_at_peak, successful))
    for name in SPECTRA:
        row[name] = _mean_of_layers(name, successful)
    row["parameters_at_start"] = successful[0]["adapter_params_at_start"]
    row["ranks"] = successful[0]["ranks"]
    return row


def _baseline_row(table: Sequence[Row], method: str | None, row: Row) -> Row | None:
    """Return the row of a method at the budget and grid point of another row.

    It is the one without an allocator, if there is such a row.
    """
    same = ("budget", "grid")
    candidates = [
        other
        for other in table
        if other["method"] == method and all(other[key] == row[key] for key in same)
    ]
    without_allocator = [other for other in candidates if other["allocator"] == "none"]
    return next(iter(without_allocator or candidates), None)


def _compared(row: Row, baseline: Row | None) -> Row:
    """Return mean, deviation and 95 % interval of paired differences, and p of the t-test."""
    if baseline is None or baseline is row:
        return dict(UNCOMPARED)
    pairs = [
        (value, baseline["values"][seed])
        for seed, value in row["values"].items()
        if seed in baseline["values"]
    ]
    differences = [value - reference for value, reference in pairs]
    if not differences:
        return dict(UNCOMPARED)
    mean = statistics.mean(differences)
    compared = {**UNCOMPARED, "difference": mean}
    if len(pairs) > 1:
        compared["difference_deviation"] = statistics.stdev(differences)
    rounding = FLOAT32_EPSILON * max(abs(value) for pair in pairs for value in pair)
    if max(differences) - min(differences) > rounding:
        from scipy.stats import ttest_rel

        test: Any = ttest_rel(*zip(*pairs, strict=True))
        compared |= {"interval": list(map(float, test.confidence_interval(0.95)))}
        compared["p"] = float(test.pvalue)
    return compared


def _trainable_at_peak(result: Row) -> float:
    """Return the parameters that trained at the peak. Results of earlier versions lack them."""
    peak = result.get("num_trainable_params_peak")
    return float(result["num_trainable_params"] if peak is None else peak)


def _mean_of_layers(name: str, results: Sequence[Row]) -> float | None:
    """Return the mean of a measure of the changes over all layers of some runs."""
    values: list[float] = []
    for result in results:
        layers = result.get("spectra") or {}
        values += [layer[name] for layer in layers.values() if layer[name] is not None]
    return statistics.mean(values) if values else None


def _difference_text(row: Row) -> str:
    """Return the mean of the paired differences, and their standard deviation."""
    text = _text(row["difference"], "+.4f")
    if row["difference_deviation"] is None:
        return text
    return f"{text} ± {row['difference_deviation']:.4f}"


def _interval_text(row: Row) -> str:
    if row["interval"] is None:
        return "-"
    low, high = row["interval"]
    return f"{low:+.4f} to {high:+.4f}"


def _metric_text(row: Row) -> str:
    """Return mean, standard deviation and number of failed runs."""
    text = f"{row['metric']:.4f}"
    if row["deviation"] is not None:
        text += f" ± {row['deviation']:.4f}"
    if row["failed"]:
        text += f" ({row['failed']} failed)"
    return text


def _whole(value: float | None) -> str:
    return _text(value, ",.0f")


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
