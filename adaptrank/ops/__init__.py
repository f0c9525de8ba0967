"""Autograd functions with a plain twin in the tests: low-rank products, scaling, cross entropy."""
