"""Fine-tune a vision model with a fresh head on labelled images."""

from functools import cached_property
from typing import Any

from torch import Tensor, nn

from adaptrank import backbones
from adaptrank._errors import UserError
from adaptrank.modules.batch_keys import entries
from adaptrank.modules.classification_module import ClassificationModule

STATISTICS = (nn.modules.batchnorm._BatchNorm,)
"""Layers that keep statistics of the activations while they train."""


class ImageClassification(ClassificationModule):
    """A classifier over images, by any model that transformers loads for this task.

    Such as ViT, Swin, ConvNeXt and ResNet. The head is new and trains with the adapters. The
    running statistics of batch norms stay those of the backbone. `targets: all-linear` adapts
    linear layers, and `targets: all` convolutions as well.
    """

    auto_class = "AutoModelForImageClassification"

    @cached_property
    def image_processor(self) -> Any:
        """Image processor of the backbone. Data modules take it from here."""
        return backbones.load_image_processor(self.source)

    @cached_property
    def tokenizer(self) -> Any:
        """A vision model has none.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{self.backbone_name} reads images, and no text. Use ImageData, or a data module of "
            "your own with `pixel_values`."
        )

    def configure_model(self) -> None:
        super().configure_model()
        _hold_statistics(self)

    def train(self, mode: bool = True) -> "ImageClassification":
        super().train(mode)
        _hold_statistics(self)
        return self

    def run_model(self, batch: dict[str, Tensor]) -> Any:
        batch = entries(batch)
        pixels = batch.get("pixel_values")
        if isinstance(pixels, Tensor) and pixels.is_floating_point():
            batch["pixel_values"] = pixels.to(self.frozen_dtype)
        return super().run_model(batch)


def _hold_statistics(module: nn.Module) -> None:
    """Keep batch norms at the statistics that they have. An adapter's file holds none."""
    for child in module.modules():
        if isinstance(child, STATISTICS):
            child.eval()
