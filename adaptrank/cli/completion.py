"""Completion of verbs and keys in a shell, by the package argcomplete.

The shell starts the command with the line so far in its environment. The keys of fit, validate,
test and predict are read from the sources, so that nothing heavy is imported.
"""

import argparse
import importlib
import os
from collections.abc import Iterator

VARIABLE = "_ARGCOMPLETE"
"""Environment variable with which the shell asks for completions."""


def is_asked() -> bool:
    """Return whether a shell asks for completions."""
    return VARIABLE in os.environ


def complete(verbs: dict[str, str], training: tuple[str, ...]) -> None:
    """Print the completions of the line in the environment, and exit.

    Args:
        verbs: name of each verb -> what it does.
        training: verbs that take the keys of a configuration.
    """
    import argcomplete

    words = os.environ.get("COMP_LINE", "").split()
    named = [word for word in words if word in verbs][:1]
    argcomplete.autocomplete(make_parser(verbs, training, named))


def make_parser(
    verbs: dict[str, str], training: tuple[str, ...], named: list[str]
) -> argparse.ArgumentParser:
    """Return a parser of all verbs, with the options and keys of the one that is named."""
    from adaptrank.cli.options import FILES

    parser = argparse.ArgumentParser(prog="adaptrank")
    parsers = parser.add_subparsers()
    for verb, summary in verbs.items():
        added = parsers.add_parser(verb, help=summary)
        if verb not in named:
            continue
        if verb not in training:
            name = FILES.get(verb, verb)
            importlib.import_module(f"adaptrank.cli.verbs.{name}").add_options(added)
        if verb in (*training, "plan"):
            for key in keys_of(verb if verb in training else "fit"):
                added.add_argument(f"--{key}")
    return parser


def keys_of(verb: str) -> Iterator[str]:
    """Yield the keys of a verb: of the run, of the trainer, and of the library's classes."""
    from adaptrank.cli.early_check import CLASS_KEYS, RUN_KEYS, VERB_KEYS
    from adaptrank.cli.signatures import TRAINER, class_names, signature

    yield from (*RUN_KEYS, *VERB_KEYS[verb])
    trainer = signature(TRAINER, "Trainer")
    for name in trainer.arguments if trainer is not None else ():
        yield f"trainer.{name}"
    for key, kind in CLASS_KEYS.items():
        found = [signature(kind, name) for name in class_names(kind)]
        names = [name for each in found if each is not None for name in each.arguments]
        yield from (f"{key}.{name}" for name in dict.fromkeys(names))
