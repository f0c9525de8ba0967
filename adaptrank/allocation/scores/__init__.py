"""Scores of units: from gradients, by ablation, from curvature.

Importing this folder fills the registry of scores.
"""

from adaptrank.allocation.scores import ablation, curvature, explained_variance, gradient

__all__ = ["ablation", "curvature", "explained_variance", "gradient"]
