"""The key `generation` of a module that writes texts: settings of transformers, checked early."""

from collections.abc import Mapping
from typing import Any

from adaptrank._errors import UserError, did_you_mean
from adaptrank._options import COUNT, check_number
from adaptrank.artifacts import GENERATION_KEYS, LARGEST_SETTING

OWN_KEYS = {
    "max_new_tokens": "Set model.max_new_tokens instead",
    "max_length": "Set model.max_new_tokens instead",
    "num_return_sequences": "Each source has one prediction",
    "return_dict_in_generate": "Texts are written, and nothing else",
    "use_cache": "The cache is always used",
    "pad_token_id": "It is the tokenizer's",
    "eos_token_id": "It is the model's, and that of the data",
    "decoder_start_token_id": "It is the model's",
}
"""Settings that stand elsewhere -> where."""


def read_generation(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return settings of generation, such as {num_beams: 4, length_penalty: 0.6}.

    Raises:
        UserError: for a setting that transformers does not have, or a value that does not fit.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise UserError(
            f"generation={given!r} is no mapping. Write settings of transformers' GenerationConfig,"
            " such as {num_beams: 4}."
        )
    import transformers

    config_class: Any = transformers.GenerationConfig
    known = [name for name in vars(config_class()) if not name.startswith("_")]
    for name in given:
        if name in OWN_KEYS:
            raise UserError(f"generation: {name} has no place here. {OWN_KEYS[name]}.")
        if name not in known:
            raise UserError(
                f"generation: transformers' GenerationConfig has no {name!r}."
                f"{did_you_mean(str(name), known)}"
            )
    check_number("generation: num_beams", given.get("num_beams", 1), COUNT, whole=True)
    for name in GENERATION_KEYS:
        value = given.get(name)
        if isinstance(value, int | float) and not abs(value) <= LARGEST_SETTING:
            raise UserError(
                f"generation: {name}={value} is too large. Use a number up to {LARGEST_SETTING:,}."
            )
    try:
        config_class(**given).validate(strict=True)
    except (TypeError, ValueError) as error:
        lines = [line.strip("- ") for line in str(error).strip().splitlines() if line.strip()]
        reason = lines[1] if len(lines) > 1 else lines[0]
        raise UserError(f"generation={dict(given)}: {reason}") from None
    return dict(given)
