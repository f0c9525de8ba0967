"""Record of a run in its checkpoint, and comparison with the run that resumes from it."""

from adaptrank.artifacts import (
    check_form,
    follow_trainer_files,
    load_best_adapter,
    read_checkpoint,
    write_trainer_files,
)
from adaptrank.checkpoints.differences import WHAT_TO_TYPE, Difference, compare_settings, refuse
from adaptrank.checkpoints.engine_callback import EngineCallback
from adaptrank.checkpoints.nests import compare_nests, describe_nests
from adaptrank.checkpoints.other_runs import STEPS_OF_SCHEDULE, WORDED_BY_THE_ENGINE
from adaptrank.checkpoints.plain_values import constructor_arguments, constructor_defaults, plain
from adaptrank.checkpoints.record import RECORD, identify_base, make_record
from adaptrank.checkpoints.recorder import (
    RunRecorder,
    compare_model,
    ensure_recorder,
    model_differences,
    record_in,
)

__all__ = [
    "RECORD",
    "STEPS_OF_SCHEDULE",
    "WHAT_TO_TYPE",
    "WORDED_BY_THE_ENGINE",
    "Difference",
    "EngineCallback",
    "RunRecorder",
    "check_form",
    "compare_model",
    "compare_nests",
    "compare_settings",
    "constructor_arguments",
    "constructor_defaults",
    "describe_nests",
    "ensure_recorder",
    "follow_trainer_files",
    "identify_base",
    "load_best_adapter",
    "make_record",
    "model_differences",
    "plain",
    "read_checkpoint",
    "record_in",
    "refuse",
    "write_trainer_files",
]
