"""A hash of examples, by which a resumed run knows its data again."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

MOST_EXAMPLES = 256
"""Examples that are hashed, spread over all of them."""


def content_hash(examples: Sequence[Mapping[str, Any]]) -> str:
    """Return a short hash of tokenized examples: 16 hexadecimal characters.

    It reads at most 256 examples. It identifies a data set, whatever its files are called.
    """
    digest = hashlib.blake2b(f"{len(examples)}".encode(), digest_size=8)
    stride = max(1, -(-len(examples) // MOST_EXAMPLES))
    for index in range(0, len(examples), stride):
        for name, value in sorted(examples[index].items()):
            plain = value.tolist() if isinstance(value, Tensor) else value
            digest.update(f"{name}={plain!r};".encode())
    return digest.hexdigest()
