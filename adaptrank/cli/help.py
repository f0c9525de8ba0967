"""Help that is there at once: signatures and docstrings are read from the sources with `ast`, so nothing heavy is imported."""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1]

INTRO = {
    "fit": "Train adapters from a YAML file, evaluate before and after, leave a run folder (runs/<config>/<n>/).",
    "validate": "Evaluate on the validation set, most often with `--model.adapter runs/<config>/<n>/adapter`.",
    "test": "Evaluate on the test set, most often with `--model.adapter runs/<config>/<n>/adapter`.",
    "predict": "Predict with `--model.adapter runs/<config>/<n>/adapter`; one line of JSON each, printed or to `--out FILE`.",
}
TRAINER = {
    "max_steps": "optimizer steps to train",
    "max_epochs": "or passes over the data",
    "accumulate_grad_batches": "batches to an optimizer step",
    "gradient_clip_val": "largest norm of the gradient",
    "check_val_every_n_epoch": "how often to evaluate in between",
    "limit_val_batches": "evaluate on that many batches, or that share",
    "accelerator": "cpu, gpu, mps, or auto",
    "devices": "how many, or which",
    "precision": "of the computation, such as bf16-mixed; the frozen weights have model.dtype",
    "callbacks": "further Lightning callbacks",
}
"""The usual arguments of Lightning's Trainer; a test holds them against its signature."""

WIDTH = 112


def usage(verb: str) -> str:
    """Help for fit, validate, test or predict: the usual keys, and where the rest is."""
    lines = [
        f"usage: python -m adaptrank {verb} --config FILE.yaml [--key value ...]",
        "",
        INTRO[verb],
        "A key on the command line overrides the file: --trainer.max_steps 50 --model.optimizer.lr 1e-3",
        "",
        "model: a class and its arguments",
    ]
    modules = PACKAGE / "modules"
    common = _arguments(_class(modules / "adapted.py", "AdaptedModule"))
    lines += _rows([(f"model.{name}{default}", what) for name, default, what in common])
    for file in sorted(modules.glob("*.py")):
        for node in _classes(file, {"AdaptedModule"}):
            own = [(f"  {name}{default}", what) for name, default, what in _arguments(node)]
            lines += _rows([(f"model: {node.name}", _summary(node)), *own])
    lines += ["", "an entry of model.adapters"]
    lines += _rows(
        [(n + d, w) for n, d, w in _arguments(_class(modules / "settings.py", "Adapter"))]
    )
    lines += _rows([("parameterizations here", _names("parameterizations", {"Parameterization"}))])
    if verb == "fit":
        lines += ["", "allocator: moves ranks while training; optional"]
        base = _class(PACKAGE / "allocation" / "allocator.py", "Allocator")
        lines += _rows([("allocators here", _names("allocation", {"Allocator"}))])
        lines += _rows(
            [(f"allocator.{name}{default}", what) for name, default, what in _arguments(base)]
        )
    lines += ["", "data: a class and its arguments"]
    lines += _rows(_members("data", {"CompletionTask", "LabelTask"}))
    shared = _arguments(_class(PACKAGE / "data" / "task.py", "TaskData"))
    lines += _rows([(f"data.{name}{default}", what) for name, default, what in shared])
    lines += ["", "trainer: Lightning's Trainer"]
    lines += _rows([(f"trainer.{name}", what) for name, what in TRAINER.items()])
    lines += ["", "the run"]
    run = [
        ("seed_everything = 0", "seed of the run"),
        ("ckpt_path", "resume from, or evaluate, this checkpoint"),
    ]
    if verb == "fit":
        run += [
            ("runs = runs", "folder of the run folders"),
            ("evaluate = true", "whether to evaluate before and after"),
        ]
    if verb == "predict":
        run += [("out", "file for the predictions, one line of JSON each")]
    lines += _rows([*run, ("debug", "show the traceback of a mistake, too")])
    lines += [
        "",
        "more",
        *_rows(
            [
                (f"{verb} --help_all", "every key, by LightningCLI"),
                (
                    f"{verb} --model.help CausalLM",
                    "one class; so with --data.help, --allocator.help, and any class_path",
                ),
                (
                    f"{verb} --config FILE --print_config",
                    "the whole configuration, defaults filled in, and stop",
                ),
                (
                    "methods",
                    "formulas, sources, costs, and which allocator works with which parameterization",
                ),
            ]
        ),
    ]
    return "\n".join(lines) + "\n"


def _rows(rows: list[tuple[str, str]], indent: int = 2, column: int = 36) -> list[str]:
    lines = []
    for name, what in rows:
        space = " " * indent
        head = f"{space}{name:{column}}"
        if len(name) >= column:
            lines.append(f"{space}{name}")
            head = " " * (indent + column)
        first, *more = textwrap.wrap(what, WIDTH - indent - column) or [""]
        lines += [head + first, *(" " * (indent + column) + line for line in more)]
    return [line.rstrip() for line in lines]


def _members(folder: str, bases: set[str]) -> list[tuple[str, str]]:
    return [
        (node.name, _summary(node))
        for file in sorted((PACKAGE / folder).rglob("*.py"))
        for node in _classes(file, bases)
    ]


def _names(folder: str, bases: set[str]) -> str:
    return ", ".join(sorted(name for name, _ in _members(folder, bases)))


def _classes(file: Path, bases: set[str]) -> Iterator[ast.ClassDef]:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        named = (
            {base.id for base in node.bases if isinstance(base, ast.Name)}
            if isinstance(node, ast.ClassDef)
            else set()
        )
        if (
            isinstance(node, ast.ClassDef)
            and named & bases
            and not node.name.startswith(("_", "CompletionTask", "LabelTask"))
        ):
            yield node


def _class(file: Path, name: str) -> ast.ClassDef:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return next(node for node in body if isinstance(node, ast.ClassDef) and node.name == name)


def _summary(node: ast.ClassDef) -> str:
    return (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")


def _arguments(node: ast.ClassDef) -> list[tuple[str, str, str]]:
    """(name, ` = default`, first sentence of its documentation) of a constructor's, or a dataclass's, arguments."""
    documented = _documented(ast.get_docstring(node) or "")
    init = next(
        (f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None
    )
    pairs: list[tuple[str, ast.expr | None]] = []
    if init is None:
        pairs = [
            (f.target.id, f.value)
            for f in node.body
            if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)
        ]
    else:
        positional, defaults = init.args.args[1:], init.args.defaults
        padded = [None] * (len(positional) - len(defaults)) + list(defaults)
        pairs = [(a.arg, d) for a, d in zip(positional, padded, strict=True)]
        pairs += [
            (a.arg, d) for a, d in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
        ]
    return [(name, _default(value), documented.get(name, "")) for name, value in pairs]


def _default(value: ast.expr | None) -> str:
    if value is None:
        return ""
    text = ast.unparse(value)
    words = {"None": "", "True": " = true", "False": " = false"}
    return words.get(text, f" = {text.strip(chr(39))}")


def _documented(docstring: str) -> dict[str, str]:
    """Argument -> the first sentence under `Args:`."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?= {4}\w)", section[1]) if section else ():
        names, _, what = entry.strip().partition(": ")
        sentence = re.split(r"[.;](?=\s|$)", " ".join(what.split()))[0]
        found.update({name.strip(): sentence for name in names.split(",")})
    return found
