"""What a mistake says: one to three lines, with what arrived, what fits, and the nearest name.

`check` walks a configuration beside the signatures that it is meant for, and `explain` decides which exceptions are a
user's mistake. Names are compared with those of the real classes, so no list is kept here.
"""

import collections.abc
import dataclasses
import difflib
import dis
import enum
import importlib
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

Key = tuple[str | int, ...]
"""Where a value stands in a configuration, as in ("model", "init_args", "adapters", 0, "targets")."""


class ConfigError(Exception):
    """A mistake in what the user wrote.

    Args:
        message: all they need to know.
        key: where it stands, if it stands somewhere.
    """

    def __init__(self, message: str, key: Key = ()) -> None:
        super().__init__(message)
        self.key = key


def debugging(args: Sequence[str] = ()) -> bool:
    """Whether tracebacks were asked for, by `--debug` or by ADAPTRANK_DEBUG."""
    return "--debug" in args or os.environ.get("ADAPTRANK_DEBUG", "0") not in ("", "0")


def fail(text: str) -> typing.NoReturn:
    """Print a mistake and leave with 2."""
    print(f"adaptrank: {text}", file=sys.stderr)
    raise SystemExit(2)


# ---- exceptions


def explain(error: BaseException) -> str | None:
    """The text of an exception that is a mistake in what was asked for; None for a bug, which keeps its traceback.

    Mistakes are our own `ConfigError`, an `OSError` (a file that is not there), Lightning's MisconfigurationException, and
    any ValueError, TypeError, ImportError or NotImplementedError that somebody raised on purpose: the innermost line is a
    `raise`, not an operation that failed.
    """
    if isinstance(error, ConfigError):
        return str(error)
    error = _root(error)
    if type(error).__name__ == "MisconfigurationException" or _is_file_error(error):
        return _sentence(error)
    if isinstance(
        error, ValueError | TypeError | ImportError | NotImplementedError
    ) and _raised_on_purpose(error):
        return _sentence(error)
    return None


def _root(error: BaseException) -> BaseException:
    """What a constructor raised, out of the report that jsonargparse makes of it."""
    while (
        str(error)
        .lstrip()
        .startswith(("Does not validate", "Problem with given class_path", "Parser key"))
    ):
        inner = error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    return error


def _is_file_error(error: BaseException) -> bool:
    return isinstance(error, OSError) and not isinstance(error, ChildProcessError | BrokenPipeError)


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and len(error.args) > 1:
        return f"{error.filename}: {error.strerror}."
    lines = [shorten(line.strip()) for line in str(error).splitlines() if line.strip()]
    return "\n".join(lines[:3]) or type(error).__name__


def shorten(line: str, most: int = 300) -> str:
    """A line of somebody else's, cut between words: its beginning says what is wrong, and its end what to do."""
    if len(line) <= most:
        return line
    half = (most - 5) // 2
    head, tail = line[:half], line[-half:]
    head = head.rpartition(" ")[0] or head
    tail = tail.partition(" ")[2] or tail
    return f"{head} ... {tail}"


def _raised_on_purpose(error: BaseException) -> bool:
    last = error.__traceback__
    if last is None:
        return True  # built, not raised
    while last.tb_next is not None:
        last = last.tb_next
    return last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


# ---- names


def nearest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The most similar name, whatever the case; for a path with dots, by its last part too."""
    names = list(dict.fromkeys(known))
    for key in (str.lower, lambda name: name.rpartition(".")[2].lower()):
        keyed = {key(name): name for name in reversed(names)}
        close = difflib.get_close_matches(key(str(word)), keyed, n=1, cutoff=cutoff)
        if close:
            return keyed[close[0]]
    return None


def hint(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or a full stop where nothing is near."""
    near = nearest(word, known)
    return f"; did you mean {near!r}?" if near else "."


def some(names: Iterable[str], most: int = 12) -> str:
    """Names with commas, the first dozen."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def spell(key: Key) -> str:
    """A key as one writes it: `model.init_args.adapters[0].targets`."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def missing_file(path: str, what: str) -> str:
    """Say that a file is missing, with the nearest name in its folder."""
    where = Path(path).expanduser()
    parent = where.parent
    if not parent.is_dir():
        return f"There is no {what} {path!r}: its folder {str(parent)!r} does not exist either."
    near = nearest(
        where.name, (p.name for p in parent.iterdir() if p.is_dir() == (not where.suffix))
    )
    if near:
        return f"There is no {what} {path!r}; did you mean {str(parent / near)!r}?"
    return f"There is no {what} {path!r}."


# ---- files


def read_yaml(path: str) -> dict[str, Any]:
    """A configuration file as a mapping.

    Raises:
        ConfigError: if it is missing, or no YAML, or no mapping.
    """
    if not Path(path).is_file():
        raise ConfigError(missing_file(path, "configuration file"))
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text file; a configuration is YAML.") from None
    except yaml.YAMLError as error:
        raise ConfigError(_broken_yaml(path, error)) from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds {_kind(content)}; a configuration is a mapping with the keys model, data and trainer."
        )
    return content


def _broken_yaml(path: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    context = getattr(error, "context", None)
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    lines = [f"{path}{where}: this is not YAML: {problem}{f' ({context})' if context else ''}."]
    if mark:
        text = Path(path).read_text(encoding="utf-8").splitlines()
        if mark.line < len(text):
            lines.append(f"  {text[mark.line].rstrip()}")
    return "\n".join(lines)


def line_of(path: str, key: Key) -> int | None:
    """The line of a key in a YAML file, from 1; None where the file does not have it."""
    node = yaml.compose(Path(path).read_text(encoding="utf-8"))
    line = None
    for part in key:
        if isinstance(node, yaml.MappingNode):
            entry = next(((k, v) for k, v in node.value if k.value == part), None)
            if entry is None:
                return None
            line, node = entry[0].start_mark.line + 1, entry[1]
        elif (
            isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value)
        ):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return None
    return line


# ---- what was given: files, then the command line


def collect(args: Sequence[str]) -> tuple[dict[str, Any], list[str], dict[Key, str]]:
    """Configuration of a command line: (merged tree, configuration files, key -> option, for what options set).

    Raises:
        ConfigError: for a file that is missing or broken, and for an argument that is no option.
    """
    tree: dict[str, Any] = {}
    files: list[str] = []
    options: dict[Key, str] = {}
    rest = list(args)
    while rest:
        option = rest.pop(0)
        if not option.startswith("-"):
            if Path(option).suffix in (".yaml", ".yml"):
                raise ConfigError(f"{option!r} is no option; write --config {option}")
            raise ConfigError(
                f"{option!r} is no option; write --key value, such as --trainer.max_steps 100."
            )
        name, equals, value = option.lstrip("-").partition("=")
        bare = not equals and not (rest and not rest[0].startswith("--"))
        if not equals:
            value = "true" if bare else rest.pop(0)
        if name in ("config", "c"):
            if bare or not value:
                raise ConfigError(f"--{name} needs a file: --{name} FILE.yaml")
            files.append(value)
            content = read_yaml(value)
            merge(tree, content)
            options = {key: given for key, given in options.items() if not _holds(content, key)}
        else:
            options[_assign(tree, name.removesuffix("+"), _value(value))] = f"--{name}"
    return tree, files, options


def merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Merge a nested mapping into another one; a new class_path drops the arguments of the old one."""
    for key, value in new.items():
        old = into.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            if value.get("class_path", old.get("class_path")) != old.get("class_path"):
                old.pop("init_args", None)
            merge(old, value)
        else:
            into[key] = value


def _holds(tree: Any, key: Key) -> bool:
    for part in key:
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def _assign(tree: dict[str, Any], name: str, value: Any) -> Key:
    """Set `a.b.c`, stepping into the init_args of classes as jsonargparse does; returns the full key."""
    key: list[str] = []
    node = tree
    *parents, last = name.split(".")
    for part in [*parents, last]:
        if "class_path" in node and part not in ("class_path", "init_args", "dict_kwargs"):
            node = node.setdefault("init_args", {})
            key.append("init_args")
        key.append(part)
        if part is last or not isinstance(node, dict):
            break
        child = node.get(part)
        if isinstance(child, str):
            child = {"class_path": child}
        node[part] = child if isinstance(child, dict) else {}
        node = node[part]
    old = node.get(last)
    if isinstance(value, str) and isinstance(old, dict) and "class_path" in old:
        merge(old, {"class_path": value})  # --model CausalLM beside arguments that a file gave
        key.append("class_path")
    else:
        node[last] = value
    return tuple(key)


class Typed(str):
    """The text of an option that YAML would read as a number or a boolean: it is both, as `--model.adapter 3` may be."""

    value: Any


def _value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if not isinstance(value, bool | int | float):
        return value
    typed = Typed(text)
    typed.value = value
    return typed


# ---- the walk


def check(given: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    """Compare a configuration with what its keys may hold.

    Args:
        given: the configuration.
        schema: {top-level key: type}; a type may be `Arguments(cls)` for the bare arguments of a class.
    Raises:
        ConfigError: for the first thing that does not fit.
    """
    for key, value in given.items():
        if key not in schema:
            raise ConfigError(
                f"Unknown key {key!r}{hint(str(key), schema)} Keys here: {some(schema, 20)}.".replace(
                    "..", "."
                ),
                (key,),
            )
        _walk(value, schema[key], (key,))


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The type of a mapping that holds the arguments of a class, with no class_path around them."""

    of: type


@cache
def arguments(cls: Callable[..., Any]) -> tuple[dict[str, tuple[Any, bool]], bool]:
    """({argument: (type, whether it is required)}, whether others are taken too), through **kwargs to the base classes."""
    found: dict[str, tuple[Any, bool]] = {}
    owners = (
        [c.__dict__["__init__"] for c in inspect.getmro(cls) if "__init__" in c.__dict__]
        if isinstance(cls, type)
        else [cls]
    )
    for position, function in enumerate(owners):
        if function is object.__init__:
            return found, position == 0 and not _is_class(cls)
        try:
            hints = get_type_hints(function)
        except Exception:  # a name that exists for type checkers only
            hints = {}
        more = False
        for name, parameter in list(inspect.signature(function).parameters.items())[
            1 if _is_class(cls) else 0 :
        ]:
            if parameter.kind is parameter.VAR_KEYWORD:
                more = True
            elif parameter.kind is not parameter.VAR_POSITIONAL and name not in found:
                found[name] = (hints.get(name, Any), parameter.default is parameter.empty)
        if not more:
            return found, False
    return found, True


def _is_class(thing: Any) -> bool:
    return isinstance(thing, type)


def subclasses(base: type) -> dict[str, type]:
    """Name -> class, of every public concrete class under a base that is known by now; the base itself where it is concrete."""
    found: dict[str, type] = {}

    def visit(cls: type) -> Iterator[type]:
        yield cls
        children: list[type] = type.__subclasses__(cls)
        for child in children:
            yield from visit(child)

    for cls in visit(base):
        hidden = cls.__name__.startswith("_") or cls.__module__.startswith(
            ("lightning.pytorch.demos", "unittest")
        )
        if not hidden and not inspect.isabstract(cls) and "<locals>" not in cls.__qualname__:
            found.setdefault(cls.__name__, cls)
    return found


def _leaves(base: type) -> str:
    """Names of the classes under a base that nothing else derives from: what one would choose."""
    return some(
        sorted(
            name
            for name, cls in subclasses(base).items()
            if cls is not base and not cls.__subclasses__()
        )
    )


def _walk(value: Any, kind: Any, key: Key) -> None:
    """Raise ConfigError where a value cannot be of a kind; whatever is not understood passes."""
    origin, args = get_origin(kind), get_args(kind)
    if isinstance(value, Typed) and not (
        kind is str or origin in (Union, types.UnionType) or str(value) in args
    ):
        value = value.value
    if isinstance(kind, Arguments):
        _walk_arguments(value, kind.of, key, skip=0, required=False)
    elif origin in (Union, types.UnionType):
        _walk_union(value, args, key)
    elif origin is Literal:
        if value not in args:
            raise _misfit(
                value, f"one of {', '.join(map(repr, args))}", key, hint(str(value), map(str, args))
            )
    elif kind is type(None) or kind is None:
        if value is not None:
            raise _misfit(value, "nothing (null)", key)
    elif kind in _SCALARS:
        if not _SCALARS[kind](value):
            unquoted = kind is str and isinstance(value, bool | int | float)
            raise _misfit(value, _NAMES[kind], key, _quote(value) if unquoted else ".")
    elif origin in _LISTS:
        if not isinstance(value, list | tuple):
            raise _misfit(
                value, "a list", key, f"; write [{value}]." if isinstance(value, str) else "."
            )
        for position, item in enumerate(value):
            _walk(item, args[0] if args else Any, (*key, position))
    elif origin in (dict, Mapping, collections.abc.Mapping) or kind is dict:
        if not isinstance(value, dict):
            raise _misfit(value, "a mapping", key)
    elif origin is collections.abc.Callable and len(args) == 2 and _is_class(args[1]):
        _walk_class(value, args[1], key, skip=len(args[0]) if isinstance(args[0], list) else 0)
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
        made: Callable[..., Any] = kind
        if not isinstance(value, dict):
            raise _misfit(value, f"a mapping with the keys {some(arguments(made)[0])}", key)
        inner = "init_args" in value or "class_path" in value
        _walk_arguments(
            value.get("init_args") or {} if inner else value,
            made,
            (*key, "init_args") if inner else key,
        )
    elif _is_class(kind) and kind.__module__ != "builtins" and issubclass(kind, _configurable()):
        _walk_class(value, kind, key, skip=0)


def _configurable() -> tuple[type, ...]:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule
    from torch.optim import Optimizer

    return (Callback, LightningDataModule, LightningModule, Optimizer)


def _walk_union(value: Any, members: Sequence[Any], key: Key) -> None:
    errors = []
    for member in members:
        try:
            _walk(value, member, key)
            if _no_instance(value, member):
                raise _misfit(value, _describe(member), key)
        except ConfigError as error:
            errors.append((member, error))
        else:
            return
    literals = [
        choice for member in members if get_origin(member) is Literal for choice in get_args(member)
    ]
    if literals and isinstance(value, str):
        names = list(dict.fromkeys(map(str, literals)))
        raise _misfit(value, f"one of {some(names, 20)}", key, hint(value, names))
    structural = [
        error
        for member, error in errors
        if _same_shape(value, member) and not _no_instance(value, member)
    ]
    if len(structural) == 1 or (structural and len(structural[0].key) > len(key)):
        raise structural[0]
    plain = [member for member, _ in errors if not _no_instance(value, member)]
    fits = " or ".join(
        dict.fromkeys(_describe(m) for m in plain if m is not int or float not in plain)
    )
    raise _misfit(value, fits, key)


def _no_instance(value: Any, kind: Any) -> bool:
    """Whether a single word stands where an object of some class would have to (`x` for a Tensor)."""
    thing = (
        _is_class(kind)
        and kind.__module__ != "builtins"
        and not issubclass(kind, (os.PathLike, enum.Enum))
    )
    return (
        thing
        and not issubclass(kind, _configurable())
        and isinstance(value, str | int | float)
        and "." not in str(value)
    )


def _same_shape(value: Any, kind: Any) -> bool:
    origin = get_origin(kind)
    if isinstance(value, list):
        return origin in _LISTS
    compound = origin is collections.abc.Callable or (
        _is_class(kind) and kind not in _SCALARS and kind is not type(None)
    )
    return (
        compound
        if isinstance(value, dict)
        else origin is Literal or (isinstance(value, str) and compound)
    )


def _describe(kind: Any) -> str:
    if kind in _NAMES:
        return _NAMES[kind]
    if kind in (None, type(None)):
        return "null"
    if get_origin(kind) in _LISTS:
        return "a list"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    return str(getattr(kind, "__name__", kind))


def _walk_class(value: Any, base: type, key: Key, skip: int) -> None:
    """A class by name, or {class_path, init_args}; `skip` positional arguments come later, from the library."""
    if value is None:
        return
    if isinstance(value, str):
        value = {"class_path": value}
    if not isinstance(value, dict):
        raise _misfit(
            value, f"the name of a {base.__name__}, or a mapping with class_path and init_args", key
        )
    if "class_path" not in value:
        raise ConfigError(
            f"{spell(key)} has no class_path; name a class, one of {_leaves(base)}.", key
        )
    cls = find_class(value["class_path"], base, (*key, "class_path"))
    unknown = next((k for k in value if k not in ("class_path", "init_args", "dict_kwargs")), None)
    if unknown is not None:
        if unknown in arguments(cls)[0]:
            raise ConfigError(
                f"{spell(key)}.{unknown} belongs under init_args, one level deeper.",
                (*key, unknown),
            )
        raise ConfigError(
            f"Unknown key {unknown!r} in {spell(key)}; a class has the keys class_path and init_args.",
            (*key, unknown),
        )
    _walk_arguments(value.get("init_args"), cls, (*key, "init_args"), skip)


def find_class(name: Any, base: type, key: Key = ()) -> Callable[..., Any]:
    """The class (or function that makes one) of a name or an import path.

    Raises:
        ConfigError: if there is none, or it is no `base`; the message names the nearest.
    """
    known = subclasses(base)
    kind = base.__name__
    if not isinstance(name, str):
        raise _misfit(name, f"the name of a {kind}", key)
    if name in known:
        return known[name]
    if "." not in name:
        hinted = (
            "; for none, write null."
            if name.lower() in ("none", "no", "off")
            else hint(name, known)
        )
        raise ConfigError(
            f"{spell(key)}: there is no {kind} {name!r}{hinted} Known: {_leaves(base)}.", key
        )
    module, _, last = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), last, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"{spell(key)}: importing {module!r} fails: {error}.", key) from error
        near = nearest(
            module,
            [*(p.stem for p in Path().glob("*.py")), *{c.__module__ for c in known.values()}],
        )
        raise ConfigError(
            f"{spell(key)}: there is no module {module!r}{f'; did you mean {near!r}?' if near else '.'} A module of your own is "
            f"looked for in the folder you start from, and on PYTHONPATH.",
            key,
        ) from None
    if found is None:
        there = {
            f"{module}.{c.__name__}"
            for c in subclasses(base).values()
            if c.__module__.startswith(module)
        }
        defined = vars(sys.modules[module]).values()
        there |= {f"{module}.{c.__name__}" for c in defined if _is_class(c) and issubclass(c, base)}
        raise ConfigError(
            f"{spell(key)}: the module {module!r} has no {last!r}{hint(name, sorted(there) or known)}",
            key,
        )
    if _is_class(found) and not issubclass(found, base):
        raise ConfigError(f"{spell(key)}: {name} is no {kind}; use one of {_leaves(base)}.", key)
    return typing.cast("Callable[..., Any]", found)


def _walk_arguments(
    value: Any, cls: Callable[..., Any], key: Key, skip: int = 0, required: bool = True
) -> None:
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise _misfit(value, "a mapping", key)
    known, more = arguments(cls)
    later = list(known)[:skip]
    known = {name: entry for name, entry in known.items() if name not in later}
    for name, item in value.items():
        if name in known:
            _walk(item, known[name][0], (*key, name))
        elif not more:
            accepts = f"\n{cls.__name__} accepts {some(known, 20)}." if len(known) <= 20 else ""
            raise ConfigError(
                f"Unknown key {spell((*key, name))}{hint(str(name), known)}{accepts}", (*key, name)
            )
    for name, (_, needed) in known.items() if required else ():
        if needed and name not in value:
            raise ConfigError(
                f"{spell((*key, name))} is missing: {cls.__name__} cannot do without it.", key
            )


def _misfit(value: Any, fits: str, key: Key, end: str = ".") -> ConfigError:
    arrived = repr(value)
    arrived = arrived if len(arrived) <= 60 else f"{arrived[:57]}..."
    return ConfigError(f"{spell(key)} is {arrived}; it must be {fits}{end}", key)


def _quote(value: bool | int | float) -> str:
    """What to do with a number or a boolean that should have been a string."""
    if isinstance(value, bool):
        return f': quote it, as in "{"yes" if value else "no"}"; unquoted, YAML reads yes, no, on and off as true and false.'
    return f': quote it, as in "{value}".'


def _kind(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", str: "a text", type(None): "nothing"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


_SCALARS: dict[Any, Callable[[Any], bool]] = {
    int: lambda value: isinstance(value, int) and not isinstance(value, bool),
    float: _is_number,  # 1e-3 is a text in YAML 1.1
    bool: lambda value: isinstance(value, bool),
    str: lambda value: (
        value is not None and not isinstance(value, dict | list | bool | int | float)
    ),
    Path: lambda value: isinstance(value, str),
}
_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Path: "a path",
}
_LISTS = (list, tuple, Sequence, Iterable, collections.abc.Sequence, collections.abc.Iterable)


def condense(message: str) -> str:
    """The heart of one of jsonargparse's messages, for what `check` does not understand: the innermost key, the first reason."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    keys = [line.split('"')[1] for line in lines if line.startswith('Parser key "')]
    skipped = (
        "Does not validate",
        "Subtypes:",
        "Errors:",
        "Given value",
        "Expected a <class 'NoneType'>",
        "Parser key",
        "Problem with given class_path",
        "Expected a path but",
    )
    reasons = [line for line in lines if not line.startswith(skipped)]
    reason = next(iter(reasons or lines), message)
    if reason.startswith("Expected a <class 'str'>"):
        reason = reason.replace("Expected a <class 'str'>", "it must be a string (quote it)")
    return shorten(f"{keys[-1]}: {reason}" if keys else reason)
