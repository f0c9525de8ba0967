"""Common base of allocators and rank initializers: arguments, words and optional hooks."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from torch import nn

from adaptrank._errors import UserError
from adaptrank._options import Range, check_arguments
from adaptrank.allocation import compatibility
from adaptrank.allocation.budget import Floor
from adaptrank.allocation.context import Axes, Run
from adaptrank.allocation.engine import Engine
from adaptrank.allocation.events import Event
from adaptrank.allocation.schedules import Phases, check_length, steps
from adaptrank.allocation.shells.lightning import LightningShell
from adaptrank.allocation.shells.trainer_hooks import TrainerHooks
from adaptrank.allocation.state import TrackedTensors
from adaptrank.axes import rank_axes
from adaptrank.checkpoints import constructor_arguments, constructor_defaults
from adaptrank.registry import Registry

ALLOCATORS: Registry["Participant"] = Registry("allocator")
"""Class name -> class, of allocators and rank initializers."""

CONTROLS: Registry["Participant"] = Registry("control")
"""Class name -> class, of what allocators are compared with."""


@dataclass(frozen=True)
class Choice:
    """Ranks to start from.

    Args:
        ranks: {axis key: units}.
        evidence: whatever `initialize` needs to set the tensors of the chosen units.
        facts: further entries of the event at step 0.
    """

    ranks: dict[str, int]
    evidence: Any = None
    facts: Event = field(default_factory=Event)


class Participant(LightningShell, TrainerHooks):
    """Base of allocators and rank initializers.

    It takes part in a run as a callback of Lightning or of `transformers.Trainer`, as it is, or
    through four plain calls: `start` before the
    first step, `before_step` once the gradients of a step are complete, `step` after the
    optimizer's step, and `finish`.

    The hooks below do nothing unless a class overrides them. Each gets the state that
    `init_state` returned and the axes of the run; `self.run` has everything else.
    """

    source: ClassVar[str] = ""
    """arXiv id of the method."""
    ranges: ClassVar[Mapping[str, Range]] = {}
    """Numeric argument -> the values that make sense, beside those that the constructor checks. Any
    other number has to be finite, and whole where its annotation says so."""
    earlier: ClassVar[Mapping[str, Any]] = {}
    """Argument -> the value that stands for it in a checkpoint from before the argument existed,
    where the default of the argument is another."""
    requires: ClassVar[frozenset[str]] = frozenset()
    """Capabilities that an axis must have beside pruning, such as "grow"."""
    options: ClassVar[Mapping[str, frozenset[str]]] = {}
    """Argument -> further capabilities that it needs while it is not off (False, 0, None)."""
    exclusive: ClassVar[bool] = False
    """Whether the run may have no second allocator, not even a rank initializer."""
    moves: ClassVar[bool] = True
    """Whether it has events, which move ranks during training."""
    hangs_gates: ClassVar[bool] = False
    """Whether it multiplies single units by gates while the model trains."""
    masks_base: ClassVar[bool] = False
    """Whether it masks parts of the frozen base, which other adapter weights do not undo."""
    exact: bool = True
    """Whether a budget in ranks is met exactly. If False it is only never exceeded."""

    short_form: ClassVar[bool] = False
    """Whether it is written in the short form; see `Allocator`."""

    accept_changes: bool = False
    """Whether it goes on from a checkpoint of a run with other arguments or another schedule."""
    init_args: dict[str, Any]
    """Arguments of the constructor as plain values, with defaults, for checkpoints."""

    def __init_subclass__(
        cls, registered: bool = True, control: bool = False, **kwargs: Any
    ) -> None:
        """Add the class to `ALLOCATORS`, or to `CONTROLS` with `control=True`.

        A contract, with `registered=False`, is in neither.
        """
        super().__init_subclass__(**kwargs)
        if registered:
            registry = CONTROLS if control else ALLOCATORS
            registry.add(cls)

    # Constructors do not hand all of their arguments up. Python passes them to __new__.
    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record the arguments, and check every number before a constructor computes with it."""
        self = super().__new__(cls)
        arguments = constructor_arguments(cls, *args, **kwargs)
        self.__dict__["init_args"] = cls.present_arguments(arguments)
        # Copying and unpickling call __new__ without arguments.
        if args or kwargs:
            check_arguments(cls, self.__dict__["init_args"])
        return self

    def __init__(
        self,
        budget: int | None,
        unit: Literal["ranks", "parameters"],
        every: int,
        warmup: int | float,
        final: int | float,
        floor: int,
        cap: int | None,
        seed: int,
    ) -> None:
        if unit not in ("ranks", "parameters"):
            raise UserError(f"unit={unit!r}; a budget counts 'ranks' or 'parameters'.")
        low_cap = cap is not None and cap < max(1, floor)
        if every < 1 or floor < 0 or low_cap or (budget is not None and budget < 1):
            raise UserError(
                f"every={every}, floor={floor}, cap={cap}, budget={budget}: floor is at least 0, "
                f"the others are at least 1, and cap is not below floor."
            )
        check_length("warmup", warmup)
        check_length("final", final)
        self.budget, self.unit, self.every = budget, unit, every
        self.warmup, self.final = warmup, final
        self.floor, self.cap, self.seed = floor, cap, seed
        super().__init__(Engine(self))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Finish training. Lightning and transformers have a hook of this name.

        Lightning hands over (trainer, module), and transformers its model by name.
        """
        if "model" in kwargs:
            self.end_training(*args, **kwargs)
        else:
            super().on_train_end(*args, **kwargs)

    @property
    def run(self) -> Run:
        """The run that it takes part in.

        Raises:
            RuntimeError: if no run has started.
        """
        return self.engine.run

    @property
    def phases(self) -> Phases:
        """Phases of the run, in steps of the optimizer that moves the axes."""
        return self.run.phases

    @property
    def label(self) -> str:
        """Name in errors, configurations and checkpoints: that of the class."""
        return type(self).__name__

    @property
    def variant(self) -> str:
        """Name of a rule that decides otherwise than the published one; "" for the published."""
        return ""

    @property
    def title(self) -> str:
        """Name in tables and reports, with the variant: "ElaLoRA (two pools)"."""
        return f"{self.label} ({self.variant})" if self.variant else self.label

    @classmethod
    def default_title(cls) -> str:
        """Return the title with default arguments, or the class name if some have no default."""
        try:
            return cls().title  # type: ignore[call-arg]  # a concrete class has defaults
        except TypeError:  # a user's class
            return cls.__name__

    @classmethod
    def present_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a checkpoint under their present names.

        An earlier version may have named them otherwise.
        """
        return dict(arguments)

    def argument_defaults(self) -> dict[str, Any]:
        """Return the values of arguments that a checkpoint does not have.

        They are the defaults of the constructor, or the values that the library had `earlier`.
        """
        defaults = {**constructor_defaults(type(self)), **self.earlier}
        return self.present_arguments(defaults)

    def describe_allocator(self) -> dict[str, Any]:
        """Return class, arguments and defaults, and the function that renames old arguments."""
        return {
            "class": self.label,
            "init_args": self.init_args,
            "defaults": self.argument_defaults(),
            "present_arguments": self.present_arguments,
        }

    @property
    def chooses_ranks(self) -> bool:
        """Whether it chooses the ranks that a run starts from."""
        return False

    @property
    def sets_tensors(self) -> bool:
        """Whether `initialize` sets the tensors of units, so that trained ones would be lost."""
        return type(self).initialize is not Participant.initialize

    @property
    def only_prunes(self) -> bool:
        """Whether it moves nothing unless the budget is below the start."""
        return False

    # ---- optional hooks

    def phases_of(self, total: int) -> Phases:
        """Return the phases of a run of `total` optimizer steps."""
        return Phases(total, steps(self.warmup, total), steps(self.final, total), self.every)

    def find_axes(self, model: nn.Module) -> Axes:
        """Return what is allocated: the rank axes of the model."""
        return rank_axes(model)

    def refuses(self, axes: Axes) -> str:
        """Return why it cannot work on these axes, as a sentence without its end; "" if it can."""
        return ""

    def choose(self, axes: Axes, batches: Iterable[Any]) -> Choice | None:
        """Return the ranks to start a new run from, or None to take the model as it is."""
        return None

    def initialize(self, axes: Axes, evidence: Any) -> None:
        """Set the tensors of the chosen units from the evidence of the choice, or leave them."""

    def check_start(self, sizes: Mapping[str, int]) -> None:
        """Refuse sizes at the start of a new run from which it could not act."""

    def init_state(self, axes: Axes) -> TrackedTensors:
        """Return an empty state. The engine fills it from a checkpoint if there is one."""
        return TrackedTensors()

    def install(self, state: Any, axes: Axes) -> None:
        """Set gates and register hooks (in `self.run.handles`) when training starts or resumes."""

    def before_pass(self, state: Any, axes: Axes) -> None:
        """Prepare the forward passes of the next optimizer step."""

    def update(self, state: Any, axes: Axes) -> None:
        """Update the state; gradients are complete, unscaled and not clipped yet."""

    def finish_step(self, state: Any, axes: Axes) -> None:
        """Act after the optimizer's step, before the event if there is one."""

    def examples_needed(self) -> int:
        """Return the number of training batches that the scores are computed on."""
        return 0

    def acts_at(self, step: int) -> bool:
        """Return whether an event at this step could move anything."""
        return True

    def budget_at(self, step: int) -> int | None:
        """Return the budget enforced at `step`, or None if the plan is unconstrained."""
        return None

    def floors(self) -> Floor:
        """Return the least size of each axis: `floor`, and at least 1 where axes multiply.

        Without a unit on one of them, such as a bond of a tensor train, the units of the others
        would stay, cost, and do nothing.
        """
        axes = self.run.axes
        if not axes:  # a schedule is checked without a model
            return self.floor
        return {key: max(self.floor, int(axis.multiplies)) for key, axis in axes.items()}

    def caps(self) -> dict[str, int | None]:
        """Return the largest size of each axis; None is no ceiling."""
        return self.run.ceilings(self.cap)

    @classmethod
    def scores_by_name(cls) -> bool:
        """Return whether a named importance scores the units, and not the class itself."""
        return False

    # ---- which methods it works with

    @classmethod
    def works_with(cls, *methods: str) -> bool:
        """Return whether it works on a parameterization or a nest, all with default arguments.

        Args:
            methods: class names, innermost first.
        """
        return compatibility.pair(cls, *methods) == "works"

    @classmethod
    def pair(cls, *methods: str) -> str:
        """Return the cell of the table of pairs; see `compatibility.pair`."""
        return compatibility.pair(cls, *methods)
