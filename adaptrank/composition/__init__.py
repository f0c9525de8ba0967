"""Adapters that add up: changes of a weight, operators on them, what they are like, and one adapter of several."""

from adaptrank.composition.changes import Change, Dense, Product
from adaptrank.composition.composing import Compression, compose
from adaptrank.composition.monitor import SpectralMonitor
from adaptrank.composition.operators import OPERATORS
from adaptrank.composition.spectral import diagnose

__all__ = [
    "OPERATORS",
    "Change",
    "Compression",
    "Dense",
    "Product",
    "SpectralMonitor",
    "compose",
    "diagnose",
]
