"""Fine-tune an encoder with a fresh head to tag the words of sentences."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.modules.batch_keys import IGNORED, read_labels
from adaptrank.modules.entity_scores import EntityScores, has_entities
from adaptrank.modules.label_metrics import MetricPart
from adaptrank.modules.label_module import LabelModule
from adaptrank.modules.problems import DIGITS
from adaptrank.modules.text_inputs import leave_out_unread_types, pad_as_tokenizer

log = logging.getLogger("adaptrank")

WORD_KEYS = ("first_pieces", "tags", "tokens")
"""Keys of an evaluation batch that say where the words begin, their classes and their texts."""

ENTITY_METRICS = ("f1", "precision", "recall")
"""Metrics of whole entities, which are logged as entity_f1 and so on."""


class TokenClassification(LabelModule):
    """A classifier of words, such as for named entities or parts of speech.

    The head is new and trains with the adapters. A word is read at its first piece. The evaluation
    reports the loss and the `metrics` per word. Where names of classes tag entities (O, B-X, I-X),
    it also reports `entity_f1`, `entity_precision` and `entity_recall` of whole entities, by the
    rules of CoNLL for BIO (IOB2), IOB1, IOBES, BILOU and IO tags.
    """

    auto_class = "AutoModelForTokenClassification"
    # At the rate of other heads it learned less: docs/results/study_head_rate_tasks.md.
    studied_head = None
    metrics_shown: ClassVar = (
        *LabelModule.metrics_shown,
        *(f"entity_{name}" for name in ENTITY_METRICS),
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Scores of entities, if the names of the classes are known and tag some.
        self.entities: EntityScores | None = None
        self.entity_parts = nn.ModuleDict()

    # ---- building

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the backbone, which makes token types only where the model reads them."""
        mapping = "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING"
        return leave_out_unread_types(super().tokenizer, self.source, mapping, self.loading)

    def load_backbone(self) -> Any:
        return pad_as_tokenizer(super().load_backbone(), self.tokenizer)

    def configure_model(self) -> None:
        super().configure_model()
        names = self.label_names
        if self.entities is None and names is not None and has_entities(names):
            self.entities = EntityScores(names)
            for name in ENTITY_METRICS:
                self.entity_parts[f"entity_{name}"] = MetricPart(self.entities, name)

    def metrics_logged(self) -> Sequence[str]:
        return (*super().metrics_logged(), *self.entity_parts)

    # ---- steps

    def targets(self, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs (N, classes) and the labels (N,) of all pieces, or of all words."""
        if labels.shape != output.shape[:2]:
            raise UserError(
                f"TokenClassification needs a label for each piece, {tuple(output.shape[:2])}, and "
                f"got labels of shape {tuple(labels.shape)}. Use a data module such as "
                "TokenClassificationData, or the module SequenceClassification."
            )
        return output.flatten(0, 1), labels.flatten()

    def _words(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return the output of each word, (B, W, classes), and which have one, (B, W) or None.

        Without `first_pieces` in the batch, each piece is a word, and it is not known.
        """
        inputs = {key: value for key, value in batch.items() if key not in WORD_KEYS}
        output = self(inputs)
        first = batch.get("first_pieces")
        if first is None:
            return output, None
        index = first.clamp(min=0).unsqueeze(-1).expand(-1, -1, output.shape[-1])
        return output.gather(1, index), first >= 0

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        output, has_piece = self._words(batch)
        if has_piece is None or "tags" not in batch:
            labels = read_labels(batch)
        else:
            labels = batch["tags"].masked_fill(~has_piece, IGNORED)
        of_words, tags = self.targets(output, labels)
        self.score(of_words, tags, batch_size=len(labels))
        if self.entities is not None:
            self.entities.update(output.argmax(-1), labels)
            for name, part in self.entity_parts.items():
                assert isinstance(part, MetricPart)
                part.update()
                self.log(name, part, prog_bar=name == "entity_f1", batch_size=len(labels))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Return the tag of each word, and its probability. Both are None for a word without one.

        A word has none if it is beyond `max_length`.
        """
        output, has_piece = self._words(batch)
        probabilities, chosen = self.problem.probabilities(output).max(-1)
        if has_piece is None:
            mask = batch.get("attention_mask")
            has_piece = torch.ones_like(chosen) if mask is None else mask
        sentences = batch.get("tokens") or [None] * len(chosen)
        names = self.label_names
        predictions = []
        for row, (words, known) in enumerate(zip(sentences, has_piece.tolist(), strict=True)):
            count = len(known) if words is None else len(words)
            tags: list[Any] = [None] * count
            certainties: list[float | None] = [None] * count
            for k in range(count):
                if known[k]:
                    index = int(chosen[row, k])
                    tags[k] = index if names is None else names[index]
                    certainties[k] = round(float(probabilities[row, k]), DIGITS)
            texts = {} if words is None else {"tokens": words}
            predictions.append({**texts, "tags": tags, "probabilities": certainties})
        return predictions
