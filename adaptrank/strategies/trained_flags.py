"""Tensors that a strategy freezes or lets train, so that the end of a run can undo it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class TrainedFlags:
    """Flags `requires_grad` of the tensors that a strategy has frozen, or has let train.

    They are noted at the hooks of the strategy. So a tensor that the user has frozen, before the
    run or during it, is in no note, and stays frozen.
    """

    def __init__(self) -> None:
        self._flags: dict[int, tuple[Tensor, bool]] = {}
        """Identity of a changed tensor -> the tensor, and its flag before the first change."""

    @contextmanager
    def noting(self, model: nn.Module, more: Iterable[Tensor] = ()) -> Iterator[None]:
        """Note the changes of flags within the block.

        Args:
            model: model whose parameters are watched.
            more: further tensors, such as those of an optimizer.
        """
        watched = [(tensor, tensor.requires_grad) for tensor in [*model.parameters(), *more]]
        try:
            yield
        finally:
            for tensor, trained in watched:
                if tensor.requires_grad != trained:
                    self._flags.setdefault(id(tensor), (tensor, trained))

    def trained(self, tensor: Tensor) -> bool:
        """Return whether a tensor trains but for what the strategy has changed."""
        _, trained = self._flags.get(id(tensor), (tensor, tensor.requires_grad))
        return trained

    def restore(self) -> None:
        """Undo all changes, and forget them."""
        for tensor, trained in self._flags.values():
            tensor.requires_grad_(trained)
        self._flags.clear()
