"""Base of the modules that predict labels of a whole input, such as a text or an image."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from adaptrank._errors import UserError, did_you_mean
from adaptrank._options import Range, check_number
from adaptrank.modules.agreement import trained_conventions
from adaptrank.modules.class_weights import ClassWeights
from adaptrank.modules.label_metrics import MetricEntry
from adaptrank.modules.label_module import LabelModule
from adaptrank.modules.problems import MultiLabel, Problem, Regression, SingleLabel

ProblemName = Literal["single_label", "multi_label", "regression"]
PROBLEMS: dict[str, type[Problem]] = {cls.key: cls for cls in (SingleLabel, MultiLabel, Regression)}

Thresholds = float | list[float] | dict[str, float]
"""A probability for all classes, one for each in order, or {name of a class: probability}."""

PROBABILITY = Range(0, 1)


class ClassificationModule(LabelModule):
    """One class, several classes, or numbers for each input.

    Args:
        problem: kind of the labels: single_label, multi_label (any number of classes in a row) or
            regression (numbers). By default that of the `adapter` or of the data, and with one
            label a regression.
        thresholds: probability from which on a class of several is predicted: a number, a list, or
            {name: number}.
        kwargs: as in `AdaptedModule`.
    """

    def __init__(
        self,
        *args: Any,
        num_labels: int | None = None,
        problem: ProblemName | None = None,
        metrics: list[MetricEntry] | None = None,
        class_weights: ClassWeights | None = None,
        thresholds: Thresholds = 0.5,
        **kwargs: Any,
    ) -> None:
        if problem is not None and problem not in PROBLEMS:
            raise UserError(f"problem={problem!r} is unknown. Use one of {', '.join(PROBLEMS)}.")
        if problem == Regression.key and class_weights is not None:
            raise UserError(
                "class_weights are for classes, and a regression has none. Remove one of the two."
            )
        _check_thresholds(thresholds)
        super().__init__(
            *args, num_labels=num_labels, metrics=metrics, class_weights=class_weights, **kwargs
        )
        self.problem_name = problem
        self.thresholds = thresholds

    def make_problem(self) -> Problem:
        labels = self.count_labels()
        key = self._problem_key(labels)
        if key == SingleLabel.key and labels == 1:
            raise UserError(
                "One class alone leaves nothing to choose. Set model.problem: regression to "
                "predict a number, or model.num_labels: 2 for two classes."
            )
        if key != MultiLabel.key:
            return PROBLEMS[key](labels)
        return MultiLabel(labels, _read_thresholds(self.thresholds, labels, self.label_names))

    def _problem_key(self, labels: int) -> str:
        """Return the kind of the labels: the key `problem`, the trained model's, or the data's.

        Raises:
            UserError: if the data have labels of another kind.
        """
        data = getattr(self._trainer, "datamodule", None)
        of_data = getattr(data, "problem", None)
        trained = trained_conventions(self).get("problem")
        key = self.problem_name or trained or of_data
        if key is None or (key == SingleLabel.key and labels == 1 and self.problem_name is None):
            return Regression.key if labels == 1 else SingleLabel.key
        if of_data is not None and of_data != key:
            where = "model.problem is" if self.problem_name else "the adapter was trained for"
            raise UserError(
                f"The labels of the data are {of_data}, and {where} {key}. Set "
                f"`{_DATA_KEYS[key]}` in the data, or another `problem`."
            )
        return str(key)


_DATA_KEYS = {
    SingleLabel.key: "regression: false, multi_label: false",
    MultiLabel.key: "multi_label: true",
    Regression.key: "regression: true",
}
"""Kind of labels -> what to set in a data module of this library."""


def _check_thresholds(given: Any) -> None:
    """Check the numbers of the key `thresholds`, before there are classes."""
    members: Mapping[str, Any]
    if isinstance(given, Mapping):
        members = {f"thresholds[{name}]": value for name, value in given.items()}
    elif isinstance(given, list | tuple):
        members = {f"thresholds[{index}]": value for index, value in enumerate(given)}
    else:
        members = {"thresholds": given}
    for name, value in members.items():
        check_number(name, value, PROBABILITY)


def _read_thresholds(
    given: Thresholds, labels: int, names: Sequence[str] | None
) -> Sequence[float]:
    """Return a threshold for each class.

    Raises:
        UserError: if there is no threshold for a class, or no class for a threshold.
    """
    if isinstance(given, Mapping):
        known = list(names) if names is not None else [str(index) for index in range(labels)]
        unknown = next((str(name) for name in given if str(name) not in known), None)
        if unknown is not None:
            raise UserError(
                f"thresholds names {unknown!r}, which is none of the classes {known[:20]}."
                f"{did_you_mean(unknown, known)}"
            )
        by_name = {str(name): value for name, value in given.items()}
        return [by_name.get(name, 0.5) for name in known]
    several = list(given) if isinstance(given, list | tuple) else [given] * labels
    if len(several) != labels:
        raise UserError(
            f"thresholds has {len(several)} numbers, and there are {labels} classes. Give one for "
            "each class, or one number for all."
        )
    return several
