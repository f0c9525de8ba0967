"""RandomMoves: as many units move at the same steps, between axes drawn at random."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from adaptrank._errors import UserError
from adaptrank.allocation.budget import Filling, Floor, floor_of
from adaptrank.allocation.context import Axes
from adaptrank.allocation.controls.recorded_run import Move, RecordedMoves, read_moves
from adaptrank.allocation.events import Proposal
from adaptrank.allocation.plans import Caps, Close, Plan, Resize, Scores
from adaptrank.allocation.policy import Policy
from adaptrank.allocation.schedules import Phases, late_drop
from adaptrank.allocation.state import TrackedTensors
from adaptrank.axes import CostModel, generator

SCHEDULE = {"swaps": 4, "every": 50, "warmup": 0.1, "final": 0.3}
"""Defaults of the schedule without a recorded run: those of ElaLoRA."""


class RandomMoves(Policy[TrackedTensors], control=True):
    """Move as many units as a recorded run did, at the same steps, between axes drawn at random.

    This is a control for allocators. It has their training dynamics, such as fresh units and
    shrinking budgets, and knows nothing of importance. What an allocator gains over it is due to
    its scores.

    At an event every unit has the same chance to be pruned, as long as its axis keeps `floor`
    units. Each fresh unit takes the place of a pruned one, and costs as much. Its axis is drawn
    among those that lost no unit in this event and are below `cap`, each with the same chance. A
    pruned unit for whose cost there is no axis stays. So the total is exact, in ranks as well as in
    parameters. Where the recorded run closed units (soft pruning), as many are closed. A closed
    unit stays closed as long as the number of closed units does not fall.

    Without a recorded run the number of units is that of ElaLoRA's schedule, b (1 - p^3).

    Args:
        run: folder of the recorded run, such as runs/NAME/0. It has a `ranks.jsonl`. Both runs
            start with as many units.
        swaps: b, the largest number of units of an event, without `run` only. None is 4.
        every, warmup, final: as in `Policy`, without `run` only. None is 50, 0.1 and 0.3.
        unit: what a move keeps, "ranks" or "parameters". With "parameters" a unit moves only
            between axes whose units cost the same.
        floor: smallest number of units of an axis.
        cap: largest number of units of an axis; None is the ceiling of the method.
        seed: seed of the draws, and of the generator that initializes new units.
    Raises:
        UserError: for a schedule beside `run`, or a run that is not there. At the start: if the
            recorded run had another number of units, or more steps.
    """

    requires = frozenset({"grow"})

    def __init__(
        self,
        run: str | None = None,
        swaps: int | None = None,
        every: int | None = None,
        warmup: int | float | None = None,
        final: int | float | None = None,
        unit: Literal["ranks", "parameters"] = "ranks",
        floor: int = 0,
        cap: int | None = None,
        seed: int = 0,
    ) -> None:
        given = {"swaps": swaps, "every": every, "warmup": warmup, "final": final}
        _check_one_schedule(run, given)
        chosen: dict[str, Any] = {
            name: SCHEDULE[name] if value is None else value for name, value in given.items()
        }
        self.swaps: int = chosen.pop("swaps")
        if self.swaps < 1:
            raise UserError(f"swaps={self.swaps}: move at least 1 unit at an event.")
        every, warmup, final = chosen["every"], chosen["warmup"], chosen["final"]
        super().__init__(None, unit, every, warmup, final, floor, cap, seed)
        self.recorded = None if run is None else read_moves(run)

    def update(self, state: TrackedTensors, axes: Axes) -> None:
        """No-op. Nothing is observed."""

    def score_units(self, state: TrackedTensors, axes: Axes) -> Scores:
        return {key: torch.zeros(len(axis)) for key, axis in axes.items()}

    def budget_at(self, step: int) -> int:
        start = self.run.start_total
        move = None if self.recorded is None else self.recorded.at(step)
        if self.recorded is None or move is None or self.unit == "parameters":
            return start
        return start - self.recorded.units + move.active

    def plan(self, scores: Scores, cost: CostModel, budget: int, step: int) -> Plan:
        return self._draw(cost, budget, step).plan

    # ---- optional members

    def propose(
        self, state: TrackedTensors, scores: Scores, cost: CostModel, budget: int, step: int
    ) -> Proposal:
        draw = self._draw(cost, budget, step)
        if not draw.left_out:
            return Proposal(draw.plan)
        return Proposal(draw.plan, f"{draw.left_out} units found no axis to move to, and stay")

    def acts_at(self, step: int) -> bool:
        move = self._move_at(step)
        return bool(move.pruned or move.grown or move.closed)

    def phases_of(self, total: int) -> Phases:
        """Return the phases of a run of `total` steps: those of the recorded run, if there is one.

        Raises:
            UserError: if the recorded run is longer, or its events are at no regular steps.
        """
        if self.recorded is None:
            return super().phases_of(total)
        return _phases_of(self.recorded, total)

    def check_start(self, sizes: Mapping[str, int]) -> None:
        units = sum(sizes.values())
        if self.recorded is not None and units != self.recorded.units:
            raise UserError(
                f"{self.label}: the run {self.recorded.folder!r} starts with "
                f"{self.recorded.units} units, and this one with {units}. Start with the same "
                f"ranks."
            )

    def _move_at(self, step: int) -> Move:
        """Return how many units an event moves."""
        nothing = Move(step, 0, 0, 0, 0)
        if self.recorded is not None:
            return self.recorded.at(step) or nothing
        swaps = late_drop(self.swaps, self.run.phases.progress(step))
        return Move(step, swaps, swaps, 0, 0)

    def _draw(self, cost: CostModel, budget: int, step: int) -> "Draw":
        sizes, closed = self.run.sizes(), self.run.progress.closed
        random = generator(self.seed, self.label, step)
        move = self._move_at(step)
        order = shuffled_units(sizes, closed, random)
        floor = self.floors()
        if move.closed:
            return Draw(close_first(sizes, order, move.closed, floor))
        return exchange_at_random(sizes, cost, budget, move, order, floor, self.caps(), random)


@dataclass(frozen=True)
class Draw:
    """A plan, and the number of units that found no axis to move to."""

    plan: Plan
    left_out: int = 0


Unit = tuple[str, int]
"""(axis key, index of the unit)."""


def shuffled_units(
    sizes: Mapping[str, int], closed: Mapping[str, Sequence[int]], random: torch.Generator
) -> list[Unit]:
    """Return all units in random order, the closed ones first."""
    units = [(axis, unit) for axis, size in sizes.items() for unit in range(size)]
    order = [units[place] for place in torch.randperm(len(units), generator=random).tolist()]
    # The sort is stable, so that both parts stay in random order.
    return sorted(order, key=lambda entry: entry[1] not in closed.get(entry[0], ()))


def close_first(sizes: Mapping[str, int], order: Sequence[Unit], count: int, floor: Floor) -> Plan:
    """Return a plan that closes the first units of an order, as far as the floors allow it."""
    closed: dict[str, list[int]] = {}
    left = count
    for axis, unit in order:
        if left and sizes[axis] - len(closed.get(axis, ())) > floor_of(floor, axis):
            closed.setdefault(axis, []).append(unit)
            left -= 1
    return {axis: Close(tuple(sorted(units))) for axis, units in closed.items()}


def exchange_at_random(
    sizes: Mapping[str, int],
    cost: CostModel,
    budget: int,
    move: Move,
    order: Sequence[Unit],
    floor: Floor,
    caps: Caps,
    random: torch.Generator,
) -> Draw:
    """Prune the first units of an order, and grow as many as `move` says, each for the same cost.

    Units that no fresh one replaces are pruned first. Further fresh units are bought as long as
    they fit the budget.

    Args:
        sizes: units of each axis.
        cost: cost model in the unit of the budget.
        budget: total not to be exceeded.
        move: number of units to prune, and to grow.
        order: all units, those to prune first.
        floor: least number of units of an axis.
        caps: axis -> largest number of units, None for no cap.
        random: generator that draws the axes of fresh units.
    """
    filling = Filling(sizes, cost, budget)
    pruned: dict[str, set[int]] = {axis: set() for axis in sizes}
    grown = dict.fromkeys(sizes, 0)
    losers = _first_that_may_go(sizes, order, move.pruned, floor)
    losing_axes = {axis for axis, _ in losers}
    without_successor = max(0, move.pruned - move.grown)
    left_out = move.pruned - len(losers)
    for number, (axis, unit) in enumerate(losers):
        before = filling.total
        filling.remove(axis)
        if number >= without_successor:
            price = before - filling.total
            winner = _drawn_axis(filling, caps, price, losing_axes, random)
            if winner is None:
                filling.add(axis)
                left_out += 1
                continue
            filling.add(winner)
            grown[winner] += 1
        pruned[axis].add(unit)
    for _ in range(move.grown - move.pruned):
        winner = _drawn_axis(filling, caps, None, losing_axes, random)
        if winner is None:
            left_out += 1
            continue
        filling.add(winner)
        grown[winner] += 1
    plan: Plan = {}
    for axis, size in sizes.items():
        if pruned[axis] or grown[axis]:
            keep = tuple(unit for unit in range(size) if unit not in pruned[axis])
            plan[axis] = Resize(keep, grown[axis])
    return Draw(plan, left_out)


def _first_that_may_go(
    sizes: Mapping[str, int], order: Sequence[Unit], count: int, floor: Floor
) -> list[Unit]:
    remaining = dict(sizes)
    losers: list[Unit] = []
    for axis, unit in order:
        if len(losers) < count and remaining[axis] > floor_of(floor, axis):
            remaining[axis] -= 1
            losers.append((axis, unit))
    return losers


def _drawn_axis(
    filling: Filling,
    caps: Caps,
    price: int | None,
    losing_axes: set[str],
    random: torch.Generator,
) -> str | None:
    """Draw the axis of a fresh unit, or return None if no axis may take it.

    The unit has this price. With None it has any price that fits the budget.
    """

    def may_take(axis: str) -> bool:
        cap = caps.get(axis)
        if cap is not None and filling.sizes[axis] >= cap:
            return False
        if price is None:
            return filling.affords(axis)
        return filling.cost.marginal(axis, filling.sizes) == price

    candidates = [axis for axis in filling.sizes if axis not in losing_axes and may_take(axis)]
    if not candidates:
        return None
    place = int(torch.randint(len(candidates), (), generator=random))
    return candidates[place]


def _check_one_schedule(run: str | None, given: Mapping[str, Any]) -> None:
    """Refuse a schedule beside a recorded run, which has one."""
    names = [name for name, value in given.items() if value is not None]
    if run is not None and names:
        raise UserError(
            f"RandomMoves takes the steps and the numbers of moves from run={run!r}. Leave "
            f"{', '.join(names)} out, or leave `run` out."
        )


def _phases_of(recorded: RecordedMoves, total: int) -> Phases:
    steps = [move.step for move in recorded.moves]
    every = steps[1] - steps[0] if len(steps) > 1 else 1
    if steps[-1] > total:
        raise UserError(
            f"RandomMoves: the run {recorded.folder!r} moved units up to step {steps[-1]}, and "
            f"this one has {total} steps. Train as long."
        )
    phases = Phases(total, max(0, steps[0] - every), total - steps[-1], every)
    if phases.events() != steps:
        raise UserError(
            f"RandomMoves: the events of the run {recorded.folder!r} are at no regular steps, "
            f"such as {steps[:4]}. Name a run without a pause."
        )
    return phases
