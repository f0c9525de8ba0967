"""Scores of units: from gradients, by ablation, from curvature."""
