"""A flag for batches without a label, which stays on the device within an epoch."""

from torch import Tensor


class UnlabelledBatches:
    """Remember whether a batch had nothing to train on, without waiting for the device."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    def note(self, count: Tensor) -> None:
        """Note the number of labelled targets of a batch, ()."""
        is_empty = count == 0
        self._seen = is_empty if self._seen is None else self._seen | is_empty

    def take(self) -> bool:
        """Return whether a batch since the last call had no label. This reads the device."""
        seen, self._seen = self._seen, None
        return seen is not None and bool(seen)
