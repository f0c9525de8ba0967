"""A frozen layer seen as a matrix W (m, n).

The layer may be a linear layer, a Conv1D, an embedding or a convolution. It may be quantized, or be
a part of a fused projection.
"""

from adaptrank.layers.attention import (
    FUSED_QUERIES,
    QUERIES,
    Attention,
    attending,
    attends,
    routed,
)
from adaptrank.layers.fused import Parts
from adaptrank.layers.matrix import (
    LINEAR,
    MATRICES,
    channels_first,
    channels_last,
    dense,
    device,
    example_input,
    is_read,
    project,
    shape,
    stored,
    write,
)
from adaptrank.layers.quantized import (
    count_numbers,
    dequantize,
    dtype,
    quantization,
    quantized,
    readable,
)
from adaptrank.layers.support import unsupported

__all__ = [
    "FUSED_QUERIES",
    "LINEAR",
    "MATRICES",
    "QUERIES",
    "Attention",
    "Parts",
    "attending",
    "attends",
    "channels_first",
    "channels_last",
    "count_numbers",
    "dense",
    "dequantize",
    "device",
    "dtype",
    "example_input",
    "is_read",
    "project",
    "quantization",
    "quantized",
    "readable",
    "routed",
    "shape",
    "stored",
    "unsupported",
    "write",
]
