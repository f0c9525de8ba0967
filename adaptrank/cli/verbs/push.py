"""`push`: share an adapter on the Hugging Face Hub."""

import argparse
import json
import logging
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptrank._errors import did_you_mean
from adaptrank.cli.errors import ConfigError, missing_file

if TYPE_CHECKING:
    from adaptrank.interop.hub import Publication

log = logging.getLogger("adaptrank")

DESCRIPTION = """\
Write an adapter into a repository on the Hugging Face Hub, in one commit: its tensors, its
description, and a card that says how to load it. Nothing else of a run is pushed, and no path of
this machine. A README.md of your own, in the folder or on the Hub, is kept as it is.

Log in once with `hf auth login`, or set HF_TOKEN. HF_ENDPOINT names another Hub."""

LICENCES = (
    *("apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "unlicense"),
    *("openrail", "creativeml-openrail-m", "bigscience-openrail-m", "gemma", "llama2", "llama3"),
    *("llama3.1", "llama3.2", "llama3.3", "other"),
)
"""Names of licences that the Hub knows, for the hint after a misspelt one."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    folder = "a run's folder, its adapter folder, or a folder in PEFT's format"
    parser.add_argument("adapter", metavar="FOLDER", help=folder)
    parser.add_argument("name", metavar="USER/NAME", help="the repository; made if it is new")
    private = "make the repository private, if it is new"
    parser.add_argument("--private", action="store_true", help=private)
    revision = "the branch to write, made if it is new (main)"
    parser.add_argument("--revision", metavar="BRANCH", help=revision)
    message = "message of the commit"
    parser.add_argument("--commit-message", metavar="TEXT", help=message)
    licence = "licence of the adapter, by its name on the Hub, such as apache-2.0"
    parser.add_argument("--license", "--licence", dest="licence", metavar="NAME", help=licence)
    language = "language of the texts, by its code, such as en (repeatable)"
    parser.add_argument("--language", action="append", default=[], metavar="CODE", help=language)
    base = "name of the base model on the Hub, where the adapter's file does not have it"
    parser.add_argument("--base", metavar="NAME", help=base)
    config = "push the run's config.yaml too, which may name your files"
    parser.add_argument("--with-config", action="store_true", help=config)
    readme = "replace a README.md of your own on the Hub"
    parser.add_argument("--replace-readme", action="store_true", help=readme)


def run(options: argparse.Namespace) -> None:
    """Push the adapter, and print where it is."""
    from adaptrank.artifacts import hub_name, shown_adapter
    from adaptrank.cli.loading import adapter_folder
    from adaptrank.interop.hub import push_adapter
    from adaptrank.reports.card_mark import is_unedited

    name = hub_name(options.name, options.revision)
    _check(options)
    if not Path(options.adapter).expanduser().exists():
        raise ConfigError(missing_file(options.adapter, "adapter folder"))
    folder = adapter_folder(options.adapter)
    config = run_file(folder, "config.yaml")
    if options.with_config and config is None:
        raise ConfigError(f"--with-config: there is no config.yaml of a run beside {folder}.")
    own_card = _own_card(folder)
    others = {"config.yaml": config} if options.with_config and config is not None else {}
    pushed = push_adapter(
        folder,
        name,
        base=options.base,
        private=options.private,
        message=options.commit_message,
        card=_card_maker(folder, str(name), own_card, options),
        may_replace=lambda text: options.replace_readme or is_unedited(text),
        others=others,
    )
    publication = pushed.publication
    _say_what_is_unknown(publication, own_card, options)
    print(f"Pushed {shown_adapter(folder)}: {pushed.address} (commit {pushed.commit[:12]})")
    if pushed.readme == "kept":
        print("  README.md on the Hub is yours and was kept. --replace-readme replaces it.")
    elif own_card is not None:
        print(f"  README.md is that of {folder}, as it is.")
    print(f"  pull:     python -m adaptrank pull {shlex.quote(str(name))}")
    if publication.library == "adaptrank":
        print(f"  load:     adaptrank.load_adapter(model, {str(name)!r})")
    else:
        print(f"  load:     peft.PeftModel.from_pretrained(base, {name.repository!r})")


def run_file(folder: Path, name: str) -> Path | None:
    """Return a file of the run that an adapter's folder belongs to, or None."""
    file = folder.parent / name
    return file if folder.name == "adapter" and file.is_file() else None


def _check(options: argparse.Namespace) -> None:
    licence = options.licence
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        hint = did_you_mean(licence.replace(" ", "-"), LICENCES)
        raise ConfigError(f"--license {licence!r} is no name of a licence on the Hub.{hint}")
    for code in options.language:
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)?", code):
            raise ConfigError(f"--language {code!r} is no code of a language, such as en or de.")


def _own_card(folder: Path) -> str | None:
    """Return the README.md of a folder, unless a run wrote it and nobody has edited it."""
    from adaptrank.artifacts import refuse_foreign_link
    from adaptrank.reports.card_mark import is_unedited

    file = folder / "README.md"
    if not file.is_file():
        return None
    refuse_foreign_link(file)
    text = file.read_text(encoding="utf-8", errors="replace")
    return None if is_unedited(text) else text


def _card_maker(
    folder: Path, name: str, own_card: str | None, options: argparse.Namespace
) -> "Callable[[Publication], str]":
    """Return the function that makes the card: the user's own one, or a new one."""

    def make(publication: "Publication") -> str:
        from adaptrank.reports.hub_card import HubFacts, hub_card

        if own_card is not None:
            return own_card
        config = run_file(folder, "config.yaml") if options.with_config else None
        description = publication.description
        facts = HubFacts(
            name,
            publication.library,
            publication.base,
            description.get("base", {}).get("fingerprint"),
            publication.auto_class,
            publication.methods,
            _allocators(folder),
            _layers(description),
            description.get("ranks", {}),
            options.licence,
            options.language,
            _summary(folder),
            "" if config is None else config.read_text(encoding="utf-8"),
        )
        return hub_card(facts)

    return make


def _layers(description: Mapping[str, Any]) -> dict[str, str]:
    """Return path -> methods of each adapted layer."""
    layers = {}
    for entry in description.get("adapters", []):
        method = " on ".join(wrapper["class"] for wrapper in reversed(entry["nest"]))
        layers.update(dict.fromkeys(entry["layers"], method))
    return layers


def _summary(folder: Path) -> dict[str, Any]:
    """Return the figures of the adapter's run, or {} if there are none."""
    from adaptrank.reports.records import SUMMARY, check_fields, read_table

    file = run_file(folder, "summary.json")
    if file is None:
        return {}
    summary = read_table(file)
    check_fields(str(file), summary, SUMMARY)
    needed = {"trainable", "parameters", "steps", "before", "after"}
    return summary if needed <= summary.keys() else {}


def _allocators(folder: Path) -> list[str]:
    """Return the names of the allocators of the adapter's run."""
    file = run_file(folder, "ranks.jsonl")
    if file is None:
        return []
    with file.open(encoding="utf-8") as lines:
        first = lines.readline()
    try:
        names = json.loads(first).get("allocators", [])
    except (ValueError, AttributeError):
        return []
    return [str(name) for name in names]


def _say_what_is_unknown(
    publication: "Publication", own_card: str | None, options: argparse.Namespace
) -> None:
    """Warn of what other people will miss, and of paths of this machine in the user's own text."""
    from adaptrank.interop.hub import local_paths

    if publication.base is None:
        log.warning(
            "The base is a folder of this machine, which has no name on the Hub: others have to "
            "name theirs. Push again with --base user/name if it is there."
        )
    if own_card is None:
        if options.licence is None:
            log.warning(
                "The card names no licence, because none is known. Add one with --license, such as "
                "apache-2.0."
            )
        return
    if options.licence is not None or options.language:
        log.warning("README.md is yours: --license and --language are not written into it.")
    if paths := local_paths(own_card):
        log.warning("README.md is yours, and names paths of this machine: %s", ", ".join(paths[:3]))
