"""What an allocator did in a run, as pictures and one page of HTML that needs nothing else."""

import base64
import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptrank._errors import UserError

STRIPES = 6
"""Events of which the ranks over time show a map."""


@dataclass(frozen=True)
class History:
    """A run as its folder has it.

    Args:
        name: of the run.
        events: lines of ranks.jsonl, by step.
        sizes: (step, {axis: units}) at the start and after each event.
        summary: figures of the run; empty if it did not end.
    """

    name: str
    events: list[dict[str, Any]]
    sizes: list[tuple[int, dict[str, int]]]
    summary: dict[str, Any]

    @property
    def start(self) -> dict[str, int]:
        """Units of each axis at the start."""
        return self.sizes[0][1]

    @property
    def end(self) -> dict[str, int]:
        """Units of each axis after the last event."""
        return self.sizes[-1][1]


def read_history(folder: Path) -> History:
    """The history of a run folder.

    Raises:
        FileNotFoundError: if there is no such folder, or no allocator ran in it.
        ValueError: if a line of ranks.jsonl is damaged; half a last line, of a run that was killed, is left out.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; name the folder of a run, such as runs/NAME/0."
        )
    file = folder / "ranks.jsonl"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no ranks.jsonl: no allocator moved a rank in this run."
        )
    lines = file.read_text(encoding="utf-8").splitlines()
    events = []
    for number, line in enumerate(lines, 1):
        try:
            events.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(
                    f"{file}, line {number}: this is no JSON; the file is damaged."
                ) from None
    events.sort(key=lambda event: int(event["step"]))
    final = _json(folder / "ranks.json")
    sizes = _sizes(events, final)
    if not sizes:
        raise UserError(
            f"{file} says nowhere what sizes the axes had; the file is damaged, or of an older version."
        )
    return History(
        "/".join(folder.resolve().parts[-2:]), events, sizes, _json(folder / "summary.json")
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _sizes(
    events: Sequence[Mapping[str, Any]], final: Mapping[str, int]
) -> list[tuple[int, dict[str, int]]]:
    """Sizes after each event. Where the first line does not have them all they are told backwards from the last ones."""
    known: dict[str, int] = (
        dict(events[0].get("sizes", {})) if events and events[0]["step"] == 0 else {}
    )
    if set(final) - set(known):
        known = {**final, **known}
        for event in reversed(events):
            for axis, units in event.get("pruned", {}).items():
                known[axis] = known.get(axis, 0) + len(units)
            for axis, count in event.get("grown", {}).items():
                known[axis] = known.get(axis, 0) - count
    found = [(0, dict(known))] if known else []
    for event in events:
        if event["step"] and known:
            known = {**known, **event.get("sizes", {})}
            closed = {axis: len(units) for axis, units in event.get("closed", {}).items()}
            found.append(
                (
                    int(event["step"]),
                    {axis: size - closed.get(axis, 0) for axis, size in known.items()},
                )
            )
    return found


def grid(axes: Sequence[str]) -> tuple[list[str], list[str], dict[str, tuple[int, int]]]:
    """(layers, kinds, {axis: (row, column)}): layer is the last number of a path, kind what is left of it."""
    places = {}
    for axis in axes:
        path, _, name = axis.rpartition(":")
        numbers = re.findall(r"(?<![^.])(\d+)(?![^.])", path)
        layer = numbers[-1] if numbers else "-"
        tail = (
            re.split(r"(?<![^.])\d+(?![^.])", path)[-1].strip(".")
            or path.rpartition(".")[2]
            or "layer"
        )
        places[axis] = (layer, tail.rpartition(".")[2], name)
    names = {name for _, _, name in places.values()}
    kinds = list(
        dict.fromkeys(
            f"{kind} {name}" if len(names) > 1 else kind for _, kind, name in places.values()
        )
    )
    layers = sorted(
        {layer for layer, _, _ in places.values()},
        key=lambda layer: (not layer.isdigit(), int(layer) if layer.isdigit() else 0),
    )
    return (
        layers,
        kinds,
        {
            axis: (layers.index(layer), kinds.index(f"{kind} {name}" if len(names) > 1 else kind))
            for axis, (layer, kind, name) in places.items()
        },
    )


def draw(history: History, folder: Path) -> dict[str, Path]:
    """Write the pictures; name -> file.

    Raises:
        ModuleNotFoundError: if matplotlib is missing.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "A report draws with matplotlib; type pip install 'adaptrank[report]'."
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers, kinds, places = grid(list(history.start))
    most = max(max(sizes.values()) for _, sizes in history.sizes)
    files = {}

    def save(name: str, figure: Any) -> None:
        files[name] = folder / f"{name}.png"
        figure.savefig(files[name], dpi=110, bbox_inches="tight", facecolor="white")
        plt.close(figure)

    def cells(sizes: Mapping[str, int]) -> Any:
        import numpy as np

        values = np.full((len(layers), len(kinds)), np.nan)
        for axis, size in sizes.items():
            if axis in places:
                row, column = places[axis]
                values[row, column] = (
                    size if np.isnan(values[row, column]) else values[row, column] + size
                )
        return values

    def heat(axes: Any, values: Any, title: str, numbers: bool, **colours: Any) -> Any:
        image = axes.imshow(values, aspect="auto", interpolation="nearest", **colours)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right", fontsize=8)
        step = max(1, len(layers) // 16)
        axes.set_yticks(range(0, len(layers), step), layers[::step], fontsize=8)
        if numbers:
            low, high = image.get_clim()
            for (row, column), value in _items(values):
                dark = (value - low) / max(high - low, 1e-9)
                axes.text(
                    column,
                    row,
                    f"{value:g}",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="black" if dark > 0.55 else "white",
                )
        return image

    height = 1.6 + 0.22 * max(len(layers), 6)
    figure, panels = plt.subplots(1, 3, figsize=(3.2 + 1.35 * len(kinds), height), sharey=True)
    first, last = cells(history.start), cells(history.end)
    top = {"vmin": 0, "vmax": float(max(_most(first), _most(last)))}
    shared = heat(panels[0], first, "start", True, cmap="viridis", **top)
    heat(panels[1], last, "end", True, cmap="viridis", **top)
    figure.colorbar(shared, ax=panels[:2], fraction=0.03, label="units")
    span = max(float(_most(abs(last - first))), 1.0)
    changed = heat(panels[2], last - first, "change", False, cmap="PuOr_r", vmin=-span, vmax=span)
    for (row, column), value in _items(last - first):
        panels[2].text(
            column, row, f"{value:+g}" if value else "", ha="center", va="center", fontsize=6
        )
    figure.colorbar(changed, ax=panels[2], fraction=0.06)
    panels[0].set_ylabel("layer")
    save("ranks", figure)

    chosen = [
        history.sizes[round(i * (len(history.sizes) - 1) / (STRIPES - 1))] for i in range(STRIPES)
    ]
    chosen = list(dict(chosen).items())
    figure, panels = plt.subplots(
        1,
        len(chosen),
        figsize=(1.2 + 1.5 * len(chosen) + 0.1 * len(kinds), height),
        sharey=True,
        squeeze=False,
    )
    for panel, (step, sizes) in zip(panels[0], chosen, strict=True):
        image = heat(
            panel,
            cells(sizes),
            f"step {step}",
            False,
            cmap="viridis",
            vmin=0,
            vmax=max(most, top["vmax"]),
        )
    figure.colorbar(image, ax=panels[0], fraction=0.02, label="units")
    panels[0][0].set_ylabel("layer")
    save("over_time", figure)

    moved = [event for event in history.events if "total" in event]
    figure, panel = plt.subplots(figsize=(7, 3.2))
    for name, style in (("allocated", ":"), ("active", "-"), ("budget", "--")):
        points = [
            (e["step"], e[name])
            for e in moved
            if e.get(name) is not None and (name != "budget" or e.get("unit", "ranks") == "ranks")
        ]
        if points:
            panel.step(
                *zip(*points, strict=True), where="post", linestyle=style, marker=".", label=name
            )
    panel.set(xlabel="optimizer step", ylabel="units", ylim=(0, None), title="Budget")
    panel.legend(frameon=False)
    panel.grid(alpha=0.3)
    save("budget", figure)

    scored = [event for event in history.events if event.get("scores")]
    if scored:
        figure, panel = plt.subplots(figsize=(7, 3.2))
        steps = [event["step"] for event in scored]
        for low, high, shade in (("min", "max", 0.18), ("q25", "q75", 0.4)):
            if all(low in event["scores"] and high in event["scores"] for event in scored):
                band = [[event["scores"][end] for event in scored] for end in (low, high)]
                panel.fill_between(
                    steps,
                    band[0],
                    band[1],
                    alpha=shade,
                    color="tab:blue",
                    label=f"{low} to {high}",
                    linewidth=0,
                )
        panel.plot(
            steps,
            [event["scores"]["median"] for event in scored],
            color="tab:blue",
            marker=".",
            label="median",
        )
        if all(event["scores"]["min"] > 0 for event in scored):
            panel.set_yscale("log")
        panel.set(xlabel="optimizer step", ylabel="score of a unit", title="Scores")
        panel.legend(frameon=False)
        panel.grid(alpha=0.3)
        save("scores", figure)
    return files


def _items(values: Any) -> list[tuple[tuple[int, int], float]]:
    rows, columns = values.shape
    return [
        ((r, c), float(values[r, c]))
        for r in range(rows)
        for c in range(columns)
        if values[r, c] == values[r, c]
    ]


def _most(values: Any) -> float:
    return max((value for _, value in _items(values)), default=0.0)


ALTS = {
    "ranks": "Heat maps of the units of each layer and kind, at the start, at the end, and their difference",
    "over_time": "Heat maps of the units at several steps",
    "budget": "Units open, allocated and budgeted over the optimizer steps",
    "scores": "Distribution of the scores at each event",
}

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; height: auto; border-radius: .3rem; background: white; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
td, th { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #8884; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
code { background: #8882; padding: .1em .3em; border-radius: .2em; overflow-wrap: anywhere; }
"""


def page(history: History, pictures: Mapping[str, bytes], replay: str) -> str:
    """The report as one HTML document: pictures inside, no script, nothing from elsewhere."""
    esc = html.escape
    facts = []
    if summary := history.summary:
        base = summary.get("base", {}).get("name", "")
        methods = ", ".join(dict.fromkeys(row["method"] for row in summary.get("layers", [])))
        facts = [
            ("base", base),
            ("method", methods),
            ("trainable parameters", f"{summary.get('trainable', 0):,}"),
        ]
        facts += [
            (name, f"{before:.4g} to {summary['after'][name]:.4g}")
            for name, before in summary.get("before", {}).items()
            if name in summary.get("after", {})
        ]
    facts += [
        (
            "units",
            f"{sum(history.start.values()):,} to {sum(history.end.values()):,} on {len(history.end)} axes",
        ),
        ("events", str(sum(bool(e["step"]) for e in history.events))),
    ]
    figures = "\n".join(
        f'<figure><div class="wide"><img alt="{esc(ALTS[name])}" src="data:image/png;base64,{base64.b64encode(data).decode()}"></div></figure>'
        for name, data in pictures.items()
    )
    events = "\n".join(
        f'<tr><td class="n">{e["step"]}</td><td class="n">{_count(e.get("pruned"))}</td><td class="n">{_count(e.get("closed"))}</td>'
        f'<td class="n">{_count(e.get("grown"))}</td><td class="n">{e.get("total", "")}</td><td>{esc(str(e.get("reason", e.get("skipped", ""))))}</td></tr>'
        for e in history.events
    )
    ranks = "\n".join(
        f'<tr><td>{esc(axis)}</td><td class="n">{size}</td><td class="n">{history.end.get(axis, size)}</td><td class="n">{history.end.get(axis, size) - size:+d}</td></tr>'
        for axis, size in history.start.items()
    )
    rows = "\n".join(
        f"<tr><th>{esc(name)}</th><td>{esc(str(value))}</td></tr>" for name, value in facts if value
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Ranks of {esc(history.name)}</title><style>{STYLE}</style></head><body>
<h1>Ranks of {esc(history.name)}</h1>
<table>{rows}</table>
{figures}
<h2>The pattern by itself</h2>
<p>The same ranks from the first step, with no allocator:</p><p><code>{esc(replay)}</code></p>
<h2>Events</h2>
<div class="wide"><table><tr><th class="n">step</th><th class="n">pruned</th><th class="n">closed</th><th class="n">grown</th><th class="n">total</th><th>reason</th></tr>
{events}</table></div>
<h2>Each axis</h2>
<div class="wide"><table><tr><th>axis</th><th class="n">start</th><th class="n">end</th><th class="n">change</th></tr>
{ranks}</table></div>
</body></html>
"""


def _count(moved: Mapping[str, Any] | None) -> int:
    return sum(
        len(value) if isinstance(value, list) else int(value) for value in (moved or {}).values()
    )


def write_report(history: History, out: Path, replay: str) -> list[Path]:
    """Draw the pictures and write the page into a folder; each file whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    import tempfile

    with tempfile.TemporaryDirectory(dir=out, prefix=".") as growing:
        files = draw(history, Path(growing))
        text = page(history, {name: file.read_bytes() for name, file in files.items()}, replay)
        (Path(growing) / "index.html").write_text(text, encoding="utf-8")
        written = []
        for file in [*files.values(), Path(growing) / "index.html"]:
            os.replace(file, out / file.name)
            written.append(out / file.name)
    return written
