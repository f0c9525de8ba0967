"""Base of all data with labels: names, numbering and frequencies of classes."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrank._errors import UserError, some
from adaptrank.data.class_names import merge_classes
from adaptrank.data.stratify import some_of_each
from adaptrank.data.task import Row, Split, TaskData, check_size

log = logging.getLogger(__name__)

SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label", "multi_label", "regression"
"""Kinds of labels: one class for each target, several classes, numbers."""


class LabelledData(TaskData):
    """Examples with a label: the index of a class, a 0 or 1 for each class, or numbers.

    A model that was trained before has a numbering of its own, by the names of its classes. Labels
    are then mapped by name to that numbering.

    Args:
        examples_per_class: number of training rows of each class to keep, drawn by the seed, for
            few-shot learning. A class with fewer rows keeps all, and a warning names it. It is
            used without `limit_train`, and where a row has one class.
        kwargs: those of `TaskData`.

    Raises:
        UserError: if `examples_per_class` is no positive number, or does not fit the labels.
    """

    model_classes: list[str] | None = None
    """Names of the classes in the model's numbering, known after `setup`."""
    _merged: tuple[list[str] | None, list[str] | None] | None = None
    """Names of the model and of the data that were brought together last."""

    def __init__(self, examples_per_class: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_size("examples_per_class", examples_per_class, 1, "leaves no example")
        if examples_per_class is not None and self.limit_train is not None:
            raise UserError(
                f"examples_per_class={examples_per_class} and limit_train={self.limit_train} both "
                "limit the training rows. Remove one of the two."
            )
        self.examples_per_class = examples_per_class

    @property
    def problem(self) -> str:
        """Kind of the labels: "single_label", "multi_label" or "regression"."""
        return SINGLE_LABEL

    def setup(self, stage: str | None = None) -> None:
        module = getattr(self.trainer, "lightning_module", None)
        self.use_classes_of(getattr(module, "class_names", None))
        super().setup(stage)

    def needs_classes(self, stage: str | None) -> bool:
        """Return whether the classes have to be found in the training rows.

        A trained model knows its classes, and prediction with it needs no training row.
        """
        module = getattr(self.trainer, "lightning_module", None)
        return stage != "predict" or getattr(module, "class_names", None) is None

    def use_classes_of(self, trained: list[str] | None) -> None:
        """Number the classes as a trained model does, or as the data do if it has no names.

        Args:
            trained: names of the model's classes.

        Raises:
            UserError: if the data have more new classes than the model has classes to spare.
        """
        names = self.class_names
        if (trained, names) == self._merged:
            return
        if trained is None or names is None:
            agreed = trained or names
        else:
            agreed = merge_classes(trained, names)
        if agreed != (self.model_classes or names):
            # Labels of examples from an earlier setup have another numbering.
            self._examples.clear()
        self.model_classes, self._merged = agreed, (trained, names)

    def check_examples_per_class(self, has_one_class: bool) -> None:
        """Refuse `examples_per_class` where a row has not exactly one class."""
        if self.examples_per_class is not None and not has_one_class:
            raise UserError(
                f"examples_per_class={self.examples_per_class} draws rows of each class, and a row "
                f"of this data has not exactly one. Use `limit_train`."
            )

    def limit(self, rows: Sequence[Row], split: Split) -> Sequence[Row]:
        """Keep some rows of each class, where this was asked for."""
        if split != "train" or self.examples_per_class is None:
            return super().limit(rows, split)
        labels = [row["label"] for row in rows]
        chosen = some_of_each(labels, self.examples_per_class, split, self.seed)
        few = {k: n for k, n in Counter(labels).items() if n < self.examples_per_class}
        if few:
            names = self.class_names
            listed = []
            for label, count in few.items():
                name = label if names is None else names[label]
                listed.append(f"{name} ({count})")
            log.warning(
                "examples_per_class=%d: %d classes have fewer training rows, and keep all: %s.",
                self.examples_per_class,
                len(few),
                some(listed),
            )
        return [rows[index] for index in chosen]

    def conventions(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        names = self.model_classes
        if names is not None and len(set(names)) == len(names):
            found["class_names"] = names
        # Files of earlier versions, and those of one class for each target, do not say it.
        if self.problem != SINGLE_LABEL:
            found["problem"] = self.problem
        return found

    def label_of_model(self, label: Any) -> Any:
        """Return a label in the model's numbering. The numbers of a regression stay as they are.

        Args:
            label: index of a class, a list with a 0 or a 1 for each class, or numbers.
        """
        names, model_classes = self.class_names, self.model_classes
        if model_classes in (None, names) or names is None or self.problem == REGRESSION:
            return label
        assert model_classes is not None
        if self.problem == MULTI_LABEL:
            flags = dict(zip(names, label, strict=True))
            return [flags.get(name, 0) for name in model_classes]
        return model_classes.index(names[label]) if isinstance(label, int) else label

    # ---- how often each class occurs

    def training_labels(self) -> Iterable[Any]:
        """Return the label of each training example, in the model's numbering.

        A label is a number, or a list or a tensor of numbers.
        """
        examples: Sequence[Row] = self.examples("train")
        return (example["label"] for example in examples)

    def count_classes(self) -> Tensor:
        """Return how many training examples each class has, (classes,).

        For several labels it has two rows, (2, classes): examples without the class, and with it.
        Labels below zero, such as -100, are not counted.

        Raises:
            UserError: for a regression.
        """
        if self.problem == REGRESSION:
            raise UserError("A regression has no classes to count. Leave class_weights out.")
        classes = len(self.model_classes or self.class_names or []) or self.num_classes or 0
        labels = [torch.as_tensor(label) for label in self.training_labels()]
        if self.problem == MULTI_LABEL:
            flags = torch.stack(labels)
            return torch.stack([(flags == 0).sum(0), (flags > 0).sum(0)])
        flat = torch.cat([label.flatten() for label in labels])
        return torch.bincount(flat[flat >= 0].long(), minlength=classes)
