"""Parts of gpu.py: models, measures, and one file for each kind of measurement."""
