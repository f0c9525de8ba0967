"""Metric of the selection by learning rate, as means over the trials of each setting."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptrank.reports.comparison import Row, setting_label

MOST_RATES = 12
"""Largest number of learning rates that a table has columns for. A search may try many more."""


@dataclass(frozen=True)
class TrialCell:
    """Mean over the trials of a setting at a learning rate.

    Args:
        text: the mean, and the number of failed trials. It is "-" if there was no trial.
        is_chosen: the rate was selected for the setting.
    """

    text: str
    is_chosen: bool = False


@dataclass(frozen=True)
class TrialTable:
    """Table of the trials of a study: a row for each setting, a column for each learning rate.

    Args:
        metric: metric of the selection.
        rates: learning rates, ascending.
        cells: label of a setting -> its cells, in the order of the rates.
    """

    metric: str
    rates: list[str]
    cells: dict[str, list[TrialCell]]


def trial_table(record: Mapping[str, Any], table: Sequence[Row]) -> TrialTable | None:
    """Return the table of the trials, or None if no rate was selected or too many were tried.

    Args:
        record: results of a study.
        table: its rows, see `comparison.rows`.
    """
    means = means_by_rate(record)
    failures = _failures_by_rate(record)
    tried: set[float] = set()
    for label in means:
        tried.update(means[label], failures.get(label, ()))
    rates = sorted(tried)
    if not means or len(rates) > MOST_RATES:
        return None
    chosen = {setting_label(row): row["lr"] for row in table}
    cells: dict[str, list[TrialCell]] = {}
    for label, by_rate in means.items():
        failed = failures.get(label, Counter())
        cells[label] = [
            TrialCell(_text(by_rate.get(rate), failed[rate]), rate == chosen.get(label))
            for rate in rates
        ]
    return TrialTable(record["selected_by"], [f"{rate:g}" for rate in rates], cells)


def _failures_by_rate(record: Mapping[str, Any]) -> dict[str, Counter[float]]:
    """Return the number of failed trials by learning rate for each setting."""
    failures: dict[str, Counter[float]] = {}
    for trial in record["trials"]:
        if trial["status"] == "failed" and trial.get("lr"):
            failures.setdefault(setting_label(trial), Counter())[trial["lr"]] += 1
    return failures


def _text(mean: float | None, failed: int) -> str:
    """Return the mean of the trials that succeeded, and the number of those that failed."""
    if mean is None:
        return "failed" if failed else "-"
    return f"{mean:.3f} ({failed} failed)" if failed else f"{mean:.3f}"


def means_by_rate(record: Mapping[str, Any]) -> dict[str, dict[float, float]]:
    """Return the selected metric by learning rate for each setting, as means over the trials.

    A setting with one rate is left out.
    """
    values_of: dict[str, dict[float, list[float]]] = {}
    for trial in record["trials"]:
        value = trial.get("metrics", {}).get(record["selected_by"])
        if trial["status"] == "success" and trial.get("lr") and value is not None:
            by_rate = values_of.setdefault(setting_label(trial), {})
            by_rate.setdefault(trial["lr"], []).append(value)
    means: dict[str, dict[float, float]] = {}
    for label, by_rate in values_of.items():
        if len(by_rate) > 1:
            means[label] = {rate: statistics.mean(by_rate[rate]) for rate in sorted(by_rate)}
    return means
