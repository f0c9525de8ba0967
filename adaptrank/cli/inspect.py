"""`inspect`: what the spectrum of an adapter says."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from adaptrank.cli import errors
from adaptrank.cli.verbs import find_model, make_parser, run_verb


def inspect(args: Sequence[str]) -> None:
    """What the spectrum of an adapter says."""
    parser = make_parser(
        "inspect",
        "Look at the change that an adapter makes to each weight: its size beside the weight, its rank by several\n"
        "measures, and intruder dimensions (leading singular vectors of W' that W does not have). Any rank measure is\n"
        "scale-free: read it beside |D|/|W|.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="a run's adapter folder")
    parser.add_argument(
        "--out", metavar="FOLDER", help="for inspect.json and inspect.png (ADAPTER/inspect)"
    )
    parser.add_argument("--layers", metavar="REGEX", help="only layers whose whole path matches")
    parser.add_argument(
        "--no-intruders",
        action="store_true",
        help="leave intruder dimensions out, which take the time",
    )
    parser.add_argument(
        "--each", action="store_true", help="a row for every layer, not for every kind"
    )
    parser.add_argument(
        "--base", metavar="NAME", help="the base; by default what the adapter's file names"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the data instead, and write nothing"
    )
    run_verb(_inspect, parser.options(args))


def _inspect(options: argparse.Namespace) -> None:
    import re

    import torch

    from adaptrank.artifacts import read_adapter
    from adaptrank.composition import kind_of, mean_by_kind, spectra, spectral_lines
    from adaptrank.reports.figures import heat_maps

    if options.layers is not None:
        try:
            re.compile(options.layers)
        except re.error as error:
            raise errors.ConfigError(
                f"--layers {options.layers!r} is no regular expression: {error}."
            ) from None
    found = find_model(options.adapter, options.base, must_be_adapter=True)
    assert found.adapter is not None
    layers = spectra(found.load(torch.float32), options.layers, not options.no_intruders)
    if not layers:
        described = read_adapter(found.adapter)
        paths = [path for entry in described["adapters"] for path in entry["layers"]]
        why = (
            f"no layer matches {options.layers!r}; there are {', '.join(paths[:3])}, ..."
            if options.layers is not None
            else "what it wraps are no single matrices"
        )
        raise errors.ConfigError(f"There is nothing to inspect in {found.adapter}: {why}.")
    kinds = {path: path if options.each else kind_of(path) for path in layers}
    summary = mean_by_kind(layers, kinds)
    data = {
        "adapter": str(found.adapter),
        "base": found.source.name,
        "summary": summary,
        "layers": layers,
    }
    if options.json:
        print(json.dumps(data))
        return
    print(
        f"{found.adapter} on {found.source.name}: the change D = W' - W, means over layers of a kind"
    )
    for line in spectral_lines(summary):
        print(f"  {line}")
    print(
        "  rank: above rounding; of full: at 1e-3 of the largest singular value, over min(m, n); 99 %: of the energy"
    )
    out = Path(options.out) if options.out else found.adapter / "inspect"
    out.mkdir(parents=True, exist_ok=True)
    (out / "inspect.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    maps = {
        "|D| / |W|": {k: f["relative"] for k, f in layers.items() if f["relative"] is not None},
        "effective rank": {k: f["effective_rank"] for k, f in layers.items()},
        "stable rank": {k: f["stable_rank"] for k, f in layers.items()},
        "rank at 1e-3, of full": {k: f["rank_share"]["0.001"] for k, f in layers.items()},
        "intruders of 10": {k: f["intruders"] for k, f in layers.items() if "intruders" in f},
    }
    try:
        heat_maps({title: values for title, values in maps.items() if values}, out / "inspect.png")
    except ModuleNotFoundError as error:
        raise errors.ConfigError(str(error)) from error
    print(f"  written: {out / 'inspect.json'}, {out / 'inspect.png'}")
