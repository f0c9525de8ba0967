"""Names in the files of HF PEFT: keys of tensors, patterns that match paths, and tasks."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adaptrank._errors import UserError

PREFIX = "base_model.model."
"""Beginning of every tensor key in a PEFT file."""

TASKS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
}
"""Auto class of transformers -> PEFT's name of the task."""

ALPHA_KEYS = {"LORA": "lora_alpha", "ADALORA": "lora_alpha", "LOKR": "alpha"}
"""PEFT's type of adapter -> the setting that holds the numerator of the scale."""

_LORA_TENSORS = "lora_[AB]|lora_embedding_[AB]|lora_E|ranknum|lora_magnitude_vector"
_LOKR_TENSORS = "lokr_w1|lokr_w2|lokr_w[12]_[ab]"
_LAYER_KEY = re.compile(rf"^(?P<path>.+)\.(?P<name>{_LORA_TENSORS}|{_LOKR_TENSORS})(\.weight)?$")


def split_key(key: str, folder: Path) -> tuple[str, str | None]:
    """Split a tensor key of PEFT.

    Args:
        key: key of a tensor in a PEFT file.
        folder: folder of the file, which an error names.

    Returns:
        (path of the layer, name of the tensor), or (name of the parameter, None) where the tensor
        belongs to a module that was trained whole.

    Raises:
        UserError: if the key does not begin as PEFT's keys do.
    """
    if not key.startswith(PREFIX):
        raise UserError(f"{folder} holds {key!r}, and PEFT's keys begin with {PREFIX!r}.")
    name = key.removeprefix(PREFIX)
    match = _LAYER_KEY.match(name)
    if match is None:
        # An adapted embedding may be stored beside its adapter.
        return name.replace(".base_layer.", "."), None
    return match["path"], match["name"]


def stored_tensor(path: str, name: str, value: Tensor, layer: nn.Module) -> tuple[str, Tensor]:
    """Return the key and the shape that PEFT gives to a tensor of a layer.

    The factors of an embedding have names of their own. Those of a convolution have the shape of
    kernels, and its magnitudes that of channels.

    Args:
        path: path of the layer in the base model.
        name: name of the tensor, such as "lora_A".
        value: tensor in our shape, a matrix for a factor.
        layer: the frozen layer.
    """
    key = f"{PREFIX}{path}.{name}"
    if name == "lora_magnitude_vector" and isinstance(layer, nn.Conv2d):
        return key, value.reshape(1, -1, 1, 1)
    if name not in ("lora_A", "lora_B"):
        return key, value
    if isinstance(layer, nn.Embedding):
        return f"{PREFIX}{path}.{name.replace('lora_', 'lora_embedding_')}", value
    if isinstance(layer, nn.Conv2d):
        shape = (len(value), -1, *layer.kernel_size) if name == "lora_A" else (*value.shape, 1, 1)
        value = value.reshape(shape)
    return f"{key}.weight", value


def exact_pattern(path: str) -> str:
    """Return a pattern that matches only this path.

    PEFT matches a pattern as a regular expression at the end of a path, from its beginning or after
    a dot.
    """
    return f"^{re.escape(path)}"


def pattern_value(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Return the value of the first pattern that matches a path, or the default, as PEFT does."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default
