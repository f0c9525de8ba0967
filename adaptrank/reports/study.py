"""The report of a study: a table, pictures, and one page of HTML. Needs matplotlib and SciPy."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptrank._files import atomic_files
from adaptrank.reports.chosen_values import chosen_values
from adaptrank.reports.comparison import Row, cells, column_names, rows
from adaptrank.reports.escaping import code_span
from adaptrank.reports.escaping import markdown as escape
from adaptrank.reports.figures import draw_study
from adaptrank.reports.kind_table import kind_table
from adaptrank.reports.rendering import Picture, render
from adaptrank.reports.trial_table import trial_table

Escape = Callable[[str], str]

MEASURES = ("rank", "effective_rank", "stable_rank", "relative")
"""Measures of a layer's change in the table of layers."""

DESCRIPTIONS = {
    "pareto": "The metric over trainable parameters, seconds of training and peak memory, one line "
    "for each method",
    "learning_rates": "The metric of the selection over the learning rate, one curve a setting",
    "ranks": "Heat maps of the final units of each layer and kind, with the first seed",
}
"""Name of a picture -> its description for people who cannot see it."""

CAPTIONS = {
    "pareto": "Each point is the mean over the seeds, and its bar is the standard deviation. "
    "Nothing cheaper is better than a point on the gray line. The scale of the parameters is "
    "logarithmic.",
    "learning_rates": "Trials with each learning rate, on the data of the selection. A curve that "
    "is best at its first or last point has not been followed far enough.",
    "ranks": "Units at the end, with the first seed. A darker cell has more units, and all maps "
    "have the same colors.",
}
"""Name of a picture -> what to see in it."""


def write_study(record: Mapping[str, Any], out: Path) -> list[Path]:
    """Write table, pictures and page of a study into a folder, each file as a whole.

    Args:
        record: results of the study, as `run_study` returns them.
        out: folder to write, made if need be.

    Returns:
        The files.

    Raises:
        ModuleNotFoundError: if matplotlib is missing.
    """
    table = rows(record)
    with atomic_files(out) as temporary:
        pictures = draw_study(record, table, temporary)
        contents = {name: file.read_bytes() for name, file in pictures.items()}
        texts = {
            "report.md": markdown(record, table),
            "index.html": page(record, table, contents),
            "table.json": json.dumps(table, indent=1) + "\n",
        }
        if record.get("spectra"):
            texts["layers.csv"] = layers_table(record)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
    names = [file.name for file in pictures.values()]
    return [out / name for name in [*names, *texts]]


def markdown(record: Mapping[str, Any], table: Sequence[Row]) -> str:
    """Return the report as Markdown."""
    values = _values(record, table)
    texts = {
        "title": escape(values["title"]),
        "limits": escape(values["limits"]),
        "columns": [escape(column) for column in values["columns"]],
        "table": [list(map(escape, row)) for row in values["table"]],
        "left_out": [escape(reason) for reason in values["left_out"]],
        "notes": [escape(sentence) for sentence in values["notes"]],
        "trials": values["trials"],
        "kinds": values["kinds"],
        "failed": [
            {"key": escape(result["key"]), "error": escape(result["error"])}
            for result in values["failed"]
        ],
    }
    return render(
        "study.md.j2",
        **texts,
        explanation=_explanation(record, escape, code_span),
        escape=escape,
        code=code_span,
    )


def page(record: Mapping[str, Any], table: Sequence[Row], pictures: Mapping[str, bytes]) -> str:
    """Return the report as one HTML document, with the pictures inside."""
    return render(
        "study.html.j2",
        **_values(record, table),
        explanation=_explanation(record, str, str),
        pictures=[
            Picture(DESCRIPTIONS[name], png, CAPTIONS[name]) for name, png in pictures.items()
        ],
    )


def _values(record: Mapping[str, Any], table: Sequence[Row]) -> dict[str, Any]:
    """Return the values that both templates show."""
    results = [*record["trials"], *record["results"]]
    return {
        "title": record["title"],
        "limits": record["limits"].strip(),
        "columns": column_names(record),
        "table": [cells(row, record) for row in table],
        "left_out": record["left_out"],
        "notes": [*chosen_values(record, table), *similarities(record)],
        "failed": [result for result in results if result["status"] == "failed"],
        "trials": trial_table(record, table),
        "kinds": kind_table(record),
    }


def layers_table(record: Mapping[str, Any]) -> str:
    """Return the measures of each layer's change in each run, as CSV."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["method", "allocator", "budget", "grid", "seed", "layer", *MEASURES])
    for result in record["results"]:
        grid = json.dumps(result.get("grid") or {})
        run = [result["method"], result["allocator"], result["budget"], grid, result["seed"]]
        for path, layer in (result.get("spectra") or {}).items():
            table.writerow([*run, path, *(layer.get(name) for name in MEASURES)])
    return text.getvalue()


def similarities(record: Mapping[str, Any]) -> list[str]:
    """Return a sentence about the similarity of the adapters of each composition."""
    sentences = []
    for result in record["results"]:
        cosine = (result.get("similarity") or {}).get("rms_cos")
        if cosine is not None:
            parts = ", ".join(result.get("of", []))
            sentences.append(
                f"{result['method']}, seed {result['seed']}: root mean square cosine {cosine:.4f} "
                f"between the changes of {parts}."
            )
    return sentences


def _trials(record: Mapping[str, Any]) -> str:
    """Return how many trials each row had, and of which learning rates."""
    # Studies of earlier versions had one seed.
    seeds = record.get("selection_seeds") or [0]
    each = f" with each of the seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
    search = record.get("search")
    if search:
        return (
            f"{search['trials']} trials for each row, which Optuna proposed between "
            f"{search['low']:g} and {search['high']:g} (seed {search.get('seed', 0)}){each}"
        )
    rates = ", ".join(f"{rate:g}" for rate in record["lrs"])
    return f"{len(record['lrs'])} trials for each row ({rates}){each}"


def _explanation(record: Mapping[str, Any], text: Escape, code: Escape) -> str:
    """Return a paragraph that says what the numbers are and how they came about.

    Args:
        record: results of the study.
        text: escapes a name in the format of the report.
        code: escapes a name that is shown as code.
    """
    better = "higher" if record["mode"] == "max" else "lower"
    seeds = ", ".join(map(str, record["seeds"]))
    sentences = [
        f"Reported on {code(record['metric'])} ({better} is better), mean ± standard deviation "
        f"over seeds {seeds}."
    ]
    if record["selected_on"]:
        sentences.append(
            f"Learning rates selected by {code(record['selected_by'])} on "
            f"{text(record['selected_on'])}, which is not reported on, by {_trials(record)}."
        )
    else:
        sentences.append("Learning rates as configured.")
    if record["baseline"]:
        sentences.append(
            f"Differences from {text(record['baseline'])} are paired by seed: mean ± standard "
            f"deviation, the 95 % interval of Student's t, and p of the paired t-test."
        )
    sentences.append(
        "Trainable parameters and units are those at the end, heads included. At the peak they "
        "include closed units."
    )
    # `dtype: auto` depends on the machine. Runs of earlier versions do not say it.
    dtypes = {result["dtype"] for result in record["results"] if result.get("dtype")}
    if dtypes:
        sentences.append(f"Frozen weights were held in {' and '.join(sorted(dtypes))}.")
    if record.get("spectra"):
        sentences.append(
            "Ranks and size of the change D of a weight W are means over layers and seeds. "
            "layers.csv has each layer."
        )
    return " ".join(sentences)
