"""The verbs beside LightningCLI's: `methods`, `generate`, `merge`. Plain argparse; what is heavy is imported when needed."""

import argparse
import importlib
import inspect
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from adaptrank.cli import errors

if TYPE_CHECKING:
    import torch

    from adaptrank.backbones import Source

log = logging.getLogger("adaptrank")

Verb = Callable[[argparse.Namespace], None]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in a line or two, the nearest option included."""

    def options(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse, and look for misspelt options first: argparse would report what is missing for want of them."""
        known = [name for action in self._actions for name in action.option_strings]
        for arg in args:
            name = arg.split("=")[0]
            if arg.startswith("--") and name not in known:
                errors.fail(
                    f"unknown option {name}{errors.hint(name, known)} `{self.prog} --help` lists them."
                )
        return self.parse_args(args)

    def error(self, message: str) -> NoReturn:
        errors.fail(f"{message}. `{self.prog} --help` shows how.")


def make_parser(verb: str, description: str) -> _Parser:
    """The parser of a verb, with the options that all verbs have."""
    parser = _Parser(
        prog=f"python -m adaptrank {verb}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import your own module first, so that its classes are known (repeatable)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake, too")
    return parser


def run_verb(body: Verb, options: argparse.Namespace) -> None:
    """Run a verb; a mistake prints its sentence and exits with 2, a bug keeps its traceback."""
    from adaptrank.cli.quiet import quiet

    try:
        with quiet():
            _import(options.modules)
            body(options)
    except BrokenPipeError:  # `| head` closed it
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # what Python flushes at its end goes nowhere
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        raise SystemExit(1) from None
    except Exception as error:
        text = errors.explain(error)
        if text is None or errors.debugging() or options.debug:
            raise
        errors.fail(text)


def _import(modules: Iterable[str]) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # it is there, and imports something that is not
            here = [file.stem for file in Path().glob("*.py")]
            raise errors.ConfigError(
                f"--import: there is no module {module!r}{errors.hint(module, here)} It is looked for in the folder you start "
                f"from, and on PYTHONPATH."
            ) from None


# ---- methods


def methods(args: Sequence[str]) -> None:
    """Show what there is: parameterizations, allocators, and which pairs work."""
    parser = make_parser(
        "methods",
        "Parameterizations and allocators: formula, source, rank axes, cost, and which pairs work.",
    )
    parser.add_argument(
        "--pairs", action="store_true", help="which allocator works on which parameterization"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    run_verb(_methods, parser.options(args))


def _methods(options: argparse.Namespace) -> None:
    from adaptrank.allocation import ALLOCATORS
    from adaptrank.allocation.compatibility import nests as rows
    from adaptrank.parameterizations import PARAMETERIZATIONS

    made = [describe_parameterization(cls) for cls in PARAMETERIZATIONS.values()]
    moves = [describe_allocator(cls) for cls in ALLOCATORS.values()]
    # Hybrids stand below their parts; a user's own classes, which --import brings, stand in the table as well.
    nests = [*((p["name"],) for p in made), *(nest for nest in rows() if len(nest) > 1)]
    pairs = {
        a["name"]: {" + ".join(nest): ALLOCATORS[a["name"]].pair(*nest) for nest in nests}
        for a in moves
    }
    if options.json:
        print(
            json.dumps({"parameterizations": made, "allocators": moves, "pairs": pairs}, indent=2)
        )
    elif options.pairs:
        print(_matrix(pairs))
    else:
        print(
            f"Parameterizations at their default arguments, and what they add to a frozen {_reference_name()} in fp32:\n"
            "trained parameters; FLOPs of the products of a forward, for each token and once a call; bytes that each\n"
            "token keeps for the backward pass. Closed formulas; measured where there is none, or it differs.\n"
        )
        head = ("", "parameters", "FLOPs/token", "FLOPs/call", "bytes/token", "source")
        print(
            _columns(
                [head, *(_made_row(p) for p in made)],
                [f"{p['formula']}\n{_made_words(p)}" for p in made],
            )
        )
        print(
            "\nAllocators: what moves ranks, on anything that has a rank axis (--pairs shows which)\n"
        )
        print(
            _columns(
                [("", "score", "needs", "source"), *(_moves_row(a) for a in moves)],
                [a["does"] for a in moves],
            )
        )
        print(
            "\nArguments: python -m adaptrank fit --allocator.help ElaLoRA; in YAML a class is named class_path: ElaLoRA."
        )


REFERENCE = 768
"""Sides of the linear layer that costs are stated for."""


def _reference_name() -> str:
    return f"Linear of {REFERENCE} x {REFERENCE}"


def describe_parameterization(cls: type[Any]) -> dict[str, Any]:
    """What a parameterization is, and what it costs on one layer: the reference, or its example where it wraps something else.

    Costs are as its closed formulas have them, and as they are measured.
    """
    import torch

    from adaptrank import testing
    from adaptrank.axes import cost_model, rank_axes

    holder = torch.nn.Module()
    linear = torch.nn.Linear(REFERENCE, REFERENCE)
    fits = cls.wraps(linear)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = holder.layer = cls(linear if fits else cls.example())
    sizes = {key: len(axis) for key, axis in rank_axes(holder).items()}
    parameters = cost_model(holder).total(sizes)
    testing.perturb(layer)  # at its start a method may save less
    said = layer.cost()
    flops, once, kept = testing.measure_cost(layer)
    closed = (None, None, None) if said is None else (said.flops, said.flops_once, 4 * said.kept)
    names = ("flops_per_token", "flops_per_call", "bytes_per_token")
    return {
        "name": cls.__name__,
        "formula": _first_sentence(cls),
        "source": cls.source,
        "axes": {key.rpartition(":")[2]: size for key, size in sizes.items()},
        "wraps": cls.wraps_what(),
        "mergeable": layer.mergeable,
        "needs_weight": layer.reads_weight,
        "splits_fused": layer.reads_blocks,
        "shared": list(layer.shared),
        "starts_at_base": layer.starts_at_base,
        "reference": _reference_name()
        if fits
        else f"{type(layer.innermost).__name__}, its own example",
        "parameters": parameters,
        "cost": {
            name: {"closed": one, "measured": int(other) if other == int(other) else other}
            for name, one, other in zip(names, closed, (flops, once, 4 * kept), strict=True)
        },
        "arguments": _arguments(cls, skip=1),
        "module": cls.__module__,
    }


def describe_allocator(cls: type[Any]) -> dict[str, Any]:
    """Name, what it does, score, needs and source of an allocator."""
    arguments = _arguments(cls)
    return {
        "name": cls.__name__,
        "does": _first_sentence(cls),
        "source": cls.source,
        "score": _score_name(cls, arguments),
        "needs": sorted(cls.requires),
        "options": {name: sorted(needs) for name, needs in cls.options.items()},
        "exclusive": cls.exclusive,
        "moves": cls.moves,
        "arguments": arguments,
        "module": cls.__module__,
    }


def _score_name(cls: type[Any], arguments: Mapping[str, Any]) -> str:
    """Return the importance of an allocator, "its own", or "-" for a rank initializer."""
    if cls.scores_by_name():
        return str(arguments.get("importance", cls.importance))
    return "its own" if cls.moves else "-"


def _arguments(cls: type[Any], skip: int = 0) -> dict[str, Any]:
    parameters = list(inspect.signature(cls).parameters.values())[skip:]
    found = {
        p.name: None if p.default is p.empty else p.default
        for p in parameters
        if p.kind is not p.VAR_KEYWORD
    }
    return {
        name: value if isinstance(value, str | int | float | None) else repr(value)
        for name, value in found.items()
    }


def _first_sentence(cls: type[Any]) -> str:
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


def _made_row(method: dict[str, Any]) -> tuple[str, ...]:
    costs = [_cost(**method["cost"][name]) for name in method["cost"]]
    return method["name"], f"{method['parameters']:,}", *costs, _or_dash(method["source"])


def _cost(closed: int | None, measured: float) -> str:
    if closed is None:  # the counter knows no fused attention: a 0 says nothing
        return f"{measured:,} (measured)" if measured else "-"
    return f"{closed:,}" if closed == measured else f"{closed:,} (measured {measured:,})"


def _made_words(method: dict[str, Any]) -> str:
    axes = ", ".join(f"{axis} {size}" for axis, size in method["axes"].items())
    words = {
        f"axes: {axes}" if axes else "no rank axis: a fixed cost": True,
        f"wraps {method['wraps']}": True,
        "merges" if method["mergeable"] else "does not merge": True,
        "needs W": method["needs_weight"],
        "splits fused projections": method["splits_fused"],
        f"shared: {', '.join(method['shared'])}": method["shared"],
        "does not start at the base": not method["starts_at_base"],
        f"costs are those on {method['reference']}": method["reference"] != _reference_name(),
    }
    return "; ".join(word for word, true in words.items() if true)


def _moves_row(allocator: dict[str, Any]) -> tuple[str, ...]:
    return (
        allocator["name"],
        allocator["score"],
        ", ".join(allocator["needs"]) or "any axis",
        _or_dash(allocator["source"]),
    )


def _or_dash(source: str) -> str:
    return source or "-"


def _columns(rows: list[tuple[str, ...]], notes: list[str]) -> str:
    """Aligned columns under a head; below each row the lines of its note, indented."""
    import textwrap

    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    indent = " " * 6
    lines = []
    for position, row in enumerate(rows):
        lines.append(
            "  "
            + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        )
        if position:
            for note in notes[position - 1].splitlines():
                lines += textwrap.wrap(note, 108, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


def _matrix(pairs: dict[str, dict[str, str]]) -> str:
    names = list(next(iter(pairs.values())))
    width = max(map(len, names))
    options = sorted({cell for works in pairs.values() for cell in works.values()} - {"", "works"})
    marks = {
        "": "-",
        "works": "yes",
        **{option: chr(ord("a") + i) for i, option in enumerate(options)},
    }
    lines = [f"  {'':{width}} {' '.join(pairs)}"]
    for name in names:
        cells = [f"{marks[works[name]]:{len(allocator)}}" for allocator, works in pairs.items()]
        lines.append(f"  {name:{width}} {' '.join(cells)}".rstrip())
    lines.append(
        "\n  -  has no rank axis, or one that cannot do what the allocator needs; a run says which when it starts"
    )
    lines += [
        f"  {marks[option]}  with {option} only: it cannot do what that option asks for"
        for option in options
    ]
    return "\n".join(lines)


# ---- what the verbs load


@dataclass
class Found:
    """An adapter on its base, or a plain model: where each is, and what the adapter's file says."""

    source: "Source"
    adapter: Path | None
    auto_class: str
    num_labels: int | None = None

    def load(self, dtype: "torch.dtype", adapted: bool = True) -> Any:
        """The model, adapted where there is an adapter, unless the base alone is asked for."""
        import transformers

        from adaptrank.artifacts import load_adapter
        from adaptrank.backbones import load_model

        labels = {} if self.num_labels is None else {"num_labels": self.num_labels}
        model = load_model(self.source, getattr(transformers, self.auto_class), dtype, **labels)
        return (
            model if self.adapter is None or not adapted else load_adapter(model, self.adapter)
        ).train(False)


def find_model(name: str, base: str | None, must_be_adapter: bool = False) -> Found:
    """An adapter's folder or a run's, with its base; or a model, by folder or id."""
    from adaptrank import backbones
    from adaptrank.artifacts import read_adapter
    from adaptrank.artifacts.adapter import WEIGHTS

    folder = Path(name).expanduser()
    if not (folder / WEIGHTS).is_file() and (folder / "adapter" / WEIGHTS).is_file():
        folder = folder / "adapter"  # a run folder
    if not must_be_adapter and not (folder / WEIGHTS).is_file():
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise errors.ConfigError(
                f"{name!r} holds neither an adapter ({WEIGHTS}) nor a model (config.json)."
            )
        return Found(backbones.resolve(name), None, "AutoModelForCausalLM")
    if not folder.exists():
        raise errors.ConfigError(errors.missing_file(name, "adapter folder"))
    described = read_adapter(folder)["base"]
    named = base or described.get("name")
    if named is None:
        raise errors.ConfigError(
            f"{folder} does not say what base it was trained on; name it with --base."
        )
    try:
        source = backbones.resolve(named)
    except FileNotFoundError as error:
        raise errors.ConfigError(
            f"The base of {folder}: {error} Name the base with --base."
        ) from error
    return Found(
        source,
        folder,
        described.get("auto_class", "AutoModelForCausalLM"),
        described.get("num_labels"),
    )


# ---- generate


def generate(args: Sequence[str]) -> None:
    """Complete prompts, greedily."""
    parser = make_parser(
        "generate",
        "Complete prompts greedily, with an adapter on its base, or with a merged (or any other causal language) model.\n"
        "Without --prompt and --file, every line of standard input is a prompt. \\n in a prompt is a line break. On a terminal\n"
        "words are shown as they come.",
    )
    parser.add_argument(
        "model",
        metavar="ADAPTER_OR_MODEL",
        help="a run's adapter folder, a model's folder, or a model id",
    )
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable")
    parser.add_argument(
        "--file",
        metavar="FILE",
        help="a prompt a line; of .jsonl files the field `prompt` of each line",
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=64, metavar="N", help="longest answer, in tokens (64)"
    )
    parser.add_argument(
        "--chat", action="store_true", help="put each prompt into the tokenizer's chat template"
    )
    parser.add_argument(
        "--json", action="store_true", help="a line of JSON for each prompt: prompt, completion"
    )
    parser.add_argument(
        "--base", metavar="NAME", help="the adapter's base; by default what its file names"
    )
    parser.add_argument(
        "--dtype", default="auto", help="of the weights: auto (bf16 where it is fast), fp32, bf16"
    )
    run_verb(_generate, parser.options(args))


def _generate(options: argparse.Namespace) -> None:
    from adaptrank import backbones

    if options.max_new_tokens < 1:
        raise errors.ConfigError(f"--max_new_tokens {options.max_new_tokens}: give 1 or more.")
    dtype = backbones.auto_dtype(options.dtype)
    found = find_model(options.model, options.base)
    if found.auto_class != "AutoModelForCausalLM":
        raise errors.ConfigError(
            f"{found.adapter} was trained for {found.auto_class.removeprefix('AutoModelFor')}, which completes no text; use "
            f"`python -m adaptrank predict --model.adapter {found.adapter} ...`."
        )
    prompts = _prompts(options)
    tokenizer, model = backbones.load_tokenizer(found.source), found.load(dtype)
    streams = sys.stdout.isatty() and not options.json
    for given in prompts:
        prompt = given.replace("\\n", "\n")
        if streams and not options.chat:
            print(prompt, end="", flush=True)
        text = complete(model, tokenizer, prompt, options.max_new_tokens, options.chat, streams)
        if streams:
            continue
        if options.json:
            print(
                json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False), flush=True
            )
        else:
            print(text if options.chat else prompt + text, flush=True)


def _prompts(options: argparse.Namespace) -> Iterable[str]:
    if options.prompt is not None and options.file is not None:
        raise errors.ConfigError("--prompt and --file both give prompts; take one.")
    if options.file is None:
        return options.prompt if options.prompt is not None else _lines()
    file = Path(options.file)
    if not file.is_file():
        raise errors.ConfigError(errors.missing_file(options.file, "file of prompts"))
    lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    if file.suffix != ".jsonl":
        return lines
    try:
        return [json.loads(line)["prompt"] for line in lines]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise errors.ConfigError(
            f"--file {file}: each line has to be JSON with a field `prompt`."
        ) from None


def _lines() -> Iterator[str]:
    if sys.stdin.isatty():
        print("One prompt a line; Ctrl-D ends.", file=sys.stderr)
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\n")


def complete(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    chat: bool = False,
    show: bool = False,
) -> str:
    """The greedy continuation of one prompt, special tokens left out; shown on standard output as it comes, if asked for."""
    import torch
    from transformers import TextStreamer

    from adaptrank.data.task import render, tokens

    text = render(tokenizer, [{"role": "user", "content": prompt}], ask=True) if chat else prompt
    ids = torch.tensor(tokens(tokenizer, [text], special=not chat), device=model.device)
    if not ids.shape[1]:
        raise errors.ConfigError("An empty prompt has nothing to complete.")
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            if show
            else None,
        )
    completion: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return completion


# ---- merge


def merge(args: Sequence[str]) -> None:
    """Fold an adapter into its base."""
    parser = make_parser(
        "merge",
        "Fold an adapter into its base and write a plain transformers model with its tokenizer, which `from_pretrained`\n"
        "loads without adaptrank. The sum is taken in float32.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="a run's adapter folder")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the model")
    parser.add_argument(
        "--base", metavar="NAME", help="the base; by default what the adapter's file names"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="to save in; auto is that of the base's files",
    )
    parser.add_argument("--force", action="store_true", help="replace a folder that is not empty")
    run_verb(_merge, parser.options(args))


def _merge(options: argparse.Namespace) -> None:
    import torch

    from adaptrank import backbones
    from adaptrank.artifacts import merge as fold
    from adaptrank.artifacts import read_adapter
    from adaptrank.artifacts.merging import rounding_error
    from adaptrank.parameterizations import wrapped_layers

    out = Path(options.out)
    found = find_model(options.adapter, options.base, must_be_adapter=True)
    assert found.adapter is not None
    if pruned := read_adapter(found.adapter).get("pruned"):
        raise errors.ConfigError(
            f"{found.adapter} cuts {len(pruned)} sets of heads or channels out of its base, each to a size of its own, which no "
            f"transformers configuration can state; keep the adapter, and load it with adaptrank.load_adapter(model, folder)."
        )
    check_out(out, options.force, {found.adapter: "adapter", Path(found.source.path): "base"})
    dtype = (
        stored_dtype(found.source)
        if options.dtype == "auto"
        else backbones.auto_dtype(options.dtype)
    )
    # The base as it is stored: half precision is merged in float32 anyway, and float32 must not be rounded before the sum.
    model = found.load(dtype if dtype == stored_dtype(found.source) else torch.float32)
    layers = len(wrapped_layers(model))
    made = [
        f"{path}.{name}"
        for path, layer in wrapped_layers(model).items()
        for name in layer.merged().keys() - dict(layer.innermost.named_parameters()).keys()
    ]
    if made:
        raise errors.ConfigError(
            f"Merging would make {made[0]} ({len(made)} such), which {type(model).__name__} does not have here: "
            f"from_pretrained would leave it out. Keep the adapter, or merge in Python, adaptrank.merge(model)."
        )
    if dtype not in (torch.float32, stored_dtype(found.source)):
        # The cast comes after the sum, where `fold` cannot see what it loses.
        error = rounding_error(model, dtype)
        if error > 0.2:
            log.warning(
                "Rounding to %s is an error of %.0f %% of the adapter's change; merge with --dtype fp32 to keep it.",
                _short(dtype),
                100 * error,
            )
    model = fold(model).to(dtype)
    tokenizer = backbones.load_tokenizer(found.source)
    write_folder(
        out, lambda folder: (model.save_pretrained(folder), tokenizer.save_pretrained(folder))
    )
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    print(
        f"Merged {layers} layers of {found.adapter} into {found.source.name}: {out} ({_short(dtype)}, {size:,.0f} MB)"
    )
    if found.auto_class == "AutoModelForCausalLM":
        print(f"  generate: python -m adaptrank generate {shlex.quote(str(out))} --prompt TEXT")
    print(f"  load:     transformers.{found.auto_class}.from_pretrained({str(out)!r})")


def stored_dtype(source: "Source") -> "torch.dtype":
    """The dtype of a base's own files, as its configuration states it; float32 where it states none."""
    import torch
    from transformers import AutoConfig

    dtype = getattr(AutoConfig.from_pretrained(source.path), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def check_out(out: Path, force: bool, sources: Mapping[Path, str]) -> None:
    """Refuse to write where something is, or over what is read: folder -> what it is."""
    if out.is_file():
        raise errors.ConfigError(f"--out {out} is a file; name a folder.")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise errors.ConfigError(
            f"--out {out} is not empty; name another folder, or replace it with --force."
        )
    for given, what in sources.items():
        if given.exists() and (
            out.resolve() == given.resolve() or out.resolve() in given.resolve().parents
        ):
            raise errors.ConfigError(
                f"--out {out} holds the {what} that this reads; name another folder."
            )


def write_folder(out: Path, write: Callable[[Path], object]) -> None:
    """Write a folder whole or not at all: into a sibling first, which then takes the place of what was there."""
    import transformers.utils

    logging: Any = transformers.utils.logging
    out.parent.mkdir(parents=True, exist_ok=True)
    growing = out.with_name(f".{out.name}.{os.getpid()}.new")
    aside = out.with_name(f".{out.name}.{os.getpid()}.old")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        growing.mkdir()
        write(growing)
        if out.exists():
            os.replace(out, aside)
        try:
            os.replace(growing, out)
        except BaseException:
            if aside.exists():
                os.replace(aside, out)
            raise
    finally:
        if shown:
            logging.enable_progress_bar()
        for left in (growing, aside):
            shutil.rmtree(left, ignore_errors=True)


def _short(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")
