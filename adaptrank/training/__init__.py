"""Training around the model: penalties, several processes, and an allocator in a Trainer."""

from adaptrank.training.compiled_blocks import compile_blocks

__all__ = ["compile_blocks"]
