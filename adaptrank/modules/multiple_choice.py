"""Fine-tune an encoder with a fresh head to choose the right one of several texts."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from adaptrank._errors import UserError
from adaptrank.modules.adapted import AdaptedModule
from adaptrank.modules.batch_keys import (
    IGNORED,
    at_least_float32,
    count_supervised,
    entries,
    read_inputs,
    read_labels,
)
from adaptrank.modules.choice_scores import Choices
from adaptrank.modules.label_metrics import MetricEntry, MetricRequest, Scores, read_requests
from adaptrank.modules.label_module import fresh_heads
from adaptrank.modules.problems import DIGITS
from adaptrank.modules.text_inputs import leave_out_unread_types, pad_as_tokenizer
from adaptrank.modules.unlabelled_batches import UnlabelledBatches
from adaptrank.training.moving import to_device

CHOICE_KEYS = ("choice_mask", "choices")
"""Keys of a batch that the model does not read."""


class MultipleChoice(AdaptedModule):
    """A model that gives each choice of a question a score. The highest one is its answer.

    The loss is the cross entropy over the choices of a question. Rows may have different numbers of
    choices: a missing one is not computed, and has the probability 0. The head is new and trains
    with the adapters.

    The evaluation reports the loss and the `metrics`. `calibration_error` is the mean difference
    between the probability of the chosen answers and the share of them that is right, over 15 bins.

    Args:
        metrics: metrics beside the loss: names, or classes of torchmetrics by `class_path` with
            `init_args`, by default accuracy and calibration_error. To a class, each place in the
            list of choices is a class.
        kwargs: as in `AdaptedModule`.
    """

    auto_class = "AutoModelForMultipleChoice"
    metrics_shown: ClassVar = ("loss", *Choices.standard)

    def __init__(self, *args: Any, metrics: list[MetricEntry] | None = None, **kwargs: Any) -> None:
        requests = read_requests(metrics)
        super().__init__(*args, **kwargs)
        default = [MetricRequest(name) for name in Choices.default_metrics]
        self.metric_requests = default if requests is None else requests
        self.mean_loss = MeanMetric()
        self.choices = Choices(0)
        self.scores: Scores | None = None
        self.guessing = MeanMetric()
        self._unlabelled = UnlabelledBatches()

    # ---- building

    def configure_model(self) -> None:
        # Metrics that do not fit are refused before the backbone is loaded.
        self._make_scores()
        super().configure_model()

    def _make_scores(self) -> None:
        """Make the metrics, once, and again for data whose questions have more choices.

        Raises:
            UserError: if a metric does not fit, or needs the number of choices, which the data
                module does not say.
        """
        data = getattr(self._trainer, "datamodule", None)
        most = int(getattr(data, "num_choices", None) or 0)
        if self.scores is not None and most <= self.choices.labels:
            return
        if not most and not all(request.is_standard for request in self.metric_requests):
            if self._trainer is None or self._trainer.predicting:
                # Nothing is evaluated.
                return
            raise UserError(
                "How many choices has a question at most? A metric by its class has to know, and "
                "the data module does not say. Give it a property `num_choices`, or use the names "
                f"{', '.join(Choices.standard)}."
            )
        self.choices = Choices(most)
        self.scores = Scores(self.metric_requests, self.choices, None)

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the backbone, which makes token types only where the model reads them."""
        mapping = "MODEL_FOR_MULTIPLE_CHOICE_MAPPING"
        return leave_out_unread_types(super().tokenizer, self.source, mapping, self.loading)

    def load_backbone(self) -> Any:
        return pad_as_tokenizer(super().load_backbone(), self.tokenizer)

    def model_options(self) -> dict[str, Any]:
        return {**super().model_options(), "fresh_head": True}

    def heads(self, backbone: nn.Module) -> list[str]:
        return fresh_heads(backbone)

    def metrics_logged(self) -> Sequence[str]:
        assert self.scores is not None
        return ("loss", *self.scores.logged)

    def chance(self) -> dict[str, float]:
        """Return the loss of guessing, the mean of log(choices)."""
        return {"loss": float(self.guessing.compute())} if self.guessing.update_called else {}

    # ---- steps

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return the score of each choice, (B, C), and -inf where a row has fewer than C.

        Args:
            batch: inputs (B, C, L), and `choice_mask` (B, C), 0 where there is no choice. Without
                it each row has C choices.
        """
        batch = entries(batch)
        inputs = read_inputs(batch, self.model, CHOICE_KEYS)
        ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if ids is None or ids.dim() < 3:
            shape = None if ids is None else tuple(ids.shape)
            raise UserError(
                "MultipleChoice needs inputs of the shape (rows, choices, tokens), and got "
                f"{shape}. Use a data module such as MultipleChoiceData."
            )
        rows, most = ids.shape[:2]
        is_choice = self.host_batch.of(batch).get("choice_mask")
        if is_choice is None:
            is_choice = torch.ones(rows, most)
        index = to_device(is_choice.flatten().nonzero().squeeze(1), ids.device)
        # Each choice is a row of one choice, so that missing ones are not computed.
        given = {key: value.flatten(0, 1).index_select(0, index) for key, value in inputs.items()}
        logits = self.model(**{key: value.unsqueeze(1) for key, value in given.items()}).logits
        scores = at_least_float32(logits.flatten())
        return (
            scores.new_full((rows * most,), -torch.inf)
            .index_copy(0, index, scores)
            .view(rows, most)
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        labels = read_labels(batch)
        count = count_supervised(labels)
        loss = self.choices.loss(self(batch), labels, count)
        self._unlabelled.note(count)
        self.step_mean.note(count, {"train_loss": loss})
        return loss

    def on_train_epoch_end(self) -> None:
        if self._unlabelled.take():
            self.warn_unsupervised("batch")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        assert self.scores is not None
        scores, labels = self(batch), read_labels(batch)
        count = count_supervised(labels)
        self.mean_loss.update(self.choices.loss(scores, labels, count), weight=count)
        has_label = labels != IGNORED
        scores, labels = scores[has_label], labels[has_label]
        choices = torch.isfinite(scores).sum(-1)
        if len(labels):
            self.scores.update(scores, labels)
            self.guessing.update(choices.log())
        self.log("loss", self.mean_loss, batch_size=len(has_label))
        for name, metric in self.scores.logged.items():
            self.log(name, metric, prog_bar=True, batch_size=len(has_label))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        probabilities = self(batch).softmax(-1).tolist()
        mask = batch.get("choice_mask")
        counts = [len(row) for row in probabilities] if mask is None else mask.sum(-1).tolist()
        texts = batch.get("choices") or [None] * len(counts)
        predictions = []
        for row, count, choices in zip(probabilities, counts, texts, strict=True):
            kept = row[:count]
            label = kept.index(max(kept))
            named = {} if choices is None else {"choice": choices[label]}
            rounded = [round(value, DIGITS) for value in kept]
            predictions.append({"label": label, **named, "probabilities": rounded})
        return predictions
