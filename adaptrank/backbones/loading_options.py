"""Keys of a configuration that say how a backbone is loaded, beside its name and its dtype."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adaptrank._errors import UserError, did_you_mean
from adaptrank.backbones.quantization import Quantization, read_quantization

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Attention implementations of transformers. Others are kernels of the Hub, `owner/name`."""

SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that spread a model over all devices."""

DEVICE = re.compile(r"(cpu|mps|(cuda|xpu|npu|hpu)(:\d+)?)")


@dataclass(frozen=True)
class LoadingOptions:
    """Arguments of `from_pretrained` that a configuration may set.

    Args:
        quantization: how linear layers are quantized while they are loaded.
        attention: attention implementation of transformers, or None for the model's default.
        device_map: where the layers go: a device, "auto" and its like, or {path: device}.
        trust_remote_code: whether Python code that comes with the model is run. Only a person may
            set it, and no file.
        added_tokens: tokens that the tokenizer gets in addition.
    """

    quantization: Quantization | None = None
    attention: str | None = None
    device_map: str | dict[str, Any] | None = None
    trust_remote_code: bool = False
    added_tokens: tuple[str, ...] = field(default=())

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained`, without that of the quantization."""
        arguments: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.attention is not None:
            arguments["attn_implementation"] = self.attention
        if self.device_map is not None:
            arguments["device_map"] = self.device_map
        return arguments

    @property
    def spreads(self) -> bool:
        """True if the device map may put layers on several devices."""
        if isinstance(self.device_map, Mapping):
            return len(set(self.device_map.values())) > 1
        return self.device_map in SPREADING


def read_options(
    quantize: str | Mapping[str, Any] | None = None,
    attn_implementation: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    added_tokens: list[str] | None = None,
) -> LoadingOptions:
    """Check the keys of a configuration, and return them as options.

    Raises:
        UserError: for a value that does not fit, before anything is loaded.
    """
    quantization = read_quantization(quantize)
    _check_attention(attn_implementation)
    _check_device_map(device_map)
    if not isinstance(trust_remote_code, bool):
        raise UserError(
            f"trust_remote_code={trust_remote_code!r} makes no sense. Give true or false."
        )
    tokens = tuple(added_tokens or ())
    for token in tokens:
        if not isinstance(token, str) or not token.strip() or tokens.count(token) > 1:
            raise UserError(
                f"added_tokens={list(tokens)!r} makes no sense. Give different texts that are not "
                f"empty, such as ['<tool>', '</tool>']."
            )
    return LoadingOptions(
        quantization,
        attn_implementation,
        dict(device_map) if isinstance(device_map, Mapping) else device_map,
        trust_remote_code,
        tokens,
    )


def _check_attention(name: str | None) -> None:
    if name is None or name in ATTENTION or "/" in name:
        return
    hint = did_you_mean(name, ATTENTION)
    raise UserError(
        f"attn_implementation={name!r} is unknown.{hint} Use one of {', '.join(ATTENTION)}, or the "
        f"name of a kernel on the Hub."
    )


def _check_device_map(device_map: str | Mapping[str, Any] | None) -> None:
    if device_map is None:
        return
    devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    for device in devices:
        is_index = isinstance(device, int) and not isinstance(device, bool) and device >= 0
        is_name = isinstance(device, str) and DEVICE.fullmatch(device) is not None
        is_spread = device in SPREADING and not isinstance(device_map, Mapping)
        if not (is_index or is_name or is_spread):
            raise UserError(
                f"device_map={device_map!r} makes no sense. Give a device such as cuda:0, one of "
                f"{', '.join(SPREADING)}, or a mapping from paths of modules to devices."
            )
