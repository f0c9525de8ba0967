"""One mean over all targets of an optimizer step: of its batches and of all processes."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from adaptrank._collectives import several, total


class StepMean:
    """Weights that turn the mean losses of batches into the mean loss of an optimizer step.

    A step has several batches if gradients are accumulated, and if there are several processes.
    With n targets in a batch whose mean loss is l, and N = sum n, the step descends

        grad = sum(n grad l) / N

    and not the mean of the batches' means, in which a target weighs more the fewer there are beside
    it. N is known after the last batch only. So each batch weighs n / n_1, where n_1 is the mean
    over processes of n in the first batch of the step, and the sum is scaled before anyone looks at
    the gradients. All counts stay on the device. A step of one batch in one process is left as it
    is, to the last bit.

    The calls of a step: `note` and `weigh` for each batch, `complete` at its end.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the batches of an unfinished step."""
        self._count: Tensor | None = None
        self._means: dict[str, Tensor] = {}
        self._first: Tensor | None = None
        self._sums: Tensor | None = None
        self._batches = 0

    def note(self, count: Tensor, means: Mapping[str, Tensor]) -> None:
        """Note the batch whose loss is differentiated next.

        Args:
            count: number of its targets, (), on the device.
            means: name in the log -> mean over its targets, ().
        """
        self._count = count
        self._means = {name: value.detach() for name, value in means.items()}

    def weigh(self, loss: Tensor, accumulated: int) -> Tensor:
        """Return the loss of the noted batch with its weight in the optimizer step.

        Args:
            loss: mean loss of the batch, over `accumulated`, times the factor of a scaler.
            accumulated: number of batches by which the trainer divides each loss.
        """
        if self._count is None or (accumulated == 1 and not several()):
            return loss
        exact = torch.float32 if loss.device.type == "mps" else torch.float64
        count = self._count.to(exact)
        means = torch.stack([torch.ones_like(count), *(m.to(exact) for m in self._means.values())])
        sums, processes = total(count * means)
        if self._first is None or self._sums is None:
            self._first, self._sums = sums[0].clamp(min=1), sums
        else:
            self._sums = self._sums + sums
        self._batches += 1
        self._count = None
        return loss * (count * processes / self._first).to(loss.dtype)

    @torch.no_grad()
    def complete(self, tensors: Iterable[Tensor], accumulated: int) -> dict[str, Tensor]:
        """Scale the gradients of a step to its mean, and return the means for the log.

        Args:
            tensors: everything that trains.
            accumulated: as in `weigh`.
        """
        if self._first is None or self._sums is None:
            means = self._means
        else:
            targets = self._sums[0].clamp(min=1)
            means = dict(zip(self._means, (self._sums / targets)[1:], strict=True))
            # One batch in each process weighs what it should already.
            if accumulated != 1 or self._batches != 1:
                _scale_gradients(tensors, accumulated * self._first / targets)
        self.reset()
        return means


def _scale_gradients(tensors: Iterable[Tensor], factor: Tensor) -> None:
    groups: dict[tuple[torch.device, torch.dtype], dict[int, Tensor]] = {}
    for tensor in tensors:
        grad = tensor.grad
        if grad is not None:
            groups.setdefault((grad.device, grad.dtype), {})[id(grad)] = grad
    for (device, dtype), grads in groups.items():
        torch._foreach_mul_(list(grads.values()), factor.to(device, dtype))
