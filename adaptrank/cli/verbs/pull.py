"""`pull`: fetch an adapter from the Hugging Face Hub."""

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptrank.cli.options import FORCE

DESCRIPTION = """\
Fetch an adapter from the Hugging Face Hub, by its name. It goes into the Hub's cache. From then on
its name stands for it wherever an adapter's folder does, without a network too. Only safetensors
and JSON are read.

For a private or gated repository log in with `hf auth login`, or set HF_TOKEN. HF_ENDPOINT names
another Hub, and HF_HOME another cache."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    name = "the repository; user/name@revision takes a branch, a tag or a commit"
    parser.add_argument("name", metavar="USER/NAME", help=name)
    parser.add_argument("--revision", metavar="NAME", help="a branch, a tag or a commit (main)")
    parser.add_argument("--out", metavar="FOLDER", help="new folder for a copy of the files")
    parser.add_argument("--force", action="store_true", help=FORCE)


def run(options: argparse.Namespace) -> None:
    """Fetch the adapter, and print what it is and what to do with it."""
    from adaptrank._files import atomic_folder
    from adaptrank.artifacts import hub_name, read_adapter, shown_adapter
    from adaptrank.cli.out_folder import check_out
    from adaptrank.interop.hub import check_adapter, pull_adapter

    name = hub_name(options.name, options.revision)
    out = Path(options.out) if options.out else None
    if out is not None:
        check_out(out, options.force, {})
    snapshot = pull_adapter(name)
    library = check_adapter(snapshot)
    if out is not None:
        with atomic_folder(out) as folder:
            pull_adapter(name, folder, snapshot)
    place = snapshot if out is None else out
    print(f"Pulled {shown_adapter(snapshot)}: {place}")
    here = shlex.quote(str(name) if out is None else str(out))
    if library == "peft":
        print("  an adapter in PEFT's format")
        print(f"  import:   python -m adaptrank import {here} --out FOLDER")
        return
    description = read_adapter(snapshot)
    print(f"  {_facts(description)}")
    if description["base"].get("auto_class") == "AutoModelForCausalLM":
        print(f"  generate: python -m adaptrank generate {here} --prompt TEXT")
    print(f"  merge:    python -m adaptrank merge {here} --out FOLDER")
    print(f"  evaluate: python -m adaptrank test --config FILE --model.adapter {here}")


def _facts(description: Mapping[str, Any]) -> str:
    """Return a line that says what an adapter is."""
    nests = [
        " on ".join(wrapper["class"] for wrapper in reversed(entry["nest"]))
        for entry in description["adapters"]
    ]
    layers = sum(len(entry["layers"]) for entry in description["adapters"])
    base = description["base"].get("name") or "a base that it does not name (--base)"
    return f"{', '.join(dict.fromkeys(nests))} on {layers} layers of {base}"
