"""The engine of an allocator: phases, events, checkpoints and refusals.

The engine knows no method and no trainer. A shell calls `start`, `before_step`, `step` and
`finish`; the engine calls the hooks of the participant in between.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from adaptrank._collectives import first
from adaptrank.allocation import checks, resuming
from adaptrank.allocation.bad_gradients import BadSteps, all_finite, unchanged_unless
from adaptrank.allocation.beginning import begin
from adaptrank.allocation.context import Loss, Run
from adaptrank.allocation.event_run import run_event
from adaptrank.allocation.events import Event, execute
from adaptrank.allocation.growth import parameter_growth
from adaptrank.allocation.plans import Close, Plan
from adaptrank.allocation.state import Progress, TrackedTensors
from adaptrank.allocation.taking_part import say_left_out, taking_part
from adaptrank.allocation.trained_units import OwnStart, own_start
from adaptrank.axes import CLOSED, check_optimizer
from adaptrank.parameterizations import adapted_part

if TYPE_CHECKING:
    from adaptrank.allocation.participant import Participant
    from adaptrank.allocation.policy import Policy

log = logging.getLogger("adaptrank")


class Engine:
    """Runs one participant: an allocator or a rank initializer.

    Args:
        participant: whose hooks are called.
    """

    def __init__(self, participant: "Participant") -> None:
        self.participant = participant
        self.running = False
        self.restored = False
        """Whether a checkpoint was loaded that the next start goes on from."""
        self.stored_run: Mapping[str, Any] | None = None
        """Description of the run whose checkpoint was loaded; None in one of an earlier version."""
        self.state = TrackedTensors()
        self.progress = Progress(budget=(participant.budget, participant.unit))
        self.rests_until = 0
        """Optimizer step up to which it neither scores nor moves anything."""
        self.held: Callable[[int], bool] | None = None
        """Whether an event at a step is left out, by the rounds of a training strategy. The last
        event of the run is never left out."""
        self._bad_steps = BadSteps()
        self._own_start: OwnStart = {}
        """Closing factors that a rank initializer has set, until the first step."""
        self._run: Run | None = None
        self._told = False
        self._has_seen_state = False

    @property
    def run(self) -> Run:
        """The run that was started last.

        Raises:
            RuntimeError: if none was.
        """
        if self._run is None:
            raise RuntimeError(f"{self.participant.label} takes part in no run yet; call start().")
        return self._run

    # ---- the life of a run

    def start(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        total_steps: float,
        batches: Iterable[Any] = (),
        loss: Loss | None = None,
    ) -> None:
        """Begin a run, or go on with the one whose checkpoint was loaded.

        Args:
            model: holds the wrappers, on its device.
            optimizers: one optimizer, or several.
            total_steps: optimizer steps of the whole run.
            batches: training batches, for allocators that look at data; they are read when needed.
            loss: batch -> mean loss, for allocators that evaluate it.
        Raises:
            ValueError: if the run makes no sense.
        """
        participant = self.participant
        if isinstance(optimizers, torch.optim.Optimizer):
            optimizers = [optimizers]
        resumed, self.restored = self.restored, False
        self.rests_until = 0
        if not resumed:
            self.progress = Progress()
        run = self._attach_model(model, list(optimizers), batches, loss)
        self._has_seen_state = False
        self._check_optimizers()
        checks.check_gates(participant, run)
        phases = checks.phases_of(participant, total_steps)
        if resumed:
            resuming.check_resume(participant, run, phases, self.stored_run)
        self.progress.phases = phases
        self.progress.budget = (participant.budget, participant.unit)
        checks.check_schedule(participant, phases)
        state = participant.init_state(run.axes)
        if resumed:
            resuming.check_tracked(participant, self.state, run.axes)
            state.load_state_dict(self.state.state_dict())
        self.state = state
        if not resumed:
            begin(participant, run, self._own_start)
            self._own_start = own_start(run.axes) if participant.sets_tensors else {}
        self.state.to(_device(run.model))
        self._bad_steps = BadSteps(self.progress.bad_steps)
        if run.examples_needed:
            len(run.examples)  # read now, so that a checkpoint of any step has them
        participant.install(self.state, run.axes)
        self._before_pass()
        self.running = True
        self._told = False

    def before_step(self, scale: float = 1.0) -> None:
        """Update the state once the gradients of an optimizer step are complete.

        A step whose gradients are not finite leaves the state as it was. The device is not asked
        whether they are: the update is made, and undone there.

        Args:
            scale: factor by which a gradient scaler multiplied the loss. The gradients in the
                optimizer are unscaled already. Those of trained gates are in no optimizer.
        Raises:
            RuntimeError: after too many steps in a row with gradients that are not finite.
        """
        nothing_left = self.participant.moves and not self.run.moves_left
        if nothing_left or self.progress.steps_done < self.rests_until:
            for leaf in self.state.leaves():
                leaf.grad = None
            return
        with torch.no_grad():
            finite = self._finite_gradients(scale)
            self._bad_steps.note(finite)
            with unchanged_unless(finite, self.state):
                self.participant.update(self.state, self.run.axes)

    def read_bad_steps(self) -> None:
        """Note the steps in a row without finite gradients. Call it where the device is read."""
        self.progress.bad_steps = self._bad_steps.read()

    def step(self, step: int | None = None) -> Event | None:
        """Finish an optimizer step, and return the event if there was one.

        An event is due on reaching its step, or on passing it.

        Args:
            step: number of the step, counted from 1; by default the next one.
        """
        progress, participant, run = self.progress, self.participant, self.run
        before = progress.steps_done
        self._own_start = {}
        progress.steps_done = before + 1 if step is None else step
        if not self._has_seen_state:
            self._check_optimizers()  # now they have state to judge by
            self._has_seen_state = True
        if progress.steps_done <= self.rests_until:
            self._before_pass()
            return None
        with torch.no_grad():
            participant.finish_step(self.state, run.axes)
        event = self._due_events(before)
        if participant.moves and not run.moves_left:
            self.state.clear()  # nothing moves any more
        self._before_pass()
        return event

    def catch_up(self) -> Event | None:
        """Carry out the last event in a run that has ended before it, so that its budget is met."""
        progress, run = self.progress, self.run
        if not self.participant.moves or not run.moves_left:
            return None
        steps_done, end = progress.steps_done, run.phases.end
        progress.steps_done = max(steps_done, end)
        event = self._event()
        event["reason"] += f"; training ended after step {steps_done}, before this event"
        log.warning(
            "%s: training ended after %d of %d planned steps, before the last event at step %d. "
            "It was carried out at the end, and nothing was trained after it.",
            self.participant.label,
            steps_done,
            run.phases.total,
            end,
        )
        return event

    def finish(self) -> None:
        """Remove the hooks of the participant, and say what an early end leaves undone.

        A warning says so if a budget in ranks let the number of parameters grow.
        """
        self.say_shortfall()
        self._say_growth()
        if self._run is not None:
            for handle in self._run.handles:
                handle.remove()
            self._run.handles.clear()
        self.running = False

    def say_shortfall(self) -> None:
        """Log one line, once, if the run ended before its last event and misses its budget."""
        if self.running and self._run is not None and self.progress.steps_done:
            self._run.model.__dict__.pop(CLOSED, None)
            if first() and not self._told and (text := checks.shortfall(self.participant)):
                log.warning(text)
            self._told = True

    def _say_growth(self) -> None:
        """Log one line if the run carried out its last event, and parameters grew."""
        is_over = self.running and self._run is not None and not self._run.moves_left
        if is_over and first() and (text := parameter_growth(self.participant)):
            log.warning(text)

    def foresee(self, model: nn.Module, total_steps: float) -> list[tuple[int, int | None]]:
        """Return (step, budget) of every event of a run, from the shapes of a model alone.

        The model may be on the meta device.

        Raises:
            ValueError: for whatever a run would refuse at its start, as far as shapes tell.
        """
        participant = self.participant
        self.progress = Progress()
        run = self._attach_model(model, [], (), None)
        phases = checks.phases_of(participant, total_steps)
        self.progress.phases = phases
        checks.check_schedule(participant, phases)
        run.note_start()
        if not participant.moves:
            return []
        participant.check_start(run.start_sizes)
        checks.check_budget(participant, run)
        return [(step, participant.budget_at(step)) for step in phases.events()]

    def check_steps(self, total_steps: float) -> None:
        """Check the schedule of a run of `total_steps` optimizer steps before there is a model.

        Raises:
            ValueError: if it would never act.
        """
        participant = self.participant
        phases = checks.phases_of(participant, total_steps)
        self.progress = Progress(phases=phases)
        self._run = Run(participant.label, nn.Module(), {}, [], self.progress, participant.unit)
        checks.check_schedule(participant, phases)

    def rest_until(self, step: int) -> None:
        """Neither score nor move anything up to an optimizer step.

        A training strategy calls it where the axes do not train at first.

        Raises:
            UserError: if an event would be due by then.
        """
        checks.check_rest(self.participant, step)
        self.rests_until = step

    def forget_scores(self) -> None:
        """Start the state anew, because the tensors that it describes were replaced.

        A training strategy calls it when a round begins.
        """
        self.state = self.participant.init_state(self.run.axes)
        self.state.to(_device(self.run.model))
        if self.participant.moves and not self.run.moves_left:
            self.state.clear()

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return progress, tracked tensors, and a description of the run."""
        self.read_bad_steps()
        model = None if self._run is None else self._run.model
        return {
            **self.progress.state_dict(),
            "tracked": self.state.state_dict(),
            "run": resuming.describe_run(self.participant, model),
        }

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Take what a checkpoint holds; the next `start` goes on from there.

        Raises:
            ValueError: if the state is damaged.
        """
        state = TrackedTensors()
        try:
            progress = Progress.from_state_dict(stored)
            state.load_state_dict(stored["tracked"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise resuming.damaged(self.participant, error) from error
        self.restored, self.running = True, False
        self.progress, self.state = progress, state
        self._bad_steps = BadSteps(progress.bad_steps)
        self.stored_run = stored.get("run")
        if self._run is not None:
            self._run.progress = self.progress

    # ---- events

    def apply(self, plan: Plan, step: int) -> Event:
        """Carry a plan out, and return what was done."""
        run = self.run
        closed = {key: c.units for key, c in plan.items() if isinstance(c, Close)}
        done = execute(plan, run.axes, self.state, run.optimizers, self.participant.seed, step)
        self.progress.closed = closed
        run.model.__dict__[CLOSED] = closed
        return done

    @property
    def _policy(self) -> "Policy[Any]":
        """The participant, which moves ranks. Only a policy has events."""
        return cast("Policy[Any]", self.participant)

    def _due_events(self, before: int) -> Event | None:
        """Carry out the events after step `before`, each at its own step; return the last one."""
        if not self.participant.moves:
            return None
        progress, phases = self.progress, self.run.phases
        step, event = progress.steps_done, None
        for due in phases.events_between(before, step):
            if self.held is not None and due != phases.end and self.held(due):
                continue
            progress.steps_done = due
            event = self._event()
        progress.steps_done = step
        if event is None and progress.deferred and step > phases.end:
            event = self._event()
        return event

    def _check_optimizers(self) -> None:
        """Refuse an optimizer that moves the axes and whose state cannot follow them."""
        tensors = self.run.trained_tensors()
        for optimizer in self.run.owners():
            check_optimizer(optimizer, tensors)

    def _event(self) -> Event:
        self._check_optimizers()  # some tensors may have got their state late
        self.read_bad_steps()
        return run_event(self._policy, self.run, self.state, self.apply)

    # ---- the start of a run

    def _attach_model(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        batches: Iterable[Any],
        loss: Loss | None,
    ) -> Run:
        participant = self.participant
        part = adapted_part(model)
        run = Run(
            owner=participant.label,
            model=part,
            axes={},
            optimizers=optimizers,
            progress=self.progress,
            unit=participant.unit,
            batches=batches,
            loss_function=loss,
        )
        self._run = run
        axes = participant.find_axes(part)
        trained = {key: axis for key, axis in axes.items() if axis.trainable()}
        begun_with = self.progress.start_sizes  # empty in a new run
        run.axes = taking_part(trained, optimizers, begun_with)
        run.left_out = {key: axis for key, axis in trained.items() if key not in run.axes}
        say_left_out(participant.label, run.left_out)
        run.examples_needed = participant.examples_needed()
        checks.check_form(participant)
        checks.check_axes(participant, run)
        return run

    # ---- gradients and passes

    def _finite_gradients(self, scale: float) -> Tensor | None:
        """Unscale the gradients of trained gates, and return whether all gradients are finite.

        The answer, (), stays on the device. It is None if there is no gradient.
        """
        gates = [leaf.grad for leaf in self.state.leaves() if leaf.grad is not None]
        if gates and scale != 1.0:
            torch._foreach_mul_(gates, 1 / scale)
        tensors = [slot.tensor for axis in self.run.axes.values() for slot in axis.slots()]
        return all_finite([tensor.grad for tensor in tensors if tensor.grad is not None] + gates)

    @torch.no_grad()
    def _before_pass(self) -> None:
        self.participant.before_pass(self.state, self.run.axes)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
