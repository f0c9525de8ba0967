"""The points of a study, each a whole configuration of `fit`. Nothing is run or loaded here.

Budgets are matched, not guessed. The integer that replaces `$budget` in a configuration is the
largest one whose number of trainable parameters does not exceed the budget. Parameters are counted
on the meta device.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from adaptrank._errors import UserError
from adaptrank.studies.choices import GridPoint, grid_points, set_grid_point
from adaptrank.studies.key_paths import Accepts, short_names
from adaptrank.studies.overlays import Config, contains, map_texts, merge, set_at
from adaptrank.studies.study_file import BUDGET, SEED, Study

Count = Callable[[Config], int]
"""Configuration -> number of parameters that train in adapters. A refusal is a ValueError."""

LONGEST_PART = 24
"""Characters of a value of a grid in the name of a folder."""

UNFIT_FOR_FOLDERS = re.compile(r"[/\\\s:*?\"<>|]")
"""Characters that the name of a folder does without."""

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
        grid: (key, value) of each key of the study's grid.
    """

    method: str
    allocator: str
    budget: int | None
    units: int | None
    parameters: int
    config: Config
    grid: GridPoint = ()


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
        grid: (key, value) of each key of the study's grid.
        spectra: whether the spectra of the adapter are collected after the run.
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
    grid: GridPoint = field(default=(), hash=False)
    spectra: bool = False

    @property
    def key(self) -> str:
        """Name of the folder of the run. It is the same for the same configuration."""
        parts = [self.method]
        if self.allocator != "none":
            parts.append(self.allocator)
        if self.budget is not None:
            parts.append(f"b{self.budget}")
        names = short_names([key for key, _ in self.grid])
        parts += [f"{names[key]}_{value}"[:LONGEST_PART] for key, value in self.grid]
        if self.lr is not None:
            parts.append(f"lr{self.lr:g}")
        parts.append(f"s{self.seed}")
        if self.trial:
            parts.append("trial")
        content = json.dumps(self.config, sort_keys=True).encode()
        parts.append(hashlib.blake2b(content, digest_size=5).hexdigest())
        return "-".join(UNFIT_FOR_FOLDERS.sub("_", part) for part in parts)


class Solution(NamedTuple):
    """The integer that was solved for a budget, its parameters, and the configuration with it."""

    units: int
    parameters: int
    config: Config


def solve_settings(
    study: Study, count: Count, accepts: Accepts | None = None
) -> Iterator[Setting | str]:
    """Yield every method with every allocator at every point of the grid and every budget.

    A combination that fits no budget is yielded as a sentence that says why.

    Args:
        study: the study.
        count: counts the parameters of a configuration.
        accepts: tells which class takes an argument, for short keys of a grid.

    Raises:
        UserError: if a key of the grid leads to no place in a configuration.
    """
    for method, allocator in itertools.product(study.methods, study.allocators):
        config = merge(study.config, study.methods[method])
        config = merge(config, study.allocators[allocator])
        for point in grid_points(study.grid):
            try:
                varied = set_grid_point(config, point, accepts)
            except UserError as error:
                raise UserError(f"grid: {error}") from None
            for setting in _settings_of(study, method, allocator, varied, count):
                yield _at_grid_point(setting, point)


def _settings_of(
    study: Study, method: str, allocator: str, config: Config, count: Count
) -> Iterator[Setting | str]:
    """Yield the settings of a configuration at the budgets of the study."""
    if contains(config, BUDGET):
        yield from _solved_settings(study.budgets, method, allocator, config, count)
    else:
        yield _fixed_setting(study.budgets, method, allocator, config, count)


def _at_grid_point(setting: Setting | str, point: GridPoint) -> Setting | str:
    if isinstance(setting, Setting):
        return replace(setting, grid=point)
    values = ", ".join(f"{key}={value}" for key, value in point)
    return f"{values}: {setting}" if point else setting


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

    There is one for each rate and each seed of the trials, and none if there is nothing to select.
    """
    points: list[Point] = []
    if len(study.lrs) > 1:
        for lr in study.lrs:
            points += rate_trials(study, setting, lr)
    return points


def rate_trials(study: Study, setting: Setting, lr: float) -> list[Point]:
    """Return the runs that try a learning rate for a setting, one for each seed of the trials."""
    config = merge(setting.config, study.selection["overlay"])
    return [_point(study, setting, config, lr, seed, trial=True) for seed in study.trial_seeds]


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
    config = map_texts(config, lambda text: seed if text == SEED else text)
    return Point(
        method=setting.method,
        allocator=setting.allocator,
        budget=setting.budget,
        lr=lr,
        seed=seed,
        units=setting.units,
        parameters=setting.parameters,
        trial=trial,
        spectra=study.spectra and not trial,
        config=config,
        grid=setting.grid,
    )
