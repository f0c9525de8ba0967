"""The configuration of a PEFT adapter, checked before anything is built from it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptrank._errors import UserError
from adaptrank.artifacts import (
    CONFIG,
    PICKLED,
    WEIGHTS,
    JsonError,
    parse_json,
    refuse_foreign_link,
)
from adaptrank.interop.peft.allow_list import check_settings
from adaptrank.interop.peft.conversions import READERS
from adaptrank.interop.peft.keys import ALPHA_KEYS
from adaptrank.interop.peft.patterns import is_quick_pattern

LONGEST_CONFIG = 1 << 24
"""Largest number of bytes of a configuration that is read."""

LARGEST = 1 << 20
"""Bound on ranks and factors. A larger number is damage."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a PEFT adapter, whose weights have to be there too.

    Raises:
        FileNotFoundError: if a file is missing.
        UserError: if the configuration is damaged, or we cannot read this type of adapter.
    """
    _check_files(folder)
    file = folder / CONFIG
    try:
        text = file.read_bytes()[:LONGEST_CONFIG].decode("utf-8")
        config: Any = parse_json(text)
    except (UnicodeDecodeError, JsonError) as error:
        raise UserError(f"{file} is damaged: {error}.") from None
    if not isinstance(config, dict) or config.get("peft_type") is None:
        raise UserError(f"{folder} is no adapter of PEFT: its {CONFIG} names no peft_type.")
    _check_supported(config, folder)
    _check_values(config, file)
    return config


def _check_files(folder: Path) -> None:
    for file in (folder / CONFIG, folder / WEIGHTS):
        refuse_foreign_link(file)
        if not file.is_file():
            pickled = ""
            if (folder / PICKLED).is_file():
                pickled = f" {PICKLED} is a pickle, which is never loaded."
            raise FileNotFoundError(
                f"No PEFT adapter at {str(folder)!r}: it has no {file.name}.{pickled}"
            )


def _check_supported(config: Mapping[str, Any], folder: Path) -> None:
    kind = config["peft_type"]
    if not isinstance(kind, str) or kind not in READERS:
        raise UserError(
            f"{folder} is of PEFT's kind {kind}, which is not imported. LORA (with DoRA), ADALORA "
            "and LOKR are."
        )
    check_settings(config, folder)


def _check_values(config: Mapping[str, Any], file: Path) -> None:
    """Check type and range of every setting that is read."""
    kind = config["peft_type"]
    alpha_key = ALPHA_KEYS[kind]
    base = config.get("base_model_name_or_path")
    fits = {
        "r": kind == "ADALORA" or _is_rank(config.get("r")),
        alpha_key: config.get(alpha_key) is None or _is_number(config[alpha_key]),
    }
    for name in ("use_rslora", "use_dora", "decompose_both"):
        fits[name] = config.get(name) in (None, True, False)
    fits["decompose_factor"] = _is_factor(config.get("decompose_factor"))
    for name in ("rank_pattern", "alpha_pattern"):
        fits[name] = _is_pattern(config.get(name), lists=kind == "ADALORA")
    fits["base_model_name_or_path"] = base is None or isinstance(base, str)
    for name, fitting in fits.items():
        if not fitting:
            raise UserError(
                f"{file} has {name}={config.get(name)!r}, which is not what PEFT writes."
            )


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_factor(value: Any) -> bool:
    return value is None or (isinstance(value, int) and -1 <= value < LARGEST)


def _is_pattern(value: Any, lists: bool) -> bool:
    """Return whether a value maps regular expressions to numbers.

    Args:
        value: value of the setting.
        lists: whether lists are allowed beside numbers, as AdaLoRA writes them.
    """
    if value is None:
        return True
    if not isinstance(value, dict):
        return False
    for key, entry in value.items():
        if not (_is_number(entry) or (lists and isinstance(entry, list))):
            return False
        if not is_quick_pattern(key):
            return False
    return True
