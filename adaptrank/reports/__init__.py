"""Figures, pages and tables for people.

Each report is made in three steps. Data is read or computed without a picture (`history`,
`comparison`, `layer_grid`). Pictures are drawn (`figures`). A page or a card is filled in from a
template (`ranks`, `study`, `card`, `inline`).
"""

from adaptrank.reports.inline import RunReport, report

__all__ = ["RunReport", "report"]
