"""Put wrappers around the layers of a model, and take them away again."""

from adaptrank.injection.description import Description, by_layer, describe, parameter_table
from adaptrank.injection.fused import join_fused, split_at
from adaptrank.injection.inject import adapt, wrap_targets
from adaptrank.injection.makers import ParameterizationCallable, as_makers, method_of
from adaptrank.injection.match import find_modules
from adaptrank.injection.paths import last_name, lies_in
from adaptrank.injection.rank_pattern import apply_rank_pattern
from adaptrank.injection.switch import (
    MERGED,
    check_names,
    delete_adapter,
    disabled,
    is_merged,
    select_rows,
    set_enabled,
)
from adaptrank.injection.trained_rows import (
    TrainedRows,
    fold_rows,
    plain_tensor_name,
    row_modules,
    train_rows,
    trained_rows,
)
from adaptrank.injection.trained_whole import forget_trained, record_trained, trained_ids
from adaptrank.injection.transaction import undone_on_error

__all__ = [
    "MERGED",
    "Description",
    "ParameterizationCallable",
    "TrainedRows",
    "adapt",
    "apply_rank_pattern",
    "as_makers",
    "by_layer",
    "check_names",
    "delete_adapter",
    "describe",
    "disabled",
    "find_modules",
    "fold_rows",
    "forget_trained",
    "is_merged",
    "join_fused",
    "last_name",
    "lies_in",
    "method_of",
    "parameter_table",
    "plain_tensor_name",
    "record_trained",
    "row_modules",
    "select_rows",
    "set_enabled",
    "split_at",
    "train_rows",
    "trained_ids",
    "trained_rows",
    "undone_on_error",
    "wrap_targets",
]
