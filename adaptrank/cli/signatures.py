"""Classes that a configuration may name, and their arguments, read from the sources.

Nothing is imported, so that a mistake in a key is found before PyTorch is there.
"""

import ast
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(__file__).parents[1]

CLASS = re.compile(r"^class (\w+)\b(?:\((.*?)\))?:", re.MULTILINE | re.DOTALL)
"""The head of a top-level class: its name and its bases."""


@dataclass(frozen=True)
class Kind:
    """A kind of class that a key of a configuration takes.

    Args:
        name: what users call it.
        package: top-level package that defines such classes.
        folder: folder of the package with the files.
        roots: base classes of all of them.
        given: positional arguments that the library fills in.
    """

    name: str
    package: str
    folder: str
    roots: tuple[str, ...]
    given: int = 0


MODEL = Kind("LightningModule", "adaptrank", "modules", ("AdaptedModule",))
DATA = Kind("LightningDataModule", "adaptrank", "data", ("TaskData",))
ALLOCATOR = Kind(
    "Allocator",
    "adaptrank",
    "allocation",
    ("Participant", "Allocator", "Policy", "RankInitializer"),
)
PARAMETERIZATION = Kind(
    "Parameterization", "adaptrank", "parameterizations", ("Parameterization",), given=1
)
STRATEGY = Kind("training strategy", "adaptrank", "strategies", ("TrainingStrategy",))
OPTIMIZER = Kind("Optimizer", "torch", "optim", ("Optimizer",), given=1)
OWN_OPTIMIZER = Kind(
    "optimizer", "adaptrank", "optimizers", ("ModelOptimizer", "PairOptimizer"), given=1
)
CALLBACK = Kind("Callback", "lightning", "pytorch/callbacks", ("Callback",))
TRAINER = Kind("Trainer", "lightning", "pytorch/trainer", ("Trainer",))
KINDS = (
    MODEL,
    DATA,
    ALLOCATOR,
    PARAMETERIZATION,
    STRATEGY,
    OPTIMIZER,
    OWN_OPTIMIZER,
    CALLBACK,
)


@dataclass(frozen=True)
class Argument:
    """An argument of a constructor.

    Args:
        name: its name.
        annotation: its type as it stands in the source, or None.
    """

    name: str
    annotation: ast.expr | None


@dataclass(frozen=True)
class Signature:
    """The arguments of a class.

    Args:
        name: name of the class.
        arguments: arguments by name, in the order in which jsonargparse lists them.
        is_open: whether there may be further arguments, which the sources do not show.
    """

    name: str
    arguments: dict[str, Argument]
    is_open: bool


def class_names(kind: Kind) -> list[str]:
    """Return the names of the public classes of a kind, sorted, without those that are bases.

    A class that others derive from counts if it is a method of its own, which has a `source`.
    """
    heads = _heads(kind)
    derived_from = {base for bases in heads.values() for base in bases}
    names = []
    for name in heads:
        is_base = name in derived_from and not _has_source(kind, name)
        hidden = name.startswith("_") or name in kind.roots or is_base
        if not hidden and _is_of(kind, name) and not _is_unlisted(kind, name):
            names.append(name)
    return sorted(names)


def signature(kind: Kind, path: str) -> Signature | None:
    """Return the arguments of a class of a kind, or None if it is another package's or unknown.

    Args:
        kind: kind of the class.
        path: its name, or its import path.
    """
    package, _, _ = path.partition(".")
    name = path.rpartition(".")[2]
    if "." in path and package != kind.package:
        return None
    if name not in _heads(kind) or not _is_of(kind, name):
        return None
    arguments, is_open = _arguments(kind, name)
    names = list(arguments)[kind.given :]
    return Signature(name, {key: arguments[key] for key in names}, is_open)


def dataclass_signature(room: str, name: str) -> Signature:
    """Return the fields of a dataclass of this package."""
    kind = Kind(name, "adaptrank", room, (name,))
    arguments, is_open = _arguments(kind, name)
    return Signature(name, arguments, is_open)


def accepts(path: str, argument: str) -> bool:
    """Tell whether a class of any kind takes an argument. False for an unknown class."""
    found = (signature(kind, path) for kind in KINDS)
    return any(each is not None and argument in each.arguments for each in found)


# ---- sources


@cache
def _folder(kind: Kind) -> Path | None:
    if kind.package == "adaptrank":
        return PACKAGE / kind.folder
    spec = find_spec(kind.package)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / kind.folder


@cache
def _files(kind: Kind) -> dict[str, Path]:
    """Return the file of each top-level class under the folder of a kind."""
    files: dict[str, Path] = {}
    folder = _folder(kind)
    for file in sorted(folder.rglob("*.py")) if folder is not None else ():
        for match in CLASS.finditer(file.read_text(encoding="utf-8")):
            files.setdefault(match[1], file)
    return files


@cache
def _heads(kind: Kind) -> dict[str, tuple[str, ...]]:
    """Return the names of the bases of each class under the folder of a kind."""
    heads: dict[str, tuple[str, ...]] = {}
    folder = _folder(kind)
    for file in sorted(folder.rglob("*.py")) if folder is not None else ():
        for name, bases in CLASS.findall(file.read_text(encoding="utf-8")):
            heads.setdefault(name, tuple(_base_names(bases)))
    return heads


def _base_names(bases: str) -> list[str]:
    """Return the names of bases: of `Base`, `module.Base` and `Base[T], keyword=x` it is Base."""
    plain = re.sub(r"\[.*?\]", "", bases, flags=re.DOTALL)
    parts = (part.strip() for part in plain.split(","))
    return [part.rpartition(".")[2] for part in parts if part and "=" not in part]


def _is_of(kind: Kind, name: str) -> bool:
    """Tell whether a class derives from a root of its kind."""
    if name in kind.roots:
        return True
    bases = _heads(kind).get(name, ())
    return any(_is_of(kind, base) for base in bases if base != name)


@cache
def _node(kind: Kind, name: str) -> ast.ClassDef | None:
    file = _files(kind).get(name)
    if file is None:
        return None
    tree = ast.parse(file.read_text(encoding="utf-8"))
    classes = (part for part in tree.body if isinstance(part, ast.ClassDef))
    return next((part for part in classes if part.name == name), None)


def _is_unlisted(kind: Kind, name: str) -> bool:
    """Tell whether a class is none to choose, by `listed=False` or `registered=False`."""
    node = _node(kind, name) if kind.package == "adaptrank" else None
    keywords = node.keywords if node is not None else []
    words = {keyword.arg: ast.unparse(keyword.value) for keyword in keywords}
    return "False" in (words.get("listed"), words.get("registered"))


def _has_source(kind: Kind, name: str) -> bool:
    node = _node(kind, name)
    assigned = [part for part in node.body if isinstance(part, ast.Assign)] if node else []
    return any(ast.unparse(part.targets[0]) == "source" for part in assigned)


def _arguments(kind: Kind, name: str) -> tuple[dict[str, Argument], bool]:
    """Return the arguments of a class by name, and whether there may be others.

    A constructor with `**kwargs` hands them to that of its bases, in their order.
    """
    node = _node(kind, name)
    if node is None:
        return {}, name != "object"
    if _is_dataclass(node):
        return _fields(node), False
    init = _constructor(node)
    arguments: dict[str, Argument] = {}
    if init is not None:
        arguments = _parameters(init)
        if init.args.kwarg is None:
            return arguments, False
    is_open = False
    bases = _heads(kind).get(name, ())
    for base in bases:
        inherited, base_is_open = _arguments(kind, base)
        arguments = {**inherited, **arguments} if init is None else {**arguments, **inherited}
        is_open = is_open or base_is_open
        # A constructor without `**kwargs` hands nothing on to the bases behind it.
        if (init is None and inherited) or _is_closed(kind, base):
            break
    return arguments, is_open or not bases


def _is_closed(kind: Kind, name: str) -> bool:
    """Return whether a class has a constructor of its own without `**kwargs`."""
    node = _node(kind, name)
    init = None if node is None else _constructor(node)
    return init is not None and init.args.kwarg is None


def _constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    functions = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    return next((function for function in functions if function.name == "__init__"), None)


def _parameters(init: ast.FunctionDef) -> dict[str, Argument]:
    """Return the parameters of a method by name, without self."""
    given = [*init.args.posonlyargs, *init.args.args][1:]
    every = [*given, *init.args.kwonlyargs]
    return {argument.arg: Argument(argument.arg, argument.annotation) for argument in every}


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _fields(node: ast.ClassDef) -> dict[str, Argument]:
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    targets = [(part.target.id, part) for part in fields if isinstance(part.target, ast.Name)]
    return {name: Argument(name, part.annotation) for name, part in targets}
