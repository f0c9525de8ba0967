"""Rows of added tokens, as PEFT's LoRA trains and stores them: `trainable_token_indices`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.injection import last_name, row_modules, trained_rows
from adaptrank.interop.peft.keys import PREFIX

SUFFIX = "token_adapter.trainable_tokens_delta"
"""Name that PEFT gives to trained rows, in the module that wraps an embedding."""


def without_rows(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters that were trained outside of wrappers, but for trained rows."""
    prefixes = tuple(f"{path}." for path in row_modules(model))
    return {name: value for name, value in trained.items() if not name.startswith(prefixes)}


def token_settings(model: nn.Module, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's settings and its tensors of trained rows. Both are empty without such rows.

    A head that is tied to the embedding is tied in PEFT by itself.

    Raises:
        UserError: if PEFT's method of this kind trains no rows.
    """
    indices: dict[str, list[int]] = {}
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, rows in trained_rows(model).items():
        if id(rows) in seen:
            continue
        seen.add(id(rows))
        if kind != "LORA":
            raise UserError(
                f"Rows of added tokens were trained, and PEFT has them beside LoRA alone, not "
                f"beside {kind}. Merge instead."
            )
        indices[last_name(path)] = rows.indices.tolist()
        tensors[f"{PREFIX}{path}.{SUFFIX}"] = rows.rows
    return ({"trainable_token_indices": indices} if indices else {}), tensors
