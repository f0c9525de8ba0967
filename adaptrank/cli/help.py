"""Help for fit, validate, test and predict, at once.

Signatures and docstrings are read from the sources with `ast`, so that nothing heavy is imported.
"""

import ast
import re
import textwrap
from collections.abc import Iterable
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]

INTRO = {
    "fit": "Train adapters from a YAML file, evaluate before and after, leave a run folder\n"
    "(runs/<config>/<n>/).",
    "validate": "Evaluate on the validation set, most often with\n"
    "`--adapter runs/<config>/<n>/adapter`. The output says what was scored.",
    "test": "Evaluate on the test set, most often with\n"
    "`--adapter runs/<config>/<n>/adapter`. The output says what was scored.",
    "predict": "Predict with `--adapter runs/<config>/<n>/adapter`. Each example is one\n"
    "line of JSON, printed or written to `--out FILE`.",
}
OVERRIDE = """A key on the command line overrides the file:
--trainer.max_steps 50 --model.optimizer.lr 1e-3"""

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
    "logger": "a logger beside metrics.jsonl, by name, such as TensorBoardLogger, or a list",
}
"""The usual arguments of Lightning's Trainer. A test holds them against its signature."""

ALLOCATION_BASES = ("Participant", "Allocator", "Policy", "RankInitializer")
"""Bases of allocators and of rank initializers."""

ALLOCATOR_SECTION = "allocator: moves ranks while training; optional"
STRATEGY_SECTION = "training_strategy: divides training into rounds; optional"

WIDTH = 112
COLUMN = 36

Row = tuple[str, str]


def usage(verb: str) -> str:
    """Return the help of a verb: the usual keys, and where the rest is."""
    head = f"usage: python -m adaptrank {verb} --config FILE.yaml [--key value ...]"
    sections = {
        "model: a class and its arguments": _model_rows(),
        "an entry of model.adapters": _adapter_rows(),
        ALLOCATOR_SECTION: _allocator_rows(),
        STRATEGY_SECTION: _strategy_rows(),
        "data: a class and its arguments": _data_rows(),
        "trainer: Lightning's Trainer": [(f"trainer.{name}", TRAINER[name]) for name in TRAINER],
        "the run": _run_rows(verb),
        "more": _more_rows(verb),
    }
    if verb != "fit":
        del sections[ALLOCATOR_SECTION], sections[STRATEGY_SECTION]
    lines = [head, "", INTRO[verb], OVERRIDE]
    for title, rows in sections.items():
        lines += ["", title, *_table(rows)]
    return "\n".join(lines) + "\n"


def _model_rows() -> list[Row]:
    """Return the arguments of all tasks, and each task with the names of its own arguments."""
    rows = _argument_rows("modules", "AdaptedModule", "model.")
    shared = {argument for argument, _ in _parameters_of("modules", "AdaptedModule")}
    for node in _concrete("modules", "AdaptedModule"):
        rows.append((f"model: {node.name}", _summary(node)))
        own = [name for name, _ in _parameters_of("modules", node.name) if name not in shared]
        if own:
            rows.append(("  adds", ", ".join(own)))
    return rows


def _adapter_rows() -> list[Row]:
    names = ", ".join(
        sorted(node.name for node in _concrete("parameterizations", "Parameterization"))
    )
    return [*_argument_rows("modules", "Adapter", ""), ("parameterizations here", names)]


def _allocator_rows() -> list[Row]:
    names = ", ".join(sorted(node.name for node in _concrete("allocation", *ALLOCATION_BASES)))
    rows = [("allocators here", names)]
    return rows + _argument_rows("allocation", "Allocator", "allocator.")


def _strategy_rows() -> list[Row]:
    nodes = _concrete("strategies", "TrainingStrategy")
    return [(node.name, _summary(node)) for node in sorted(nodes, key=lambda node: node.name)]


def _data_rows() -> list[Row]:
    """Return the classes that read files, the names of the others, and what all of them take."""
    rows, made_here = [], []
    for node in _concrete("data", "TaskData"):
        if "sources" in dict(_parameters_of("data", node.name)):
            rows.append((node.name, _summary(node)))
        else:
            made_here.append(node.name)
    rows.append(("without files", ", ".join(made_here)))
    return rows + _argument_rows("data", "TaskData", "data.")


def _run_rows(verb: str) -> list[Row]:
    rows = [
        ("adapter", "short for model.adapter: a folder, or user/name on the Hub"),
        ("seed_everything = 0", "seed of the run"),
        ("ckpt_path", "resume from, or evaluate, this checkpoint"),
        ("accept_changes = false", "go on although the checkpoint is of other settings"),
    ]
    if verb == "fit":
        rows += [
            ("runs = runs", "folder of the run folders"),
            ("evaluate = true", "whether to evaluate before and after"),
            (
                "save",
                "best or last: weights of the adapter; best if a ModelCheckpoint has a metric",
            ),
        ]
    if verb == "predict":
        rows.append(("out", "file for the predictions, one line of JSON each"))
    return [*rows, ("debug", "show the traceback of a mistake, too")]


def _more_rows(verb: str) -> list[Row]:
    one_class = "one class; also with --data.help, --allocator.help, and any class_path"
    return [
        (f"{verb} --help_all", "every key, by LightningCLI"),
        (f"{verb} --model.help CausalLM", one_class),
        (f"{verb} --config FILE --print_config", "the whole configuration with its defaults"),
        ("methods", "formulas, sources, costs, and which methods, allocators and strategies fit"),
    ]


def _table(rows: Iterable[Row]) -> list[str]:
    """Return rows as two columns, indented and wrapped."""
    lines = []
    indent = " " * (COLUMN + 2)
    for name, text in rows:
        first, *more = textwrap.wrap(text, WIDTH - len(indent)) or [""]
        if len(name) < COLUMN:
            lines.append(f"  {name:{COLUMN}}{first}".rstrip())
        else:
            lines += [f"  {name}", f"{indent}{first}".rstrip()]
        lines += [indent + line for line in more]
    return lines


# ---- classes, from the sources


@cache
def _classes(room: str) -> dict[str, ast.ClassDef]:
    """Return the top-level classes of a room's files, by name."""
    nodes: dict[str, ast.ClassDef] = {}
    for file in sorted((PACKAGE / room).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        nodes |= {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    return nodes


def _bases(node: ast.ClassDef) -> list[str]:
    """Return the names of a class's bases: of `Base`, `module.Base` and `Base[T]` it is Base."""
    bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
    return [ast.unparse(base).rpartition(".")[2] for base in bases]


def _lineage(room: str, name: str) -> list[ast.ClassDef]:
    """Return a class and its ancestors, as far as the room defines them, the nearest first."""
    node = _classes(room).get(name)
    if node is None:
        return []
    lineage = [node]
    for base in _bases(node):
        lineage += _lineage(room, base)
    return lineage


def _ancestors(room: str, name: str) -> set[str]:
    """Return the names of all bases of a class and of its ancestors."""
    bases: set[str] = set()
    for node in _lineage(room, name):
        bases.update(_bases(node))
    return bases


def _concrete(room: str, *roots: str) -> list[ast.ClassDef]:
    """Return the public classes under some roots, without the bases that only help to define them.

    A class that others derive from is a method of its own if it has a `source`.
    """
    nodes = _classes(room)
    derived_from = {base for node in nodes.values() for base in _bases(node)}
    concrete = []
    for name, node in nodes.items():
        public = not name.startswith("_") and name not in roots
        is_method = name not in derived_from or _has_source(node)
        if public and is_method and not _is_unlisted(node) and _ancestors(room, name) & set(roots):
            concrete.append(node)
    return concrete


def _is_unlisted(node: ast.ClassDef) -> bool:
    """Tell whether a class is none to choose, by `listed=False` or `registered=False`."""
    words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    return "False" in (words.get("listed"), words.get("registered"))


def _has_source(node: ast.ClassDef) -> bool:
    assigned = [part for part in node.body if isinstance(part, ast.Assign)]
    return any(ast.unparse(part.targets[0]) == "source" for part in assigned)


def _argument_rows(room: str, name: str, prefix: str) -> list[Row]:
    """Return the arguments of a class, with their defaults and first sentences.

    A class without a constructor has that of its nearest ancestor. An argument is documented by
    the nearest class that says something about it.
    """
    lineage = _lineage(room, name)
    documented: dict[str, str] = {}
    for node in reversed(lineage):
        documented |= _documented(ast.get_docstring(node) or "")
    return [
        (f"{prefix}{argument}{_default(value)}", documented.get(argument, ""))
        for argument, value in _parameters_of(room, name)
    ]


def _parameters_of(room: str, name: str) -> list[tuple[str, ast.expr | None]]:
    """Return (name, default) of the parameters of a class, or of its nearest ancestor with any."""
    return next((found for node in _lineage(room, name) if (found := _parameters(node))), [])


def _summary(node: ast.ClassDef) -> str:
    return (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")


def _parameters(node: ast.ClassDef) -> list[tuple[str, ast.expr | None]]:
    """Return (name, default) of the constructor's parameters, or of a dataclass's fields."""
    functions = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    init = next((function for function in functions if function.name == "__init__"), None)
    if init is not None:
        return _signature(init.args)
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return []
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    return [(f.target.id, f.value) for f in fields if isinstance(f.target, ast.Name)]


def _signature(arguments: ast.arguments) -> list[tuple[str, ast.expr | None]]:
    """Return (name, default) of a method's parameters, without self."""
    positional = arguments.args[1:]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    defaults = [*missing, *arguments.defaults, *arguments.kw_defaults]
    names = [argument.arg for argument in [*positional, *arguments.kwonlyargs]]
    return list(zip(names, defaults, strict=True))


def _default(value: ast.expr | None) -> str:
    if value is None:
        return ""
    text = ast.unparse(value)
    words = {"None": "", "True": " = true", "False": " = false"}
    return words.get(text, f" = {text.strip(chr(39))}")


def _documented(docstring: str) -> dict[str, str]:
    """Return the first sentence of each argument under `Args:`."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
    if section is None:
        return {}
    sentences: dict[str, str] = {}
    for entry in re.split(r"\n(?= {4}\w)", section[1]):
        names, _, text = entry.strip().partition(": ")
        sentence = re.split(r"[.;](?=\s|$)", " ".join(text.split()))[0]
        sentences |= {name.strip(): sentence for name in names.split(",")}
    return sentences
