"""Typed reading of a run's and a study's files: what does not fit is named by file, line and key.

Keys that no report reads are left as they are.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adaptrank._errors import UserError

Check = Callable[[Any], bool]

LARGEST = 2**53
"""Largest number that a report shows. Larger ones are not exact as floating-point numbers."""
LONGEST_QUOTE = 60
"""Characters of a wrong value that an error quotes."""


# ---- kinds of values


def is_count(value: Any) -> bool:
    """Tell whether a value is a number of units, steps or parameters."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def is_number(value: Any) -> bool:
    """Tell whether a value is a number, which may be NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not math.isfinite(value) or abs(value) <= 1e300


def is_text(value: Any) -> bool:
    """Tell whether a value is a text."""
    return isinstance(value, str)


def optional(check: Check) -> Check:
    """Return a check that also lets null pass."""
    return lambda value: value is None or check(value)


def table_of(check: Check) -> Check:
    """Return a check for a mapping of texts to values that fit."""
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def list_of(check: Check) -> Check:
    """Return a check for a list of values that fit."""
    return lambda value: isinstance(value, list) and all(map(check, value))


def record_of(fields: "Fields") -> Check:
    """Return a check for a mapping with these required keys."""

    def check(value: Any) -> bool:
        if not isinstance(value, dict):
            return False
        return all(key in value and fits(value[key]) for key, (fits, _) in fields.items())

    return check


Fields = Mapping[str, tuple[Check, str]]
"""Key -> its check, and what fits in words."""

COUNT = (is_count, "a whole number from 0 on")
NUMBER = (is_number, "a number")
TEXT = (is_text, "a text")
UNITS = (table_of(list_of(is_count)), "lists of units by axis")
COUNTS = (table_of(is_count), "whole numbers by axis")
METRICS = (table_of(optional(is_number)), "numbers by name")

EVENT: Fields = {
    "allocators": (list_of(is_text), "a list of texts"),
    "reason": TEXT,
    "skipped": TEXT,
    "unit": TEXT,
    "budget": (optional(is_count), "a whole number from 0 on, or null"),
    "total": COUNT,
    "active": COUNT,
    "allocated": COUNT,
    "parameters": COUNT,
    "allocated_parameters": COUNT,
    "sizes": COUNTS,
    "pruned": UNITS,
    "closed": UNITS,
    "grown": COUNTS,
    "scores": (table_of(is_number), "numbers by name"),
}
"""Optional keys of a line of ranks.jsonl beside its step."""

LAYER: Fields = {"kind": TEXT, "count": COUNT, "method": TEXT, "trainable": COUNT}

SUMMARY: Fields = {
    "base": (lambda value: isinstance(value, dict), "a mapping"),
    "layers": (list_of(record_of(LAYER)), "a list of kind, count, method and trainable"),
    "trainable": COUNT,
    "parameters": COUNT,
    "ranks": COUNT,
    "steps": COUNT,
    "seconds": NUMBER,
    "before": METRICS,
    "after": METRICS,
    "rounds": (lambda value: isinstance(value, dict), "a mapping"),
}
"""Optional keys of summary.json."""

SUCCESS: Fields = {
    "metrics": METRICS,
    "num_trainable_params": NUMBER,
    "train_time": NUMBER,
    "accelerator_memory_max": NUMBER,
    "file_size": NUMBER,
    "units_final": NUMBER,
    "units_peak": NUMBER,
    "adapter_params_at_start": (optional(is_number), "a number or null"),
    "ranks": COUNTS,
}
"""Keys of the result of a run that succeeded."""

RESULT: Fields = {
    "key": TEXT,
    "status": (lambda value: value in ("success", "failed"), "'success' or 'failed'"),
    "method": TEXT,
    "allocator": TEXT,
    "budget": (optional(is_count), "a whole number or null"),
    "seed": (lambda value: isinstance(value, int), "a whole number"),
    "lr": (optional(is_number), "a number or null"),
}
"""Keys of every result of a study."""

IS_TABLE = (lambda value: isinstance(value, dict), "a mapping")

CHANGE: Fields = {
    "rank": NUMBER,
    "effective_rank": NUMBER,
    "relative": (optional(is_number), "a number or null"),
}
"""Measures of the change of a layer, in a study with spectra."""

OPTIONAL_RESULT: Fields = {
    "grid": IS_TABLE,
    "dtype": (optional(is_text), "a text or null"),
    "against": (optional(is_text), "a text or null"),
    "of": (list_of(is_text), "a list of texts"),
    "num_trainable_params_peak": NUMBER,
    "spectra": (table_of(record_of(CHANGE)), "measures by layer"),
    "similarity": (record_of({"rms_cos": (optional(is_number), "")}), "a mapping with rms_cos"),
}
"""Keys of the result of a study with a grid or with sums."""

SEARCH: Fields = {"trials": COUNT, "low": NUMBER, "high": NUMBER}

OPTIONAL_STUDY: Fields = {
    "grid": (table_of(list_of(lambda value: True)), "lists of values by key"),
    "spectra": (lambda value: isinstance(value, bool), "true or false"),
    "search": (optional(record_of(SEARCH)), "a mapping with trials, low and high, or null"),
    "selection_seeds": (list_of(lambda value: isinstance(value, int)), "a list of whole numbers"),
}
"""Keys of results.json that a study without a grid or a search may not have."""

STUDY: Fields = {
    "title": TEXT,
    "limits": TEXT,
    "metric": TEXT,
    "mode": (lambda value: value in ("max", "min"), "'max' or 'min'"),
    "baseline": (optional(is_text), "a text or null"),
    "selected_on": (optional(is_text), "a text or null"),
    "selected_by": (optional(is_text), "a text or null"),
    "reported_on": TEXT,
    "lrs": (list_of(is_number), "a list of numbers"),
    "seeds": (list_of(lambda value: isinstance(value, int)), "a list of whole numbers"),
    "left_out": (list_of(is_text), "a list of texts"),
    "trials": (list_of(lambda value: isinstance(value, dict)), "a list of results"),
    "results": (list_of(lambda value: isinstance(value, dict)), "a list of results"),
}
"""Keys of results.json."""


# ---- files


def read_lines(file: Path) -> list[tuple[str, Any]]:
    """Return (place, value) of each line of a JSON Lines file.

    A last line that is cut off, as a killed run leaves it, is left out.

    Raises:
        UserError: naming the line that is no JSON.
    """
    values: list[tuple[str, Any]] = []
    lines = _read_bytes(file).split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            values.append((place, _parse(line)))
        except (ValueError, RecursionError):
            # A complete line ends with a line break, so that another, empty, line follows.
            if number < len(lines):
                raise UserError(f"{place}: this is no JSON. The file is damaged.") from None
    return values


def read_table(file: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file, empty if there is no file.

    Raises:
        UserError: if the file holds something else.
    """
    if not file.is_file():
        return {}
    try:
        content = _parse(_read_bytes(file))
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        place = f"{file}, line {line}" if line else str(file)
        raise UserError(f"{place}: this is no JSON. The file is damaged.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON mapping. The file is damaged.")
    return content


def check_fields(place: str, record: Any, fields: Fields, required: bool = False) -> None:
    """Check the keys of a mapping that a report reads.

    Args:
        place: file and line, for the error.
        record: the mapping.
        fields: keys and what fits.
        required: whether each of them has to be there.

    Raises:
        UserError: naming place, key, value and what fits.
    """
    if not isinstance(record, dict):
        raise UserError(f"{place}: {_quote(record)} is no mapping. The file is damaged.")
    for key, (fits, words) in fields.items():
        if key not in record:
            if required:
                raise UserError(f"{place}: the key {key!r} is missing. The file is damaged.")
        elif not fits(record[key]):
            raise UserError(
                f"{place}: {key} is {_quote(record[key])}. It must be {words}. The file is damaged."
            )


def read_study_results(file: Path) -> dict[str, Any]:
    """Return the results of a study, whose every key that a report reads is checked.

    Raises:
        UserError: naming the file, the result and the key.
    """
    record = read_table(file)
    check_fields(str(file), record, STUDY, required=True)
    check_fields(str(file), record, OPTIONAL_STUDY)
    for list_name in ("trials", "results"):
        for number, result in enumerate(record[list_name], 1):
            place = f"{file}, {list_name}, number {number}"
            check_fields(place, result, RESULT, required=True)
            check_fields(place, result, OPTIONAL_RESULT)
            succeeded = result["status"] == "success"
            fields = SUCCESS if succeeded else {"error": TEXT}
            check_fields(place, result, fields, required=True)
    return record


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from None


def _parse(text: bytes) -> Any:
    return json.loads(text.decode("utf-8"))


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_QUOTE else f"{text[: LONGEST_QUOTE - 3]}..."
