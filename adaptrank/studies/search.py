"""Learning rates that Optuna proposes, with equal trials for every setting of a study."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from adaptrank.studies.design import Point, Setting, trial_point
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
        points = [
            trial_point(study, setting, rate) for setting, rate in zip(settings, rates, strict=True)
        ]
        found = run_points(points, f"trials of round {number + 1}")
        for search, trial, result in zip(searches, trials, found, strict=True):
            value = result["metrics"].get(study.selection["metric"], math.nan)
            if math.isfinite(value):
                search.tell(trial, value)
            else:
                search.tell(trial, state=_failed())
        results += found
    return results


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
        "maximize" if study.selection.get("mode", "min") == "max" else "minimize"
    )
    sampler = optuna.samplers.TPESampler(seed=study.search.get("seed", 0))
    return optuna.create_study(sampler=sampler, direction=direction)


def _failed() -> Any:
    import optuna

    return optuna.trial.TrialState.FAIL


def _rounded(rate: float) -> float:
    """Return a rate with as many digits as the name of a run shows."""
    return float(f"{rate:.{SIGNIFICANT}g}")
