"""Metrics that have a name of their own in a configuration, for each kind of labels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import (
    BinaryCalibrationError,
    BinaryF1Score,
    BinaryMatthewsCorrCoef,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MultilabelAUROC,
    MultilabelExactMatch,
    MultilabelF1Score,
)
from torchmetrics.regression import (
    MeanAbsoluteError,
    MeanSquaredError,
    PearsonCorrCoef,
    R2Score,
    SpearmanCorrCoef,
)

Reads = Literal["decisions", "probabilities", "positive", "pairs", "outcomes"]
"""Input of a metric, beside the labels unless it says otherwise.

- decisions: predicted classes, (N,), or for several labels 0 and 1, (N, L).
- probabilities: (N, L), or the values of a regression.
- positive: (N,) probability of class 1.
- pairs: (N L,) probability of each class of each row, and the labels in the same order.
- outcomes: (N,) probability of the decision, and 1 where it is right, else 0, in place of the
  labels.
"""


@dataclass(frozen=True)
class Standard:
    """A metric with a name of its own.

    Args:
        make: function number of labels -> metric.
        reads: what the metric is given.
    """

    make: Callable[[int], Metric]
    reads: Reads = "decisions"


class ShareRight(MeanMetric):
    """Share of decisions that are right. It is updated as metrics of classes are."""

    def update(self, confidence: Tensor, is_right: Tensor) -> None:  # type: ignore[override]
        super().update(is_right)


def _f1(labels: int) -> Metric:
    return BinaryF1Score() if labels == 2 else MulticlassF1Score(labels, average="macro")


def _matthews(labels: int) -> Metric:
    return BinaryMatthewsCorrCoef() if labels == 2 else MulticlassMatthewsCorrCoef(labels)


def _correlation(cls: Callable[..., Metric]) -> Callable[[int], Metric]:
    """Return a maker of a correlation. Its argument is left out where there is one number."""
    return lambda labels: cls() if labels == 1 else cls(num_outputs=labels)


FOR_CLASSES: Mapping[str, Standard] = {
    "accuracy": Standard(lambda labels: MulticlassAccuracy(labels, average="micro")),
    "f1": Standard(_f1),
    "matthews": Standard(_matthews),
    "balanced_accuracy": Standard(lambda labels: MulticlassAccuracy(labels, average="macro")),
    "auroc": Standard(lambda labels: MulticlassAUROC(labels), "probabilities"),
    "calibration_error": Standard(
        lambda labels: MulticlassCalibrationError(labels), "probabilities"
    ),
}
"""Name -> metric of one class for each target."""

FOR_LABELS: Mapping[str, Standard] = {
    "f1": Standard(lambda labels: MultilabelF1Score(labels, average="macro")),
    "f1_micro": Standard(lambda labels: MultilabelF1Score(labels, average="micro")),
    "exact_match": Standard(lambda labels: MultilabelExactMatch(labels)),
    "auroc": Standard(lambda labels: MultilabelAUROC(labels), "probabilities"),
    "calibration_error": Standard(lambda labels: BinaryCalibrationError(), "pairs"),
}
"""Name -> metric of several classes for each row."""

FOR_CHOICES: Mapping[str, Standard] = {
    "accuracy": Standard(lambda labels: ShareRight(), "outcomes"),
    "calibration_error": Standard(lambda labels: BinaryCalibrationError(), "outcomes"),
}
"""Name -> metric of one choice for each question, whose number of choices may differ."""

FOR_NUMBERS: Mapping[str, Standard] = {
    "pearson": Standard(_correlation(PearsonCorrCoef)),
    "spearman": Standard(_correlation(SpearmanCorrCoef)),
    "rmse": Standard(lambda labels: MeanSquaredError(squared=False, num_outputs=labels)),
    "mae": Standard(lambda labels: MeanAbsoluteError(num_outputs=labels)),
    "r2": Standard(lambda labels: R2Score(multioutput="raw_values")),
}
"""Name -> metric of a regression."""

STANDARD_NAMES = tuple(dict.fromkeys([*FOR_CLASSES, *FOR_LABELS, *FOR_CHOICES, *FOR_NUMBERS]))
"""Names of all of these metrics."""
