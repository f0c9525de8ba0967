"""Put wrappers around the layers of a model, and take them away again."""

from adaptrank.injection.inject import (
    ParameterizationCallable,
    adapt,
    apply_rank_pattern,
    delete_adapter,
    describe,
    disabled,
    find_modules,
    join_fused,
    select_rows,
    set_enabled,
    split_at,
    undone_on_error,
)

__all__ = [
    "ParameterizationCallable",
    "adapt",
    "apply_rank_pattern",
    "delete_adapter",
    "describe",
    "disabled",
    "find_modules",
    "join_fused",
    "select_rows",
    "set_enabled",
    "split_at",
    "undone_on_error",
]
