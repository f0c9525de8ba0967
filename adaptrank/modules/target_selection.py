"""The tokens of a batch that predict a labelled token, as indices that are made on the host."""

from dataclasses import dataclass
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor

from adaptrank.modules.batch_keys import IGNORED
from adaptrank.training.moving import to_device


@dataclass(frozen=True)
class Targets:
    """Labelled tokens of a batch, and the tokens before them, which predict them.

    The predicting tokens are known where the labels of the host are. Without them the device is
    read.

    Args:
        labels: (rows, length), on the device.
        predicts: (rows, length), true on predicting tokens, on the host.
    """

    labels: Tensor
    predicts: Tensor

    @cached_property
    def index(self) -> Tensor:
        """Indices of the predicting tokens among all rows * length tokens, (n,)."""
        return self.select(self.predicts)

    @cached_property
    def tokens(self) -> Tensor:
        """The labelled tokens, (n,)."""
        return self.labels.flatten().index_select(0, self.index + 1)

    @cached_property
    def row(self) -> Tensor:
        """The row of each labelled token, (n,)."""
        return self.index // self.labels.shape[1]

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def columns(self) -> Tensor:
        """Positions at which some row predicts a target, on the host."""
        return self.predicts.any(0).nonzero().squeeze(1)

    def select(self, mask: Tensor) -> Tensor:
        """Return the indices at which a mask of any shape is true, flattened, on the device."""
        return to_device(mask.flatten().nonzero().squeeze(1), self.labels.device)


def find_targets(labels: Tensor, host_labels: Tensor) -> Targets:
    """Return the targets of a batch.

    Args:
        labels: (rows, length), -100 where a token is not trained on.
        host_labels: the same on the host, or where the values are.
    """
    return Targets(labels, F.pad(host_labels[:, 1:] != IGNORED, (0, 1)))


def selected(rows: Tensor, index: Tensor) -> Tensor:
    """Return entries of (rows, length, ...) by their index among all rows * length: (n, ...)."""
    return rows.flatten(0, 1).index_select(0, index)
