"""Adapters that add up: changes of a weight, operators on them, their spectra, and one adapter."""

from adaptrank.composition.changes import (
    Change,
    Dense,
    Product,
    change_of,
    rank_for,
    truncated,
)
from adaptrank.composition.composed_report import layer_lines, report_json
from adaptrank.composition.composing import compose
from adaptrank.composition.compression import Compression
from adaptrank.composition.monitor import SpectralMonitor, kind_of, spectra
from adaptrank.composition.operators import OPERATORS
from adaptrank.composition.similarity import Similarity, pair_lines
from adaptrank.composition.spectral import diagnose, mean_by_kind, spectral_lines

__all__ = [
    "OPERATORS",
    "Change",
    "Compression",
    "Dense",
    "Product",
    "Similarity",
    "SpectralMonitor",
    "change_of",
    "compose",
    "diagnose",
    "kind_of",
    "layer_lines",
    "mean_by_kind",
    "pair_lines",
    "rank_for",
    "report_json",
    "spectra",
    "spectral_lines",
    "truncated",
]
