"""Studies: many runs of `fit` that differ in a few things, and what they say together."""

from adaptrank.studies.design import (
    Point,
    Setting,
    reported_points,
    solve_budget,
    solve_settings,
    trial_points,
)
from adaptrank.studies.engines import on_ray, on_this_machine
from adaptrank.studies.replays import without_replays
from adaptrank.studies.runner import run_study
from adaptrank.studies.study_file import Study, read_study

__all__ = [
    "Point",
    "Setting",
    "Study",
    "on_ray",
    "on_this_machine",
    "read_study",
    "reported_points",
    "run_study",
    "solve_budget",
    "solve_settings",
    "trial_points",
    "without_replays",
]
