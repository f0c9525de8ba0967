"""Merge and restart: each round trains a fresh adapter over what the rounds before have merged."""

from typing import Any

from torch import Tensor, nn

from adaptrank.allocation import Participant
from adaptrank.parameterizations import Parameterization
from adaptrank.strategies.ledger import (
    insert_ledgers,
    ledger_of,
    live_wrappers,
    merge_into_ledger,
    stored_numbers,
)
from adaptrank.strategies.restart import restart, trained_tensors
from adaptrank.strategies.strategy import TrainingStrategy


class MergeAndRestart(TrainingStrategy, registered=False):
    """Base of strategies whose rounds each merge an update and start a new one.

    At a border the change of every layer is added to its ledger in float32
    (`parameterizations.MergedUpdates`), and the wrappers start anew from their constructors. A
    fresh wrapper changes nothing, so the function of the model stays the same in evaluation mode.
    With dropout the function in training mode changes, because what is merged is not dropped. The
    last round is not merged: its wrappers are part of the adapter, beside the ledger.

    Args:
        seed: seed of the fresh tensors.
    """

    def prepare(self, model: nn.Module) -> None:
        insert_ledgers(model)

    def enter(self, number: int) -> None:
        if number == 0:
            return
        for path, outermost in self.layers.items():
            for wrapper in live_wrappers(outermost):
                restart(path, wrapper, self.seed, number)
        self.forget(self.live_tensors())
        self.run.forget_scores()

    def leave(self, number: int) -> None:
        for outermost in self.layers.values():
            merge_into_ledger(outermost, self.merge_factor())

    def merge_factor(self) -> float:
        """Return the factor of a change when it is merged."""
        return 1.0

    def live_tensors(self) -> list[Tensor]:
        """Return the tensors of the wrappers that train, a tied one once."""
        return trained_tensors(self.rewritten())

    def rewritten(self) -> list[Parameterization]:
        live: list[Parameterization] = []
        for outermost in self.layers.values():
            live += live_wrappers(outermost)
        return live

    def refuses_allocator(self, allocator: Participant) -> str:
        return hangs_on_units(allocator)

    def holds_allocators(self, step: int) -> bool:
        """Leave events out in the first tenth of a round, whose units have just started at zero."""
        rounds = self.run.rounds
        number = rounds.number(step - 1)
        return number > 0 and step - rounds.start(number) <= 0.1 * rounds.length(number)

    def describe_border(self, number: int) -> dict[str, Any]:
        merged = {path: len(ledger_of(outermost).A) for path, outermost in self.layers.items()}
        return {"merged_ranks": merged, "stored": stored_numbers(self.layers)}


def hangs_on_units(allocator: Participant) -> str:
    """Return why an allocator cannot follow units that a new round replaces, or "" if it can."""
    kind = type(allocator)
    hangs = kind.install is not Participant.install
    trains = kind.before_pass is not Participant.before_pass
    if hangs or trains or allocator.masks_base:
        return (
            "its gates, masks or hooks belong to the units of one round, and the next round "
            "replaces the units; use an allocator that only scores them, such as AdaLoRA"
        )
    return ""
