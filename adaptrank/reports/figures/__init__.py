"""All pictures of the library, drawn with matplotlib."""

from adaptrank.reports.figures.layer_maps import LayerMap, Scale, draw_composition, heat_maps
from adaptrank.reports.figures.run_figures import draw_run
from adaptrank.reports.figures.study_figures import draw_study
from adaptrank.reports.figures.task_figures import draw_tasks

__all__ = [
    "LayerMap",
    "Scale",
    "draw_composition",
    "draw_run",
    "draw_study",
    "draw_tasks",
    "heat_maps",
]
