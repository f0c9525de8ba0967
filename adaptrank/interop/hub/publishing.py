"""The files of an adapter as the Hub gets them: tensors and descriptions, without local paths."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adaptrank._errors import UserError
from adaptrank.artifacts import (
    CONFIG,
    WEIGHTS,
    check_digest,
    find_weights,
    is_repository,
    open_weights,
    read_adapter,
    write_described,
)
from adaptrank.interop.peft import TASKS, read_config

PATH = re.compile(r"(?<![\w/.:@-])(?:~|[A-Za-z]:[\\/]|/)[\w.@+~/\\-]*[\w@+~-]")
"""A text that looks like an absolute path."""


@dataclass(frozen=True)
class Publication:
    """An adapter that is ready to be pushed.

    Args:
        folder: folder with the files as the Hub gets them, and no others.
        library: whose format it is, "adaptrank" or "peft".
        base: name of the base model on the Hub, or None if it has none.
        auto_class: class of transformers that loads the base, or None if it is not known.
        methods: names of the methods of each different nest, outermost first.
        description: of an adapter of this library, as its file holds it. Empty for one of PEFT.
    """

    folder: Path
    library: Literal["adaptrank", "peft"]
    base: str | None
    auto_class: str | None
    methods: tuple[tuple[str, ...], ...]
    description: Mapping[str, Any]


def prepare(folder: Path, target: Path, base: str | None = None) -> Publication:
    """Write the files of an adapter into an empty folder, without the paths of this machine.

    The description of an adapter may say where its base lay. That is left out. A base that is a
    folder of this machine has no name on the Hub, and is not named. All tensors stay as they are.

    Args:
        folder: an adapter of this library, or one in PEFT's format.
        target: the empty folder.
        base: name of the base on the Hub. None takes that in the adapter's file.
    Raises:
        FileNotFoundError: if there is no adapter in the folder.
        UserError: if the adapter is damaged, or the base has no such name.
    """
    if base is not None and not is_repository(base):
        raise UserError(f"--base {base!r} is no name on the Hub. Write it as user/name.")
    if is_of_peft(find_weights(folder).parent / CONFIG):
        return _prepare_peft(folder, target, base)
    return _prepare_own(folder, target, base)


def is_of_peft(config: Path) -> bool:
    """Return whether the configuration of an adapter is one of PEFT."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("peft_type") is not None


def _prepare_own(folder: Path, target: Path, base: str | None) -> Publication:
    description = read_adapter(folder)
    with open_weights(find_weights(folder)) as stored:
        stored.check()
        check_digest(stored, description)
        tensors = dict(stored)
    described = description["base"]
    name = base or published_name(described.get("name"), described.get("source"))
    facts = {key: value for key, value in described.items() if key not in ("name", "source")}
    if name is not None:
        facts["name"] = name
    wheel = re.search(r": wheel ([\w.-]+ [\w.]+)", str(described.get("source")))
    if wheel and name is not None:
        facts["source"] = f"{name}: wheel {wheel[1]}"
    description = {**description, "base": facts}
    write_described(target, description, tensors)
    return Publication(
        target, "adaptrank", name, facts.get("auto_class"), _methods(description), description
    )


def _prepare_peft(folder: Path, target: Path, base: str | None) -> Publication:
    config = read_config(folder)
    name = base or published_name(config.get("base_model_name_or_path"), None)
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(find_weights(folder), target / WEIGHTS)
    published = {**config, "base_model_name_or_path": name}
    (target / CONFIG).write_text(json.dumps(published, indent=2) + "\n", encoding="utf-8")
    auto_classes = {task: auto_class for auto_class, task in TASKS.items()}
    auto_class = auto_classes.get(str(config.get("task_type")))
    kind = str(config["peft_type"])
    return Publication(target, "peft", name, auto_class, ((_peft_method(kind, config),),), {})


def _peft_method(kind: str, config: Mapping[str, Any]) -> str:
    if kind == "LORA":
        return "DoRA" if config.get("use_dora") else "LoRA"
    return {"ADALORA": "AdaLoRA", "LOKR": "LoKr"}.get(kind, kind)


def _methods(description: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Return the classes of each different nest, outermost first."""
    nests: dict[tuple[str, ...], None] = {}
    for entry in description["adapters"]:
        nests[tuple(wrapper["class"] for wrapper in reversed(entry["nest"]))] = None
    return tuple(nests)


def published_name(name: str | None, source: str | None) -> str | None:
    """Return the name that other people know a base by, or None if it is a folder of a machine.

    Args:
        name: the base as a run named it.
        source: where the run found it, see `backbones.Source.describe`.
    """
    if not name or not is_repository(name):
        return None
    was_folder = source is not None and ": local folder (" in source
    return None if was_folder or Path(name).expanduser().exists() else name


def local_paths(text: str) -> list[str]:
    """Return the absolute paths in a text that exist on this machine, below its top folders."""
    found: dict[str, None] = {}
    for match in PATH.finditer(text):
        path = Path(match[0]).expanduser()
        if len(path.parts) > 2 and os.path.lexists(path):
            found[match[0]] = None
    return list(found)
