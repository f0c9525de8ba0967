"""Tensor functions with a plain twin in the tests.

Autograd functions: `low_rank` adds low-rank products, `kronecker_product` adds Kronecker products,
`scaling` scales inputs and outputs, `magnitude` gives the rows of a layer trained norms, and
`cross_entropy` is the loss of a frozen head without its logits. `products` and
`second_derivatives` hold what they share. `random_rows` computes frozen random numbers.
"""
