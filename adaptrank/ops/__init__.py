"""Tensor functions with a plain twin in the tests.

`low_rank` adds low-rank products, `scaling` scales inputs and outputs, and `cross_entropy` is the
loss of a frozen head without its logits: autograd functions. `random_rows` computes frozen random
numbers.
"""
