"""Studies: many runs of `fit` that differ in a few things, and what they say together."""

from adaptrank.studies.design import Point, Study, read_study
from adaptrank.studies.runner import run_study

__all__ = ["Point", "Study", "read_study", "run_study"]
