"""The settings of a PEFT adapter, and what becomes of each: an allow-list.

A setting is read, or it has no effect on what a trained adapter computes, or it must have the value
that turns it off. An adapter that uses anything else is refused by the setting's name.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from adaptrank._errors import UserError

_ABOUT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "peft_type",
        "peft_version",
        "revision",
        "target_modules",
        "task_type",
    }
)
"""Settings of every type that name the base or chose layers. The tensors say which layers."""

_LORA = frozenset(
    {
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "qalora_group_size",
        "rank_pattern",
        "runtime_config",
        "use_rslora",
    }
)

UNDERSTOOD: Mapping[str, frozenset[str]] = {
    "LORA": _ABOUT | _LORA | {"alpha_pattern", "init_lora_weights", "r", "use_dora"},
    # AdaLoRA ignores an initialization, a pattern of alpha and the scale of rsLoRA.
    "ADALORA": _ABOUT
    | _LORA
    | {
        "alpha_pattern",
        "beta1",
        "beta2",
        "deltaT",
        "init_lora_weights",
        "init_r",
        "orth_reg_weight",
        "r",
        "target_r",
        "tfinal",
        "tinit",
        "total_step",
    },
    "LOKR": _ABOUT
    | {
        "alpha",
        "alpha_pattern",
        "decompose_both",
        "decompose_factor",
        "init_weights",
        "module_dropout",
        "modules_to_save",
        "r",
        "rank_dropout",
        "rank_dropout_scale",
        "rank_pattern",
        "use_effective_conv2d",
    },
}
"""PEFT's type of adapter -> the settings that are read, or that act in training only."""

_VARIANTS: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "bias": "none",
    "kasa_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "megatron_config": None,
    "monteclora_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}

OFF: Mapping[str, Mapping[str, Any]] = {
    "LORA": _VARIANTS,
    "ADALORA": {**_VARIANTS, "use_dora": False},
    "LOKR": {},
}
"""PEFT's type of adapter -> {setting that none of our classes has: the value that turns it off}."""


def check_settings(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse an adapter that uses a setting which we do not understand.

    Raises:
        UserError: names the setting.
    """
    kind = config["peft_type"]
    for name, value in config.items():
        if name in UNDERSTOOD[kind]:
            continue
        if name in OFF[kind]:
            if not (_is_off(value) or value == OFF[kind][name]):
                raise UserError(
                    f"{folder} was trained with {name}={_shown(value)}, which none of our classes "
                    "has. Merge it in PEFT, and use the merged model."
                )
        elif not (_is_off(value) or _is_default_of_peft(kind, name, value)):
            raise UserError(
                f"{folder} was trained with {name}={_shown(value)}, a setting that is unknown "
                "here, so that the adapter may compute something else. Merge it in PEFT, and use "
                "the merged model."
            )


def _is_off(value: Any) -> bool:
    """Return whether a value turns any setting off."""
    return value is None or value is False or value in ([], {}, "")


def _is_default_of_peft(kind: str, name: str, value: Any) -> bool:
    """Return whether the installed PEFT, if any, has this value as the setting's default."""
    try:
        import peft
    except ImportError:
        return False
    config_class = cast(Any, peft).PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    fields = dataclasses.fields(config_class) if config_class is not None else ()
    for field in fields:
        if field.name != name:
            continue
        if field.default_factory is not dataclasses.MISSING:
            return bool(field.default_factory() == value)
        return bool(field.default == value)
    return False


def _shown(value: Any) -> str:
    """Return a value for an error, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
