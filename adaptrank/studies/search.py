"""Trials of learning rates: the metric that selects, and rates that Optuna proposes."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from adaptrank.studies.design import Point, Setting, rate_trials
from adaptrank.studies.engines import Result
from adaptrank.studies.study_file import Study

RunPoints = Callable[[Sequence[Point], str], list[Result]]
"""(points, what they are) -> their results. Points that are finished are not run again."""

SIGNIFICANT = 4
"""Digits of a learning rate that is tried."""


def search_trials(study: Study, settings: Sequence[Setting], run_points: RunPoints) -> list[Result]:
    """Run all trials of a search, and return their results.

    Each setting has a sampler of its own, a tree-structured Parzen estimator with the seed of the
    search. It proposes a rate, on a logarithmic scale, from the results so far. So a search that
    was stopped proposes the same rates again, and finds the results of those that are finished.

    Args:
        study: study with a `search`.
        settings: settings whose learning rate is searched for.
        run_points: runs the trials of one round, one for each setting.

    Raises:
        ModuleNotFoundError: if Optuna is missing.
    """
    searches = [_optuna_study(study) for _ in settings]
    low, high = study.search["low"], study.search["high"]
    results: list[Result] = []
    for number in range(study.search["trials"]):
        trials = [search.ask() for search in searches]
        rates = [_rounded(t.suggest_float("lr", low, high, log=True)) for t in trials]
        points: list[Point] = []
        for setting, rate in zip(settings, rates, strict=True):
            points += rate_trials(study, setting, rate)
        found = run_points(points, f"trials of round {number + 1}")
        seeds = len(study.trial_seeds)
        for place, (search, trial) in enumerate(zip(searches, trials, strict=True)):
            value = mean_metric(study, found[seeds * place : seeds * (place + 1)])
            if value is None:
                search.tell(trial, state=_failed())
            else:
                search.tell(trial, value)
        results += found
    return results


def mean_metric(study: Study, trials: Sequence[Result]) -> float | None:
    """Return the mean of the metric that selects, or None if a trial has no finite value.

    So a rate at which one seed fails is not chosen where another rate has results of all seeds.

    Args:
        study: the study.
        trials: trials of one setting at one learning rate, one for each seed.
    """
    metric = study.selection["metric"]
    values = [result["metrics"].get(metric, math.nan) for result in trials]
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else None


def _optuna_study(study: Study) -> Any:
    """Return an empty study of Optuna with a seeded sampler."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "A search over learning rates needs Optuna: pip install 'adaptrank[search]'."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction: Literal["minimize", "maximize"] = (
        "maximize" if study.selection_sign < 0 else "minimize"
    )
    sampler = optuna.samplers.TPESampler(seed=study.search.get("seed", 0))
    return optuna.create_study(sampler=sampler, direction=direction)


def _failed() -> Any:
    import optuna

    return optuna.trial.TrialState.FAIL


def _rounded(rate: float) -> float:
    """Return a rate with as many digits as the name of a run shows."""
    return float(f"{rate:.{SIGNIFICANT}g}")
