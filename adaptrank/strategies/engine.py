"""The engine of a training strategy: rounds, borders and checkpoints. It knows no trainer."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adaptrank._errors import UserError
from adaptrank.axes import forget_state, rank_axes
from adaptrank.parameterizations import Parameterization, adapted_part, wrapped_layers
from adaptrank.strategies.rate import scale_rate
from adaptrank.strategies.rounds import Rounds
from adaptrank.strategies.trained_flags import TrainedFlags

if TYPE_CHECKING:
    from adaptrank.allocation import Participant
    from adaptrank.strategies.strategy import TrainingStrategy

log = logging.getLogger("adaptrank")

VERSION = 1
"""Version of the state in a checkpoint."""


@dataclass
class StrategyRun:
    """The model and the progress of a run, as a strategy may use them.

    Args:
        model: holds the wrappers.
        layers: path before wrapping -> outermost wrapper.
        optimizers: optimizers of the run.
        rounds: the rounds of the run.
        allocators: allocators of the run, whose scores are forgotten when tensors start anew.
        seed: seed of the strategy.
        steps_done: optimizer steps so far.
        number: number of the present round.
        events_seen: events of the allocators so far.
        flags: tensors that the strategy has frozen, or has let train.
    """

    model: nn.Module
    layers: Mapping[str, Parameterization]
    optimizers: list[torch.optim.Optimizer]
    rounds: Rounds
    allocators: list["Participant"]
    seed: int
    steps_done: int = 0
    number: int = 0
    events_seen: int = 0
    handles: list[RemovableHandle] = field(default_factory=list)
    flags: TrainedFlags = field(default_factory=TrainedFlags)

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Delete optimizer state and gradients of tensors that start anew."""
        forget_state(tensors, self.optimizers)

    def forget_scores(self) -> None:
        """Let the allocators score anew, because the tensors that they scored were replaced."""
        for allocator in self.allocators:
            allocator.engine.forget_scores()

    def ranks(self) -> dict[str, int]:
        """Return the units of each axis, without those of what earlier rounds merged."""
        return {key: len(axis) for key, axis in rank_axes(self.model).items()}

    def optimized(self) -> list[Tensor]:
        """Return all parameters of the optimizers, which train in some round."""
        tensors: list[Tensor] = []
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                tensors += group["params"]
        return tensors

    def trained(self) -> int:
        """Return how many numbers train at present."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


class RoundEngine:
    """Runs one strategy: prepares the model, and acts at the borders between rounds.

    Args:
        strategy: whose hooks are called.
    """

    def __init__(self, strategy: "TrainingStrategy") -> None:
        self.strategy = strategy
        self.running = False
        self.events: list[dict[str, Any]] = []
        """Events at the start of each round."""
        self._stored: Mapping[str, Any] | None = None
        self._flags = TrainedFlags()
        self._run: StrategyRun | None = None

    @property
    def run(self) -> StrategyRun:
        """The run that was started last.

        Raises:
            RuntimeError: if none was.
        """
        if self._run is None:
            raise RuntimeError(f"{self.strategy.label} takes part in no run yet; call start().")
        return self._run

    # ---- the life of a run

    def prepare(self, model: nn.Module) -> None:
        """Add what the strategy needs to a model.

        Raises:
            UserError: if the model holds no adapter.
        """
        if not wrapped_layers(model):
            raise UserError(
                f"{self.strategy.label} found no adapter in this {type(model).__name__}; call "
                f"adaptrank.adapt(model, ...) first."
            )
        part = adapted_part(model)
        with self._flags.noting(part):
            self.strategy.prepare(part)

    def start(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        total_steps: float,
        allocators: Sequence["Participant"] = (),
        steps_done: int = 0,
    ) -> None:
        """Begin a run, or go on with the one whose checkpoint was loaded.

        Args:
            model: holds the wrappers.
            optimizers: optimizers of the run.
            total_steps: optimizer steps of the whole run.
            allocators: allocators of the same run.
            steps_done: optimizer steps of the checkpoint that the run goes on from.
        Raises:
            UserError: if the run makes no sense, or if its checkpoint is of another run.
        """
        strategy = self.strategy
        self._run = run = self._make_run(model, optimizers, total_steps, allocators, steps_done)
        self._check_switched_on()
        stored, self._stored = self._stored, None
        if stored is None:
            if steps_done:
                raise UserError(
                    f"The checkpoint is of a run without {strategy.label}; leave it out, or start "
                    f"a new run."
                )
            self.events = []
            self._enter(0)
        else:
            self._check_stored(stored, run.rounds)
            self.events = list(stored["events"])
            run.steps_done, run.number = int(stored["steps_done"]), int(stored["round"])
            with self._noting_flags():
                strategy.arrange(run.number)
            self._cross_borders()
        for allocator in run.allocators:
            allocator.engine.held = strategy.holds_allocators
        run.events_seen = _count_events(run.allocators)
        for optimizer in run.optimizers:
            run.handles += scale_rate(optimizer, lambda group: strategy.rate(run.steps_done, group))
        self.running = True

    def check_steps(self, total_steps: float) -> None:
        """Check the rounds of a run of `total_steps` optimizer steps before there is a model.

        Raises:
            UserError: if they make no sense.
        """
        if not self.strategy.rounds_of_data:
            self._rounds(total_steps)

    def check_allocators(self, allocators: Iterable["Participant"]) -> None:
        """Check that allocators can take part in a run with the strategy.

        Raises:
            UserError: if one cannot.
        """
        for allocator in allocators:
            if reason := self.strategy.refuses_allocator(allocator):
                raise UserError(f"{self.strategy.label} and {allocator.label}: {reason}.")

    def foresee(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        total_steps: float,
        allocators: Sequence["Participant"] = (),
    ) -> list[dict[str, int]]:
        """Return number, start, end and trained numbers of each round, from the shapes of a model.

        The model is prepared, and may be on the meta device. Its tensors stay as they are.

        Raises:
            UserError: for whatever a run would refuse at its start, as far as shapes tell.
        """
        self._run = run = self._make_run(model, optimizers, total_steps, allocators, 0)
        foreseen = []
        for number in range(len(run.rounds)):
            start, end = run.rounds.start(number), run.rounds.end(number)
            with self._noting_flags():
                trained = self.strategy.trained_numbers(number)
            foreseen.append({"round": number, "start": start, "end": end, "trained": trained})
        self.finish()
        return foreseen

    def ends_round(self, step: int) -> bool:
        """Return whether a round ends with an optimizer step, counted from 1."""
        return self.run.number < self.run.rounds.number(step)

    def step(self, step: int | None = None) -> dict[str, Any] | None:
        """Finish an optimizer step, and return the event if a round has begun.

        Args:
            step: number of the step, counted from 1; by default the next one.
        """
        run = self.run
        run.steps_done = run.steps_done + 1 if step is None else step
        self._follow_allocators()
        return self._cross_borders()

    def finish(self) -> None:
        """Give the optimizers their own learning rates back, and the tensors their own flags.

        What the strategy has frozen trains again, and what it has let train is frozen again. What
        the user has frozen stays so. So the next run finds the model as this one did.
        """
        if self._run is not None:
            for handle in self._run.handles:
                handle.remove()
            self._run.handles.clear()
            for allocator in self._run.allocators:
                allocator.engine.held = None
        self.release()
        self.running = False

    def release(self) -> None:
        """Undo what `prepare` and the rounds have changed about which tensors train."""
        self._flags.restore()

    def _noting_flags(self) -> AbstractContextManager[None]:
        """Return a block in which the tensors that the strategy freezes are noted."""
        return self._flags.noting(self.run.model, self.run.optimized())

    def _make_run(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        total_steps: float,
        allocators: Sequence["Participant"],
        steps_done: int,
    ) -> StrategyRun:
        """Return a run whose rounds and allocators make sense.

        Raises:
            UserError: if they do not.
        """
        self.check_allocators(allocators)
        part = adapted_part(model)
        return StrategyRun(
            part,
            wrapped_layers(part),
            list(optimizers),
            self._rounds(total_steps),
            list(allocators),
            self.strategy.seed,
            steps_done,
            flags=self._flags,
        )

    def _check_switched_on(self) -> None:
        """Refuse an adapter that is off, if the strategy would start it anew with all others.

        Raises:
            UserError: names the adapter.
        """
        is_off = [wrapper.name for wrapper in self.strategy.rewritten() if not wrapper.enabled]
        if is_off:
            raise UserError(
                f"{self.strategy.label} starts every adapter of the model anew, and "
                f"{is_off[0]!r} is switched off and would be lost; remove it by "
                f"adaptrank.delete_adapter(model, {is_off[0]!r}), or switch it on by "
                f"adaptrank.set_enabled(model, True)."
            )

    def _rounds(self, total_steps: float) -> Rounds:
        """Return the rounds of a run.

        Raises:
            UserError: if the run has no end, or one round in all.
        """
        label = self.strategy.label
        if total_steps in (-1, float("inf")):
            raise UserError(
                f"{label} divides a run into rounds, and this run has no end; give "
                f"trainer.max_steps or trainer.max_epochs."
            )
        rounds = self.strategy.rounds(int(total_steps))
        if len(rounds) < 2:
            raise UserError(
                f"{label} would have one round in this run of {int(total_steps)} optimizer steps, "
                f"and so do nothing; train longer, or ask for shorter rounds."
            )
        return rounds

    # ---- borders

    def _follow_allocators(self) -> None:
        """Let the strategy act after an event of an allocator."""
        run = self.run
        count = _count_events(run.allocators)
        if count != run.events_seen:
            run.events_seen = count
            with self._noting_flags(), torch.no_grad():
                self.strategy.follow(run.number)

    def _cross_borders(self) -> dict[str, Any] | None:
        """Close the rounds that have ended, and enter those that follow, one by one."""
        run, event = self.run, None
        while self.ends_round(run.steps_done):
            with self._noting_flags(), torch.no_grad():
                self.strategy.leave(run.number)
            event = self._enter(run.number + 1)
        return event

    def _enter(self, number: int) -> dict[str, Any]:
        run = self.run
        run.number = number
        with self._noting_flags():
            with torch.no_grad():
                self.strategy.enter(number)
            self.strategy.arrange(number)
        event = {
            "step": run.steps_done,
            "round": number,
            "rounds": len(run.rounds),
            "strategy": self.strategy.label,
            "ranks": run.ranks(),
            "trained": run.trained(),
            **self.strategy.describe_border(number),
        }
        self.events.append(event)
        return event

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the round, the arguments, and the events so far."""
        run = self._run
        return {
            "version": VERSION,
            "class": self.strategy.label,
            "init_args": self.strategy.init_args,
            "round": 0 if run is None else run.number,
            "steps_done": 0 if run is None else run.steps_done,
            "borders": [] if run is None else list(run.rounds.borders),
            "events": self.events,
        }

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Take what a checkpoint holds; the next `start` goes on from there.

        Raises:
            UserError: if the state is damaged.
        """
        missing = {"class", "init_args", "round", "steps_done", "borders", "events"} - set(stored)
        if missing or stored.get("version") != VERSION:
            raise UserError(
                f"The checkpoint's state of {self.strategy.label} is damaged or of another "
                f"version; start a new run, or use another checkpoint."
            )
        self._stored, self.running = stored, False

    def _check_stored(self, stored: Mapping[str, Any], rounds: Rounds) -> None:
        """Compare the run of a checkpoint with this one.

        Raises:
            UserError: naming the differences.
        """
        before, now = dict(stored["init_args"]), self.strategy.init_args
        differences = [
            f"{name}: {before.get(name)!r} there, {value!r} here"
            for name, value in now.items()
            if before.get(name) != value
        ]
        done = int(stored["steps_done"])
        # A run that ended where a longer one has a border crosses it when it goes on.
        passed = [border for border in stored["borders"] if border < done]
        moved = [border for border in rounds.borders if border < done] != passed
        if moved or int(stored["round"]) > rounds.number(done):
            differences.append("rounds that are over ended at other steps")
        if not differences:
            return
        listed = "; ".join(differences)
        if not self.strategy.accept_changes:
            raise UserError(
                f"The checkpoint is of another run of {self.strategy.label} ({listed}); restore "
                f"these settings, or set accept_changes: true in the model."
            )
        log.warning("%s goes on with other settings: %s.", self.strategy.label, listed)


def _count_events(allocators: Iterable["Participant"]) -> int:
    return sum(len(allocator.events) for allocator in allocators)
