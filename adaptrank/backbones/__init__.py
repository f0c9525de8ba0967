"""Pretrained models by name: a folder, the caches, an installed wheel, the Hub."""

from adaptrank.backbones.by_name import load_backbone
from adaptrank.backbones.digits_vit import digit_images
from adaptrank.backbones.dtype import auto_dtype
from adaptrank.backbones.fingerprints import fingerprint
from adaptrank.backbones.kept_layers import layers_to_keep
from adaptrank.backbones.load import (
    NO_PILLOW,
    check_unquantized,
    load_config,
    load_image_processor,
    load_model,
    load_tokenizer,
    model_on_meta,
)
from adaptrank.backbones.loading_options import LoadingOptions, read_options
from adaptrank.backbones.lookup import Source, is_hub_id, resolve
from adaptrank.backbones.positions import longest_prompt, position_limit
from adaptrank.backbones.quantization import (
    KINDS,
    Quantization,
    check_quantization,
    read_quantization,
)
from adaptrank.backbones.vocabulary import (
    add_embedding_rows,
    before_end,
    chat_template_of,
    embedding_paths,
    embedding_rows,
)
from adaptrank.backbones.wheels import WHEELS, Wheel

__all__ = [
    "KINDS",
    "NO_PILLOW",
    "WHEELS",
    "LoadingOptions",
    "Quantization",
    "Source",
    "Wheel",
    "add_embedding_rows",
    "auto_dtype",
    "before_end",
    "chat_template_of",
    "check_quantization",
    "check_unquantized",
    "digit_images",
    "embedding_paths",
    "embedding_rows",
    "fingerprint",
    "is_hub_id",
    "layers_to_keep",
    "load_backbone",
    "load_config",
    "load_image_processor",
    "load_model",
    "load_tokenizer",
    "longest_prompt",
    "model_on_meta",
    "position_limit",
    "read_options",
    "read_quantization",
    "resolve",
]
