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
from adaptrank.artifacts.contents import describe_adapter
from adaptrank.artifacts.extraction import (
    TENSORS,
    extract_adapter,
    locate_tensors,
    read_checkpoint,
)
from adaptrank.artifacts.header import digest_of
from adaptrank.artifacts.merging import merge, rounding_error, unmerge
from adaptrank.artifacts.rounding import RoundingLoss

__all__ = [
    "CONFIG",
    "TENSORS",
    "WEIGHTS",
    "RoundingLoss",
    "describe_adapter",
    "digest_of",
    "extract_adapter",
    "frozen_weights",
    "load_adapter",
    "locate_tensors",
    "merge",
    "read_adapter",
    "read_checkpoint",
    "rounding_error",
    "save_adapter",
    "trained_modules",
    "unmerge",
    "write_files",
]
