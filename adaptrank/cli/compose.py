"""`compose`: several adapters as one."""

import argparse
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptrank.cli import errors
from adaptrank.cli.verbs import (
    check_out,
    find_model,
    make_parser,
    run_verb,
    stored_dtype,
    write_folder,
)

OPTIONS = {
    "density": (
        float,
        "of each change the fraction of entries that stays: ties, magnitude_prune (0.2)",
    ),
    "drop": (float, "probability that an entry is dropped: dare, dare_ties (0.5)"),
    "seed": (int, "of what is dropped (0)"),
    "scale": (float, "of the result: ties, dare_ties (1)"),
    "elect": (str, "sign by the 'total' or by 'frequency': ties, dare_ties"),
    "normalize": (str, "divide by the 'count' or the 'weights' that agree: ties, dare_ties"),
    "within": (str, "operator in the common basis: knots (ties)"),
    "cut": (float, "singular values that are dropped, relative: knots (1e-9)"),
}


def compose(args: Sequence[str]) -> None:
    """Several adapters as one."""
    parser = make_parser(
        "compose",
        "Put adapters that were trained one by one on the same base together: their weighted sum, or another operator;\n"
        "written as one adapter, or with --merge as a plain transformers model. The report says how the adapters lie to\n"
        "each other, and what every approximation costs.",
    )
    parser.add_argument(
        "adapters", metavar="ADAPTER", nargs="+", help="adapter folders, two or more"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the result")
    parser.add_argument(
        "--method",
        default="sum",
        metavar="NAME",
        help="sum, ties, dare, dare_ties, magnitude_prune, knots (sum)",
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        metavar="W",
        help="one for each adapter; negative takes away",
    )
    parser.add_argument("--rank", type=int, metavar="K", help="compress every layer to this rank")
    parser.add_argument(
        "--energy",
        type=float,
        metavar="Q",
        help="compress, keeping this share of the squares, such as 0.99",
    )
    parser.add_argument(
        "--error",
        type=float,
        metavar="E",
        help="compress, with at most this relative error a layer",
    )
    parser.add_argument(
        "--parameters", type=int, metavar="N", help="compress to this many parameters in all"
    )
    parser.add_argument(
        "--sequential",
        action="store_true",
        help="nest the adapters instead: each one changes what those before it made",
    )
    parser.add_argument(
        "--order",
        type=int,
        nargs="+",
        metavar="I",
        help="for --sequential, innermost first, from 1",
    )
    parser.add_argument(
        "--others",
        default="error",
        help="modules trained whole: error, first, average, drop (error)",
    )
    parser.add_argument("--signs", action="store_true", help="count conflicts of signs, too")
    parser.add_argument(
        "--merge", action="store_true", help="write the merged model instead of an adapter"
    )
    parser.add_argument(
        "--base", metavar="NAME", help="the base; by default what the first adapter's file names"
    )
    parser.add_argument("--force", action="store_true", help="replace a folder that is not empty")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    for name, (kind, what) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, help=what)
    run_verb(_compose, parser.options(args))


def _compose(options: argparse.Namespace) -> None:
    from adaptrank import backbones
    from adaptrank.artifacts import read_adapter, save_adapter
    from adaptrank.composition import Compression, layer_lines, pair_lines, report_json
    from adaptrank.composition import compose as put_together

    out = Path(options.out)
    found = [find_model(name, options.base, must_be_adapter=True) for name in options.adapters]
    folders = [one.adapter for one in found if one.adapter is not None]
    check_out(
        out,
        options.force,
        {**dict.fromkeys(folders, "adapter"), Path(found[0].source.path): "base"},
    )
    base = read_adapter(folders[0])["base"]
    base.pop("fingerprint")
    extra = {name: getattr(options, name) for name in OPTIONS if getattr(options, name) is not None}
    dtype = stored_dtype(found[0].source)
    model = found[0].load(dtype, adapted=False)
    report = put_together(
        model,
        folders,
        options.weights,
        options.method,
        mode="sequential" if options.sequential else "delta",
        order=None if options.order is None else [i - 1 for i in options.order],
        compression=Compression(options.rank, options.energy, options.error, options.parameters),
        merged=options.merge,
        others=options.others,
        signs=options.signs,
        **extra,
    )

    def write(folder: Path) -> None:
        if options.merge:
            model.save_pretrained(folder)
            backbones.load_tokenizer(found[0].source).save_pretrained(folder)
        else:
            save_adapter(model, folder, base)
        (folder / "composition.json").write_text(report_json(report), encoding="utf-8")
        _draw(report, folder / "composition.png")

    write_folder(out, write)
    if options.json:
        print(json.dumps(report))
        return
    how = (
        " then ".join(report["order"])
        if options.sequential
        else f"{options.method} of {len(folders)} adapters"
    )
    print(f"Composed {how}: {out}")
    for line in [*pair_lines(report), *layer_lines(report)]:
        print(f"  {line}")
    quoted = shlex.quote(str(out))
    print(f"  report:   {out / 'composition.json'}, {out / 'composition.png'}")
    if found[0].auto_class == "AutoModelForCausalLM":
        print(f"  generate: python -m adaptrank generate {quoted} --prompt TEXT")


def _draw(report: dict[str, Any], file: Path) -> None:
    from adaptrank.reports.figures import heat_maps

    layers = report["layers"]
    maps: dict[str, dict[str, float]] = {}
    for pair in report["pairs"]:
        name = " + ".join(pair["adapters"])
        maps[f"cosine, {name}"] = {
            k: facts["cos"][name] for k, facts in layers.items() if name in facts["cos"]
        }
    signed = frozenset([*maps, "interference"])
    for i, adapter in enumerate(report["adapters"]):
        values = {
            k: facts["relative"][i]
            for k, facts in layers.items()
            if facts["relative"][i] is not None
        }
        maps[f"|D| / |W|, {adapter}"] = values
    maps["interference"] = {k: facts["interference"] for k, facts in layers.items()}
    for name in ("rank", "error"):
        if any(name in facts for facts in layers.values()):
            maps[name] = {k: facts.get(name, math.nan) for k, facts in layers.items()}
    try:
        heat_maps({title: values for title, values in maps.items() if values}, file, signed)
    except ModuleNotFoundError as error:
        raise errors.ConfigError(str(error)) from error
