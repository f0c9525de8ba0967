"""What all data with labels share: names of classes, their numbering, and how often each occurs."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.data.class_names import merge_classes
from adaptrank.data.task import Row, TaskData

SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label", "multi_label", "regression"
"""Kinds of labels: one class for each target, several classes, numbers."""


class LabelledData(TaskData):
    """Examples with a label: the index of a class, a 0 or 1 for each class, or numbers.

    A model that was trained before has a numbering of its own, by the names of its classes. Labels
    are then mapped by name to that numbering.
    """

    model_classes: list[str] | None = None
    """Names of the classes in the model's numbering, known after `setup`."""
    _merged: tuple[list[str] | None, list[str] | None] | None = None
    """Names of the model and of the data that were brought together last."""

    @property
    def problem(self) -> str:
        """Kind of the labels: "single_label", "multi_label" or "regression"."""
        return SINGLE_LABEL

    def setup(self, stage: str | None = None) -> None:
        module = getattr(self.trainer, "lightning_module", None)
        self.use_classes_of(getattr(module, "class_names", None))
        super().setup(stage)

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
