"""Allocators and rank initializers, which decide how many units each layer keeps and when."""

from adaptrank.allocation import controls, initial, methods
from adaptrank.allocation.allocator import Allocator
from adaptrank.allocation.events import Event
from adaptrank.allocation.growth import parameter_growth, possible_growth
from adaptrank.allocation.initial.initializer import Choice, RankInitializer
from adaptrank.allocation.participant import ALLOCATORS, CONTROLS, Participant
from adaptrank.allocation.policy import Policy
from adaptrank.allocation.shells.lightning import fit_before_load
from adaptrank.allocation.shells.trainer_hooks import AdapterCallback
from adaptrank.allocation.state import TrackedTensors

ALLOCATORS.import_folder(methods.__name__, methods.__path__)
ALLOCATORS.import_folder(initial.__name__, initial.__path__)
CONTROLS.import_folder(controls.__name__, controls.__path__)


def __getattr__(name: str) -> type[Participant]:
    """`from adaptrank.allocation import ElaLoRA`, with no second list to keep."""
    for registry in (ALLOCATORS, CONTROLS):
        if name in registry:
            return registry[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ALLOCATORS",
    "CONTROLS",
    "AdapterCallback",
    "Allocator",
    "Choice",
    "Event",
    "Participant",
    "Policy",
    "RankInitializer",
    "TrackedTensors",
    "fit_before_load",
    "parameter_growth",
    "possible_growth",
]
