"""Metrics of generated texts: those of torchmetrics, and the share of texts that are the target."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

from adaptrank._errors import UserError, did_you_mean
from adaptrank.modules.label_metrics import MetricPart, find_class
from adaptrank.modules.metrics import ShareOfTexts

EXAMPLE = "the quick brown fox jumps"
"""Text on which a metric is tried."""


class SameText(ShareOfTexts):
    """Share of texts that are their target, in [0, 1]. Runs of white space count as one space."""

    def matches(self, text: str, wanted: str) -> bool:
        return text.split() == wanted.split()


ROUGE_KEYS = ("rouge1", "rouge2", "rougeL")
"""Kinds of ROUGE. That of whole summaries (rougeLsum) needs data of the package nltk."""

TORCHMETRICS = "torchmetrics.text"
"""Module of metrics of texts. Its import takes seconds, as it imports models for some of them."""

TEXT_METRICS: Mapping[str, str] = {
    "bleu": "BLEUScore",
    "sacrebleu": "SacreBLEUScore",
    "chrf": "CHRFScore",
    "rouge": "ROUGEScore",
    "edit_distance": "EditDistance",
    "wer": "WordErrorRate",
    "cer": "CharErrorRate",
}
"""Name in a configuration -> class of torchmetrics."""

TEXT_NAMES = ("exact_match", *TEXT_METRICS)
"""Names of metrics of texts in a configuration."""

SEVERAL_TARGETS = frozenset(
    {"BLEUScore", "CHRFScore", "TranslationEditRate", "ExtendedEditDistance"}
)
"""Classes of metrics that take a list of targets for each text."""


def update_texts(metric: Metric, texts: Sequence[str], targets: Sequence[str]) -> None:
    """Update a metric with generated texts and their targets, one for each."""
    families = {cls.__name__ for cls in type(metric).__mro__}
    if families & SEVERAL_TARGETS:
        metric.update(list(texts), [[target] for target in targets])
    else:
        metric.update(list(texts), list(targets))


class TextScores(nn.Module):
    """Metrics of generated texts, and what of each is logged.

    Args:
        metrics: name -> metric.
        kept: name -> {key of its value: name in the log}, for metrics with several values of which
            some are logged.

    Raises:
        UserError: if a metric does not take texts, or gives no numbers.
    """

    def __init__(
        self, metrics: Mapping[str, Metric], kept: Mapping[str, Mapping[str, str]]
    ) -> None:
        super().__init__()
        self.metrics = nn.ModuleDict(metrics)
        self.logged = nn.ModuleDict()
        for name, metric in metrics.items():
            value = _try(name, metric)
            if isinstance(value, Mapping):
                keys = kept.get(name) or {key: f"{name}_{key}" for key in value}
                for key, logged in keys.items():
                    self.logged[logged] = MetricPart(metric, key)
            else:
                self.logged[name] = metric

    def update(self, texts: Sequence[str], targets: Sequence[str]) -> None:
        """Take generated texts and their targets, one for each."""
        for metric in self.metrics.values():
            assert isinstance(metric, Metric)
            update_texts(metric, texts, targets)
        for part in self.logged.values():
            if isinstance(part, MetricPart):
                part.update()

    def items(self) -> Iterator[tuple[str, Metric]]:
        """Yield (name in the log, metric with one value)."""
        for name, metric in self.logged.items():
            assert isinstance(metric, Metric)
            yield name, metric


def read_text_metrics(entries: Sequence[str | Mapping[str, Any]]) -> TextScores:
    """Return the metrics of the key `metrics`.

    Args:
        entries: a name of `TEXT_METRICS`, or {class_path, init_args, name} for each metric.

    Raises:
        UserError: for a name that is unknown, a class that is no metric of texts, or two metrics
            of one name.
    """
    metrics: dict[str, Metric] = {}
    kept: dict[str, Mapping[str, str]] = {}
    for entry in entries:
        if isinstance(entry, str) and entry in TEXT_NAMES:
            name, metric = entry, _of_name(entry)
            if entry == "rouge":
                kept[name] = {f"{key}_fmeasure": key for key in ROUGE_KEYS}
        else:
            name, metric = _of_class(entry)
        if name in metrics:
            raise UserError(
                f"Two metrics are called {name!r} in the log. Give one of them another `name`, "
                "beside its class_path."
            )
        metrics[name] = metric
    return TextScores(metrics, kept)


def _of_name(name: str) -> Metric:
    """Return a metric by its name in a configuration."""
    if name == "exact_match":
        return SameText()
    cls = find_class(f"{TORCHMETRICS}.{TEXT_METRICS[name]}")
    return cls(rouge_keys=ROUGE_KEYS) if name == "rouge" else cls()


def _of_class(entry: str | Mapping[str, Any]) -> tuple[str, Metric]:
    """Return the name and the metric of an entry with a class."""
    is_short = isinstance(entry, str) and "." not in entry
    if is_short and not hasattr(import_module(TORCHMETRICS), str(entry)):
        raise UserError(
            f"There is no metric of texts {entry!r}.{did_you_mean(str(entry), TEXT_NAMES)} Use "
            f"{', '.join(TEXT_NAMES)}, or the class_path of a class of torchmetrics.text."
        )
    given: Mapping[str, Any] = {"class_path": entry} if isinstance(entry, str) else entry
    path = str(given.get("class_path"))
    cls = find_class(path if "." in path else f"{TORCHMETRICS}.{path}")
    try:
        metric = cls(**(given.get("init_args") or {}))
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(f"The metric {cls.__name__} cannot be made: {error}") from error
    return str(given.get("name") or cls.__name__), metric


def _try(name: str, metric: Metric) -> Any:
    """Return the value of a metric on an example, and leave the metric as it was.

    Raises:
        UserError: if the metric does not take texts, or its value is no number.
    """
    tried = metric.clone()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            update_texts(tried, [EXAMPLE], [EXAMPLE])
            value = tried.compute()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"The metric {name} does not take texts: {reason}") from error
    values = list(value.values()) if isinstance(value, Mapping) else [value]
    if not all(isinstance(one, Tensor) and one.numel() == 1 for one in values):
        raise UserError(
            f"The metric {name} gives no number, which a log could hold. Choose another."
        )
    return value
