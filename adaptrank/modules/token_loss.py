"""Base of the modules that train on tokens: mean loss, its perplexity, and the test set."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from adaptrank.modules.adapted import AdaptedModule


class TokenLossModule(AdaptedModule):
    """A model with a loss for each token. Its evaluation reports `loss` and `perplexity`.

    `loss` is the mean over all tokens of the data, and `perplexity` is its exponential. A test is
    what a validation is.

    Args:
        kwargs: as in `AdaptedModule`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mean_loss = MeanMetric()

    def mean_of(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of the losses of a batch, (), and their number, ().

        A batch without a label is warned of once. Its mean is zero, with a gradient of zero.

        Args:
            losses: (tokens,).
        """
        supervised = len(losses)
        if not supervised:
            self.warn_unsupervised("batch")
        mean: Tensor = losses.mean() if supervised else losses.sum()
        return mean, torch.full((), supervised, device=losses.device)

    def log_losses(self, losses: Tensor, batch_size: int) -> None:
        """Add the losses of an evaluation batch, (tokens,), to the logged mean."""
        self.mean_loss.update(losses)
        self.log("loss", self.mean_loss, prog_bar=True, batch_size=batch_size)

    def on_validation_epoch_end(self) -> None:
        if self.mean_loss.update_called:
            self.log("perplexity", self.mean_loss.compute().exp())

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()
