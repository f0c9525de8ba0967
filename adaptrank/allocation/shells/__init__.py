"""The callers of the engine: the Lightning callback and the transformers callback."""
