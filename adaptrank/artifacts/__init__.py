"""Files of a run: adapters, merged models, summaries."""

from adaptrank.artifacts.adapter import (
    CONFIG,
    WEIGHTS,
    load_adapter,
    load_together,
    read_adapter,
    save_adapter,
    write_described,
    write_files,
)
from adaptrank.artifacts.adapter_checks import check_digest
from adaptrank.artifacts.base_weights import frozen_weights, quantization_of, trained_modules
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
from adaptrank.artifacts.file_names import PICKLED
from adaptrank.artifacts.header import digest_of
from adaptrank.artifacts.hub_cache import (
    HUB_FILES,
    cached_adapter,
    download_adapter,
    is_adapter_on_hub,
    locate_adapter,
    refuse_foreign_link,
    shown_adapter,
)
from adaptrank.artifacts.hub_errors import asking_hub, hub_is_offline
from adaptrank.artifacts.hub_names import HubName, hub_name, is_repository, parse_hub_name
from adaptrank.artifacts.merging import merge, rounding_error, unmerge
from adaptrank.artifacts.rollback import Rollback, unchanged_on_error
from adaptrank.artifacts.rounding import RoundingLoss
from adaptrank.artifacts.strict_json import JsonError, parse_json
from adaptrank.artifacts.trained_module_checks import check_other_adapters, untied
from adaptrank.artifacts.trainer_files import (
    follow_trainer_files,
    load_best_adapter,
    write_trainer_files,
)
from adaptrank.artifacts.weights_file import StoredTensors, find_weights, open_weights

__all__ = [
    "CONFIG",
    "GENERATION_KEYS",
    "HUB_FILES",
    "LARGEST_SETTING",
    "PICKLED",
    "TENSORS",
    "WEIGHTS",
    "HubName",
    "JsonError",
    "Rollback",
    "RoundingLoss",
    "StoredTensors",
    "asking_hub",
    "cached_adapter",
    "check_digest",
    "check_form",
    "check_other_adapters",
    "conventions_of",
    "describe_adapter",
    "describe_nests",
    "digest_of",
    "download_adapter",
    "explain_damage",
    "extract_adapter",
    "find_weights",
    "finish_configuration",
    "follow_trainer_files",
    "frozen_weights",
    "hub_is_offline",
    "hub_name",
    "is_adapter_on_hub",
    "is_repository",
    "load_adapter",
    "load_best_adapter",
    "load_together",
    "locate_adapter",
    "locate_tensors",
    "merge",
    "open_weights",
    "parse_hub_name",
    "parse_json",
    "prompt_conventions",
    "quantization_of",
    "read_adapter",
    "read_checkpoint",
    "record_conventions",
    "refuse_foreign_link",
    "rounding_error",
    "save_adapter",
    "shown_adapter",
    "stop_ids_of",
    "trained_modules",
    "unchanged_on_error",
    "unmerge",
    "untied",
    "use_chat_template",
    "write_described",
    "write_files",
    "write_trainer_files",
]
