"""Files of a run: adapters, merged models, summaries."""

from adaptrank.artifacts.adapter import (
    CONFIG,
    WEIGHTS,
    load_adapter,
    read_adapter,
    save_adapter,
    write_files,
)
from adaptrank.artifacts.base_weights import frozen_weights, trained_modules
from adaptrank.artifacts.checkpoint_reading import check_form, explain_damage, read_checkpoint
from adaptrank.artifacts.contents import describe_adapter, describe_nests
from adaptrank.artifacts.conventions import (
    GENERATION_KEYS,
    LARGEST_SETTING,
    conventions_of,
    finish_configuration,
    prompt_conventions,
    record_conventions,
    stop_ids_of,
    use_chat_template,
)
from adaptrank.artifacts.extraction import (
    TENSORS,
    extract_adapter,
    locate_tensors,
)
from adaptrank.artifacts.header import digest_of
from adaptrank.artifacts.merging import merge, rounding_error, unmerge
from adaptrank.artifacts.rollback import Rollback, unchanged_on_error
from adaptrank.artifacts.rounding import RoundingLoss
from adaptrank.artifacts.strict_json import JsonError, parse_json
from adaptrank.artifacts.trainer_files import (
    follow_trainer_files,
    load_best_adapter,
    write_trainer_files,
)
from adaptrank.artifacts.weights_file import StoredTensors, open_weights

__all__ = [
    "CONFIG",
    "GENERATION_KEYS",
    "LARGEST_SETTING",
    "TENSORS",
    "WEIGHTS",
    "JsonError",
    "Rollback",
    "RoundingLoss",
    "StoredTensors",
    "check_form",
    "conventions_of",
    "describe_adapter",
    "describe_nests",
    "digest_of",
    "explain_damage",
    "extract_adapter",
    "finish_configuration",
    "follow_trainer_files",
    "frozen_weights",
    "load_adapter",
    "load_best_adapter",
    "locate_tensors",
    "merge",
    "open_weights",
    "parse_json",
    "prompt_conventions",
    "read_adapter",
    "read_checkpoint",
    "record_conventions",
    "rounding_error",
    "save_adapter",
    "stop_ids_of",
    "trained_modules",
    "unchanged_on_error",
    "unmerge",
    "use_chat_template",
    "write_files",
    "write_trainer_files",
]
