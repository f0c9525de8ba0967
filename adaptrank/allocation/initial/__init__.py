"""Rank initializers: one paper, one file. The folder is the registry."""
