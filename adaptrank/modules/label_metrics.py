"""Metrics of an evaluation: those with a name of their own, and any class of torchmetrics."""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torchmetrics import Metric

from adaptrank._errors import UserError, did_you_mean
from adaptrank.modules.choice_scores import Choices
from adaptrank.modules.problems import Decision, MultiLabel, Regression
from adaptrank.modules.standard_metrics import STANDARD_NAMES, Reads

if TYPE_CHECKING:
    MetricEntry = str | Mapping[str, Any] | Metric
else:
    # An instance comes from Python only. In a file a metric is a name or a mapping, which is
    # completed and built once the number of classes is known.
    MetricEntry = str | dict[str, Any]

PLACES = ("torchmetrics.classification", "torchmetrics.regression", "torchmetrics")
"""Modules in which a class without a path is looked for."""

KEYS = ("class_path", "init_args", "name")
"""Keys of a metric in a configuration."""

TAKEN = ("loss", "train_loss")
"""Names in the log that metrics cannot have."""


# ---- what a configuration says


@dataclass(frozen=True)
class MetricRequest:
    """A metric that a configuration asks for.

    Args:
        name: name in the log.
        cls: its class, or None for a standard metric.
        init_args: arguments that the configuration gives.
        instance: the metric itself, where Python code gave it.
    """

    name: str
    cls: type[Metric] | None = None
    init_args: Mapping[str, Any] = field(default_factory=dict)
    instance: Metric | None = None

    @property
    def is_standard(self) -> bool:
        """Whether the metric has a name of its own."""
        return self.cls is None and self.instance is None


def read_requests(entries: Sequence[MetricEntry] | None) -> list[MetricRequest] | None:
    """Read the key `metrics`.

    Raises:
        UserError: for a name that is unknown, a class that does not exist or is no metric, an
            unknown key, or two metrics of one name.
    """
    if entries is None:
        return None
    if isinstance(entries, str | Mapping):
        raise UserError(f"metrics={entries!r} is no list. Write metrics: [{entries!r}].")
    requests: list[MetricRequest] = []
    for entry in entries:
        request = _read_request(entry)
        if request.name in TAKEN:
            raise UserError(
                f"A metric cannot be called {request.name!r}: the log has one. Rename it."
            )
        if any(request.name == other.name for other in requests):
            raise UserError(
                f"Two metrics are called {request.name!r} in the log. Give one of them another "
                "`name`, beside its class_path."
            )
        requests.append(request)
    return requests


def _read_request(entry: MetricEntry) -> MetricRequest:
    if isinstance(entry, Metric):
        return MetricRequest(type(entry).__name__, instance=entry)
    if isinstance(entry, str):
        if entry in STANDARD_NAMES:
            return MetricRequest(entry)
        return MetricRequest(entry.rpartition(".")[2], find_class(entry))
    if not isinstance(entry, Mapping) or not isinstance(entry.get("class_path"), str):
        raise UserError(
            f"{entry!r} is no metric. Give a name, such as accuracy, or class_path with init_args."
        )
    for key in entry:
        if key not in KEYS:
            raise UserError(
                f"A metric has no key {key!r}.{did_you_mean(str(key), KEYS)} Use {', '.join(KEYS)}."
            )
    cls = find_class(entry["class_path"])
    init_args = entry.get("init_args") or {}
    if not isinstance(init_args, Mapping):
        raise UserError(f"init_args={init_args!r} of {cls.__name__} are no mapping of arguments.")
    return MetricRequest(str(entry.get("name") or cls.__name__), cls, dict(init_args))


def find_class(path: str) -> type[Metric]:
    """Return the class of a metric by its import path, or of torchmetrics by its name alone.

    Raises:
        UserError: if there is none. The message suggests the nearest name.
    """
    module_name, _, name = path.rpartition(".")
    for place in [module_name] if module_name else PLACES:
        try:
            module = import_module(place)
        except ImportError as error:
            raise UserError(f"The metric {path!r} cannot be imported: {error}.") from error
        cls = getattr(module, name, None)
        if isinstance(cls, type) and issubclass(cls, Metric):
            return cls
        if cls is not None:
            raise UserError(f"{path!r} is no metric: it does not derive from torchmetrics.Metric.")
    here = _metrics_in(module_name) if module_name else list(STANDARD_NAMES)
    known = here or [name for place in PLACES for name in _metrics_in(place)]
    hint = did_you_mean(name, known) or did_you_mean(name, _metrics_in(PLACES[0]))
    raise UserError(
        f"There is no metric {path!r}.{hint} Use {', '.join(STANDARD_NAMES)}, or the class_path of "
        "a class of torchmetrics."
    )


def _metrics_in(place: str) -> list[str]:
    """Return the names of the metrics in a module."""
    members = vars(import_module(place)).items()
    return [name for name, cls in members if isinstance(cls, type) and issubclass(cls, Metric)]


# ---- building


def build_metric(request: MetricRequest, problem: Decision) -> tuple[Metric, Reads]:
    """Return a metric, and what it is given.

    Arguments that a class wants and that were left out are filled in: `num_classes`, `num_labels`,
    `num_outputs` and `task`.

    Raises:
        UserError: if the metric does not fit the labels, or its arguments are wrong.
    """
    if request.instance is not None:
        return request.instance, reads_of(request.instance, problem)
    if request.cls is None:
        standard = problem.standard.get(request.name)
        if standard is None:
            raise UserError(
                f"metric {request.name!r} does not fit {problem.targets}. Use "
                f"{', '.join(problem.standard)}."
            )
        return standard.make(problem.labels), standard.reads
    arguments = complete_arguments(request.cls, request.init_args, problem)
    try:
        metric = request.cls(**arguments)
    except (TypeError, ValueError) as error:
        known = [name for name in _signature(request.cls).parameters if name != "kwargs"]
        unknown = next((name for name in request.init_args if name not in known), None)
        hint = did_you_mean(unknown, known) if unknown is not None else ""
        raise UserError(f"The metric {request.name} cannot be made: {error}{hint}") from error
    return metric, reads_of(metric, problem)


def complete_arguments(
    cls: type[Metric], given: Mapping[str, Any], problem: Decision
) -> dict[str, Any]:
    """Return the arguments of a metric with those that follow from the labels."""
    wanted = _signature(cls).parameters
    arguments = {name: _build_nested(value, problem) for name, value in given.items()}
    sizes = {"num_classes": problem.labels}
    if isinstance(problem, MultiLabel):
        sizes = {"num_labels": problem.labels}
    elif isinstance(problem, Regression):
        sizes = {"num_outputs": problem.labels} if problem.labels > 1 else {}
    if "task" in wanted and "task" not in arguments:
        arguments["task"] = _task(arguments, problem)
    if arguments.get("task") == "binary":
        return arguments
    for name, value in sizes.items():
        if name in wanted:
            arguments.setdefault(name, value)
    return arguments


def _task(arguments: Mapping[str, Any], problem: Decision) -> str:
    """Return the `task` of a class that stands for three classes.

    Two classes are binary, as for the name f1, unless an argument speaks of several classes.
    """
    if isinstance(problem, MultiLabel):
        return "multilabel"
    if isinstance(problem, Choices):
        return "multiclass"
    of_several = {"num_classes", "average", "top_k"} & arguments.keys()
    return "binary" if problem.labels == 2 and not of_several else "multiclass"


def _build_nested(value: Any, problem: Decision) -> Any:
    """Return an argument, or the metric that it describes, such as that of a wrapper."""
    if isinstance(value, Mapping) and "class_path" in value:
        return build_metric(_read_request(value), problem)[0]
    return value


def _signature(cls: type[Metric]) -> inspect.Signature:
    """Return the signature of a class. Those that stand for three classes define `__new__`."""
    constructor: Any = vars(cls).get("__new__") or cls.__init__
    constructor = getattr(constructor, "__func__", constructor)
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    return inspect.Signature(parameters)


def reads_of(metric: Metric, problem: Decision) -> Reads:
    """Return what a metric is given, by the family of torchmetrics that its class belongs to."""
    inner = getattr(metric, "metric", None) or getattr(metric, "_base_metric", None)
    if isinstance(inner, Metric):
        return reads_of(inner, problem)
    families = [cls.__name__ for cls in type(metric).__mro__]
    if not any(name.startswith("Binary") for name in families):
        return "probabilities"
    # No choice is the positive one. Whether the answer is right has two outcomes.
    if isinstance(problem, Choices):
        return "outcomes"
    return "pairs" if isinstance(problem, MultiLabel) else "positive"


# ---- the metrics of a run


class Scores(nn.Module):
    """Metrics of an evaluation, and what each of them is given.

    Args:
        requests: the metrics that were asked for.
        problem: kind of the labels.
        names: names of the classes, for metrics with a value for each class.

    Raises:
        UserError: if a metric does not fit the labels, or gives no numbers.
    """

    def __init__(
        self, requests: Sequence[MetricRequest], problem: Decision, names: Sequence[str] | None
    ) -> None:
        super().__init__()
        self.problem = problem
        self.metrics = nn.ModuleList()
        self.reads: list[Reads] = []
        # A ModuleDict would not take every name.
        self.logged: dict[str, Metric] = {}
        self.parts = nn.ModuleList()
        for request in requests:
            metric, reads = build_metric(request, problem)
            self.metrics.append(metric)
            self.reads.append(reads)
            is_known = request.is_standard
            of_several_numbers = isinstance(problem, Regression) and problem.labels > 1
            parts: dict[str, Metric] = {}
            if of_several_numbers or not is_known:
                parts = self._parts(request.name, metric, reads, names)
            self.parts.extend(parts.values())
            self.logged |= parts or {request.name: metric}

    def update(self, output: Tensor, labels: Tensor) -> None:
        """Take outputs of the head and labels of targets that have one."""
        given = {reads: self._given(reads, output, labels) for reads in set(self.reads)}
        for metric, reads in zip(self.metrics, self.reads, strict=True):
            assert isinstance(metric, Metric)
            metric.update(*given[reads])
        for part in self.parts:
            assert isinstance(part, MetricPart)
            part.update()

    def _given(self, reads: Reads, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two arguments of a metric's `update`."""
        if reads == "decisions":
            return self.problem.decide(output), labels
        probabilities = self.problem.probabilities(output)
        if reads == "positive":
            return probabilities[:, 1], labels
        if reads == "outcomes":
            confidence, chosen = probabilities.max(-1)
            return confidence, (chosen == labels).long()
        if reads == "pairs":
            return probabilities.flatten(), labels.flatten()
        return probabilities, labels

    def _parts(
        self, name: str, metric: Metric, reads: Reads, names: Sequence[str] | None
    ) -> dict[str, Metric]:
        """Return a metric for each value of a metric with several, or {} where it has one."""
        value = self._try(name, metric, reads)
        if isinstance(value, Mapping):
            shapes = {str(key): part for key, part in value.items()}
            if all(isinstance(part, Tensor) and part.numel() == 1 for part in shapes.values()):
                return {str(key): MetricPart(metric, key) for key in value}
        elif isinstance(value, Tensor) and value.numel() == 1:
            return {}
        elif isinstance(value, Tensor) and value.shape == (self.problem.labels,):
            of_classes = names or [str(index) for index in range(self.problem.labels)]
            return {
                f"{name}_{of_class}": MetricPart(metric, index)
                for index, of_class in enumerate(of_classes)
            }
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UserError(
            f"The metric {name} gives no number, nor one for each class, but {shape}, which no log "
            "can hold. Choose another, or another `average` of it."
        )

    def _try(self, name: str, metric: Metric, reads: Reads) -> Any:
        """Return the value of a metric on drawn outputs, and leave it as it was.

        Raises:
            UserError: if the metric cannot take such outputs and labels.
        """
        output, labels = self.problem.example()
        given = self._given(reads, output, labels)
        tried = metric.clone()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tried.update(*given)
                return tried.compute()
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(
                f"The metric {name} does not fit {self.problem.key} with {self.problem.targets}: "
                f"{reason}"
            ) from error


class MetricPart(Metric):
    """One value of a metric that has several.

    Args:
        whole: the metric, which is updated and reset by itself.
        key: index of the value, or its key.
    """

    full_state_update = False

    def __init__(self, whole: Metric, key: Any) -> None:
        super().__init__()
        # In a list PyTorch does not register it as a submodule a second time.
        self.whole = [whole]
        self.key = key

    def update(self) -> None:
        """No-op. Metrics that were never updated warn when they are computed."""

    def compute(self) -> Tensor:
        value: Tensor = self.whole[0].compute()[self.key]
        return value
