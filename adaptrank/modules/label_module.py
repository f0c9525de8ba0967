"""Base of all modules that predict labels: a fresh head, its loss, metrics and predictions."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import MeanMetric

from adaptrank._errors import UserError
from adaptrank._options import COUNT, check_number
from adaptrank.modules.adapted import AdaptedModule
from adaptrank.modules.agreement import trained_conventions
from adaptrank.modules.batch_keys import at_least_float32, entries, read_inputs, read_labels
from adaptrank.modules.class_weights import (
    BALANCED,
    ClassWeights,
    check_class_weights,
    resolve_weights,
)
from adaptrank.modules.known_attention import known_attention
from adaptrank.modules.label_counts import LabelCounts, LabelShares, LabelSpread
from adaptrank.modules.label_metrics import MetricEntry, MetricRequest, Scores, read_requests
from adaptrank.modules.problems import Problem, SingleLabel
from adaptrank.modules.standard_metrics import STANDARD_NAMES
from adaptrank.modules.task_classes import as_tensor, only_own_task
from adaptrank.modules.task_matrix import ensure_task_matrix
from adaptrank.modules.unlabelled_batches import UnlabelledBatches


def fresh_heads(backbone: nn.Module) -> list[str]:
    """Return the children of a model that have parameters and are not its pretrained part."""
    pretrained = getattr(backbone, "base_model_prefix", "")
    return [
        name
        for name, child in backbone.named_children()
        if name != pretrained and list(child.parameters())
    ]


class LabelModule(AdaptedModule):
    """A backbone with a fresh head that predicts labels. The head trains with the adapters.

    A task sets `auto_class`. It overrides `make_problem` where a target is more than one class,
    `targets` where a row has several targets, and `predict_step` where a prediction is more than
    `Problem.describe` says. The loss is the mean over all targets of an optimizer step.

    Args:
        num_labels: number of outputs of the head, by default that of the `adapter`, or of the data
            module.
        metrics: metrics beside the loss: names, or classes of torchmetrics by `class_path` with
            `init_args`. Number of classes and `task` are filled in.
        class_weights: weight of each class in the loss: "balanced", a list, or {name: weight}.
        kwargs: as in `AdaptedModule`.
    """

    metrics_shown: ClassVar[Sequence[str]] = ("loss", *STANDARD_NAMES)

    def __init__(
        self,
        *args: Any,
        num_labels: int | None = None,
        metrics: list[MetricEntry] | None = None,
        class_weights: ClassWeights | None = None,
        **kwargs: Any,
    ) -> None:
        if num_labels is not None:
            check_number("num_labels", num_labels, COUNT, whole=True)
        requests = read_requests(metrics)
        check_class_weights(class_weights)
        super().__init__(*args, **kwargs)
        self.num_labels = num_labels
        self.metric_requests = requests
        self.class_weights = class_weights
        self.mean_loss = MeanMetric()
        self._problem: Problem | None = None
        self.scores: Scores | None = None
        self.labels_seen: LabelCounts | LabelShares | LabelSpread | None = None
        self.weights: Tensor | None
        self.register_buffer("weights", None, persistent=False)
        self.task_of_class: Tensor | None
        self.register_buffer("task_of_class", None, persistent=False)
        self._unlabelled = UnlabelledBatches()

    # ---- building

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            ensure_task_matrix(self.trainer, self.schedule)

    def configure_model(self) -> None:
        # Metrics and weights that do not fit are refused before the backbone is loaded.
        if self._problem is None:
            problem = self.make_problem()
            default = [MetricRequest(name) for name in problem.default_metrics]
            requests = default if self.metric_requests is None else self.metric_requests
            self.scores = Scores(requests, problem, self.label_names)
            self.labels_seen = problem.statistics()
            self._problem = problem
        self._weigh_classes(self.problem)
        data = getattr(self._trainer, "datamodule", None)
        self.task_of_class = as_tensor(getattr(data, "task_of_class", None), self.device)
        super().configure_model()

    def make_problem(self) -> Problem:
        """Return the kind of the labels."""
        return SingleLabel(self.count_labels())

    def _weigh_classes(self, problem: Problem) -> None:
        """Set the weights of the classes, where a loss is computed."""
        if self.class_weights is None or getattr(self._trainer, "predicting", False):
            return
        counts = None
        if self.class_weights == BALANCED:
            # Without a Trainer no data are known, and nothing is trained.
            if self._trainer is None:
                return
            data = getattr(self._trainer, "datamodule", None)
            count = getattr(data, "count_classes", None)
            counts = None if count is None else count()
        self.weights = resolve_weights(self.class_weights, problem, self.label_names, counts)

    def model_options(self) -> dict[str, Any]:
        """Return further arguments of `backbones.load_model`."""
        return {**super().model_options(), "num_labels": self.count_labels(), "fresh_head": True}

    def heads(self, backbone: nn.Module) -> list[str]:
        return fresh_heads(backbone)

    def describe_base(self) -> dict[str, Any]:
        return {**super().describe_base(), "num_labels": self.count_labels()}

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes that the model was trained on, or None if they are not known."""
        names: list[str] | None = trained_conventions(self).get("class_names")
        return names

    @property
    def label_names(self) -> list[str] | None:
        """Names of the head's outputs: those of training, or those of the data, or None."""
        data = getattr(self._trainer, "datamodule", None)
        for owner, attribute in (
            (self, "class_names"),
            (data, "model_classes"),
            (data, "class_names"),
        ):
            names: list[str] | None = getattr(owner, attribute, None)
            if names and len(names) == self.count_labels():
                return names
        return None

    def count_labels(self) -> int:
        """Return the number of classes: `num_labels`, the trained model's, or the data module's.

        Raises:
            UserError: if none of them says.
        """
        if self.num_labels is not None:
            return self.num_labels
        if self.class_names is not None:
            return len(self.class_names)
        data = getattr(self._trainer, "datamodule", None)
        num_classes = getattr(data, "num_classes", None)
        if num_classes is None:
            raise UserError(
                "How many classes are there? Set model.num_labels. The data module does not say."
            )
        return int(num_classes)

    def describe_training(self) -> dict[str, Any]:
        # Checkpoints of earlier versions do not have the key.
        weighted = {} if self.class_weights is None else {"class_weights": self.class_weights}
        return {**super().describe_training(), **weighted}

    def metrics_logged(self) -> Sequence[str]:
        assert self.scores is not None
        return ("loss", *self.scores.logged)

    def chance(self) -> dict[str, float]:
        if self.labels_seen is None or self._problem is None:
            return {}
        known = self.labels_seen.chance()
        if self.weights is None:
            return known
        # With weights rare classes count more, and naming the most frequent one is no aim.
        return {"loss": known["loss"]} if known and isinstance(self.problem, SingleLabel) else {}

    # ---- steps

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the output of the head in float32 or better.

        It has the shape (rows, labels), or (rows,) for a regression with one number.
        """
        logits = at_least_float32(self.run_model(batch).logits)
        return self.problem.shape_output(logits)

    def run_model(self, batch: dict[str, Tensor]) -> Any:
        """Return what the model computes of a batch without its labels."""
        inputs = read_inputs(batch, self.model)
        host = self.host_batch.of(entries(batch))
        with known_attention(inputs, host, self.model) as ready:
            return self.model(**ready)

    @property
    def problem(self) -> Problem:
        """Kind of the labels.

        Raises:
            RuntimeError: before `configure_model` has made it.
        """
        if self._problem is None:
            raise RuntimeError("The task is made by configure_model(). The Trainer calls it.")
        return self._problem

    def targets(self, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs (N, labels) and labels of the targets of a batch.

        Args:
            output: result of `forward`.
            labels: the batch's labels.
        """
        return output, labels

    def labelled_outputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return outputs and labels of the targets of a batch that have a label."""
        output, labels = self.targets(self(batch), read_labels(batch))
        return self.problem.labelled(output, labels)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output, labels = self.targets(self(batch), read_labels(batch))
        if self.task_of_class is not None:
            output = only_own_task(output, labels, self.task_of_class)
        count = self.problem.count(labels, self.weights)
        loss = self.problem.loss(output, labels, count, self.weights)
        self._unlabelled.note(count)
        self.step_mean.note(count, {"train_loss": loss})
        return loss

    def on_train_epoch_end(self) -> None:
        if self._unlabelled.take():
            self.warn_unsupervised("batch")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        output, labels = self.targets(self(batch), read_labels(batch))
        self.score(output, labels, batch_size=len(read_labels(batch)))

    def score(self, output: Tensor, labels: Tensor, batch_size: int) -> None:
        """Update and log the loss and the metrics.

        Args:
            output: of the targets.
            labels: of the targets.
            batch_size: number of rows.
        """
        assert self.scores is not None
        assert self.labels_seen is not None
        problem = self.problem
        count = problem.count(labels, self.weights)
        self.mean_loss.update(problem.loss(output, labels, count, self.weights), weight=count)
        labels = problem.read_targets(labels)
        # Every process counts, since all of them sum the counts later.
        self.labels_seen.update(labels)
        output, labels = problem.labelled(output, labels)
        if len(labels):
            self.scores.update(output, labels)
        self.log("loss", self.mean_loss, batch_size=batch_size)
        for name, metric in self.scores.logged.items():
            self.log(name, metric, prog_bar=True, batch_size=batch_size)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Sequence[Any]:
        return self.problem.describe(self(batch), self.label_names)
