"""Find a mistake in a key, in the name of a class or in a plain value before PyTorch is imported.

What is not certain is left to jsonargparse, which parses and checks everything again.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaptrank._errors import did_you_mean, some
from adaptrank.cli.errors import ConfigError, Key
from adaptrank.cli.given import LEVELS, Entry, sources, spell
from adaptrank.cli.mistakes import MisfitError, ParsingError, UnknownKeyError
from adaptrank.cli.plain_types import misfit
from adaptrank.cli.signatures import (
    ALLOCATOR,
    CALLBACK,
    DATA,
    MODEL,
    OPTIMIZER,
    OWN_OPTIMIZER,
    PARAMETERIZATION,
    STRATEGY,
    TRAINER,
    Kind,
    Signature,
    class_names,
    dataclass_signature,
    signature,
)

CLASS_KEYS: Mapping[str, Kind] = {
    "model": MODEL,
    "data": DATA,
    "allocator": ALLOCATOR,
    "initial_ranks": ALLOCATOR,
    "training_strategy": STRATEGY,
}
"""Keys at the top of a configuration that hold a class."""

RUN_KEYS = ("config", "seed_everything", "trainer", *CLASS_KEYS, "runs", "accept_changes")
RUN_KEYS += ("evaluate", "save")
FIT_KEYS = ("ckpt_path", "weights_only")
VERB_KEYS: Mapping[str, Sequence[str]] = {
    "fit": FIT_KEYS,
    "validate": (*FIT_KEYS, "verbose"),
    "test": (*FIT_KEYS, "verbose"),
    "predict": (*FIT_KEYS, "return_predictions", "out"),
}
"""Keys of each verb beside those of all runs."""

FREE_OPTIONS = (
    "adapter",
    "help",
    "help_all",
    "print_config",
    "print_completion",
    "print_shtab",
    "debug",
)
"""Options that are no keys of a configuration."""

PREFIX = "ADAPTRANK"
"""Beginning of environment variables that give keys, as in ADAPTRANK_FIT__TRAINER__MAX_STEPS."""

MERGE = "<<"
"""Key with which YAML merges the mapping of an anchor."""


class Source:
    """The entries of one file or option, by key."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = {entry.key: entry for entry in entries}

    def top(self) -> Iterator[Entry]:
        """Yield the entries that stand under no other one."""
        for key, entry in self.entries.items():
            if not any(key[:length] in self.entries for length in range(1, len(key))):
                yield entry

    def where(self, key: Key) -> Entry:
        """Return the entry of a key, or of the nearest level around it.

        A key that YAML merges from an anchor has no line of its own.
        """
        levels = (key[:length] for length in range(len(key), 0, -1))
        return next(self.entries[level] for level in levels if level in self.entries)

    def refuse(self, mistake: ParsingError, key: Key, value: Any = None) -> None:
        """Raise a mistake at the place of a key."""
        entry = self.entries.get(key) or Entry(key, self.where(key).where, value)
        raise mistake.at(entry)


def check_early(verb: str, args: Sequence[str]) -> None:
    """Check the keys of a command line and of its files.

    Args:
        verb: fit, validate, test or predict.
        args: the command line after the verb.

    Raises:
        ConfigError: at the first mistake, with its file and line, or its option.
    """
    _check_words(args)
    _check_environment(verb)
    known = (*RUN_KEYS, *VERB_KEYS[verb])
    classes: dict[str, str | None] = {}
    for entries in sources(args):
        source = Source(entries)
        for entry in source.top():
            # An option may name a value below, as in --model.optimizer.lr.
            if entry.where.startswith("--"):
                _check_option(source, entry, known, classes)
            else:
                _check_top(source, entry, known, classes)


def _check_words(args: Sequence[str]) -> None:
    """Refuse a word that is neither an option nor the value of one."""
    follows_option = False
    for word in args:
        if word.startswith("-"):
            follows_option = "=" not in word
        elif follows_option:
            follows_option = False
        else:
            fits = f"--config {word}" if word.endswith((".yaml", ".yml")) else "--key value"
            example = "" if fits.startswith("--config") else ", such as --trainer.max_steps 100."
            raise ParsingError(f"{word!r} is no option. Write {fits}{example}").whole()


def _check_environment(verb: str) -> None:
    """Refuse an environment variable of a verb that names no key, which the parser would ignore."""
    prefix = f"{PREFIX}_{verb.upper()}__"
    known = [*RUN_KEYS, *VERB_KEYS[verb], *_trainer_keys()]
    names = {f"{prefix}{key.upper().replace('.', '__')}": key for key in known}
    for name in os.environ:
        if not name.startswith(prefix) or name in names:
            continue
        first = name.removeprefix(prefix).partition("__")[0]
        if first.lower() in CLASS_KEYS:
            raise ConfigError(
                f"{name}: an environment variable gives a class as a whole. Write "
                f"{prefix}{first}='{{class_path: ..., init_args: {{...}}}}'."
            )
        raise ConfigError(f"{name} names no key of {verb}.{did_you_mean(name, names)}")


def _check_top(
    source: Source, entry: Entry, known: Sequence[str], classes: dict[str, str | None]
) -> None:
    """Check a key at the top of a file, and all that stands under it."""
    (name,) = entry.key
    if name in CLASS_KEYS:
        _check_class_value(source, entry.key, entry.value, CLASS_KEYS[str(name)], classes)
    elif name == "trainer" and isinstance(entry.value, dict):
        _check_trainer(source, entry.key, entry.value)
    elif name not in known and name != MERGE:
        text = f"Unknown key KEY.{did_you_mean(str(name), known)}"
        text += f"\nKeys here: {some(known, 20)}."
        source.refuse(UnknownKeyError(text), entry.key)


def _check_option(
    source: Source, entry: Entry, known: Sequence[str], classes: dict[str, str | None]
) -> None:
    """Check one option of the command line."""
    first, *rest = [str(part) for part in entry.key]
    # An option without a value gets its sentence from the parser.
    if first in FREE_OPTIONS or entry.value == "" or (rest and rest[-1] == "help"):
        return
    if first in CLASS_KEYS and rest in ([], ["class_path"]):
        _check_class_value(source, entry.key, entry.value, CLASS_KEYS[first], classes)
    elif first == "trainer":
        _check_trainer_option(source, entry, rest)
    elif first in CLASS_KEYS:
        found = signature(CLASS_KEYS[first], classes.get(first) or "")
        names = [part for part in rest if part not in LEVELS]
        if found is not None and names:
            _check_argument(source, entry.key, names, entry.value, found)
    elif first not in known and not first.endswith("+"):
        _refuse_option(entry, [*known, *_trainer_keys()])


def _trainer_keys() -> list[str]:
    found = signature(TRAINER, "Trainer")
    return [f"trainer.{name}" for name in found.arguments] if found else []


def _refuse_option(entry: Entry, known: Sequence[str]) -> None:
    option = entry.where
    options = [f"--{key}" for key in known]
    raise ParsingError(f"Unknown option {option}.{did_you_mean(option, options)}").whole()


def _check_trainer_option(source: Source, entry: Entry, rest: Sequence[str]) -> None:
    found = signature(TRAINER, "Trainer")
    if found is None or not rest:
        return
    name = rest[0].removesuffix("+")
    if name not in found.arguments and not found.is_open:
        _refuse_option(entry, [*RUN_KEYS, *_trainer_keys()])
    if len(rest) == 1:
        _check_plain(source, entry.key, entry.value, found, name)


# ---- classes


def _check_class_value(
    source: Source, key: Key, value: Any, kind: Kind, classes: dict[str, str | None] | None = None
) -> None:
    """Check a class by its name, or as a mapping with `class_path` and `init_args`.

    Args:
        source: source of the value.
        key: its key.
        value: its value.
        kind: kind of class that fits.
        classes: classes of the keys at the top so far, which another file may go on with.
    """
    path, arguments = value, None
    if isinstance(value, dict):
        path, arguments = value.get("class_path"), value.get("init_args")
        _check_levels(source, key, value)
    top = str(key[0])
    if path is None and isinstance(value, dict) and classes is not None:
        path = classes.get(top)
    if classes is not None:
        classes[top] = path if isinstance(path, str) else None
    if not isinstance(path, str) or path.endswith((".yaml", ".yml")):
        return
    found = signature(kind, path)
    if found is None:
        at = (*key, "class_path")
        _refuse_unknown_class(source, at if at in source.entries else key, path, kind)
    elif isinstance(arguments, dict):
        _check_arguments(source, (*key, "init_args"), arguments, found)


def _check_levels(source: Source, key: Key, value: Mapping[str, Any]) -> None:
    """Refuse an argument beside `class_path`."""
    if "class_path" not in value:
        return
    for name in value:
        if name not in LEVELS:
            text = "KEY belongs under init_args, one level deeper."
            source.refuse(ParsingError(text), (*key, name))


def _refuse_unknown_class(source: Source, key: Key, path: str, kind: Kind) -> None:
    """Refuse a name that no class of this library can have. Others may be a user's."""
    module, _, name = path.rpartition(".")
    known = class_names(kind)
    if kind is OPTIMIZER and module == "torch.optim":
        hint = did_you_mean(path, [f"{module}.{each}" for each in known])
        text = f"KEY: the module {module!r} has no {name!r}.{hint}"
        if hint:
            source.refuse(ParsingError(text), key)
        return
    if kind is OWN_OPTIMIZER:
        hint = did_you_mean(path, [f"{module}.{each}" for each in known])
        text = f"KEY: the module {module!r} has no {name!r}.{hint}"
        source.refuse(ParsingError(f"{text} Known: {some(known, 12)}."), key)
        return
    if module or kind is OPTIMIZER:
        return
    hint = did_you_mean(name, known)
    if name.lower() in ("none", "no", "off"):
        hint = " For none, write null."
    if kind is CALLBACK:
        known = [each for each in known if each != "Callback"]
        # Allocators and strategies are callbacks as well, and so are classes of other packages.
        if not hint or any(signature(each, name) is not None for each in (ALLOCATOR, STRATEGY)):
            return
    # Another package may have registered a model or data under a name that is like none here.
    if hint or kind in (ALLOCATOR, PARAMETERIZATION, STRATEGY):
        text = f"KEY: there is no {kind.name} {name!r}.{hint} Known: {some(known, 12)}."
        source.refuse(ParsingError(text), key)


def _check_arguments(
    source: Source, key: Key, arguments: Mapping[str, Any], found: Signature
) -> None:
    for name, value in arguments.items():
        _check_argument(source, (*key, name), [str(name)], value, found)


def _check_argument(
    source: Source, key: Key, names: Sequence[str], value: Any, found: Signature
) -> None:
    """Check one argument of a class.

    Args:
        source: source of the value.
        key: its key.
        names: names from the class on, without levels. An option may go deeper than the argument.
        value: its value.
        found: signature of the class.
    """
    name = names[0].removesuffix("+")
    if name not in found.arguments:
        if not found.is_open:
            source.refuse(_unknown_argument(name, found), key)
        return
    if len(names) > 1:
        return
    if name == "optimizer" and value is not None:
        _check_class_value(source, key, value, _kind_of_optimizer(value))
    elif name == "adapters" and isinstance(value, list):
        for position, item in enumerate(value):
            _check_adapter(source, (*key, position), item)
    else:
        _check_plain(source, key, value, found, name)


def _kind_of_optimizer(value: Any) -> Kind:
    """Return the kind of an optimizer: one of this library by its name or path, else PyTorch's."""
    path = value.get("class_path") if isinstance(value, dict) else value
    is_own = isinstance(path, str) and (
        path.startswith("adaptrank.optimizers.") or path in class_names(OWN_OPTIMIZER)
    )
    return OWN_OPTIMIZER if is_own else OPTIMIZER


def _unknown_argument(name: str, found: Signature) -> UnknownKeyError:
    known = list(found.arguments)
    text = f"Unknown key KEY.{did_you_mean(name, known)}"
    if len(known) <= 20:
        text += f"\n{found.name} accepts {some(known, 20)}."
    return UnknownKeyError(text)


def _check_adapter(source: Source, key: Key, entry: Any) -> None:
    """Check an entry of `model.adapters`."""
    if not isinstance(entry, dict):
        return
    found = dataclass_signature("modules", "Adapter")
    for name, value in entry.items():
        if name not in found.arguments:
            source.refuse(_unknown_argument(str(name), found), (*key, name))
        elif name == "parameterization" and isinstance(value, list):
            for position, item in enumerate(value):
                _check_class_value(source, (*key, name, position), item, PARAMETERIZATION)
        else:
            _check_plain(source, (*key, name), value, found, str(name))


def _check_trainer(source: Source, key: Key, arguments: Mapping[str, Any]) -> None:
    """Check the section `trainer`, and the callbacks in it."""
    found = signature(TRAINER, "Trainer")
    if found is None or found.is_open:
        return
    for name, value in arguments.items():
        at = (*key, name)
        if name not in found.arguments:
            hint = did_you_mean(f"trainer.{name}", _trainer_keys())
            source.refuse(UnknownKeyError(f"Unknown key KEY.{hint}"), at)
        elif name == "callbacks" and isinstance(value, list):
            for position, item in enumerate(value):
                _check_class_value(source, (*at, position), item, CALLBACK)
        else:
            _check_plain(source, at, value, found, str(name))


def _check_plain(source: Source, key: Key, value: Any, found: Signature, name: str) -> None:
    """Check a value whose type is made of numbers, texts, booleans and choices."""
    annotation = found.arguments[name].annotation
    is_option = source.where(key).where == f"--{spell(key)}"
    sentence = misfit(annotation, value, is_option)
    if sentence is not None:
        source.refuse(MisfitError(f"KEY is VALUE. {sentence}", (), str(value)), key, value)
