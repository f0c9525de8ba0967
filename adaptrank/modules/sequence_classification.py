"""Fine-tune an encoder with a fresh head on labelled texts or pairs of texts."""

from functools import cached_property
from typing import Any

from adaptrank.modules.classification_module import ClassificationModule
from adaptrank.modules.text_inputs import leave_out_unread_types, pad_as_tokenizer


class SequenceClassification(ClassificationModule):
    """A classifier over the whole text, or with one label a regression.

    The head is new and trains with the adapters. `problem` chooses several classes for each text,
    or numbers. F1 is that of class 1 for two classes, and the macro average for more.
    """

    auto_class = "AutoModelForSequenceClassification"

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the backbone, which makes token types only where the model reads them."""
        mapping = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"
        return leave_out_unread_types(super().tokenizer, self.source, mapping, self.loading)

    def load_backbone(self) -> Any:
        return pad_as_tokenizer(super().load_backbone(), self.tokenizer)
