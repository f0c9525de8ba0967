"""Results of a study -> a table, tests against the baseline, pictures, and one page of HTML. Needs matplotlib and SciPy."""

import base64
import html
import json
import math
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptrank.reports.ranks import STYLE, grid

Row = dict[str, Any]


def rows(record: Mapping[str, Any]) -> list[Row]:
    """One row for each method, allocator and budget: means and standard deviations over seeds, and a paired t-test against the baseline.

    The test pairs runs of one seed at one budget; its p is None where there are fewer than two pairs, or no difference varies.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for result in record["results"]:
        groups.setdefault((result["method"], result["allocator"], result["budget"]), []).append(
            result
        )
    found = []
    for (method, allocator, budget), results in groups.items():
        good = [r for r in results if r["status"] == "success" and record["metric"] in r["metrics"]]
        row: Row = {
            "method": method,
            "allocator": allocator,
            "budget": budget,
            "lr": results[0]["lr"],
            "seeds": len(good),
            "failed": len(results) - len(good),
            "values": {r["seed"]: r["metrics"][record["metric"]] for r in good},
        }
        if good:
            row["metric"] = statistics.mean(row["values"].values())
            row["deviation"] = statistics.stdev(row["values"].values()) if len(good) > 1 else None
            for name in (
                "num_trainable_params",
                "train_time",
                "accelerator_memory_max",
                "file_size",
                "units_final",
                "units_peak",
            ):
                row[name] = statistics.mean(r[name] for r in good)
            row["parameters_at_start"] = good[0]["adapter_params_at_start"]
            row["ranks"] = good[0]["ranks"]
        found.append(row)
    for row in found:
        row |= _against(row, _baseline(found, record["baseline"], row))
    return found


def _baseline(found: Sequence[Row], name: str | None, row: Row) -> Row | None:
    """The baseline's row at the same budget, without an allocator if it has such a row."""
    own = [r for r in found if r["method"] == name and r["budget"] == row["budget"]]
    plain = [r for r in own if r["allocator"] == "none"]
    return next(iter(plain or own), None)


def _against(row: Row, baseline: Row | None) -> Row:
    if baseline is None or baseline is row:
        return {"difference": None, "p": None}
    pairs = [
        (value, baseline["values"][seed])
        for seed, value in row["values"].items()
        if seed in baseline["values"]
    ]
    differences = [one - other for one, other in pairs]
    if not differences:
        return {"difference": None, "p": None}
    p = None
    if len(pairs) > 1 and len(set(differences)) > 1:
        from scipy.stats import ttest_rel

        p = float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
    return {"difference": statistics.mean(differences), "p": p}


HEAD = (
    "method",
    "allocator",
    "budget",
    "trainable",
    "units peak",
    "lr",
    "selected on",
    "reported on",
    "metric",
    "against baseline",
    "p",
    "time",
    "memory",
    "file",
)


def cells(row: Row, record: Mapping[str, Any]) -> list[str]:
    """A row as texts, in the order of HEAD."""
    if "metric" not in row:
        return [
            row["method"],
            _dash(row["allocator"]),
            _count(row["budget"]),
            *["-"] * 5,
            f"{row['failed']} failed",
            *["-"] * 5,
        ]
    value = f"{row['metric']:.4f}" + (
        f" ± {row['deviation']:.4f}" if row["deviation"] is not None else ""
    )
    return [
        row["method"],
        _dash(row["allocator"]),
        _count(row["budget"]),
        _count(row["num_trainable_params"]),
        _count(row["units_peak"]) if row["units_peak"] else "-",
        "-" if row["lr"] is None else f"{row['lr']:g}",
        record["selected_on"] or "-",
        record["reported_on"],
        value + (f" ({row['failed']} failed)" if row["failed"] else ""),
        "-" if row["difference"] is None else f"{row['difference']:+.4f}",
        "-" if row["p"] is None else f"{row['p']:.3f}",
        f"{row['train_time']:.0f} s",
        f"{row['accelerator_memory_max'] / 2**30:.2f} GiB",
        f"{row['file_size'] / 1e6:.2f} MB",
    ]


def _dash(text: str) -> str:
    return "-" if text == "none" else text


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def markdown(record: Mapping[str, Any], found: Sequence[Row]) -> str:
    """The report as Markdown."""
    head = list(HEAD)
    head[head.index("metric")] = record["metric"]
    lines = [f"# {record['title']}", ""]
    lines += [record["limits"].strip(), ""] if record["limits"] else []
    lines += [_how(record), ""]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(cells(row, record))} |" for row in found]
    if record["left_out"]:
        lines += ["", "Left out:", "", *(f"- {why}" for why in record["left_out"])]
    failed = [r for r in [*record["trials"], *record["results"]] if r["status"] == "failed"]
    if failed:
        lines += ["", "Failed:", "", *(f"- {r['key']}: {r['error']}" for r in failed)]
    return "\n".join(lines) + "\n"


def _how(record: Mapping[str, Any]) -> str:
    seeds = ", ".join(map(str, record["seeds"]))
    selected = (
        f"Learning rates selected by `{record['selected_by']}` on {record['selected_on']}, which is not reported on, by {len(record['lrs'])} trials for each row "
        f"({', '.join(f'{lr:g}' for lr in record['lrs'])})."
        if record["selected_on"]
        else "Learning rates as configured."
    )
    against = (
        f" p: paired t-test against {record['baseline']} over seeds." if record["baseline"] else ""
    )
    return (
        f"Reported on `{record['metric']}` ({'higher' if record['mode'] == 'max' else 'lower'} is better), mean ± standard deviation over seeds "
        f"{seeds}. {selected}{against} Trainable parameters are those at the end, heads included; units are those held at the peak."
    )


def draw(record: Mapping[str, Any], found: Sequence[Row], folder: Path) -> dict[str, Path]:
    """Pareto plots of the metric over parameters, time and memory, and heat maps of final ranks; name -> file.

    Raises:
        ModuleNotFoundError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Pictures need matplotlib: pip install 'adaptrank[report]'."
        ) from error
    good = [row for row in found if "metric" in row]
    files: dict[str, Path] = {}
    if not good:
        return files
    names = list(dict.fromkeys(_label(row) for row in good))
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    marks = "osD^vP*Xhd<>"
    for panel, (key, words, unit) in zip(
        panels,
        (
            ("num_trainable_params", "trainable parameters", 1.0),
            ("train_time", "seconds of training", 1.0),
            ("accelerator_memory_max", "peak memory, GiB", 2.0**30),
        ),
        strict=True,
    ):
        for number, name in enumerate(names):
            own = sorted((row for row in good if _label(row) == name), key=lambda row: row[key])
            xs, ys = [row[key] / unit for row in own], [row["metric"] for row in own]
            bars = [row["deviation"] or 0.0 for row in own]
            style = {
                "fmt": marks[number % len(marks)] + ("-" if key == "num_trainable_params" else ""),
                "ms": 5,
                "lw": 1,
                "capsize": 2,
                "color": f"C{number % 10}",
            }
            panel.errorbar(xs, ys, bars, label=name, **style)
        front = pareto([(row[key] / unit, row["metric"]) for row in good], record["mode"])
        panel.plot(
            *zip(*front, strict=True), color="0.5", lw=4, alpha=0.3, zorder=0, label="best so far"
        )
        if key == "num_trainable_params":
            panel.set_xscale("log")
        panel.set(xlabel=words, ylabel=record["metric"])
        panel.grid(alpha=0.3)
    panels[-1].legend(frameon=False, fontsize=8)
    files["pareto"] = folder / "pareto.png"
    figure.savefig(files["pareto"], dpi=120)
    ranked = [
        row for row in good if len(set(row["ranks"].values())) > 1
    ]  # of one size everywhere there is nothing to see
    if ranked:
        files["ranks"] = folder / "ranks.png"
        _draw_ranks(ranked, files["ranks"])
    return files


def pareto(points: Sequence[tuple[float, float]], mode: str) -> list[tuple[float, float]]:
    """Of (cost, metric) those that nothing beats in both, from the cheapest on."""
    sign = 1 if mode == "max" else -1
    best, front = -math.inf, []
    for cost, metric in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if sign * metric > best:
            best = sign * metric
            front.append((cost, metric))
    return front


def _label(row: Row) -> str:
    return (
        str(row["method"]) if row["allocator"] == "none" else f"{row['method']}, {row['allocator']}"
    )


def _draw_ranks(ranked: Sequence[Row], file: Path) -> None:
    import numpy as np
    from matplotlib.figure import Figure

    shown = ranked[:12]
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(3.4 * across, 2.8 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel, row in zip(panels, shown, strict=False):
        layers, kinds, place = grid(list(row["ranks"]))
        values = np.full((len(layers), len(kinds)), np.nan)
        for axis, size in row["ranks"].items():
            values[place[axis]] = size
        image = panel.imshow(values, aspect="auto", cmap="viridis", vmin=0)
        figure.colorbar(image, ax=panel, shrink=0.8)
        budget = "" if row["budget"] is None else f", {row['budget']:,}"
        panel.set_title(f"{_label(row)}{budget}", fontsize=8)
        panel.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", fontsize=6)
        panel.set_yticks(range(len(layers)), layers, fontsize=6)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    figure.savefig(file, dpi=120)


ALTS = {
    "pareto": "The metric over trainable parameters, seconds of training and peak memory, one line for each method",
    "ranks": "Heat maps of the final units of each layer and kind, with the first seed",
}


def page(record: Mapping[str, Any], found: Sequence[Row], pictures: Mapping[str, bytes]) -> str:
    """The report as one HTML document: pictures inside, no script, nothing from elsewhere."""
    esc = html.escape
    head = [record["metric"] if name == "metric" else name for name in HEAD]
    table = "\n".join(
        "<tr>"
        + "".join(
            f"<td{'' if i < 2 else ' class=n'}>{esc(cell)}</td>"
            for i, cell in enumerate(cells(row, record))
        )
        + "</tr>"
        for row in found
    )
    columns = "".join(
        f"<th{'' if i < 2 else ' class=n'}>{esc(name)}</th>" for i, name in enumerate(head)
    )
    figures = "\n".join(
        f'<figure><div class="wide"><img alt="{esc(ALTS[name])}" src="data:image/png;base64,{base64.b64encode(data).decode()}"></div></figure>'
        for name, data in pictures.items()
    )
    notes = "".join(f"<li>{esc(why)}</li>" for why in record["left_out"])
    failed = "".join(
        f"<li>{esc(r['key'])}: {esc(r['error'])}</li>"
        for r in [*record["trials"], *record["results"]]
        if r["status"] == "failed"
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{esc(record["title"])}</title><style>{STYLE}td {{ white-space: nowrap; }} figure {{ margin: 1rem 0; }}
body {{ max-width: 78rem; }} .wide img {{ min-width: 46rem; }}</style></head><body>
<h1>{esc(record["title"])}</h1>
{f"<p>{esc(record['limits'])}</p>" if record["limits"] else ""}
<p>{esc(_how(record)).replace("`", "")}</p>
<div class="wide"><table><tr>{columns}</tr>
{table}</table></div>
{figures}
{f"<h2>Left out</h2><ul>{notes}</ul>" if notes else ""}
{f"<h2>Failed</h2><ul>{failed}</ul>" if failed else ""}
</body></html>
"""


def write_study(record: Mapping[str, Any], out: Path) -> list[Path]:
    """Write table, pictures and page into a folder; each file whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    found = rows(record)
    with tempfile.TemporaryDirectory(dir=out, prefix=".") as growing:
        files = list((pictures := draw(record, found, Path(growing))).values())
        for name, text in (
            ("report.md", markdown(record, found)),
            (
                "index.html",
                page(record, found, {name: file.read_bytes() for name, file in pictures.items()}),
            ),
            ("table.json", json.dumps(found, indent=1) + "\n"),
        ):
            (Path(growing) / name).write_text(text, encoding="utf-8")
            files.append(Path(growing) / name)
        for file in files:
            os.replace(file, out / file.name)
    return [out / file.name for file in files]
