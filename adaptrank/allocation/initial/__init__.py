"""Rank initializers: one paper, one file, and the parts that they are made of.

The folder is the registry.
"""
