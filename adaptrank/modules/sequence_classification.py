"""Fine-tune an encoder with a fresh head on labelled texts or pairs of texts."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    BinaryF1Score,
    BinaryMatthewsCorrCoef,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

from adaptrank import backbones
from adaptrank._errors import UserError
from adaptrank.modules.adapted import AdaptedModule

MetricName = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]


class SequenceClassification(AdaptedModule):
    """A classifier (or, with one label, a regression) over the whole text; its head is new and trains with the adapters.

    Args:
        num_labels: classes; None asks the data module. 1 is a regression.
        metrics: what to report beside the loss; by default accuracy, or Pearson and Spearman correlation for a regression.
            F1 is that of class 1 for two classes, the macro average for more.
        kwargs: as in `AdaptedModule`.
    """

    auto_class = "AutoModelForSequenceClassification"
    metrics_shown: ClassVar = ("loss", "accuracy", "f1", "matthews", "pearson", "spearman")

    def __init__(
        self,
        *args: Any,
        num_labels: int | None = None,
        metrics: list[MetricName] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.num_labels, self.metric_names = num_labels, metrics
        self.mean_loss = MeanMetric()
        self.scores: MetricCollection | None = None

    def configure_model(self) -> None:
        super().configure_model()
        if self.scores is None:
            labels = self._labels()
            names = self.metric_names or (["pearson", "spearman"] if labels == 1 else ["accuracy"])
            self.scores = MetricCollection({name: make_metric(name, labels) for name in names})

    def load_backbone(self) -> Any:
        import transformers

        auto_class = getattr(transformers, self.auto_class)
        backbone = backbones.load_model(
            self.source, auto_class, self.frozen_dtype, num_labels=self._labels()
        )
        if (
            backbone.config.pad_token_id is None
        ):  # a decoder finds the last token of a text by its padding
            backbone.config.pad_token_id = self.tokenizer.pad_token_id
        return backbone

    def heads(self, backbone: nn.Module) -> list[str]:
        """Every child of the model beside the pretrained part that has parameters."""
        base = getattr(backbone, "base_model_prefix", "")
        return [
            name
            for name, child in backbone.named_children()
            if name != base and any(True for _ in child.parameters())
        ]

    def describe_base(self) -> dict[str, Any]:
        return {**super().describe_base(), "num_labels": self._labels()}

    def _labels(self) -> int:
        if self.num_labels is not None:
            return self.num_labels
        data = getattr(self._trainer, "datamodule", None)
        known = getattr(data, "num_classes", None)
        if known is None:
            raise UserError(
                "How many classes are there? Set model.num_labels; the data module does not say."
            )
        return int(known)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (B, classes), or values (B,) for a regression, in float32."""
        logits: Tensor = self.model(
            **{k: v for k, v in batch.items() if k != "labels"}
        ).logits.float()
        return logits.squeeze(-1) if self._labels() == 1 else logits

    def _loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return (
            F.mse_loss(output, labels.float())
            if self._labels() == 1
            else F.cross_entropy(output, labels)
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(self(batch), batch["labels"])
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        assert self.scores is not None
        output, labels = self(batch), batch["labels"]
        labels = labels.float() if self._labels() == 1 else labels
        self.mean_loss.update(self._loss(output, labels), weight=len(labels))
        self.scores.update(output if self._labels() == 1 else output.argmax(-1), labels)
        self.log("loss", self.mean_loss, batch_size=len(labels))
        self.log_dict(self.scores, prog_bar=True, batch_size=len(labels))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Sequence[Any]:
        output = self(batch)
        predicted: list[Any] = (output if self._labels() == 1 else output.argmax(-1)).tolist()
        return predicted


def make_metric(name: MetricName, labels: int) -> Metric:
    """A task metric by its name, from torchmetrics.

    Raises:
        ValueError: if it does not fit the number of labels.
    """
    if (name in ("pearson", "spearman")) != (labels == 1):
        fits = "pearson, spearman" if labels == 1 else "accuracy, f1, matthews"
        raise UserError(f"metric {name!r} does not fit {labels} label(s); use {fits}.")
    if name == "accuracy":
        return MulticlassAccuracy(labels, average="micro")
    if name == "f1":
        return BinaryF1Score() if labels == 2 else MulticlassF1Score(labels, average="macro")
    if name == "matthews":
        return BinaryMatthewsCorrCoef() if labels == 2 else MulticlassMatthewsCorrCoef(labels)
    return PearsonCorrCoef() if name == "pearson" else SpearmanCorrCoef()
