"""The points of a study, each a whole configuration of `fit`. Nothing is run or loaded here.

Budgets are matched, not guessed. The integer that replaces `$budget` in a configuration is the
largest one whose number of trainable parameters does not exceed the budget. Parameters are counted
on the meta device.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from adaptrank.studies.overlays import Config, contains, map_texts, merge, set_at
from adaptrank.studies.study_file import BUDGET, Study

Count = Callable[[Config], int]
"""Configuration -> number of parameters that train in adapters. A refusal is a ValueError."""

LARGEST = 1 << 14
"""Bound on the integer that is solved for a budget."""


@dataclass(frozen=True)
class Setting:
    """A method with an allocator at a budget. Learning rate and seed are still open.

    Args:
        method: name of the method.
        allocator: name of the allocator, "none" without one.
        budget: largest number of trainable parameters, None if the study has no budgets.
        units: integer that was solved for the budget, None if there was none to solve.
        parameters: number of parameters that train in adapters at the start.
        config: whole configuration.
    """

    method: str
    allocator: str
    budget: int | None
    units: int | None
    parameters: int
    config: Config


@dataclass(frozen=True)
class Point:
    """One run.

    Args:
        method: name of the method.
        allocator: name of the allocator, "none" without one.
        budget: largest number of trainable parameters, None if the study has no budgets.
        lr: learning rate, None for the configuration's own.
        seed: seed of the run.
        units: integer that was solved for the budget, None if there was none to solve.
        parameters: number of parameters that train in adapters at the start.
        trial: whether the run only helps to select a learning rate.
        config: whole configuration.
    """

    method: str
    allocator: str
    budget: int | None
    lr: float | None
    seed: int
    units: int | None
    parameters: int
    trial: bool
    config: Config = field(hash=False, compare=False)

    @property
    def key(self) -> str:
        """Name of the folder of the run. It is the same for the same configuration."""
        parts = [self.method]
        if self.allocator != "none":
            parts.append(self.allocator)
        if self.budget is not None:
            parts.append(f"b{self.budget}")
        if self.lr is not None:
            parts.append(f"lr{self.lr:g}")
        parts.append(f"s{self.seed}")
        if self.trial:
            parts.append("trial")
        content = json.dumps(self.config, sort_keys=True).encode()
        parts.append(hashlib.blake2b(content, digest_size=5).hexdigest())
        return "-".join(part.replace("/", "_").replace(" ", "_") for part in parts)


class Solution(NamedTuple):
    """The integer that was solved for a budget, its parameters, and the configuration with it."""

    units: int
    parameters: int
    config: Config


def solve_settings(study: Study, count: Count) -> Iterator[Setting | str]:
    """Yield every method with every allocator at every budget.

    A combination that fits no budget is yielded as a sentence that says why.
    """
    for method, method_overlay in study.methods.items():
        for allocator, allocator_overlay in study.allocators.items():
            config = merge(merge(study.config, method_overlay), allocator_overlay)
            if contains(config, BUDGET):
                yield from _solved_settings(study.budgets, method, allocator, config, count)
            else:
                yield _fixed_setting(study.budgets, method, allocator, config, count)


def _solved_settings(
    budgets: Sequence[int], method: str, allocator: str, config: Config, count: Count
) -> Iterator[Setting | str]:
    """Yield one setting for each budget."""
    for budget in budgets:
        solution = solve_budget(config, budget, count)
        if isinstance(solution, str):
            yield f"{method}, {allocator}, {budget:,}: {solution}"
        else:
            units, parameters, solved = solution
            yield Setting(method, allocator, budget, units, parameters, solved)


def _fixed_setting(
    budgets: Sequence[int], method: str, allocator: str, config: Config, count: Count
) -> Setting | str:
    """Return the one setting of a configuration of a fixed size, at the smallest budget it fits."""
    parameters = count(config)
    fitting = [budget for budget in budgets if parameters <= budget]
    if budgets and not fitting:
        return f"{method} has {parameters:,} parameters at any budget, above all of them"
    return Setting(method, allocator, min(fitting, default=None), None, parameters, config)


def solve_budget(config: Config, budget: int, count: Count) -> Solution | str:
    """Solve for the largest integer in place of `$budget` that does not exceed the budget.

    The number of parameters has to grow with the integer. An integer that the method refuses is too
    large.

    Returns:
        The solution, or the reason why even 1 does not fit.
    """
    try:
        least = count(_with_units(config, 1))
    except ValueError as error:
        return str(error).split("\n", 1)[0]
    if least > budget:
        return f"already 1 takes {least:,} parameters"

    def fits(units: int) -> bool:
        try:
            return count(_with_units(config, units)) <= budget
        except ValueError:
            return False

    units = _largest_fitting(fits)
    solved = _with_units(config, units)
    return Solution(units, count(solved), solved)


def _largest_fitting(fits: Callable[[int], bool]) -> int:
    """Return the largest integer below the bound that fits, by bisection. 1 has to fit."""
    low, high = 1, 2
    while high < LARGEST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def _with_units(config: Config, units: int) -> Config:
    """Return the configuration with an integer in place of `$budget`."""

    def change(text: str) -> int | str:
        return units if text == BUDGET else text.replace(BUDGET, str(units))

    filled: Config = map_texts(config, change)
    return filled


def trial_points(study: Study, setting: Setting) -> list[Point]:
    """Return the runs that select the learning rate of a setting.

    There is one for each rate, with the first seed, and none if there is nothing to select.
    """
    if len(study.lrs) < 2:
        return []
    config = merge(setting.config, study.selection["overlay"])
    return [_point(study, setting, config, lr, study.seeds[0], trial=True) for lr in study.lrs]


def reported_points(study: Study, setting: Setting, lr: float | None) -> list[Point]:
    """Return the runs of a setting that are reported, one for each seed."""
    return [_point(study, setting, setting.config, lr, seed, trial=False) for seed in study.seeds]


def _point(
    study: Study, setting: Setting, config: Config, lr: float | None, seed: int, trial: bool
) -> Point:
    if lr is not None:
        config = set_at(config, study.lr_key, lr)
    for key in study.seed_keys:
        config = set_at(config, key, seed)
    return Point(
        method=setting.method,
        allocator=setting.allocator,
        budget=setting.budget,
        lr=lr,
        seed=seed,
        units=setting.units,
        parameters=setting.parameters,
        trial=trial,
        config=config,
    )
