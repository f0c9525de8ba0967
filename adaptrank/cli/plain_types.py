"""Values that do not fit a type of numbers, texts, booleans and choices, by its source text."""

import ast
from collections.abc import Iterator
from typing import Any

import yaml

from adaptrank._errors import did_you_mean, some

WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "None": "null",
}
"""A plain type -> what fits, in words."""


def misfit(annotation: ast.expr | None, value: Any, is_option: bool) -> str | None:
    """Return what fits, as a sentence, if a value does not. None if it may fit.

    Args:
        annotation: the type, as it stands in the source.
        value: the value as YAML has it.
        is_option: whether it was typed on the command line, where any value is a text as well.
    """
    if annotation is None or value is None:
        return None
    parts = list(_parts(annotation))
    choices: list[str] = []
    for part in parts:
        choices += _choices(part) or []
    plain = [ast.unparse(part) for part in parts if _choices(part) is None]
    if any(name not in WORDS for name in plain):
        return None
    if choices:
        return _no_choice(choices, plain, value)
    if any(_fits(name, value, is_option) for name in plain):
        return None
    words = list(dict.fromkeys(WORDS[name] for name in plain))
    if "a number" in words and "a whole number" in words:
        words.remove("a whole number")
    fits = " or ".join(sorted(words, key=lambda word: word == "null"))
    return f"It must be {fits}."


def _parts(annotation: ast.expr) -> Iterator[ast.expr]:
    """Yield the members of a union: `A | B`, `Union[A, B]`, `Optional[A]`."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        yield from _parts(annotation.left)
        yield from _parts(annotation.right)
        return
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        members = annotation.slice
        inner = members.elts if isinstance(members, ast.Tuple) else [members]
        if annotation.value.id in ("Union", "Optional"):
            for member in inner:
                yield from _parts(member)
            if annotation.value.id == "Optional":
                yield ast.Constant(None)
            return
    yield annotation


def _choices(part: ast.expr) -> list[str] | None:
    """Return the choices of a `Literal[...]`, or None for another type."""
    if not (isinstance(part, ast.Subscript) and ast.unparse(part.value) == "Literal"):
        return None
    members = part.slice.elts if isinstance(part.slice, ast.Tuple) else [part.slice]
    return [str(member.value) for member in members if isinstance(member, ast.Constant)]


def _no_choice(choices: list[str], plain: list[str], value: Any) -> str | None:
    """Return the sentence for a value that is none of the choices, or None if it may be one."""
    if str(value) in choices or any(name != "None" for name in plain):
        return None
    hint = did_you_mean(str(value), choices)
    return f"It must be one of {some(map(repr, choices), 20)}.{hint}"


def _fits(name: str, value: Any, is_option: bool) -> bool:
    """Tell whether a value may fit one plain type. jsonargparse reads texts as YAML once more."""
    if isinstance(value, str) and name in ("int", "float", "bool"):
        if _is_float(value):
            return name != "bool"
        value = _as_yaml(value)
    if name == "str":
        return isinstance(value, str) or is_option
    if name == "bool":
        return isinstance(value, bool)
    if name == "None":
        return value is None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _as_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
