"""A small vision transformer that knows half of scikit-learn's digits, trained on this machine.

It is a backbone without a download: an adapter then learns the other digits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptrank._errors import UserError
from adaptrank.backbones.made_once import make_once
from adaptrank.backbones.silence import silenced

if TYPE_CHECKING:
    from torch import Tensor

NAME = "adaptrank/vit-digits"
"""Name of the model, as a backbone."""

KNOWN_DIGITS = (0, 1, 2, 3, 4)
"""Digits that it was trained on."""

SIZE = 8
"""Height and width of an image, in pixels."""

EPOCHS, BATCH_SIZE, LEARNING_RATE = 10, 32, 1e-3

PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": SIZE, "width": SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
"""Contents of its image processor's file."""


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's 1,797 images of handwritten digits, and the digit of each.

    Returns:
        Images (1797, 8, 8) as uint8, and digits (1797,).

    Raises:
        UserError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "The images of digits come with scikit-learn. Install it with "
            "`pip install 'adaptrank[vision]'`."
        ) from error
    digits: Any = load_digits()
    # Pixels are whole numbers from 0 to 16.
    images = (digits.images * 255 / 16).round().astype(np.uint8)
    return images, digits.target


def make_digits_vit(folder: Path) -> None:
    """Train the model, unless the folder has it already.

    Raises:
        UserError: if scikit-learn is not installed.
        OSError: if the folder cannot be written.
    """
    images, labels = digit_images()
    make_once(
        folder,
        lambda into: _write(into, images, labels),
        f"Training {NAME} on the digits 0 to 4 into {folder}, once. This takes some seconds.",
        f"{NAME} could not be made in {folder}",
    )


def _write(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    import torch
    from transformers.utils import IMAGE_PROCESSOR_NAME

    known = np.isin(labels, KNOWN_DIGITS)
    # A first run must draw the same random numbers as the runs after it.
    with silenced(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _trained(as_pixels(images[known]), torch.tensor(labels[known]))
        model.vit.save_pretrained(folder)
    (folder / IMAGE_PROCESSOR_NAME).write_text(json.dumps(PROCESSOR, indent=2))


def as_pixels(images: np.ndarray) -> Tensor:
    """Return images (N, 8, 8) as the model reads them, (N, 3, 8, 8)."""
    import torch

    values = torch.tensor(images, dtype=torch.float32) / 255
    return ((values - 0.5) / 0.5)[:, None].expand(-1, 3, -1, -1)


def _trained(pixels: Tensor, labels: Tensor) -> Any:
    """Return a classifier of these images."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    make_config: Any = ViTConfig
    config = make_config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=2,
        num_labels=len(KNOWN_DIGITS),
    )
    model: Any = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    for _ in range(EPOCHS):
        for batch in torch.split(torch.randperm(len(labels)), BATCH_SIZE):
            loss = model(pixel_values=pixels[batch], labels=labels[batch]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()
