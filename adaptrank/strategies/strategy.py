"""The contract of a training strategy: rounds, and what happens at their borders."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from adaptrank._options import Range, check_arguments
from adaptrank.checkpoints import constructor_arguments
from adaptrank.parameterizations import Parameterization
from adaptrank.registry import Registry
from adaptrank.strategies.engine import RoundEngine, StrategyRun
from adaptrank.strategies.rounds import Rounds
from adaptrank.strategies.shell import StrategyShell

STRATEGIES: Registry["TrainingStrategy"] = Registry("training strategy")
"""Class name -> class."""


class TrainingStrategy(StrategyShell):
    """Divides a run into rounds, and rewrites the adapter at the borders between them.

    It takes part in a run as a callback of Lightning, or through four plain calls: `start` before
    the first step, `step` after each step of the optimizer, and `finish`. `prepare` comes before
    a checkpoint is loaded; the callback and `start` call it.

    Whatever a round leaves behind lies in tensors of the model. So a checkpoint needs the number of
    the round and nothing more, and a resumed run goes on bit by bit.

    A method file has the same members in the same order: `rounds`, `prepare`, `enter`, `arrange`,
    `leave` and `rate`. All but `rounds` may be left out. `self.run` has the model, its layers, the
    optimizers, the seed and the rounds.

    Args:
        seed: seed of everything that is drawn at a border.
    """

    source: ClassVar[str] = ""
    """arXiv id of the method."""
    ranges: ClassVar[Mapping[str, Range]] = {}
    """Numeric argument -> the values that make sense."""
    preserves_function: bool = True
    """Whether a border leaves the function of the model as it is, in evaluation mode.

    If it does not, the event of the border has the loss before and after it.
    """
    trains_one_factor: ClassVar[bool] = False
    """Whether one factor of each product trains at a time, so that LoRA+ makes no sense."""
    rounds_of_data: ClassVar[bool] = False
    """Whether the data say how long a round is, so that rounds are known only with the data."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Names of the methods that have to be in the model beside the method that it works on."""
    accept_changes: bool = False
    """Whether it goes on from a checkpoint of a run with other arguments or other rounds."""
    init_args: dict[str, Any]
    """Arguments of the constructor as plain values, with defaults, for checkpoints."""

    def __init_subclass__(cls, registered: bool = True, **kwargs: Any) -> None:
        """Add the class to `STRATEGIES`, unless it is a contract: `registered=False`."""
        super().__init_subclass__(**kwargs)
        if registered:
            STRATEGIES.add(cls)

    # Constructors do not hand all of their arguments up. Python passes them to __new__.
    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record the arguments, and check every number before a constructor computes with it."""
        self = super().__new__(cls)
        self.__dict__["init_args"] = constructor_arguments(cls, *args, **kwargs)
        if args or kwargs:  # copying and unpickling call __new__ without arguments
            check_arguments(cls, self.__dict__["init_args"])
        return self

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        super().__init__(RoundEngine(self))

    @property
    def label(self) -> str:
        """Name in errors, configurations and checkpoints: that of the class."""
        return type(self).__name__

    @property
    def run(self) -> StrategyRun:
        """The run that it takes part in.

        Raises:
            RuntimeError: if no run has started.
        """
        return self.engine.run

    # ---- the contract

    @abstractmethod
    def rounds(self, total_steps: int) -> Rounds:
        """Return the rounds of a run of `total_steps` optimizer steps."""

    def prepare(self, model: nn.Module) -> None:
        """Add what the strategy needs to a model, before a checkpoint is loaded into it.

        It is called again on a model that is prepared already, and changes nothing then.
        """

    def enter(self, number: int) -> None:
        """Rewrite tensors at the start of a round. A resumed run does not call it again."""

    def arrange(self, number: int) -> None:
        """Set what lies in no tensor, such as which tensors train, for a round.

        It is called after `enter`, and when a run resumes inside of a round.
        """

    def leave(self, number: int) -> None:
        """Close a round that has ended, such as by merging what it trained."""

    def follow(self, number: int) -> None:
        """Act in the midst of a round, after an event in which an allocator has moved units."""

    def rate(self, steps_done: int, group: Mapping[str, Any]) -> float:
        """Return the factor of the learning rate in the next step. It is a pure function.

        The user's schedule is multiplied by it.

        Args:
            steps_done: optimizer steps before this one.
            group: the parameter group.
        """
        return 1.0

    def rewritten(self) -> list[Parameterization]:
        """Return the wrappers whose tensors a border replaces."""
        return []

    def refuses_allocator(self, allocator: Any) -> str:
        """Return why an allocator cannot take part, as a sentence without its end; "" if it can."""
        return ""

    def holds_allocators(self, step: int) -> bool:
        """Return whether the allocators leave out an event after optimizer step `step`."""
        return False

    def describe_border(self, number: int) -> dict[str, Any]:
        """Return further entries of the event at the start of a round."""
        return {}

    def trained_numbers(self, number: int) -> int:
        """Return how many numbers train in a round, from the shapes of a model alone."""
        self.arrange(number)
        return self.run.trained()

    # ---- what a method uses

    @property
    def layers(self) -> Mapping[str, Parameterization]:
        """Path -> outermost wrapper, of each adapted layer."""
        return self.run.layers

    def forget(self, tensors: list[Tensor]) -> None:
        """Delete optimizer state and gradients of tensors that start anew."""
        self.run.forget(tensors)
