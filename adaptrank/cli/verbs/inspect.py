"""`inspect`: show the spectra of an adapter."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from adaptrank.cli.errors import ConfigError
from adaptrank.cli.options import ADAPTER, BASE

DESCRIPTION = """\
Look at the change that an adapter makes to each weight: its size beside the weight, its rank by
several measures, and intruder dimensions (leading singular vectors of W' that W does not have).
Each rank measure is scale-free: read it beside |D| / |W|."""

LEGEND = (
    "rank: above rounding; of full: at 1e-3 of the largest singular value, over min(m, n); "
    "99 %: of the energy"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("adapter", metavar="ADAPTER", help=ADAPTER)
    out = "for inspect.json and inspect.png (inspected/NAME in the folder you start from)"
    parser.add_argument("--out", metavar="FOLDER", help=out)
    parser.add_argument("--layers", metavar="REGEX", help="only layers whose whole path matches")
    intruders = "leave intruder dimensions out, which take most of the time"
    parser.add_argument("--no-intruders", action="store_true", help=intruders)
    each = "a row for every layer, not for every kind of layer"
    parser.add_argument("--each", action="store_true", help=each)
    parser.add_argument("--base", metavar="NAME", help=BASE)
    as_json = "print the data instead, and write nothing"
    parser.add_argument("--json", action="store_true", help=as_json)


def run(options: argparse.Namespace) -> None:
    """Print a table of the spectra, and write the data and a picture."""
    import torch

    from adaptrank._files import atomic_files, write_json
    from adaptrank.cli.loading import find_adapter
    from adaptrank.composition import kind_of, mean_by_kind, spectra, spectral_lines
    from adaptrank.reports.layer_grid import in_grid_order

    _check_pattern(options.layers)
    stored = find_adapter(options.adapter, options.base)
    assert stored.adapter is not None
    out = Path(options.out) if options.out else Path("inspected") / _name_of(stored.adapter)
    if not options.json:
        _check_out(out, stored.adapter)
    found = spectra(stored.load(torch.float32), options.layers, not options.no_intruders)
    if not found:
        raise ConfigError(_why_nothing(stored.adapter, options.layers))
    layers = {path: found[path] for path in in_grid_order(found)}
    rows = {path: path if options.each else kind_of(path) for path in layers}
    summary = mean_by_kind(layers, rows)
    data = {
        "adapter": str(stored.adapter),
        "base": stored.source.name,
        "summary": summary,
        "layers": layers,
    }
    if options.json:
        print(json.dumps(data))
        return
    print(
        f"{stored.adapter} on {stored.source.name}: the change D = W' - W, means over layers of ",
        end="",
    )
    print("a kind")
    for line in spectral_lines(summary):
        print(f"  {line}")
    print(f"  {LEGEND}")
    with atomic_files(out) as temporary:
        write_json(temporary / "inspect.json", data)
        _draw(layers, temporary / "inspect.png")
    print(f"  written: {out / 'inspect.json'}, {out / 'inspect.png'}")


def _name_of(adapter: Path) -> str:
    """Return a name for the files of an adapter: `elalora_llama-0` for runs/elalora_llama/0."""
    folder = adapter.resolve()
    parts = folder.parts[1:]
    if folder.name == "adapter":
        parts = parts[:-1]
    number = parts[-2:] if parts and parts[-1].isdigit() else parts[-1:]
    return "-".join(number) or "adapter"


def _check_out(out: Path, adapter: Path) -> None:
    """Refuse to write into the folder of the adapter, which may be shared or read-only."""
    inside = (out.resolve(), *out.resolve().parents)
    if adapter.resolve() in inside:
        raise ConfigError(
            f"{out} lies in the adapter's folder {adapter}, which is left as it is. Name another "
            f"folder with --out."
        )
    if out.is_file():
        raise ConfigError(f"--out {out} is a file. Name a folder.")


def _check_pattern(pattern: str | None) -> None:
    if pattern is None:
        return
    try:
        re.compile(pattern)
    except re.error as error:
        text = f"--layers {pattern!r} is no regular expression: {error}."
        raise ConfigError(text) from None


def _why_nothing(adapter: Path, pattern: str | None) -> str:
    """Return the sentence for an adapter without a layer to inspect."""
    from adaptrank.artifacts import read_adapter

    nothing = f"There is nothing to inspect in {adapter}"
    if pattern is None:
        return f"{nothing}: the modules that it wraps are no single matrices."
    paths = [path for entry in read_adapter(adapter)["adapters"] for path in entry["layers"]]
    return f"{nothing}: no layer matches {pattern!r}. There are {', '.join(paths[:3])}, ..."


def _draw(layers: dict[str, dict[str, Any]], file: Path) -> None:
    from adaptrank.reports.figures import LayerMap, Scale, heat_maps

    size, rank = Scale("size beside the weight"), Scale("rank of the change")
    share, intruders = Scale("share of the full rank"), Scale("of 10 vectors", highest=10)
    maps = {
        "relative": LayerMap("|D| / |W|", size),
        "effective_rank": LayerMap("effective rank", rank),
        "stable_rank": LayerMap("stable rank", rank),
        "rank_share": LayerMap("rank at 1e-3, of full", share),
        "intruders": LayerMap("intruder dimensions", intruders),
    }
    for path, facts in layers.items():
        shown = {**facts, "rank_share": facts["rank_share"]["0.001"]}
        for name, each in maps.items():
            if shown.get(name) is not None:
                each.values[path] = shown[name]
    heat_maps([each for each in maps.values() if each.values], file)
