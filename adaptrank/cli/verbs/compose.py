"""`compose`: put several adapters together."""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from adaptrank.cli.options import BASE, FORCE

DESCRIPTION = """\
Put adapters that were trained one by one on the same base together: their weighted sum, or another
operator. The result is one adapter, or with --merge a plain transformers model. The report says how
similar the adapters are, where they interfere, and what each approximation costs."""

OPERATOR_OPTIONS = {
    "density": (float, "kept fraction of each change: ties, magnitude_prune (0.2), dare_ties (1)"),
    "trim": (
        str,
        "'whole': over all layers (ties, dare_ties); 'layer': each by itself (magnitude_prune)",
    ),
    "drop": (float, "probability that an entry is dropped: dare, dare_ties (0.5)"),
    "seed": (int, "seed of what is dropped (0)"),
    "scale": (float, "scale of the result: ties, dare_ties (1)"),
    "elect": (str, "sign by the 'total' or by 'frequency': ties, dare_ties"),
    "normalize": (str, "divide by the 'count' or the 'weights' that agree: ties, dare_ties"),
    "within": (str, "operator in the common basis: knots (ties)"),
    "cut": (float, "relative size of singular values that are dropped: knots (1e-9)"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    add, flag = parser.add_argument, "store_true"
    add(
        "adapters",
        metavar="ADAPTER",
        nargs="+",
        help="adapters, two or more: folders, or names on the Hub",
    )
    add("--out", required=True, metavar="FOLDER", help="new folder for the result")
    method = "sum, ties, dare, dare_ties, magnitude_prune, knots (sum)"
    add("--method", default="sum", metavar="NAME", help=method)
    weights = "one weight for each adapter; a negative one subtracts"
    add("--weights", type=float, nargs="+", metavar="W", help=weights)
    add("--rank", type=int, metavar="K", help="compress every layer to this rank")
    energy = "compress, keeping this share of the squared singular values, such as 0.99"
    add("--energy", type=float, metavar="Q", help=energy)
    error = "compress, with at most this relative error in a layer"
    add("--error", type=float, metavar="E", help=error)
    add("--parameters", type=int, metavar="N", help="compress to this many parameters in all")
    sequential = "nest the adapters instead: each changes the weights that those before it made"
    add("--sequential", action=flag, help=sequential)
    order = "for --sequential, innermost first, counted from 1"
    add("--order", type=int, nargs="+", metavar="I", help=order)
    others = "modules trained whole: error, first, average, drop (error)"
    add("--others", default="error", help=others)
    add("--signs", action=flag, help="count conflicts of signs, too")
    add("--merge", action=flag, help="write the merged model instead of an adapter")
    add("--base", metavar="NAME", help=BASE)
    add("--force", action=flag, help=FORCE)
    add("--json", action=flag, help="print the report as JSON")
    for name, (kind, text) in OPERATOR_OPTIONS.items():
        add(f"--{name}", type=kind, help=text)


def run(options: argparse.Namespace) -> None:
    """Compose, write the result, and print the report."""
    from adaptrank.artifacts import read_adapter
    from adaptrank.cli.loading import find_adapter, stored_dtype
    from adaptrank.cli.out_folder import check_out, write_folder
    from adaptrank.composition import layer_lines, pair_lines, report_json
    from adaptrank.reports.figures import draw_composition

    out = Path(options.out)
    stored = [find_adapter(name, options.base) for name in options.adapters]
    first = stored[0]
    folders = [each.adapter for each in stored if each.adapter is not None]
    read = {**dict.fromkeys(folders, "adapter"), Path(first.source.path): "base"}
    check_out(out, options.force, read)
    base = read_adapter(folders[0])["base"]
    for key in ("fingerprint", "fingerprint_beside_linear", "quantization"):
        base.pop(key, None)
    model = first.load(stored_dtype(first.source), adapted=False, folded=False)
    report = _composed(model, folders, options)

    def write(folder: Path) -> None:
        _save(model, folder, base, first if options.merge else None)
        (folder / "composition.json").write_text(report_json(report), encoding="utf-8")
        draw_composition(report, folder / "composition.png")

    write_folder(out, write)
    if options.json:
        print(json.dumps(report))
        return
    how = f"{options.method} of {len(folders)} adapters"
    if options.sequential:
        how = " then ".join(report["order"])
    print(f"Composed {how}: {out}")
    for line in [*pair_lines(report), *layer_lines(report)]:
        print(f"  {line}")
    print(f"  report:   {out / 'composition.json'}, {out / 'composition.png'}")
    if first.is_causal:
        print(f"  generate: python -m adaptrank generate {shlex.quote(str(out))} --prompt TEXT")


def _composed(model: Any, folders: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Compose in the model, and return the report."""
    from adaptrank.composition import Compression, compose

    given = {name: getattr(options, name) for name in OPERATOR_OPTIONS}
    return compose(
        model,
        folders,
        options.weights,
        options.method,
        mode="sequential" if options.sequential else "delta",
        order=None if options.order is None else [position - 1 for position in options.order],
        compression=Compression(options.rank, options.energy, options.error, options.parameters),
        merged=options.merge,
        others=options.others,
        signs=options.signs,
        **{name: value for name, value in given.items() if value is not None},
    )


def _save(model: Any, folder: Path, base: dict[str, Any], merged: Any) -> None:
    """Write an adapter, or the merged model with the tokenizer of its base."""
    from adaptrank.artifacts import conventions_of, finish_configuration, save_adapter
    from adaptrank.injection import fold_rows

    if merged is None:
        save_adapter(model, folder, base)
    else:
        preprocessor = merged.preprocessor()
        fold_rows(model)
        finish_configuration(model, preprocessor, conventions_of(model))
        model.save_pretrained(folder)
        preprocessor.save_pretrained(folder)
