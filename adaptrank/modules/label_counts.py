"""Label statistics of an evaluation, which give loss and accuracy of a model that guesses."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

EXACT = torch.float32 if torch.backends.mps.is_available() else torch.float64
"""Dtype of sums of squares, which cancel in float32."""


class LabelCounts(Metric):
    """Number of examples of each class.

    Args:
        classes: number of classes.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        zeros = torch.zeros(classes, dtype=torch.long)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(self, labels: Tensor) -> None:
        """Count labels (B,). Negative ones are no classes, and are left out."""
        is_class = (labels >= 0).to(self.counts.dtype)
        self.counts = self.counts.index_add(0, labels.clamp(min=0), is_class)

    def compute(self) -> Tensor:
        return self.counts

    def chance(self) -> dict[str, float]:
        """Return loss, accuracy and its standard error of a model that guesses. {} if unknown.

        The loss is log(classes). The accuracy is that of the most frequent class.
        """
        if not self.update_called:
            return {}
        counts = self.compute()
        total = float(counts.sum())
        if not total:
            return {}
        share = float(counts.max()) / total
        error = math.sqrt(share * (1 - share) / total)
        return {"loss": math.log(len(counts)), "accuracy": share, "accuracy_error": error}


class LabelShares(Metric):
    """Number of rows that have each of several classes.

    Args:
        classes: number of classes, L.
    """

    full_state_update = False
    positive: Tensor
    known: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        for name in ("positive", "known"):
            zeros = torch.zeros(classes, dtype=torch.long)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, labels: Tensor) -> None:
        """Count labels (N, L) of 0 and 1. Negative ones are not known."""
        self.positive = self.positive + (labels > 0).sum(0)
        self.known = self.known + (labels >= 0).sum(0)

    def compute(self) -> Tensor:
        return self.positive / self.known.clamp(min=1)

    def chance(self) -> dict[str, float]:
        """Return the loss of a model that always answers the share of each class, or {}.

        It is the mean entropy of the classes, -p log p - (1 - p) log(1 - p).
        """
        if not self.update_called:
            return {}
        shares = self.compute().to(EXACT)
        entropies = torch.special.entr(shares) + torch.special.entr(1 - shares)
        return {"loss": float(entropies.mean())}


class LabelSpread(Metric):
    """Variance of the labels of a regression, the mean over its targets.

    Args:
        targets: number of numbers to predict for each row.
    """

    full_state_update = False
    total: Tensor
    squares: Tensor
    examples: Tensor

    def __init__(self, targets: int = 1) -> None:
        super().__init__()
        shape = () if targets == 1 else (targets,)
        for name in ("total", "squares"):
            self.add_state(name, torch.zeros(shape, dtype=EXACT), dist_reduce_fx="sum")
        self.add_state("examples", torch.zeros((), dtype=EXACT), dist_reduce_fx="sum")

    def update(self, labels: Tensor) -> None:
        """Take labels (N,), or (N, targets)."""
        values = labels.to(EXACT)
        self.total = self.total + values.sum(0)
        self.squares = self.squares + values.square().sum(0)
        self.examples = self.examples + len(values)

    def compute(self) -> Tensor:
        mean = self.total / self.examples
        return (self.squares / self.examples - mean.square()).mean()

    def chance(self) -> dict[str, float]:
        """Return the squared error of a model that always answers the mean. {} if unknown."""
        known = self.update_called and bool(self.examples)
        return {"loss": float(self.compute())} if known else {}
