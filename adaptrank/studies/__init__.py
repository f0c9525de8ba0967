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
from adaptrank.studies.key_paths import Place, find_place, set_place, spell_place, value_at
from adaptrank.studies.overlays import Config, map_texts, merge
from adaptrank.studies.references import check_replays, without_replays
from adaptrank.studies.runner import run_study
from adaptrank.studies.study_file import SEED, Study, make_study, read_study

__all__ = [
    "SEED",
    "Config",
    "Place",
    "Point",
    "Setting",
    "Study",
    "check_replays",
    "find_place",
    "make_study",
    "map_texts",
    "merge",
    "on_ray",
    "on_this_machine",
    "read_study",
    "reported_points",
    "run_study",
    "set_place",
    "solve_budget",
    "solve_settings",
    "spell_place",
    "trial_points",
    "value_at",
    "without_replays",
]
