"""Fine-tune an encoder with a fresh head on labelled texts or pairs of texts."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
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
from adaptrank._options import COUNT, check_number
from adaptrank.modules.adapted import AdaptedModule
from adaptrank.modules.agreement import trained_conventions
from adaptrank.modules.batch_keys import (
    IGNORED,
    at_least_float32,
    count_supervised,
    entries,
    forward_keys,
    read_inputs,
    read_labels,
)
from adaptrank.modules.known_attention import known_attention
from adaptrank.modules.label_counts import LabelCounts, LabelSpread

MetricName = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]

REGRESSION_METRICS = ("pearson", "spearman")
CLASSIFICATION_METRICS = ("accuracy", "f1", "matthews")


class SequenceClassification(AdaptedModule):
    """A classifier over the whole text, or with one label a regression.

    The head is new and trains with the adapters.

    Args:
        num_labels: number of classes, by default that of the `adapter`, or of the data module. 1 is
            a regression.
        metrics: metrics beside the loss, by default accuracy, or for a regression Pearson and
            Spearman correlation. F1 is that of class 1 for two classes, and the macro average for
            more.
        kwargs: as in `AdaptedModule`.
    """

    auto_class = "AutoModelForSequenceClassification"
    metrics_shown: ClassVar = ("loss", *CLASSIFICATION_METRICS, *REGRESSION_METRICS)

    def __init__(
        self,
        *args: Any,
        num_labels: int | None = None,
        metrics: list[MetricName] | None = None,
        **kwargs: Any,
    ) -> None:
        if num_labels is not None:
            check_number("num_labels", num_labels, COUNT, whole=True)
        super().__init__(*args, **kwargs)
        self.num_labels = num_labels
        self.metric_names = metrics
        self.mean_loss = MeanMetric()
        self.scores: MetricCollection | None = None
        self._unsupervised: Tensor | None = None
        self.labels_seen: LabelCounts | LabelSpread | None = None

    # ---- building

    def configure_model(self) -> None:
        super().configure_model()
        if self.scores is not None:
            return
        labels = self._count_labels()
        default: list[MetricName] = ["pearson", "spearman"] if labels == 1 else ["accuracy"]
        names = self.metric_names or default
        self.scores = MetricCollection({name: make_metric(name, labels) for name in names})
        self.labels_seen = LabelSpread() if labels == 1 else LabelCounts(labels)

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the backbone, which makes token types only where the model reads them."""
        tokenizer = super().tokenizer
        if not self._reads_token_types():
            names = tokenizer.model_input_names
            tokenizer.model_input_names = [name for name in names if name != "token_type_ids"]
        return tokenizer

    def _reads_token_types(self) -> bool:
        """Tell whether the model's class, which is not built yet, names token types."""
        from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

        config = AutoConfig.from_pretrained(self.source.path)
        model_class: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
        # The code of some models comes with their weights.
        return not isinstance(model_class, type) or "token_type_ids" in forward_keys(model_class)

    def load_backbone(self) -> Any:
        import transformers

        auto_class = getattr(transformers, self.auto_class)
        backbone = backbones.load_model(
            self.source, auto_class, self.frozen_dtype, num_labels=self._count_labels()
        )
        # A decoder finds the last token of a text by its padding, which the tokenizer writes.
        if self.tokenizer.pad_token_id is not None:
            backbone.config.pad_token_id = self.tokenizer.pad_token_id
        return backbone

    def heads(self, backbone: nn.Module) -> list[str]:
        """Return the children of the model that have parameters and are not its pretrained part."""
        pretrained = getattr(backbone, "base_model_prefix", "")
        return [
            name
            for name, child in backbone.named_children()
            if name != pretrained and list(child.parameters())
        ]

    def describe_base(self) -> dict[str, Any]:
        return {**super().describe_base(), "num_labels": self._count_labels()}

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes that the model was trained on, or None if they are not known."""
        names: list[str] | None = trained_conventions(self).get("class_names")
        return names

    def _count_labels(self) -> int:
        """Return the number of classes: `num_labels`, the trained model's, or the data module's."""
        if self.num_labels is not None:
            return self.num_labels
        if self.class_names is not None:
            return len(self.class_names)
        data = getattr(self._trainer, "datamodule", None)
        num_classes = getattr(data, "num_classes", None)
        if num_classes is None:
            raise UserError(
                "How many classes are there? Set model.num_labels. The data module does not say."
            )
        return int(num_classes)

    @property
    def _is_regression(self) -> bool:
        return self._count_labels() == 1

    def chance(self) -> dict[str, float]:
        return self.labels_seen.chance() if self.labels_seen is not None else {}

    # ---- steps

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return logits (B, classes), or values (B,) for a regression, in float32 or better."""
        inputs = read_inputs(batch, self.model)
        host = self.host_batch.of(entries(batch))
        with known_attention(inputs, host, self.model) as ready:
            logits = at_least_float32(self.model(**ready).logits)
        return logits.squeeze(-1) if self._is_regression else logits

    def _loss(self, output: Tensor, labels: Tensor, count: Tensor) -> Tensor:
        """Return the mean loss over the labelled examples, which is zero if there is none.

        Args:
            output: logits (B, classes), or values (B,) of a regression.
            labels: (B,).
            count: number of labelled examples, ().
        """
        if self._is_regression:
            if labels.shape != output.shape:
                raise UserError(
                    f"A regression needs one label for each row, {tuple(output.shape)}, and got "
                    f"labels of shape {tuple(labels.shape)}. Squeeze them in the collate_fn."
                )
            return F.mse_loss(output, labels.to(output.dtype))
        loss = F.cross_entropy(output, labels, ignore_index=IGNORED)
        return torch.where(count > 0, loss, 0 * output.sum())

    def _predict(self, output: Tensor) -> Tensor:
        """Return the predicted classes (B,), or the values (B,) of a regression."""
        return output if self._is_regression else output.argmax(-1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        labels = read_labels(batch)
        count = count_supervised(labels)
        loss = self._loss(self(batch), labels, count)
        is_unsupervised = count == 0
        earlier = self._unsupervised
        self._unsupervised = is_unsupervised if earlier is None else earlier | is_unsupervised
        self.step_mean.note(count, {"train_loss": loss})
        return loss

    def on_train_epoch_end(self) -> None:
        # The flag is read here and not in each step, which would wait for the device.
        if self._unsupervised is not None and bool(self._unsupervised):
            self.warn_unsupervised("batch")
        self._unsupervised = None

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        assert self.scores is not None
        assert self.labels_seen is not None
        output, labels = self(batch), read_labels(batch)
        count = count_supervised(labels)
        size = len(labels)
        self.mean_loss.update(self._loss(output, labels, count), weight=count)
        if self._is_regression:
            labels = labels.float()
        # Every process counts, since all of them sum the counts later.
        self.labels_seen.update(labels)
        if not self._is_regression:
            output, labels = output[labels != IGNORED], labels[labels != IGNORED]
        if len(labels):
            self.scores.update(self._predict(output), labels)
        self.log("loss", self.mean_loss, batch_size=size)
        self.log_dict(self.scores, prog_bar=True, batch_size=size)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Sequence[Any]:
        predicted: list[Any] = self._predict(self(batch)).tolist()
        return predicted


def make_metric(name: MetricName, labels: int) -> Metric:
    """Return a metric of torchmetrics by its name.

    Args:
        name: name of the metric.
        labels: number of classes. 1 is a regression.

    Raises:
        UserError: if the metric does not fit the number of labels.
    """
    fitting = REGRESSION_METRICS if labels == 1 else CLASSIFICATION_METRICS
    if name not in fitting:
        raise UserError(
            f"metric {name!r} does not fit {labels} label(s). Use {', '.join(fitting)}."
        )
    if name == "accuracy":
        return MulticlassAccuracy(labels, average="micro")
    if name == "f1":
        return BinaryF1Score() if labels == 2 else MulticlassF1Score(labels, average="macro")
    if name == "matthews":
        return BinaryMatthewsCorrCoef() if labels == 2 else MulticlassMatthewsCorrCoef(labels)
    if name == "pearson":
        return PearsonCorrCoef()
    return SpearmanCorrCoef()
