"""Training strategies: rounds of training, and what happens to the adapter between them."""

from adaptrank.strategies import methods
from adaptrank.strategies.engine import StrategyRun
from adaptrank.strategies.fitting import beside_allocator, on_method
from adaptrank.strategies.ledger import (
    change_of,
    insert_ledgers,
    ledger_of,
    live_wrappers,
    merge_into_ledger,
)
from adaptrank.strategies.merge_and_restart import MergeAndRestart
from adaptrank.strategies.restart import restart, trained_tensors
from adaptrank.strategies.rounds import Rounds
from adaptrank.strategies.shell import strategy_of
from adaptrank.strategies.strategy import STRATEGIES, TrainingStrategy

STRATEGIES.import_folder(methods.__name__, methods.__path__)


def __getattr__(name: str) -> type[TrainingStrategy]:
    """`from adaptrank.strategies import ReLoRA`, with no second list to keep."""
    if name in STRATEGIES:
        return STRATEGIES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "STRATEGIES",
    "MergeAndRestart",
    "Rounds",
    "StrategyRun",
    "TrainingStrategy",
    "beside_allocator",
    "change_of",
    "insert_ledgers",
    "ledger_of",
    "live_wrappers",
    "merge_into_ledger",
    "on_method",
    "restart",
    "strategy_of",
    "trained_tensors",
]
